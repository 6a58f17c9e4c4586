"""`edgert stress`: the memory promise, judged from outside.

Each budget runs in a process of its own inside a control group with exactly that limit and no
swap. Owns: the runs, the verdict, the table and the picture. Must not know how the engine keeps
its promise. Where no control group can be made it says so and samples the resident size.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

import edgert
from edgert import BudgetExceededError, EdgertError, format_bytes
from edgert.cli.cgroup import MemoryGroup, MemoryGroupError, drop_page_cache
from edgert.cli.options import (
    Budget,
    ModelOptions,
    debug_options,
    json_option,
    load_options_without_budget,
    parse_budget,
)
from edgert.cli.report import atomic_file, note, print_json, require_matplotlib, table

__all__ = ["BudgetRun", "problems", "stress"]

_POLL_SECONDS = 0.02


@dataclasses.dataclass(slots=True)
class BudgetRun:
    """One budget, asked for and tried."""

    asked: str
    budget_bytes: int
    raised: bool  # the share asked for was below the floor
    judged_by: str = ""
    exit_code: int | None = None
    peak_bytes: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    message: str = ""  # the last line of the child's stderr when it failed

    @property
    def over(self) -> bool:
        """True when the run needed all of its limit or more.

        A group is never charged above its limit, the kernel reclaims or kills, so reaching it is
        what going over looks like from outside.
        """
        return self.peak_bytes >= self.budget_bytes or self.exit_code in (-9, 137)


@click.command()
@load_options_without_budget
@click.option(
    "--budgets",
    default="100%,50%,25%",
    show_default=True,
    metavar="LIST",
    help="Budgets with commas between: sizes, or shares of what the whole model needs. A share "
    "below the smallest budget that works is raised to it and marked.",
)
@click.option("-p", "--prompt", default="Once upon a time", show_default=True, metavar="TEXT")
@click.option(
    "-n",
    "--max-tokens",
    "--n-predict",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Tokens to generate with each budget.",
)
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Write a PNG of speed and peak by budget."
)
@json_option
@debug_options
def stress(
    options: ModelOptions,
    budgets: str,
    prompt: str,
    max_tokens: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Run under real memory limits and compare.

    Every budget must end well, stay below its limit, and give the same tokens and the same hash
    of the logits. Exit code 6: a run needed more than its budget.
    """
    if plot is not None:
        require_matplotlib()
    runs = _plan_runs(options, [parse_budget(text) for text in budgets.split(",")])
    files = edgert.read_gguf(options.path).files
    with _sigterm_as_interrupt():
        for run in runs:
            drop_page_cache(files)
            _run(run, _command(options, run, prompt, max_tokens))
            note(f"{run.asked}: exit {run.exit_code}, peak {format_bytes(run.peak_bytes)}")
    if plot is not None:
        _plot(plot, options.path.name, runs)
    found = problems(runs)
    if as_json:
        shown = [dataclasses.asdict(run) | {"over": run.over} for run in runs]
        print_json({"model": options.path.name, "runs": shown, "problems": found})
    else:
        click.echo(_table(runs))
    _raise_verdict(runs, found)


def problems(runs: list[BudgetRun]) -> list[str]:
    """What went wrong, one line each; empty when the promise held."""
    found = []
    good = [run for run in runs if run.exit_code == 0]
    for run in runs:
        if run.over:
            peak, budget = format_bytes(run.peak_bytes), format_bytes(run.budget_bytes)
            found.append(f"{run.asked}: the peak of {peak} reached the budget of {budget}")
        if run.exit_code != 0:
            found.append(f"{run.asked}: exit {run.exit_code}, {run.message}".rstrip(", "))
        elif run.tokens != good[0].tokens:
            found.append(f"{run.asked}: other tokens than with {good[0].asked}")
        elif run.stats["logits_hash"] != good[0].stats["logits_hash"]:
            found.append(f"{run.asked}: other logits than with {good[0].asked}")
    return found


def _raise_verdict(runs: list[BudgetRun], found: list[str]) -> None:
    for run in runs:
        if run.over:
            raise BudgetExceededError(run.budget_bytes, run.peak_bytes)
    if found:
        raise EdgertError("; ".join(found))


