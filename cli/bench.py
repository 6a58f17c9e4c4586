"""`edgert bench`: a model, the same model in llama.cpp, or the kernels alone.

Owns: the options. What is measured, and how, is in bench_model.py, bench_baseline.py and
bench_kernels.py.
"""

from __future__ import annotations

from typing import Any

import click

from edgert.cli.options import ModelOptions, debug_options, json_option, load_options
from edgert.cli.progress import Progress
from edgert.cli.report import print_json

__all__ = ["bench"]


def _counts(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """A list of positive numbers."""
    try:
        counts = tuple(int(part) for part in value.split(",") if part)
    except ValueError:
        counts = (0,)
    if not counts or min(counts) < 1:
        raise click.BadParameter(f"{value!r} is not a list like 1,2,4,8", context, parameter)
    return counts


@click.command()
@load_options
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of the prompt; by default 512, or what the context holds.",
)
@click.option(
    "--gen-tokens", type=click.IntRange(min=1), default=32, show_default=True, metavar="M",
    help="Tokens generated one by one.",
)  # fmt: skip
@click.option(
    "--batch",
    "batches",
    default="1,2,4,8",
    show_default=True,
    callback=_counts,
    metavar="LIST",
    help="Tokens computed in one pass behind a short context.",
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Measured runs; the rows give their medians.",
)
@click.option(
    "--baseline",
    type=click.Choice(["llamacpp"]),
    help="Measure llama.cpp on the same file too, turn by turn; needs llama-cpp-python.",
)
@click.option(
    "--baseline-python",
    metavar="PATH",
    help="The Python that has llama-cpp-python; by default the one that runs edgert.",
)
@json_option
@debug_options
def bench(
    options: ModelOptions,
    baseline: str | None,
    baseline_python: str | None,
    as_json: bool,
    **sizes: Any,
) -> None:
    """Measure prefill, decode and reading speed.

    Generation is greedy, so the hash of the logits is the same in every trial, for every budget
    and thread count.
    """
    from edgert.cli.bench_model import Sizes, bench_model, bench_text

    if baseline_python is not None and baseline is None:
        raise click.UsageError("--baseline-python needs --baseline llamacpp")
    with Progress() as progress:
        if baseline is None:
            found, text = bench_model(options, Sizes(**sizes), progress), bench_text
        else:
            from edgert.cli.bench_baseline import compare, comparison_text

            found = compare(options, Sizes(**sizes), baseline_python, progress)
            text = comparison_text
    if found is None:
        raise click.Abort
    if as_json:
        print_json(found)
    else:
        click.echo(text(found))
