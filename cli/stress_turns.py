"""The same runs several times over, by turns: `edgert stress --turns`.

Owns: their order, medians, and ratios to the first of them. Pure. Must not know how a run is made
or what is promised of it.

A disk or a memory that others use is faster in one minute than in the next. So each round of runs
is made backwards every second time, a ratio is taken within a round, and the medians are shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from edgert import format_bytes
from edgert.cli.stress_cases import Case
from edgert.cli.stress_runs import Run

__all__ = ["TURNS_HEADER", "by_turns", "in_turns", "turns_rows"]


def in_turns(cases: Sequence[Case], rounds: int) -> list[Case]:
    """All cases `rounds` times, every second round backwards."""
    order = [cases[::-1] if number % 2 else cases for number in range(rounds)]
    return [case for one in order for case in one]


_FIGURES: dict[str, Callable[[Run], float | None]] = {
    "load_seconds": lambda run: run.found.get("load_seconds"),
    "first_token_seconds": lambda run: run.found.get("first_token_seconds"),
    "prefill_tok_s": lambda run: run.stats.get("prefill_tok_s"),
    "decode_tok_s": lambda run: run.stats.get("decode_tok_s"),
    "device_bytes_per_s": lambda run: run.device_bytes_per_s or None,
    "read_share": lambda run: run.read_share,
    "disk_busy_share": lambda run: run.stats.get("disk_busy_share") if run.timed else None,
    "roof_share": lambda run: run.roof_share,
}
_COMPARED = ("load_seconds", "first_token_seconds", "prefill_tok_s", "decode_tok_s")


def by_turns(cases: Sequence[Case], runs: Iterable[Run]) -> list[dict[str, Any]]:
    """For each of the distinct cases the medians of its runs that ended well, in their order.

    A figure is None where no run has it. `ratios` are medians of this case's figures over those
    of the first case, each pair from one round.
    """
    found: dict[Case, list[Run]] = {case: [] for case in cases}
    for run in runs:
        if run.case in found:
            found[run.case].append(run)
    first = found[cases[0]] if cases else []
    return [_of_case(case, made, first) for case, made in found.items()]


def _of_case(case: Case, made: Sequence[Run], first: Sequence[Run]) -> dict[str, Any]:
    done = [run for run in made if run.exit_code == 0]
    figures = {name: [_figure(name, run) for run in made] for name in _FIGURES}
    ratios = {}
    for name in _COMPARED:
        pairs = zip(figures[name], (_figure(name, run) for run in first), strict=False)
        ratios[name] = _median(ours / theirs for ours, theirs in pairs if ours and theirs)
    speeds = [speed for speed in figures["decode_tok_s"] if speed is not None]
    return {
        "case": case.name, "budget_bytes": case.budget_bytes, "runs": len(done),
        **{name: _median(values) for name, values in figures.items()},
        "decode_tok_s_least": min(speeds, default=None),
        "decode_tok_s_most": max(speeds, default=None),
        "ratios": ratios, "logits_hashes": sorted({run.found["logits_hash"] for run in done}),
    }  # fmt: skip


def _figure(name: str, run: Run) -> float | None:
    return _FIGURES[name](run) if run.exit_code == 0 else None


def _median(values: Iterable[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return statistics.median(kept) if kept else None


TURNS_HEADER = (
    "by turns, medians", "limit", "runs", "load", "x", "first token", "x", "prefill tok/s", "x",
    "decode tok/s", "x", "least", "most", "device GB/s", "share", "busy", "roof", "logits",
)  # fmt: skip


def turns_rows(found: Iterable[dict[str, Any]]) -> list[list[str]]:
    """A line for each case of `by_turns`; "-" where a figure says nothing, x: times the first."""
    return [_row(one) for one in found]


def _row(one: dict[str, Any]) -> list[str]:
    def shown(form: str, value: float | None) -> str:
        return "-" if value is None else form.format(value)

    cells = [one["case"], format_bytes(one["budget_bytes"]), str(one["runs"])]
    for name in _COMPARED:
        form = "{:.2f} s" if name.endswith("seconds") else "{:.2f}"
        cells += [shown(form, one[name]), shown("{:.2f}", one["ratios"][name])]
    device = one["device_bytes_per_s"]
    hashes = one["logits_hashes"]
    return [
        *cells,
        shown("{:.2f}", one["decode_tok_s_least"]),
        shown("{:.2f}", one["decode_tok_s_most"]),
        shown("{:.2f}", device and device / 1e9),
        *(shown("{:.2f}", one[f"{name}_share"]) for name in ("read", "disk_busy", "roof")),
        " ".join(f"#{digest[:8]}" for digest in hashes) or "-",
    ]
