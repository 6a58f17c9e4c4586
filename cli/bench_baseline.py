"""`edgert bench --baseline`: the same file in edgert and in llama.cpp, turn by turn.

Owns: what is measured, the two processes, ratios. Must not know how an engine is driven
(bench_worker.py). The engines take turns row by row, so that what else happens on the machine
meets both, and each has a process of its own that sleeps while the other computes: in one process
the waiting threads of one would take cores from the other.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import edgert
from edgert import ContextError, EdgertError, InputError
from edgert.cli.bench_model import PAST, Sizes, some_text
from edgert.cli.options import ModelOptions
from edgert.cli.progress import Progress
from edgert.cli.report import table

__all__ = ["EngineWorker", "compare", "comparison_text", "worker_commands"]

_REPEATS = 5  # of a batch row in a trial, each being one short pass
_REST_SECONDS = 0.05  # OpenMP's threads spin for some milliseconds after a pass
_WORKER = Path(__file__).with_name("bench_worker.py")


_Case = tuple[str, list[int], list[int], bool]  # row, past, tokens, one by one


class EngineWorker:
    """An engine in its own process; `ask` measures one request."""

    def __init__(self, name: str, argv: Sequence[str], env: dict[str, str]) -> None:
        self.name = name
        self.facts: dict[str, Any] = {}
        self._python = argv[0]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        try:
            self._child = subprocess.Popen(
                argv, env=env, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise InputError(f"{argv[0]} cannot be started: {error.strerror}") from None

    def wait_ready(self, show: Callable[[int, int, str], object]) -> None:
        """Wait until the model is loaded."""
        while "ready" not in (answer := self._read()):
            what, done, total = answer["progress"]
            show(done, total, f"{self.name}: {what}")
        self.facts = answer["ready"]

    def ask(self, past: list[int], tokens: list[int], single: bool) -> dict[str, Any]:
        """{"seconds": s, "top": token} of one request."""
        assert self._child.stdin is not None
        request = {"past": past, "tokens": tokens, "single": single}
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # `_read` finds the reason
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise EdgertError(f"{self.name} ended with {self._last_error()}")
        answer: dict[str, Any] = json.loads(line)
        if answer.get("missing"):
            raise InputError(
                f"{self._python} has no llama-cpp-python ({answer['error']}); "
                "pip install 'edgert[llamacpp]', or name a Python that has it with "
                "--baseline-python"
            )
        if "error" in answer:
            raise EdgertError(f"{self.name}: {answer['error']}")
        return answer

    def _last_error(self) -> str:
        self._child.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return ": ".join([f"exit code {self._child.returncode}", *lines[-1:]])

    def kill(self) -> None:
        """End the process now; may be called from another thread while it is asked."""
        self._child.kill()

    def close(self) -> None:
        """End the process."""
        self.kill()
        with self._child, self._errors:
            pass


def worker_commands(
    options: ModelOptions,
    threads: int,
    context_length: int,
    python: str | None,
    theirs: Path,
    *,
    repack: bool = True,
) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Name -> command and environment of both processes; llama.cpp first, as it may be missing.

    `repack`: llama.cpp's own repacking of weights at loading, its default.
    """
    settings: dict[str, Any] = {
        "path": str(options.path),
        "threads": threads,
        "context_length": context_length,
    }
    ours = {**settings, "kv_cache_type": options.kv_cache_type}
    if options.memory_budget is not None:
        ours["memory_budget"] = options.memory_budget.text
    source = str(Path(edgert.__file__).parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    there = dict(os.environ)
    if python is not None:
        there.pop("PYTHONPATH", None)  # packages for this Python would break another one

    def command(interpreter: str, engine: str, chosen: dict[str, Any]) -> list[str]:
        return [interpreter, str(_WORKER), engine, json.dumps(chosen)]

    return {
        "llama.cpp": (
            command(
                python or sys.executable,
                "llamacpp",
                settings | {"path": str(theirs), "repack": repack},
            ),
            there,
        ),
        "edgert": (command(sys.executable, "edgert", ours), here),
    }


def compare(
    options: ModelOptions,
    sizes: Sizes,
    python: str | None,
    baseline_model: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    """Measure all rows with both engines; the object that --json prints.

    `python`: the interpreter that has llama-cpp-python, by default this one. `baseline_model`: its
    file, by default the same. Raises `InputError` when either cannot be used, and what
    `edgert.plan_model` raises.
    """
    theirs = baseline_model or options.path
    if theirs.suffix == ".edgert":
        raise InputError(f"llama.cpp cannot read {theirs}; name a GGUF with --baseline-model")
    plan = options.plan()
    prompt = sizes.prompt(plan.context_length)
    needed = max(prompt, PAST + max(sizes.gen_tokens, *sizes.batches)) + 1
    context = options.context_length or needed
    if needed > context:
        raise ContextError(needed, context)
    tokenizer = edgert.Tokenizer.from_manifest(edgert.read_manifest(options.path).metadata)
    text = some_text(tokenizer, needed)
    workers: dict[str, EngineWorker] = {}
    with ExitStack() as stack:
        commands = worker_commands(options, plan.threads, context, python, theirs)
        for name, (argv, env) in commands.items():
            workers[name] = EngineWorker(name, argv, env)
            stack.callback(workers[name].close)
            workers[name].wait_ready(progress.update)
        progress.close()
        cases: list[_Case] = [("prefill", [], text[:prompt], False)]
        cases += [("decode", text[:PAST], text[PAST:][: sizes.gen_tokens], True)]
        cases += [(f"batch {n}", text[:PAST], text[PAST:][:n], False) for n in sizes.batches]
        rows = _measure(workers["edgert"], workers["llama.cpp"], cases, sizes.trials, progress)
        progress.close()
        return {
            "model": options.path.name,
            "baseline_model": theirs.name,
            "machine": f"{platform.machine()} {platform.system()}",
            "cores": os.cpu_count(),
            "threads": plan.threads,
            "trials": sizes.trials,
            "baseline": f"llama-cpp-python {workers['llama.cpp'].facts['version']}",
            "baseline_features": workers["llama.cpp"].facts["features"],
            "rows": rows,
        }


def _measure(
    ours: EngineWorker,
    theirs: EngineWorker,
    cases: Sequence[_Case],
    trials: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    seconds: dict[tuple[str, str], list[float]] = {}
    top: dict[tuple[str, str], int] = {}
    for trial in range(trials + 1):  # the first is not counted: pages are touched, code wakes
        for number, (row, past, tokens, single) in enumerate(cases):
            progress.update(trial * len(cases) + number, (trials + 1) * len(cases), row)
            repeats = _REPEATS if row.startswith("batch") and trial else 1
            for worker in (ours, theirs) if trial % 2 else (theirs, ours):
                answers = [worker.ask(past, tokens, single) for _ in range(repeats)]
                time.sleep(_REST_SECONDS)
                top[row, worker.name] = answers[-1]["top"]
                if trial:
                    median = statistics.median(answer["seconds"] for answer in answers)
                    seconds.setdefault((row, worker.name), []).append(median)
    return [
        _row(row, len(tokens), seconds[row, ours.name], seconds[row, theirs.name])
        | {"same_next_token": top[row, ours.name] == top[row, theirs.name]}
        for row, _, tokens, _ in cases
    ]


def _row(row: str, n: int, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Medians over the trials; the ratio is that of trials measured next to each other."""
    return {
        "row": row,
        "tokens": n,
        "edgert_tok_s": n / statistics.median(ours),
        "llamacpp_tok_s": n / statistics.median(theirs),
        "ratio": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        "edgert_seconds": statistics.median(ours),
        "llamacpp_seconds": statistics.median(theirs),
    }


def comparison_text(found: dict[str, Any]) -> str:
    """`compare`'s object for people. A ratio above 1 says that edgert is faster."""
    rows = found["rows"]
    alone = next((r for r in rows if r["row"] == "batch 1"), None)

    def cost(row: dict[str, Any], side: str) -> str:
        if alone is None or not row["row"].startswith("batch"):
            return "-"
        return f"{row[f'{side}_seconds'] / alone[f'{side}_seconds']:.2f}"

    header = ["row", "edgert tok/s", "llama.cpp tok/s", "ratio", "edgert cost", "llama.cpp cost"]
    lines = [
        [
            row["row"] if row["row"].startswith("batch") else f"{row['row']} {row['tokens']}",
            f"{row['edgert_tok_s']:.2f}",
            f"{row['llamacpp_tok_s']:.2f}",
            f"{row['ratio']:.2f}",
            cost(row, "edgert"),
            cost(row, "llamacpp"),
        ]
        for row in rows
    ]
    title = f"{found['model']}, {found['threads']} threads, against {found['baseline']}"
    if found["baseline_model"] != found["model"]:
        title += f" on {found['baseline_model']}"
    agreed = sum(row["same_next_token"] for row in rows)
    return (
        f"{title}\n{table(header, lines)}\n"
        f"ratio: speed of edgert to llama.cpp; cost: time of a batch to that of one token; "
        f"same next token in {agreed} of {len(rows)} rows"
    )
