"""`edgert simulate`: hit rates of expert caches on recorded routing, beside the optimum."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgert import (
    InputError,
    ModelError,
    parse_bytes,
    read_expert_profile,
    read_routing,
    synthetic_routing,
    tune_policy,
)
from edgert import simulate as simulate_trace
from edgert.cli.options import debug_options, json_option
from edgert.cli.progress import Progress
from edgert.cli.report import atomic_file, print_json, require_matplotlib, table

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgert import Figure, Routing, Trial

__all__ = ["simulate"]

_POLICIES = "lru,lfu,lfu-decay,auto,belady"


@click.command()
@click.argument("file", metavar="[TRACE]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--budgets",
    default="25%,50%,75%",
    show_default=True,
    metavar="LIST",
    help="Memory for experts, with commas between: 1GiB, or 25% of all experts.",
)
@click.option("--slots", metavar="LIST", help="Instead: experts kept, over all layers.")
@click.option(
    "--policies",
    default=_POLICIES,
    show_default=True,
    metavar="LIST",
    help="Also partition, pinned, robust. auto is the engine's choice. With +last or "
    "+transitions: experts are read ahead by such guesses, all in time.",
)
@click.option("--per-layer", is_flag=True, help="A cache for each layer, of slots / layers.")
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="A trace of earlier runs, or the profile they left: requests then begin with its hottest.",
)
@click.option("--array", metavar="NAME", help="Which array of a foreign .npz is the trace.")
@click.option(
    "--experts", type=click.IntRange(1, 1 << 15), help="Experts of a layer, in a foreign .npz."
)
@click.option("--record-bytes", metavar="SIZE", help="Size of one expert, for budgets in bytes.")
@click.option("--synthetic", metavar="KIND", help="No TRACE: random, skewed or drifting routing.")
@click.option("--tune", "tuning", is_flag=True, help="Tune on half of the requests, test on half.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a PNG of the table.")
@json_option
@debug_options
def simulate(
    file: Path | None, budgets: str, slots: str | None, policies: str, per_layer: bool,
    profile: Path | None, array: str | None, experts: int | None, record_bytes: str | None,
    synthetic: str | None, tuning: bool, plot: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Replay recorded routing with caches of other sizes and policies.

    TRACE is a file of `edgert trace`, or an .npz with arrays of integers [tokens, layers, k], each
    one request ([tokens, requests, layers, k]: several). Every request begins with an empty cache;
    rates are means over requests. Belady evicts what is used again last: no policy does better.
    With --tune the parameters of auto are chosen on every other request and tried on the rest (one
    request: its halves), and the other way round, beside auto as it is.

    \b
    edgert simulate trace.npz --budgets 1GiB,2GiB
    edgert simulate trace.npz --slots 64,128 --policies lru,robust,belady --json
    edgert simulate --synthetic drifting --tune
    """
    if (file is None) == (synthetic is None):
        raise click.UsageError("give a TRACE, or --synthetic instead of one")
    if plot is not None:
        require_matplotlib()
    if synthetic is not None:
        trace = synthetic_routing(synthetic)
    else:
        assert file is not None
        trace = read_routing(file, array=array, experts=experts)
    known, loaded = None, False
    if profile is not None:
        known, loaded = _uses(profile, array, trace.experts)
    if record_bytes is not None:
        trace = replace(trace, record_bytes=parse_bytes(record_bytes), record_sizes=None)
    counts = _counts(slots) if slots else _slots_of(budgets, trace, per_layer)
    names = [name.strip() for name in policies.split(",") if name.strip()]
    if tuning:
        with Progress() as progress:
            trials = tune_policy(
                trace, counts, per_layer=per_layer,
                progress=lambda done, total: progress.update(done, total, "tune"),
            )  # fmt: skip
        if as_json:
            print_json({"trials": [{n: getattr(t, n) for n in t.__slots__} for t in trials]})
        else:
            click.echo(_trials_text(trials))
        return
    with Progress() as progress:
        figures = simulate_trace(
            trace, counts, names, per_layer=per_layer, profile=known, loaded=loaded,
            progress=lambda done, total: progress.update(done, total, "simulate"),
        )  # fmt: skip
    if plot is not None:
        _plot(plot, synthetic or str(file), figures)
    if as_json:
        rows = [{name: getattr(f, name) for name in f.__slots__} for f in figures]
        print_json(
            {
                "layers": trace.layers, "experts": trace.experts, "k": trace.k,
                "tokens": trace.tokens, "requests": len(trace.requests), "figures": rows,
            }
        )  # fmt: skip
    else:
        click.echo(_text(trace, figures, names))


