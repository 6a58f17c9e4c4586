"""One run of `edgert stress`: an engine, or several, in a process that a control group limits.

Owns: what the run does and the figures that only the inside knows. Must not know limits, other
runs or what is expected of it. Run as a module with one argument, a JSON object (`Task` in
stress_runs.py says what is in it); prints one JSON object. An error of ours is
{"error": {"kind", "text", "need_bytes"}} with its exit code, anything else a traceback.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

from edgert import BudgetError, EdgertError, StorageError
from edgert.cli.stress_faults import Faults

__all__ = ["main"]

_TEXT = (
    "Once upon a time there was a small house at the edge of a wide forest, and in it lived a "
    "girl who liked to walk. Every morning she took her red ball and went to look for her friend, "
    "the old dog of the miller. One day the sun was warm, and they found a path they did not know. "
)
_RSS_EVERY = 256  # tokens between two looks at the resident size


class _Runner:
    """Generates with one engine: `tokens` over as many prompts as it takes."""

    def __init__(self, engine: Any, task: dict[str, Any]) -> None:
        self._engine = engine
        self._task = task
        self._text = engine.tokenize(_TEXT * -(-task["prompt_tokens"] // 16))
        self._ends = dict.fromkeys(engine.tokenizer.eos_ids, float("-inf"))
        self.tokens: list[int] = []
        self.found: dict[str, Any] = {"rss": [], "live": []}
        self.error: BaseException | None = None

    def run(self) -> None:
        """All rounds; what went wrong is left in `error`."""
        try:
            number = 0
            while len(self.tokens) < self._task["max_tokens"]:
                self._round(number)
                number += 1
        except Exception as error:
            self.error = error

    def _round(self, number: int) -> None:
        engine, task = self._engine, self._task
        start = 7 * number % len(self._text)
        prompt = (self._text[start:] + self._text * 2)[: task["prompt_tokens"]]
        events = engine.generate(
            prompt, stream=True, max_tokens=task["max_tokens"] - len(self.tokens),
            logit_bias=self._ends, **task["sampling"],
        )  # fmt: skip
        for event in events:
            if not self.tokens:
                self.found["first_token_seconds"] = time.monotonic() - task["started"]
                self.found["first_token_read_bytes"] = engine.weights.total_read_bytes
            self.tokens.append(event.token)
            if len(self.tokens) % _RSS_EVERY == 0:
                self.found["rss"].append((len(self.tokens), engine.memory().resident_bytes))
            self._change_budget()
        if number == 0:
            self.found["stats"] = engine.last_stats.to_dict()
            if engine.is_streamed and not task["fault"]:
                engine.measure_device()  # in this group: what was profiled is the idle machine
                self.found["stats"]["predicted_tok_s"] = engine.predicted_tok_s

    def _change_budget(self) -> None:
        """The next of the budgets in `live`, when its token has come."""
        live = self._task["live"]
        step = max(self._task["max_tokens"] // (len(live) + 1), 1)
        done = len(self.found["live"])
        if done < len(live) and len(self.tokens) == (done + 1) * step:
            budget = max(live[done], self._engine.smallest_budget())
            before, begin = self._engine.memory().resident_bytes, time.perf_counter()
            self._engine.set_memory_budget(budget)
            seconds = time.perf_counter() - begin
            held = self._engine.memory().resident_bytes
            self.found["live"].append(
                {
                    "budget_bytes": budget,
                    "seconds": seconds,
                    "before_bytes": before,
                    "resident_bytes": held,
                }
            )

    def result(self) -> dict[str, Any]:
        """What the parent is told."""
        plan, last = self._engine.plan, self._engine.last_stats
        return self.found | {
            "tokens": self.tokens,
            "logits_hash": last.logits_hash,
            "streamed_bytes": plan.streamed_bytes,
            "first_pass_bytes": plan.resident_bytes + plan.streamed_bytes,
            "experts": plan.expert_bytes > 0,
            "threads": plan.threads,
            "context_length": plan.context_length,
            "pass_tokens": plan.prefill_tokens,
        }


def _run(task: dict[str, Any], faults: Faults | None) -> dict[str, Any]:
    import edgert

    engines: list[Any] = []
    begin = time.perf_counter()
    try:
        for budget in task["budgets"]:
            engine = edgert.load(
                task["path"],
                memory_budget=budget,
                context_length=task["context_length"],
                threads=task["threads"],
                kv_cache_type=task["kv_cache_type"],
                verify_checksums=task["verify_checksums"],
            )
            engines.append(engine)
        load_seconds = time.perf_counter() - begin
        if faults is not None:
            faults.install()
        runners = _together(engines, task)
        found = runners[0].result() if runners[0].error is None else {}
        if failed := [r.error for r in runners if r.error is not None]:
            if faults is None or not isinstance(failed[0], StorageError):
                raise failed[0]
            # The disk has failed and works again: so must the engine.
            faults.remove()
            runners = _together(engines, task)
            if failed_again := [r.error for r in runners if r.error is not None]:
                raise failed_again[0]
            found = runners[0].result() | {"recovered": _error(failed[0])}
        found["others_equal"] = all(
            (r.tokens, r.result()["logits_hash"]) == (found["tokens"], found["logits_hash"])
            for r in runners[1:]
        )
        return found | {"load_seconds": load_seconds}
    finally:
        for engine in engines:
            engine.close()


def _together(engines: list[Any], task: dict[str, Any]) -> list[_Runner]:
    runners = [_Runner(engine, task) for engine in engines]
    threads = [threading.Thread(target=runner.run) for runner in runners[1:]]
    for thread in threads:
        thread.start()
    runners[0].run()
    for thread in threads:
        thread.join()
    return runners


def _error(error: BaseException) -> dict[str, Any]:
    need = error.need_bytes if isinstance(error, BudgetError) else 0
    return {"kind": type(error).__name__, "text": str(error).splitlines()[0], "need_bytes": need}


def main(arguments: list[str]) -> None:
    """Do the run, print its figures, exit with the code of its error."""
    task = json.loads(arguments[0])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get into the answer
    faults = Faults(task["fault"], task["fault_number"]) if task["fault"] else None
    if faults is not None and faults.kind != "eio":
        faults.install()
    code = 0
    try:
        found = _run(task, faults)
    except EdgertError as error:
        found, code = {"error": _error(error)}, error.exit_code
    if faults is not None:
        found["faults"] = {"reads": faults.reads, "done": faults.done}
    with answers:
        json.dump(found, answers)
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
