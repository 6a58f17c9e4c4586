"""Options that several commands share, declared once.

Owns: names, spellings (llama.cpp's are accepted), ranges and help texts, and the two bundles
commands receive: `ModelOptions` and a dict of sampling values that were given. Must not know what
a command does with them. A value nobody gave stays None: the engine has the defaults.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.core import ParameterSource

import edgert
from edgert import BudgetError, InputError
from edgert.cli.progress import Progress

if TYPE_CHECKING:
    from edgert import Engine, Plan

__all__ = [
    "Budget",
    "ModelOptions",
    "SAMPLING",
    "checksum_option",
    "debug_options",
    "draft_option",
    "json_option",
    "load_options",
    "load_options_without_budget",
    "model_argument",
    "parse_budget",
    "sampling_options",
    "trace_option",
    "without_learning",
]

F = TypeVar("F", bound=Callable[..., Any])

_UNLIMITED = 2**60  # bytes; "as much as the whole model wants"


@dataclass(frozen=True, slots=True)
class Budget:
    """A memory budget as given: bytes, or a share of what the whole model needs in memory."""

    text: str
    nbytes: int | None
    percent: float | None = None

    def resolve(self, full_bytes: int) -> int:
        """The budget in bytes; `full_bytes` is what the model needs with all weights resident."""
        if self.nbytes is not None:
            return self.nbytes
        assert self.percent is not None
        return int(full_bytes * self.percent / 100)


def parse_budget(value: str) -> Budget:
    """A budget from `1.5GiB`, `600M`, or `50%` of what the model needs with all weights resident.

    Raises `InputError`.
    """
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value)
    if share:
        if not 0 < float(share[1]) <= 100:
            raise InputError(f"{value!r} is not a share between 0% and 100%")
        return Budget(value.strip(), None, float(share[1]))
    try:
        nbytes = edgert.parse_bytes(value)
    except InputError as error:
        raise InputError(f"{error}, or a share like 50%") from None
    if nbytes == 0:
        raise InputError("a memory budget of 0 bytes holds nothing")
    return Budget(value.strip(), nbytes)


class _Finite(click.FloatRange):
    """A range that refuses nan and inf, which compare as inside every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What decides how a model is loaded."""

    model: Path | None  # None: the bundled model
    memory_budget: Budget | None = None
    context_length: int | None = None
    threads: int | None = None
    kv_cache_type: str = "f16"
    quality_bits: int | str | None = None
    draft_model: Path | None = None
    verify_checksums: bool = False

    @property
    def path(self) -> Path:
        """The model's file. Raises `ModelError` when none was named and none is bundled."""
        return self.model if self.model is not None else edgert.bundled_model()

    def plan(self, budget: int | str | None = None) -> Plan:
        """The plan for these options, or for another budget; reads the header, no weight.

        Raises `BudgetError` below the floor.
        """
        chosen = {} if budget is None else {"memory_budget": budget}
        return edgert.plan_model(self.path, **self.for_plan() | chosen)

    def for_plan(self) -> dict[str, Any]:
        """The options that decide a plan, by their names in the API."""
        return {
            "memory_budget": self._budget,
            "context_length": self.context_length,
            "threads": self.threads,
            "kv_cache_type": self.kv_cache_type,
            "quality_bits": self.quality_bits,
            "verify_checksums": self.verify_checksums,
        }

    def full_and_floor(self) -> tuple[int, int]:
        """Bytes with all weights in memory, and the smallest budget that works."""
        try:
            plan = self.plan(_UNLIMITED)
        except BudgetError as error:  # a machine with less memory than the floor
            return error.need_bytes, error.need_bytes
        return plan.full_bytes, plan.floor_bytes

    @property
    def _budget(self) -> int | str | None:
        """The budget as the engine takes it; it knows the model a share refers to."""
        if self.memory_budget is None:
            return None
        exact = self.memory_budget.nbytes
        return self.memory_budget.text if exact is None else exact

    def load(self, progress: Progress, **more: Any) -> Engine:
        """Load the model; the caller closes the engine."""

        def show(what: str, done: int, total: int) -> None:
            progress.update(done, total, what)

        more = {"draft_model": self.draft_model, **self.for_plan(), **more}
        return edgert.load(self.path, on_progress=show, **more)


