"""The two things `edgert stress` does with its cases, from the first run to the exit code.

Owns: the loop, its lines on stderr, output in all forms, what Ctrl-C leaves, the error at the end.
Must not know how a run is made (stress_runs.py, stress_baseline.py) or judged (stress_report.py).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from edgert import BudgetExceededError, EdgertError
from edgert.cli.report import note, print_json, table
from edgert.cli.stress_baseline import (
    BASELINE_HEADER,
    Comparison,
    LlamaCpp,
    baseline_rows,
    compare_case,
    ratio_line,
)
from edgert.cli.stress_cases import Case
from edgert.cli.stress_document import Document, Part, machine_facts, write_document
from edgert.cli.stress_plot import pictures, plot_budgets, svg
from edgert.cli.stress_report import (
    PROMISE_HEADER,
    RUN_HEADER,
    problems,
    promises,
    run_rows,
    verdict,
)
from edgert.cli.stress_runs import Run, run_case
from edgert.cli.stress_turns import TURNS_HEADER, by_turns, turns_rows

__all__ = ["Outputs", "compare", "judge", "sigterm_as_interrupt"]


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where results go beside stdout, and in what form they go there."""

    report: Path | None
    plot: Path | None
    as_json: bool


def judge(
    cases: Sequence[Case], time_limit: float, out: Outputs, compared: Sequence[Case] = ()
) -> None:
    """Run the cases and say what came of it; raises the error that decides the exit code.

    Those of the cases that are `compared` are run by turns, and get a table of medians.
    """
    runs: list[Run] = []

    def do(case: Case) -> str:
        runs.append(run_case(case, time_limit))
        return runs[-1].summary()

    whole = _each(cases, do)
    found, held = problems(runs), promises(runs)
    line = verdict(runs, found, len(cases))
    kept = [promise.row() for promise in held]
    medians = by_turns(compared, runs)
    if out.as_json:
        shown = [asdict(promise) | {"kept": promise.kept} for promise in held]
        verdicts = {"verdict": line, "problems": found, "promises": shown}
        print_json(
            {
                **verdicts, "machine": machine_facts(), "turns": medians,
                "runs": [run.to_dict() for run in runs],
            }
        )  # fmt: skip
    else:
        tables = [table(PROMISE_HEADER, kept), table(RUN_HEADER, run_rows(runs))]
        tables += [table(TURNS_HEADER, turns_rows(medians))] if medians else []
        click.echo("\n\n".join(["\n".join([line, *found]), *tables]))
    if out.plot is not None and runs:
        plot_budgets(out.plot, runs)
    if out.report is not None:
        parts = [
            Part("Problems", found or ["none"]),
            Part("Promises", (), PROMISE_HEADER, kept),
            Part("Pictures", pictures=[svg(picture) for picture in pictures(runs)]),
            Part("Runs", (), RUN_HEADER, run_rows(runs)),
            Part("Machine", machine_facts()),
        ]
        if medians:
            parts.insert(2, Part("By turns", (), TURNS_HEADER, turns_rows(medians)))
        write_document(out.report, Document(line, parts))
    _end(whole, [(run.case, run.peak_bytes) for run in runs if run.over], found)


def compare(cases: Sequence[Case], llama: LlamaCpp, time_limit: float, out: Outputs) -> None:
    """Run both engines on the cases and print the ratios; raises as `judge` does."""
    found: list[Comparison] = []

    def do(case: Case) -> str:
        found.append(compare_case(case, llama, time_limit, len(found)))
        return ratio_line(found[-1:])

    whole = _each(cases, do)
    wrong = [
        f"{one.case.name}: {side.message}" for one in found if (side := one.sides["edgert"]).message
    ]
    over = [(one.case, one.sides["edgert"].peak_bytes) for one in found if one.over]
    kept = "broken" if over or wrong else "kept"
    line = f"{kept}: {len(found) - len(over)} of {len(found)} within budget; {ratio_line(found)}"
    if out.as_json:
        shown = {"verdict": line, "problems": wrong, "machine": machine_facts()}
        print_json({**shown, "comparisons": [one.to_dict() for one in found]})
    else:
        click.echo(f"{line}\n\n{table(BASELINE_HEADER, baseline_rows(found))}")
    if out.report is not None:
        parts = [
            Part("Against llama.cpp", wrong, BASELINE_HEADER, baseline_rows(found)),
            Part("Machine", machine_facts()),
        ]
        write_document(out.report, Document(line, parts))
    _end(whole, over, wrong)


def _each(cases: Sequence[Case], do: Callable[[Case], str]) -> bool:
    """Do all cases, each with a line on stderr; False when that was interrupted."""
    try:
        for number, case in enumerate(cases):
            note(f"[{number + 1}/{len(cases)}] {case.name}: {do(case)}")
    except KeyboardInterrupt:
        return False
    return True


def _end(whole: bool, over: Sequence[tuple[Case, int]], found: Sequence[str]) -> None:
    if not whole:
        raise click.Abort
    for case, peak in over:
        raise BudgetExceededError(case.budget_bytes, peak)
    if found:
        raise EdgertError(found[0] + (f" (and {len(found) - 1} more)" if found[1:] else ""))


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that no control group is left behind."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
