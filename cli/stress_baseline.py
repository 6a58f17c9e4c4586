"""`edgert stress --baseline`: edgert and llama.cpp in groups with the same limits, in turn.

Owns: what both are asked, the time limit, the ratios. How an engine is driven is in
bench_baseline.py. llama.cpp maps the file, its repacking off, because repacked weights can not be
dropped from memory and do not fit: in a limit below the file's size every token reads it anew. A
few tokens may take minutes, so each side has a time limit.

Each is given a prompt, then another one, and then generates behind that, as in a conversation: what
either keeps in memory then is what it kept of text. The first prompt meets what loading left there.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event, Timer
from typing import Any

import edgert
from edgert import EdgertError, InputError, format_bytes
from edgert.cli.bench_baseline import EngineWorker, worker_commands
from edgert.cli.bench_model import some_text
from edgert.cli.cgroup import drop_page_cache
from edgert.cli.options import Budget, ModelOptions
from edgert.cli.stress_cases import Case
from edgert.cli.stress_runs import open_group, probe_disk, run_case

__all__ = [
    "BASELINE_HEADER", "Comparison", "LlamaCpp", "baseline_rows", "compare_case", "ratio_line",
]  # fmt: skip

_SIDES = ("llama.cpp", "edgert")
_FIGURES = ("decode", "prefill", "first_prefill")
_STEADY = 4  # tokens of llama.cpp where edgert guesses: each costs it the same


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """What it is run with."""

    python: str | None = None  # the interpreter that has it; None: this one
    model: Path | None = None  # None: the model of the case


@dataclass(slots=True)
class Side:
    """One engine in its group."""

    decode_tok_s: float = 0.0  # behind the second prompt; 0: it did not come so far
    prefill_tok_s: float = 0.0  # of the second prompt
    first_prefill_tok_s: float = 0.0
    peak_bytes: int = 0
    device_bytes_per_s: float = 0.0
    message: str = ""  # why not
    top: list[int] = field(default_factory=list)  # likeliest next token after each request


@dataclass(slots=True)
class Comparison:
    """Both engines on one case."""

    case: Case
    sides: dict[str, Side]

    def ratio(self, figure: str) -> float | None:
        """Speed of edgert over that of llama.cpp; None where either has none."""
        ours, theirs = (getattr(self.sides[name], figure) for name in ("edgert", "llama.cpp"))
        return ours / theirs if ours and theirs else None

    @property
    def over(self) -> bool:
        """True when edgert needed all of its limit."""
        return self.sides["edgert"].peak_bytes >= self.case.budget_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        ratios = {f: self.ratio(f"{f}_tok_s") for f in _FIGURES}
        return asdict(self) | {"over": self.over, "ratios": ratios}


def compare_case(case: Case, llama: LlamaCpp, time_limit: float, turn: int) -> Comparison:
    """Ask both the same; who begins changes with `turn`.

    Where edgert may guess it generates a text of its own, as in every other run. Raises
    `InputError` when there is no llama-cpp-python, or a file that it cannot read.
    """
    theirs = llama.model or case.model
    if theirs.suffix == ".edgert":
        raise InputError(f"llama.cpp cannot read {theirs}; name a GGUF with --baseline-model")
    sides = {}
    for name in _SIDES if turn % 2 else _SIDES[::-1]:
        for path in {case.model, theirs}:
            drop_page_cache(edgert.read_manifest(path).files)
        if case.speculate and name == "edgert":
            sides[name] = _generate(case, time_limit)
        else:
            sides[name] = _measure(name, case, llama.python, theirs, time_limit)
    return Comparison(case, sides)


def _generate(case: Case, time_limit: float) -> Side:
    run = run_case(case, time_limit)
    decode, prefill = (run.stats.get(name, 0.0) for name in ("decode_tok_s", "prefill_tok_s"))
    return Side(
        decode, prefill, peak_bytes=run.peak_bytes, device_bytes_per_s=run.device_bytes_per_s,
        message=run.message,
    )  # fmt: skip


def _measure(name: str, case: Case, python: str | None, theirs: Path, time_limit: float) -> Side:
    budget = Budget(str(case.budget_bytes), case.budget_bytes)
    options = ModelOptions(
        case.model, budget, case.context_length, case.threads, case.kv_cache_type
    )
    threads = options.plan().threads
    commands = worker_commands(options, threads, case.context_length, python, theirs, repack=False)
    argv, env = commands[name]
    tokenizer = edgert.Tokenizer.from_manifest(edgert.read_manifest(case.model).metadata)
    size = case.prompt_tokens
    text = some_text(tokenizer, 2 * size + case.max_tokens)
    side = Side()
    with ExitStack() as stack:
        group = open_group(case.budget_bytes, case.disk_rate, case.model)
        if group is not None:
            stack.enter_context(group)
        side.device_bytes_per_s = probe_disk(case.model, group)
        worker = EngineWorker(name, group.command(argv) if group else argv, env)
        stack.callback(worker.close)
        try:
            with _limited(worker, time_limit) as late:
                worker.wait_ready(lambda *_: None)
                first, second, rest = text[:size], text[size : 2 * size], text[2 * size :]
                answer = worker.ask([], first, False)
                side.first_prefill_tok_s = size / answer["seconds"]
                answer = worker.ask([], second, False)
                side.prefill_tok_s = size / answer["seconds"]
                side.top.append(answer["top"])
                tokens = rest[: _STEADY if case.speculate else None]
                answer = worker.ask(second, tokens, True)
                side.decode_tok_s = len(tokens) / answer["seconds"]
                side.top.append(answer["top"])
        except InputError:
            raise
        except EdgertError as error:
            side.message = f"not done within {time_limit:.0f} s" if late.is_set() else str(error)
        if group is not None:
            side.peak_bytes = group.peak_bytes() or 0
    return side


@contextmanager
def _limited(worker: EngineWorker, seconds: float) -> Iterator[Event]:
    """End the worker's process after so long; whoever reads from it then gets an error.

    The event is set when that was the reason.
    """
    late = Event()

    def end() -> None:
        late.set()
        worker.kill()

    timer = Timer(seconds, end)
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


BASELINE_HEADER = (
    "case", "limit", "device GB/s", "edgert decode", "llama.cpp decode", "ratio",
    "edgert prefill", "llama.cpp prefill", "ratio", "edgert first prompt",
    "llama.cpp first prompt", "ratio", "edgert peak", "same next token", "note",
)  # fmt: skip


def baseline_rows(found: Sequence[Comparison]) -> list[list[str]]:
    """A line for each case; tokens/s."""
    return [_row(one) for one in found]


def _row(one: Comparison) -> list[str]:
    ours, theirs = one.sides["edgert"], one.sides["llama.cpp"]

    def shown(value: float | None) -> str:
        return f"{value:.2f}" if value else "-"

    rate = statistics.mean(side.device_bytes_per_s for side in one.sides.values()) / 1e9
    notes = [f"{name}: {side.message}" for name, side in one.sides.items() if side.message]
    both = min(len(ours.top), len(theirs.top))
    agreed = sum(a == b for a, b in zip(ours.top, theirs.top, strict=False))
    speeds = []
    for name in (f"{figure}_tok_s" for figure in _FIGURES):
        speeds += [shown(s) for s in (getattr(ours, name), getattr(theirs, name), one.ratio(name))]
    return [
        one.case.name, format_bytes(one.case.budget_bytes), shown(rate), *speeds,
        f"{100 * ours.peak_bytes / one.case.budget_bytes:.0f} %", f"{agreed} of {both}",
        "; ".join(notes) or "-",
    ]  # fmt: skip


def ratio_line(found: Sequence[Comparison]) -> str:
    """The ratios of all cases in one line."""
    parts = []
    for figure in _FIGURES:
        ratios = [r for one in found if (r := one.ratio(f"{figure}_tok_s")) is not None]
        if ratios:
            middle = f" (median {statistics.median(ratios):.2f})" if len(ratios) > 2 else ""
            span = f"{min(ratios):.2f} to {max(ratios):.2f}"
            parts.append(f"{figure.replace('_', ' ')} {span} times llama.cpp{middle}")
    return ", ".join(parts) or "nothing to compare"
