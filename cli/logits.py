"""`edgert logits`: the raw scores of a list of tokens, to compare with anything else."""

from __future__ import annotations

from pathlib import Path

import click

import edgert
from edgert import InputError
from edgert.cli.options import ModelOptions, debug_options, json_option, load_options
from edgert.cli.progress import Progress
from edgert.cli.report import atomic_file, print_json

__all__ = ["logits"]


@click.command()
@load_options
@click.option("--tokens", required=True, metavar="1,2,3", help="Token ids, with commas between.")
@click.option("--out", type=click.Path(path_type=Path), help="File for the float32 array (.npy).")
@click.option(
    "--prefill-tokens",
    type=click.IntRange(min=1),
    help="Compute this many tokens in one pass; never changes a bit of the result.",
)
@json_option
@debug_options
def logits(
    options: ModelOptions, tokens: str, out: Path | None, prefill_tokens: int | None, as_json: bool
) -> None:
    """Save the logits of a list of tokens and print their hash.

    The array is float32 [n_tokens, n_vocab]. The hash is the same for every budget, thread count
    and chunk size.
    """
    import numpy as np

    ids = _token_ids(tokens)
    more = {} if prefill_tokens is None else {"prefill_tokens": prefill_tokens}
    with Progress() as progress, options.load(progress, **more) as engine:
        progress.close()
        scores = engine.logits(ids)
        plan, peak = engine.plan, engine.memory().peak_bytes
    digest = edgert.logits_hash(scores)
    if out is not None:
        with atomic_file(out) as stream:
            np.save(stream, scores)
    if as_json:
        print_json(
            {
                "logits_hash": digest,
                "shape": list(scores.shape),
                "out": None if out is None else str(out),
                "budget_bytes": plan.budget_bytes,
                "threads": plan.threads,
                "prefill_tokens": plan.prefill_tokens,
                "peak_bytes": peak,
            }
        )
    else:
        click.echo(digest)


def _token_ids(text: str) -> list[int]:
    try:
        ids = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"{text!r} is not a list of token ids; write one like 1,2,3") from None
    if not ids:
        raise InputError("the list of tokens is empty")
    return ids
