"""`edgert plan`: where every byte of a memory budget goes, and how fast that will be."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import edgert
from edgert import BudgetError, format_bytes
from edgert.cli.options import (
    ModelOptions,
    debug_options,
    draft_option,
    json_option,
    load_options,
)
from edgert.cli.progress import Progress
from edgert.cli.report import atomic_file, note, print_json, require_matplotlib, table

if TYPE_CHECKING:
    from edgert import Forecast

__all__ = ["forecast_text", "plan"]


@click.command()
@load_options
@draft_option
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Write a PNG of predicted speed by budget."
)
@json_option
@debug_options
def plan(options: ModelOptions, plot: Path | None, as_json: bool) -> None:
    """Show where every byte of a memory budget goes, and how fast that will be.

    Only the header of the file is read. The first time on a machine and disk, reading, memory and
    kernels are measured for some seconds; the figures are kept. Of a mixture of experts the hit
    rate comes from a profile that runs of the model leave, if there is one. A budget that cannot
    work ends with exit code 5 and the smallest budget that does.
    """
    if plot is not None:
        require_matplotlib()
    try:
        found = _forecast(options)
    except BudgetError as error:
        if as_json:
            print_json(
                {
                    "feasible": False,
                    "budget_bytes": error.budget_bytes,
                    "floor_bytes": error.need_bytes,
                }
            )
        elif error.table:
            click.echo(error.table)
        # The table is on stdout now; the message alone follows on stderr.
        error.args = (str(error).partition("\n\n")[0],)
        raise
    if plot is not None:
        _plot(plot, options.path.name, found)
    if as_json:
        print_json({"feasible": True, **found.plan.to_dict(), **found.to_dict()})
    else:
        click.echo(forecast_text(found))


def _forecast(options: ModelOptions) -> Forecast:
    told = False
    with Progress() as progress:

        def show(what: str, done: int, total: int) -> None:
            nonlocal told
            if not told and what.startswith("measuring"):
                told = True
                progress.close()
                note(f"{what}: once, some seconds")
            elif not told:
                progress.update(done, total, what)

        found = edgert.forecast(
            options.path, draft_model=options.draft_model, on_progress=show, **options.for_plan()
        )
    if not found.profile_kept:
        logging.getLogger("edgert").debug(
            "the cache folder cannot be written: the machine is measured each time"
        )
    return found


def forecast_text(found: Forecast) -> str:
    """The regions, the speed to expect, and the curve over budgets."""
    plan, guess = found.plan, found.prediction
    share = 100 * plan.resident_bytes / plan.budget_bytes
    about = "about " if guess.even_routing else ""
    read = f"{format_bytes(plan.streamed_bytes)} read in every pass"
    if plan.expert_slots and guess.hit_rate != 1:
        read = "missing experts are read as they are chosen"
    limit: str = guess.limit
    if limit == "flash":
        limit += f" at {guess.device_bytes_per_s / 1e9:.2f} GB/s"
    lines = [
        plan.table(),
        "",
        f"weights  {format_bytes(plan.resident_bytes)} resident, {share:.0f} % of the budget; "
        f"{read}",
        f"prefill  {about}{guess.prefill_tok_s:.4g} tok/s, {guess.prompt_tokens} tokens in "
        f"{guess.first_token_seconds:.2g} s",
        f"decode   {about}{guess.decode_tok_s:.3g} tok/s, limited by {limit}",
        *_draft_model(found),
        *_drafting(found),
        *_routing_lines(found),
        "",
    ]
    drafts = any(point.draft_tok_s for point in found.curve)
    header = ["budget", "resident", "read a pass", "prefill tok/s", "decode tok/s", "limit"]
    header += ["with drafts"] if drafts else []
    rows = [_row(point, drafts) for point in found.curve]
    return "\n".join(lines) + "\n" + table(header, rows)


def _draft_model(found: Forecast) -> list[str]:
    """What a draft model takes. (How often it will be right, only running it tells.)"""
    nbytes = found.draft_model_bytes
    return [f"draft    its model takes {format_bytes(nbytes)} of the process"] if nbytes else []


def _drafting(found: Forecast) -> list[str]:
    """What the model's own drafts will do."""
    drafts = found.drafting
    if drafts is None:
        return []
    how = "learnt of this model" if drafts.is_learnt else "assumed until it has drafted"
    gain = drafts.decode_tok_s / found.prediction.decode_tok_s
    return [
        f"drafts   {drafts.decode_tok_s:.3g} tok/s, {gain:.1f} times as fast: "
        f"{drafts.tokens_per_pass:.1f} tokens from a pass of {drafts.pass_seconds:.2g} s, before "
        f"{100 * drafts.ready_share:.0f} % of which",
        f"         drafts are ready, if {100 * drafts.acceptance:.0f} % of them are right ({how})",
    ]


def _routing_lines(found: Forecast) -> list[str]:
    """What the speed of a model with experts was predicted from."""
    guess, known = found.prediction, found.routing
    if guess.hit_rate is None:
        return []
    rate = f"experts  {100 * guess.hit_rate:.0f} % of those a token uses are in memory"
    if guess.even_routing:
        return [
            f"{rate}: no profile of this model, so all are taken as equally likely;",
            "         a run of it keeps one",
        ]
    if known is None or guess.hit_rate == 1:
        return [rate]
    return [f"{rate}, by the routing of {known.tokens:.0f} tokens of earlier runs"]


def _row(point: Any, drafts: bool) -> tuple[str, ...]:
    more = (f"{point.draft_tok_s:.3g}" if point.draft_tok_s else "-",) if drafts else ()
    return (
        format_bytes(point.budget_bytes),
        format_bytes(point.resident_bytes),
        format_bytes(point.streamed_bytes),
        f"{point.prefill_tok_s:.4g}",
        f"{point.decode_tok_s:.3g}",
        point.limit,
        *more,
    )


def _plot(path: Path, title: str, found: Forecast) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = [point.budget_bytes / 2**20 for point in found.curve]
    figure, decode = pyplot.subplots(figsize=(7, 4), layout="constrained")
    decode.plot(budgets, [p.decode_tok_s for p in found.curve], "o-", color="tab:blue")
    decode.axvline(found.plan.budget_bytes / 2**20, color="gray", linestyle=":")
    decode.set(xlabel="memory budget (MiB)", title=f"{title}, predicted", ylim=(0, None))
    decode.set_ylabel("decode (tokens/s)", color="tab:blue")
    prefill = decode.twinx()
    prefill.plot(budgets, [p.prefill_tok_s for p in found.curve], "s-", color="tab:red")
    prefill.set(ylim=(0, None))
    prefill.set_ylabel("prefill (tokens/s)", color="tab:red")
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=150)
    pyplot.close(figure)
