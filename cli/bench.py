"""`edgert bench`: a model, the same model in llama.cpp, or the kernels alone.

Owns: the options. What is measured, and how, is in bench_model.py, bench_baseline.py,
bench_speculation.py and bench_kernels.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from edgert.cli.options import (
    ModelOptions,
    debug_options,
    draft_option,
    json_option,
    load_options,
    trace_option,
    without_learning,
)
from edgert.cli.progress import Progress
from edgert.cli.report import print_csv, print_json
from edgert.cli.timeline import recorded

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


def _model_was_typed() -> bool:
    """True when the model is on the command line, not only in EDGERT_MODEL."""
    source = click.get_current_context().get_parameter_source
    return ParameterSource.COMMANDLINE in (source("model"), source("model_file"))


@click.command()
@load_options
@draft_option
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
@click.option(
    "--baseline-model",
    type=click.Path(path_type=Path),
    metavar="GGUF",
    help="Another file for llama.cpp, of the same shape; it cannot read an .edgert file.",
)
@click.option(
    "--kernels",
    is_flag=True,
    help="Measure the matrix kernels instead of a model, against the limits of the machine.",
)
@click.option(
    "--formats",
    metavar="LIST",
    help="Number formats for --kernels, like Q4_0,P3_128; by default those of GGUF.",
)
@click.option(
    "--attention",
    is_flag=True,
    help="Measure attention by context length instead of a model.",
)
@click.option(
    "--speculate",
    is_flag=True,
    help="Measure decoding with guessed tokens and without, turn by turn.",
)
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The text that --speculate continues; by default one that repeats, and one that does not.",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values.")
@trace_option
@json_option
@debug_options
def bench(
    options: ModelOptions,
    baseline: str | None,
    baseline_python: str | None,
    baseline_model: Path | None,
    kernels: bool,
    attention: bool,
    formats: str | None,
    speculate: bool,
    prompt_file: Path | None,
    as_csv: bool,
    as_json: bool,
    trace: Path | None,
    **sizes: Any,
) -> None:
    """Measure prefill, decode and reading speed.

    Generation is greedy, so the hash of the logits is the same in every trial, for every budget
    and thread count. --baseline measures llama.cpp beside edgert, --kernels and --attention parts
    of edgert against the limits of the machine.
    """
    _refuse_combinations(click.get_current_context().params)
    without_learning()
    with Progress() as progress:
        if kernels:
            from edgert.cli.bench_kernels import bench_kernels, kernels_text

            names = formats.split(",") if formats else None
            found = bench_kernels(names, options.threads, sizes["trials"], progress)
            rows, text = found["kernels"], kernels_text
        elif attention:
            from edgert.cli.bench_kernels import attention_text, bench_attention

            kind = options.kv_cache_type
            found = bench_attention(kind, options.threads, sizes["trials"], progress)
            rows, text = found["kernels"], attention_text
        elif baseline is not None:
            from edgert.cli.bench_baseline import compare, comparison_text
            from edgert.cli.bench_model import Sizes

            found = compare(options, Sizes(**sizes), baseline_python, baseline_model, progress)
            rows, text = found["rows"], comparison_text
        elif speculate:
            from edgert.cli.bench_model import Sizes
            from edgert.cli.bench_speculation import bench_speculation, speculation_text

            found = bench_speculation(options, Sizes(**sizes), prompt_file, progress)
            rows, text = found["rows"], speculation_text
        else:
            from edgert.cli.bench_model import Sizes, bench_model, model_text

            with recorded(trace) as timeline:
                found = bench_model(options, Sizes(**sizes), progress, timeline)
            rows, text = [found], model_text
    if as_csv:
        print_csv(rows)
    elif as_json:
        print_json(found)
    else:
        click.echo(text(found))


def _refuse_combinations(given: dict[str, Any]) -> None:
    """Say which options do not go together. Raises `click.UsageError`."""
    parts = given["kernels"] or given["attention"]
    for name in ("python", "model"):
        if given[f"baseline_{name}"] is not None and given["baseline"] is None:
            raise click.UsageError(f"--baseline-{name} needs --baseline llamacpp")
    kinds = (given["kernels"], given["attention"], given["speculate"], given["baseline"])
    if sum(map(bool, kinds)) > 1:
        raise click.UsageError("give one of --kernels, --attention, --baseline and --speculate")
    if given["prompt_file"] is not None and not given["speculate"]:
        raise click.UsageError("--prompt-file needs --speculate")
    if given["draft_model"] is not None and not given["speculate"]:
        raise click.UsageError("--draft-model needs --speculate")
    if parts and _model_was_typed():
        raise click.UsageError("--kernels and --attention measure without a model")
    if given["formats"] is not None and not given["kernels"]:
        raise click.UsageError("--formats needs --kernels")
    if given["trace"] is not None and (parts or given["baseline"] is not None):
        raise click.UsageError("--trace records a model: without --kernels and the like")
    if given["as_csv"] and given["as_json"]:
        raise click.UsageError("give --csv or --json, not both")