def _budget(context: click.Context, parameter: click.Parameter, value: str | None) -> Budget | None:
    try:
        return None if value is None else parse_budget(value)
    except InputError as error:
        raise click.BadParameter(str(error), context, parameter) from None


def _quality_bits(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> int | str | None:
    if value is None or value == "auto":
        return value
    if not value.isdecimal() or not 1 <= int(value) <= 8:
        raise click.BadParameter(f"{value!r} is not auto or 1 to 8", context, parameter)
    return int(value)


def _option(*names: str, **settings: Any) -> Callable[[F], F]:
    return click.option(*names, **settings)


# Name in the API -> option spellings, type and help. The REPL's `/set parameter` uses it too.
SAMPLING: dict[str, tuple[tuple[str, ...], click.ParamType[Any], str]] = {
    "max_tokens": (
        ("-n", "--max-tokens", "--n-predict"),
        click.IntRange(min=-1),
        "Stop after this many tokens; -1 is until the end of the text or of the context.",
    ),
    "temperature": (
        ("--temp", "--temperature"),
        _Finite(min=0),
        "Randomness; 0 takes the likeliest token.",
    ),
    "top_k": (("--top-k",), click.IntRange(min=0), "Keep the K likeliest tokens; 0 keeps all."),
    "top_p": (("--top-p",), _Finite(min=0, max=1), "Keep the likeliest tokens up to this sum."),
    "min_p": (("--min-p",), _Finite(min=0, max=1), "Drop tokens below this share of the best."),
    "repeat_penalty": (
        ("--repeat-penalty",),
        _Finite(min=0, min_open=True),
        "Divide the scores of recent tokens; 1 is off.",
    ),
    "repeat_last_n": (
        ("--repeat-last-n",),
        click.IntRange(min=-1),
        "How many tokens the penalty looks back; -1 is all.",
    ),
    "seed": (
        ("-s", "--seed"),
        click.IntRange(min=-1, max=2**63 - 1),
        "Seed of the sampler; -1 draws one, and the last line prints it.",
    ),
    "speculate": (
        ("--speculate/--no-speculate",),
        click.BOOL,
        "Guess tokens from the text so far, or with the top bits of a nested pack, and verify "
        "several in a pass, where that is faster; the same tokens either way. On by default.",
    ),
    "draft_max": (
        ("--draft-max", "--draft"),
        click.IntRange(0, 63),
        "Most tokens to guess at once; 15 by default, 0 is --no-speculate.",
    ),
}


def sampling_options(function: F) -> F:
    """Add the sampling options; the command gets those that were given as `sampling`."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in SAMPLING}
        sampling = {name: value for name, value in given.items() if value is not None}
        for name in ("max_tokens", "seed"):
            if sampling.get(name) == -1:
                del sampling[name]
        stop = kwargs.pop("stop")
        if stop:
            sampling["stop"] = list(stop)
        return function(*args, sampling=sampling, **kwargs)

    decorated: Any = _option(
        "-r",
        "--stop",
        "--reverse-prompt",
        "stop",
        multiple=True,
        metavar="TEXT",
        help="End the answer before this text; may be given several times.",
    )(wrapper)
    for name, (flags, kind, text) in reversed(SAMPLING.items()):
        decorated = _option(*flags, name, type=kind, default=None, help=text)(decorated)
    return cast(F, decorated)


def model_argument(function: F) -> F:
    """Add MODEL, also accepted as -m; the command gets `model`, None for the bundled one."""

    @functools.wraps(function)
    def wrapper(*args: Any, model_file: Path | None, model: Path | None, **kwargs: Any) -> Any:
        context = click.get_current_context()
        typed = context.get_parameter_source("model") is ParameterSource.COMMANDLINE
        if model_file is not None and model is not None and typed:
            raise click.UsageError(f"two models were given: {model_file} and {model} (-m)")
        return function(*args, model=model_file if model_file is not None else model, **kwargs)

    path: click.ParamType[Any] = click.Path(path_type=Path)
    with_option = _option(
        "-m",
        "--model",
        "model",
        type=path,
        metavar="FILE",
        help="The model's file, .gguf or .edgert, as an option; by default the bundled model.",
    )(wrapper)
    argument = click.argument("model_file", metavar="[MODEL]", required=False, type=path)
    return cast(F, argument(with_option))


def load_options(function: F) -> F:
    """Add MODEL and the options that decide the plan; the command gets them as `options`."""
    with_budget = _option(
        "-b",
        "--memory-budget",
        metavar="SIZE",
        callback=_budget,
        help="All the memory edgert may use: 1.5GiB, 600M, or 50% of what the whole model "
        "needs. By default what the machine has free, less a margin.",
    )(load_options_without_budget(function))
    return with_budget


def load_options_without_budget(function: F) -> F:
    """As `load_options` for a command that chooses the budgets itself."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        names = tuple(field.name for field in fields(ModelOptions))
        options = ModelOptions(**{name: kwargs.pop(name) for name in names if name in kwargs})
        return function(*args, options=options, **kwargs)

    decorated: Any = wrapper
    for option in (
        checksum_option,
        _option(
            "--quality-bits",
            metavar="BITS",
            callback=_quality_bits,
            help="Of a nested pack, use only these top bits (8: all): smaller, and lossy. auto: as "
            "many as fit without streaming.",
        ),
        _option(
            "-ctk",
            "--kv-cache-type",
            type=click.Choice(["f16", "f32"]),
            default="f16",
            show_default=True,
            help="Number format of the KV cache.",
        ),
        _option(
            "-t",
            "--threads",
            type=click.IntRange(1, 1024),
            help="Compute threads; by default one for each core the process may use.",
        ),
        _option(
            "-c",
            "--ctx-size",
            "context_length",
            type=click.IntRange(min=0),
            callback=lambda _context, _param, value: value or None,
            help="Tokens of context; 0 is the model's own length.",
        ),
        model_argument,
    ):
        decorated = option(decorated)
    return cast(F, decorated)


def draft_option(function: F) -> F:
    """Add --draft-model, below `load_options`: it becomes a part of `options`."""
    return _option(
        "-md",
        "--draft-model",
        "--model-draft",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="A smaller model with the same vocabulary that guesses tokens, where that is faster; "
        "the same tokens either way. It is in memory as a whole, inside the same budget.",
    )(function)


def checksum_option(function: F) -> F:
    """Add --verify-checksums."""
    return _option(
        "--verify-checksums",
        is_flag=True,
        help="Of an .edgert file, compare all that is read with its checksums.",
    )(function)


def trace_option(function: F) -> F:
    """Add --trace; the command gets `trace`, a path or None."""
    return _option(
        "--trace",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Write what happened when (reads, waits, every operation) as Chrome trace events, "
        "for ui.perfetto.dev; the newest 30 or so tokens of a large model.",
    )(function)


def json_option(function: F) -> F:
    """Add --json; the command gets `as_json`."""
    text = "Print one JSON object."
    return _option("--json", "as_json", is_flag=True, help=text)(function)


def debug_options(function: F) -> F:
    """Add --debug and -v; logging is set up here and nowhere else."""

    @functools.wraps(function)
    def wrapper(*args: Any, debug: bool, verbose: bool, **kwargs: Any) -> Any:
        if debug or verbose:
            level = logging.DEBUG if debug else logging.INFO
            logging.basicConfig(format="%(name)s: %(message)s")
            logging.getLogger("edgert").setLevel(level)
        return function(*args, **kwargs)

    with_verbose = _option("-v", "--verbose", is_flag=True, help="Log what happens, on stderr.")(
        wrapper
    )
    text = "Log more, and show tracebacks of errors."
    return cast(F, _option("--debug", is_flag=True, help=text)(with_verbose))


def without_learning() -> None:
    """Measure runs as the first ones, unless the user says otherwise: what was learnt of experts
    and drafts from the same text would flatter the next run of it."""
    os.environ.setdefault("EDGERT_EXPERT_PROFILE", "off")
    os.environ.setdefault("EDGERT_ACCEPTANCE", "off")
