"""`edgert stress`: the memory promise, judged from outside.

Owns: the options. What is tried is in stress_cases.py, how in stress_runs.py, what it says in
stress_report.py; stress_outcome.py leads from the first run to the exit code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

import edgert
from edgert import InputError
from edgert.cli.options import (
    checksum_option,
    debug_options,
    json_option,
    parse_budget,
    without_learning,
)
from edgert.cli.report import require_matplotlib
from edgert.cli.stress_faults import FAULTS

__all__ = ["stress"]

T = TypeVar("T")


def _listed(
    read: Callable[[str], T],
) -> Callable[[click.Context, click.Parameter, str], tuple[T, ...]]:
    """A callback for values with commas between."""

    def callback(context: click.Context, parameter: click.Parameter, text: str) -> tuple[T, ...]:
        try:
            return tuple(read(part.strip()) for part in text.split(","))
        except InputError as error:
            raise click.BadParameter(str(error), context, parameter) from None

    return callback


def _number(text: str, *, least: int, most: int = 2**31) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise InputError(f"{text!r} is not a whole number from {least} on")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError(f"{text!r} is not a number from 0 on")
    return value


def _one_of(text: str, *, names: Sequence[str]) -> str:
    if text not in names:
        raise InputError(f"{text!r} is none of {', '.join(names)}")
    return text


def _rate(context: click.Context, parameter: click.Parameter, text: str) -> int:
    try:
        return edgert.parse_bytes(text)
    except InputError as error:
        raise click.BadParameter(str(error), context, parameter) from None


def _sweep_options(function: Callable[..., None]) -> Callable[..., None]:
    """What is combined; each a list with commas."""
    for option in (
        click.option(
            "--budgets", default="100%,50%,25%", show_default=True, metavar="LIST",
            callback=_listed(parse_budget),
            help="Sizes, or shares of what the whole model needs. A share below the smallest "
            "budget that works is raised to it and marked.",
        ),
        click.option(
            "-c", "--ctx-size", "--ctx-sizes", "contexts", default="0", metavar="LIST",
            callback=_listed(partial(_number, least=0)),
            help="Tokens of context; 0 (default) is what prompt and answer need.",
        ),
        click.option(
            "--prompt-tokens", "prompts", default="4", show_default=True, metavar="LIST",
            callback=_listed(partial(_number, least=1)),
            help="Lengths of the prompt.",
        ),
        click.option(
            "-t", "--threads", default="0", metavar="LIST",
            callback=_listed(partial(_number, least=0, most=1024)),
            help="Compute threads; 0 (default) is one for each core.",
        ),
        click.option(
            "-ctk", "--kv-cache-type", "--kv-cache-types", "kv_types", default="f16",
            show_default=True, metavar="LIST",
            callback=_listed(partial(_one_of, names=("f16", "f32"))),
            help="Number formats of the KV cache, f16 or f32.",
        ),
        click.option(
            "--temp", "--temperature", "temperatures", default="0", show_default=True,
            metavar="LIST", callback=_listed(_temperature),
            help="Temperatures of sampling; 0 takes the likeliest token.",
        ),
        click.option(
            "--fault", "faults", default="none", metavar="LIST",
            callback=_listed(partial(_one_of, names=(*FAULTS, "none"))),
            help="Disks that are slow, stutter, fail once (eio, eio-load) or deliver less than "
            "asked (short), or none. Must end in equal output or a clean error.",
        ),
        click.option(
            "--runs", type=click.IntRange(min=1), metavar="N",
            help="Try N combinations, drawn the same way each time, instead of all of them.",
        ),
        click.option(
            "--turns", type=click.IntRange(min=1), default=1, metavar="N",
            help="Make all runs N times, every second time backwards, and give medians, and "
            "ratios to the first: how speeds compare where disk and memory change.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def _output_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--report", type=click.Path(path_type=Path), metavar="FILE",
            help="Write a report, Markdown or (.html) HTML with pictures.",
        ),
        click.option(
            "--plot", type=click.Path(path_type=Path),
            help="Write a PNG of speed and peak by budget.",
        ),
        json_option,
        debug_options,
    ):  # fmt: skip
        function = option(function)
    return function


@click.command()
@click.argument("model_files", metavar="[MODEL]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-m", "--model", type=click.Path(path_type=Path), metavar="FILE",
    help="A model's GGUF file, as an option; the bundled model when none is named.",
)  # fmt: skip
@_sweep_options
@click.option(
    "-n", "--max-tokens", "--n-predict", type=click.IntRange(min=1), default=16, show_default=True,
    help="Tokens to generate in each run. What does not fit the context is generated from new "
    "prompts in the same process; from 2560 on, growth of its memory is judged.",
)  # fmt: skip
@click.option(
    "--disk-rate", default="0", metavar="SIZE", callback=_rate,
    help="Let the disk be read at no more than this a second, such as 1000MB; 0: its own rate.",
)  # fmt: skip
@click.option(
    "-s", "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True,
    help="Seed of all sampling.",
)  # fmt: skip
@click.option(
    "--speculate", is_flag=True,
    help="Let runs guess tokens, as edgert run does; what they are compared with does not.",
)  # fmt: skip
@checksum_option
@click.option("--live", is_flag=True, help="Change the budget while generating: 50 % and back.")
@click.option(
    "--engines", type=click.IntRange(1, 16), default=1, show_default=True,
    help="Engines in each process, which share the budget and generate at once.",
)  # fmt: skip
@click.option(
    "--baseline", type=click.Choice(["llamacpp"]),
    help="Also run llama.cpp (mmap) in such groups and give the ratios.",
)  # fmt: skip
@click.option("--baseline-python", metavar="PYTHON", help="The Python that has llama-cpp-python.")
@click.option(
    "--baseline-model", type=click.Path(path_type=Path), metavar="FILE",
    help="The GGUF that llama.cpp runs, where edgert runs a pack of it.",
)  # fmt: skip
@click.option(
    "--time-limit", type=click.IntRange(min=1), default=600, show_default=True, metavar="SECONDS",
    help="End a run that takes longer.",
)  # fmt: skip
@_output_options
def stress(
    model_files: tuple[Path, ...],
    model: Path | None,
    contexts: tuple[int, ...],
    kv_types: tuple[str, ...],
    faults: tuple[str, ...],
    runs: int | None,
    turns: int,
    report: Path | None,
    plot: Path | None,
    as_json: bool,
    time_limit: int,
    baseline: str | None,
    baseline_python: str | None,
    baseline_model: Path | None,
    **sweep: Any,
) -> None:
    """Run under real memory limits and compare.

    Every run has a process and a control group of its own, with a limit of exactly its budget.
    Each must end well, stay below the limit, and give the tokens and the hash of the logits that
    a run with all weights in memory gives. The options with lists are combined.

    \b
    edgert stress                               a quick check, bundled model
    edgert stress A.gguf B.gguf --runs 200 ...  many runs (README.md has them)
    edgert stress A.edgert --speculate -n 64    a nested pack drafting for itself
    edgert stress A.gguf --disk-rate 1000MB --baseline llamacpp
    edgert stress A.gguf A.edgert --budgets 60% --turns 5

    The verdict is the first line of the output. Exit code 6: a run needed more than its budget;
    1: something else went wrong. Without control groups memory is sampled, and the verdict says so.
    """
    from edgert.cli.stress_baseline import LlamaCpp
    from edgert.cli.stress_cases import Sweep, all_cases, choose, with_references
    from edgert.cli.stress_outcome import Outputs, compare, judge, sigterm_as_interrupt
    from edgert.cli.stress_turns import in_turns
    from edgert.cli.warmup import compile_kernels

    without_learning()
    if plot is not None:
        require_matplotlib()
    if model_files and model is not None and _typed("model"):
        raise click.UsageError(f"models were given twice: {model_files[0]} and {model} (-m)")
    models = model_files or ((model,) if model is not None else (edgert.bundled_model(),))
    wanted = Sweep(
        models, contexts=contexts, kv_cache_types=kv_types,
        faults=tuple("" if fault == "none" else fault for fault in faults), **sweep,
    )  # fmt: skip
    cases = all_cases(wanted)
    cases = in_turns(choose(cases, runs) if runs else cases, turns)
    for file in models:  # a compiler needs more than small groups allow: 220 MiB
        compile_kernels(file)
    out = Outputs(report, plot, as_json)
    with sigterm_as_interrupt():
        if baseline is not None:
            compare(cases, LlamaCpp(baseline_python, baseline_model), time_limit, out)
        else:
            judge(with_references(cases), time_limit, out, cases if turns > 1 else ())


def _typed(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE
