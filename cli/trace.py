"""`edgert trace`: which experts a run chooses, in a file for `edgert simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgert import InputError, join_passes, write_routing
from edgert.cli.options import (
    ModelOptions,
    debug_options,
    json_option,
    load_options,
    sampling_options,
    without_learning,
)
from edgert.cli.progress import Progress
from edgert.cli.report import atomic_file, print_json

__all__ = ["trace"]


@click.command()
@load_options
@sampling_options
@click.option("-p", "--prompt", required=True, metavar="TEXT", help="The text to continue.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The .npz to write.",
)
@click.option(
    "--policy", default="auto", show_default=True, help="Evict by this policy of simulate."
)
@json_option
@debug_options
def trace(
    options: ModelOptions, sampling: dict[str, Any], prompt: str, out: Path, policy: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Record which experts a run chooses.

    The file holds `layers`, `experts`, `k`, `record_bytes`, `choices` int16 [tokens, layers, k] and
    `passes`, the number of tokens of each forward pass; where experts have several sizes also
    `record_sizes` [layers, experts]. The hit rate printed is the run's own, with
    an empty cache at its start; `edgert simulate` gives the same for its policy and slots.

    \b
    edgert trace model.gguf -b 2GiB -n 200 -p "Once upon a time" --out trace.npz
    edgert simulate trace.npz --budgets 25%,50%
    """
    without_learning()
    passes: list[Any] = []
    with Progress() as progress, options.load(progress) as engine:
        progress.close()
        if engine.experts is None:
            raise InputError(f"{engine.path.name} has no experts, so nothing is routed")
        engine.experts.set_policy(policy)
        engine.experts.set_prefetch(False)  # simulate knows policies alone
        engine.experts.record(passes.append)
        engine.generate(prompt, **{"max_tokens": 128, **sampling})
        engine.experts.record(None)
        hits, misses = engine.experts.counts
        plan, spec = engine.plan, engine.spec
    sizes = plan.expert_sizes
    each = None if sizes is None else sizes.records.reshape(spec.num_hidden_layers, -1)
    found = join_passes(passes, spec.num_experts, plan.expert_slot_bytes, each)
    with atomic_file(out) as stream:
        write_routing(stream, found)
    rate = hits / (hits + misses)
    if as_json:
        print_json(
            {
                "out": str(out), "tokens": found.tokens, "layers": found.layers,
                "experts": found.experts, "k": found.k, "slots": plan.expert_slots,
                "hits": hits, "misses": misses, "hit_rate": rate,
            }
        )  # fmt: skip
    else:
        click.echo(
            f"{found.tokens} tokens, {found.layers} layers, {found.k} of {found.experts} experts; "
            f"hit rate {100 * rate:.1f} % with {plan.expert_slots} slots"
        )