def _uses(path: Path, array: str | None, experts: int) -> tuple[npt.NDArray[np.float64], bool]:
    """How often each expert was used, and whether an engine would begin with them loaded."""
    try:
        return read_expert_profile(path).uses.astype(float), True
    except ModelError:
        return read_routing(path, array=array, experts=experts).uses(), False


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{text!r} is no list of slots; write one like 64,128") from None
    return counts


def _slots_of(text: str, trace: Routing, per_layer: bool) -> list[int]:
    """Slots for each budget; whole layers' worth with `per_layer`."""
    every = trace.layers * trace.experts
    counts = []
    for part in (part.strip() for part in text.split(",")):
        if part.endswith("%"):
            try:
                share = float(part[:-1]) / 100
            except ValueError:
                share = -1.0
            if not 0 < share <= 1:
                raise InputError(f"{part!r} is no share of the experts; give 1% to 100%")
            count = int(share * every)
        elif trace.record_bytes < 1 and trace.record_sizes is None:
            raise InputError(
                f"how many experts fit in {part} is not known: this trace has no size of an "
                "expert; give --record-bytes, --slots, or a share like 25%"
            )
        else:
            count = trace.slots_within(parse_bytes(part))
        counts.append(count - count % trace.layers if per_layer else count)
    return counts


def _text(trace: Routing, figures: list[Figure], names: list[str]) -> str:
    """Hit rates in per cent: a row for each number of slots, a column for each policy."""
    rows = []
    for at in range(0, len(figures), len(names)):
        row = figures[at : at + len(names)]
        below = " (below a token)" if row[0].below_working_set else ""
        rates = [
            f"{100 * f.hit_rate:.1f}" + (f" ({f.wasted_per_token:.1f})" if "+" in f.policy else "")
            for f in row
        ]
        chosen = [f.chosen for f in row if f.policy == "auto"][:1]
        rows.append([f"{row[0].slots}{below}", f"{100 * row[0].share:.0f}", *rates, *chosen])
    header = ["slots", "% of experts", *names, *(["auto is"] if "auto" in names else [])]
    return (
        f"{trace.tokens} tokens in {len(trace.requests)} requests, {trace.layers} layers, "
        f"{trace.k} of {trace.experts} experts; hit rates in %"
        + (" (experts a token read ahead for nothing)" if any("+" in n for n in names) else "")
        + f"\n\n{table(header, rows)}"
    )


def _trials_text(trials: list[Trial]) -> str:
    """Hit rates in per cent on what was not tuned on."""
    rows = [
        [
            t.tuned_on, str(t.slots),
            *(f"{100 * rate:.1f}" for rate in (t.lru, t.lfu, t.usual, t.tuned, t.belady)),
            f"{t.half_life:g}, {t.doubt:g}",
        ]
        for t in trials
    ]  # fmt: skip
    header = ["tuned on", "slots", "lru", "lfu", "auto", "auto tuned", "belady", "life, doubt"]
    return f"hit rates in % on the half that nothing was tuned on\n\n{table(header, rows)}"


def _plot(path: Path, title: str, figures: list[Figure]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name in dict.fromkeys(f.policy for f in figures):
        points = sorted((100 * f.share, 100 * f.hit_rate) for f in figures if f.policy == name)
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel="experts kept (%)", ylabel="hit rate (%)", title=title, ylim=(0, None))
    axes.legend()
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=150)
    pyplot.close(figure)