def _plan_runs(options: ModelOptions, budgets: list[Budget]) -> list[BudgetRun]:
    full, floor = options.full_and_floor()
    runs: list[BudgetRun] = []
    for budget in budgets:
        nbytes = budget.resolve(full)
        raised = budget.percent is not None and nbytes < floor
        runs.append(BudgetRun(budget.text, floor if raised else nbytes, raised))
    return runs


def _command(options: ModelOptions, run: BudgetRun, prompt: str, max_tokens: int) -> list[str]:
    argv = [sys.executable, "-m", "edgert", "run", str(options.path), "--json"]
    argv += ["-b", str(run.budget_bytes), "-n", str(max_tokens), "-p", prompt]
    argv += ["--temp", "0", "--seed", "0", "-ctk", options.kv_cache_type]
    if options.context_length is not None:
        argv += ["-c", str(options.context_length)]
    if options.threads is not None:
        argv += ["-t", str(options.threads)]
    return argv


def _run(run: BudgetRun, argv: list[str]) -> None:
    try:
        group = MemoryGroup(run.budget_bytes)
    except MemoryGroupError as error:
        run.judged_by = "sampled RSS"
        note(f"no control group ({error}); sampling the resident size instead")
        _watch(run, argv, None)
        return
    with group:
        run.judged_by = group.kind
        _watch(run, group.command(argv), group)


def _watch(run: BudgetRun, argv: list[str], group: MemoryGroup | None) -> None:
    import psutil

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=errors)
        try:
            process = psutil.Process(child.pid)
            while child.poll() is None:
                try:
                    now = group.current_bytes() if group else process.memory_info().rss
                    run.peak_bytes = max(run.peak_bytes, now)
                except (psutil.Error, OSError):
                    pass  # it ended between the two calls
                time.sleep(_POLL_SECONDS)
        finally:
            child.kill()
            child.wait()
        run.exit_code = child.returncode
        if group:
            run.peak_bytes = group.peak_bytes() or run.peak_bytes
        out.seek(0)
        errors.seek(0)
        if run.exit_code == 0:
            answer = json.loads(out.read())
            run.tokens, run.stats = answer["tokens"], answer["stats"]
        else:
            lines = errors.read().decode("utf-8", "replace").strip().splitlines()
            run.message = next((x[7:] for x in lines if x.startswith("error: ")), "")
            run.message = run.message or (lines[-1] if lines else "")


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that no control group is left behind."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _table(runs: list[BudgetRun]) -> str:
    header = ("asked", "limit", "judged by", "exit", "peak", "of limit", "prefill tok/s")
    rows = []
    for run in runs:
        stats = run.stats
        mark = " (raised)" if run.raised else ""
        rows.append(
            (
                run.asked + mark,
                format_bytes(run.budget_bytes),
                run.judged_by,
                str(run.exit_code),
                format_bytes(run.peak_bytes),
                f"{100 * run.peak_bytes / run.budget_bytes:.0f} %",
                f"{stats['prefill_tok_s']:.1f}" if stats else "-",
                f"{stats['decode_tok_s']:.2f}" if stats else "-",
                f"{stats['read_bytes_per_token'] / 2**20:.1f}" if stats else "-",
                f"#{stats['logits_hash'][:8]}" if stats else "-",
            )
        )
    return table((*header, "decode tok/s", "MiB/tok", "logits"), rows)


def _plot(path: Path, title: str, runs: list[BudgetRun]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = sorted((run for run in runs if run.stats), key=lambda run: run.budget_bytes)
    budgets = [run.budget_bytes / 2**20 for run in done]
    figure, speed = pyplot.subplots(figsize=(7, 4), layout="constrained")
    speed.plot(budgets, [run.stats["decode_tok_s"] for run in done], "o-", color="tab:blue")
    speed.set(xlabel="memory budget (MiB)", title=title, ylim=(0, None))
    speed.set_ylabel("decode (tokens/s)", color="tab:blue")
    memory = speed.twinx()
    memory.plot(budgets, [run.peak_bytes / 2**20 for run in done], "s-", color="tab:red")
    memory.plot(budgets, budgets, ":", color="gray", label="the limit")
    memory.set(ylim=(0, None))
    memory.set_ylabel("peak memory (MiB)", color="tab:red")
    memory.legend(loc="lower right")
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=150)
    pyplot.close(figure)
