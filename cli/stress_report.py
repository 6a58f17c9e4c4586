"""What the runs of `edgert stress` say together: problems, promises, verdict, tables.

Owns: the judgement. Pure. Must not know how a run was made nor how a document is written.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from edgert import format_bytes
from edgert.cli.stress_runs import Run

__all__ = [
    "GROWTH_BYTES",
    "PROMISE_HEADER",
    "RUN_HEADER",
    "Promise",
    "problems",
    "promises",
    "run_rows",
    "verdict",
]

GROWTH_BYTES = 8 * 2**20  # of the resident size, over the last four fifths of a long run
_SHRINK_SECONDS = 2.0
_WAITED = 0.05  # share of decode time; below, compute was the limit and the disk idle with reason
_EASY = 0.595  # of a model's file as budget: 60 %, rounded to MiB
_LARGE = 2 * 2**30  # budgets from which most of the memory must hold weights


def problems(runs: Sequence[Run]) -> list[str]:
    """What went wrong, one line each; empty when every promise about memory and output held."""
    found = []
    first: dict[tuple[object, ...], Run] = {}
    for run in runs:
        if run.exit_code == 0:
            first.setdefault(run.case.text, run)
    for run in runs:
        found += [f"{run.case.name}: {what}" for what in _problems(run, first.get(run.case.text))]
    return found


def _problems(run: Run, same: Run | None) -> Iterable[str]:
    if run.over:
        peak, budget = format_bytes(run.peak_bytes), format_bytes(run.case.budget_bytes)
        yield f"the peak of {peak} reached the budget of {budget}"
    if run.exit_code != 0:
        if not run.refused:
            ended = "no exit" if run.exit_code is None else f"exit {run.exit_code}"
            yield f"{ended}, {run.message}".rstrip(", ")
        return
    assert same is not None
    if run.found["tokens"] != same.found["tokens"]:
        yield f"other tokens than with {same.case.asked}"
    elif run.found["logits_hash"] != same.found["logits_hash"]:
        yield f"other logits than with {same.case.asked}"
    if not run.found.get("others_equal", True):
        yield "the engines of one process disagree"
    if run.growth_bytes is not None and run.growth_bytes > GROWTH_BYTES:
        yield f"the resident size grew by {format_bytes(run.growth_bytes)} while generating"
    for change in run.found.get("live", []):
        held, budget = change["resident_bytes"], change["budget_bytes"]
        if held > budget:
            yield f"{format_bytes(held)} held after a change to {format_bytes(budget)}"
    if run.case.fault and not run.found["faults"]["reads"]:
        yield "no read went through the faulty disk"


def verdict(runs: Sequence[Run], found: Sequence[str], planned: int) -> str:
    """One line: what was promised, in how many runs it held."""
    within = sum(not run.over for run in runs)
    word = "broken" if found else "kept" if runs else "nothing tried"
    if any(run.sampled for run in runs):
        word += " (memory sampled, not limited)"
    line = f"{word}: {within} of {len(runs)} runs within budget"
    if failed := sum(run.refused or run.recovered for run in runs):
        line += f", {failed} with the error of a failing disk"
    line += f", {len(found)} problems" if found else ", all outputs equal"
    return line if len(runs) == planned else f"{line} (interrupted: {len(runs)} of {planned} runs)"


@dataclass(frozen=True, slots=True)
class Promise:
    """A figure with a bound, over all runs that have it. Values in `unit`."""

    what: str
    bound: float
    unit: str
    at_most: bool  # else at least
    values: tuple[float, ...]
    bound_of_median: float | None = None

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def worst(self) -> float:
        """The value that is furthest to the wrong side."""
        return max(self.values) if self.at_most else min(self.values)

    @property
    def kept(self) -> bool:
        """True when the worst value is within the bound, and the median within its own."""
        good = self.worst <= self.bound if self.at_most else self.worst >= self.bound
        return good and (self.bound_of_median is None or self.median <= self.bound_of_median)

    @property
    def missed(self) -> int:
        """In how many runs the bound did not hold."""
        return sum(v > self.bound if self.at_most else v < self.bound for v in self.values)

    def row(self) -> list[str]:
        """As a line of the table."""
        sign = "<=" if self.at_most else ">="
        bound = f"{sign} {self.bound:g} {self.unit}"
        if self.bound_of_median is not None:
            bound += f", median {sign} {self.bound_of_median:g}"
        shown = [f"{self.median:.3g}", f"{self.worst:.3g}", str(len(self.values))]
        return [self.what, bound, *shown, "kept" if self.kept else f"missed in {self.missed}"]


def promises(runs: Sequence[Run]) -> list[Promise]:
    """Every promise that these runs say something about."""
    done = [run for run in runs if run.exit_code == 0]

    def values(figure: Callable[[Run], float | None]) -> tuple[float, ...]:
        return tuple(value for run in done if (value := figure(run)) is not None)

    def waited(figure: Callable[[Run], float | None]) -> Callable[[Run], float | None]:
        def found(run: Run) -> float | None:
            says = run.stats.get("stall_share", 0.0) >= _WAITED and not run.case.speculate
            return figure(run) if says else None

        return found

    def drafted(run: Run, *, easy: bool) -> float | None:
        file_bytes = run.found["first_pass_bytes"]
        is_easy = not run.case.temperature and run.case.budget_bytes >= _EASY * file_bytes
        return run.roof_share if run.drafts_itself and is_easy == easy else None

    def busy(run: Run) -> float | None:
        """Time with a read under way, or the rate used if that is more: a slowed disk saves up."""
        if not (run.timed and run.drafts_itself):
            return None
        share: float = run.stats["disk_busy_share"]
        return max(share, run.read_share or 0.0)

    def rate(run: Run, *, experts: bool) -> float | None:
        return run.read_share if run.found["experts"] == experts else None

    def prediction(run: Run) -> float | None:
        return None if run.prediction is None else abs(run.prediction) * 100

    def resident(run: Run) -> float | None:
        large = run.case.budget_bytes >= _LARGE and run.case.context_length <= 2048
        return run.resident_share if large else None

    def first(run: Run) -> float | None:
        return None if run.first_token is None else run.first_token[0] / run.first_token[1]

    def growth(run: Run) -> float | None:
        return None if run.growth_bytes is None else run.growth_bytes / 2**20

    def shrink(run: Run) -> float | None:
        times = [c["seconds"] for c in run.found.get("live", []) if _shrinks(c)]
        return max(times, default=None)

    peaks = tuple(run.peak_bytes / run.case.budget_bytes for run in runs)
    found = [
        Promise("peak / budget", 1.0, "", True, peaks),
        Promise("read rate / device, waiting for it", 0.95, "", False,
                values(waited(partial(rate, experts=False)))),
        Promise("read rate / device, of experts", 0.9, "", False,
                values(waited(partial(rate, experts=True)))),
        Promise("decode / plain roof, waiting for it", 0.93, "", False,
                values(waited(lambda run: run.roof_share))),
        Promise("drafting / plain roof, greedy, from 60 %", 4.0, "", False,
                values(partial(drafted, easy=True))),
        Promise("drafting / plain roof, else", 2.5, "", False,
                values(partial(drafted, easy=False))),
        Promise("disk busy, drafting", 0.9, "", False, values(busy)),
        Promise("resident / budget, from 2 GiB", 0.85, "", False, values(resident)),
        Promise("predicted tok/s, error", 20.0, "%", True, values(prediction), 10.0),
        Promise("first token / bound", 1.0, "", True, values(first)),
        Promise("growth in a long run", GROWTH_BYTES / 2**20, "MiB", True, values(growth)),
        Promise("live shrink", _SHRINK_SECONDS, "s", True, values(shrink)),
    ]  # fmt: skip
    return [promise for promise in found if promise.values]


def _shrinks(change: dict[str, float]) -> bool:
    return change["resident_bytes"] < change["before_bytes"]


PROMISE_HEADER = ("promise", "bound", "median", "worst", "runs", "")
RUN_HEADER = (
    "run", "limit", "judged by", "exit", "peak", "hits", "prefill tok/s", "decode tok/s",
    "tok/pass", "guessed", "MiB/tok", "read GB/s", "device", "share", "busy", "roof", "resident",
    "predicted", "first token", "bound", "logits",
)  # fmt: skip


def run_rows(runs: Sequence[Run]) -> list[list[str]]:
    """A line for each run; "-" where a figure says nothing."""
    return [_row(run) for run in runs]


def _row(run: Run) -> list[str]:
    def shown(form: str, value: float | None) -> str:
        return "-" if value is None else form.format(value)

    stats, first = run.stats, run.first_token or (None, None)
    mark = " (raised)" if run.case.raised else ""
    predicted = stats.get("predicted_tok_s") or None
    drafted = stats.get("drafted_tokens", 0)
    device = run.device_bytes_per_s / 1e9 or None
    return [
        run.case.name + mark,
        format_bytes(run.case.budget_bytes),
        run.judged_by,
        "late" if run.exit_code is None else str(run.exit_code),
        f"{100 * run.peak_bytes / run.case.budget_bytes:.0f} %",
        str(run.limit_hits),
        shown("{:.1f}", stats.get("prefill_tok_s")),
        shown("{:.2f}", stats.get("decode_tok_s")),
        shown("{:.1f}", run.tokens_per_pass),
        f"{stats['accepted_tokens']} of {drafted}" if drafted else "-",
        shown("{:.0f}", stats["read_bytes_per_token"] / 2**20 if stats else None),
        shown("{:.2f}", stats["read_bytes_per_s"] / 1e9 if stats else None),
        shown("{:.2f}", device),
        shown("{:.2f}", run.read_share),
        shown("{:.2f}", stats.get("disk_busy_share")),
        shown("{:.2f}", run.roof_share),
        shown("{:.2f}", run.resident_share),
        shown("{:.2f}", predicted),
        shown("{:.2f} s", first[0]),
        shown("{:.2f} s", first[1]),
        f"#{run.found['logits_hash'][:8]}" if "logits_hash" in run.found else "-",
    ]
