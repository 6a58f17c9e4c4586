"""The runs of `edgert stress`: each in a process and a control group of its own.

Owns: starting, watching and ending one run, and the figures that follow from it. Must not know how
the engine keeps its promise, nor what a report looks like.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import edgert
from edgert import format_bytes
from edgert.cli.cgroup import MemoryGroup, MemoryGroupError, drop_page_cache
from edgert.cli.report import note
from edgert.cli.stress_cases import Case

__all__ = ["Run", "open_group", "probe_disk", "run_case"]

_POLL_SECONDS = 0.02
_PROBE_SECONDS = 0.8
_PROBE = Path(__file__).with_name("disk_rate.py")
_SAMPLED = "sampled RSS"


@dataclass(slots=True)
class Run:
    """A case that was tried. `found` is what the worker told (stress_worker.py)."""

    case: Case
    judged_by: str = ""
    exit_code: int | None = None  # None: it did not end in time
    peak_bytes: int = 0
    limit_hits: int = 0
    seconds: float = 0.0
    device_bytes_per_s: float = 0.0  # direct reads in the same group; mean of before and after
    found: dict[str, Any] = field(default_factory=dict)
    message: str = ""  # the error of a run that failed

    @property
    def sampled(self) -> bool:
        """True when no control group held the run."""
        return self.judged_by == _SAMPLED

    @property
    def over(self) -> bool:
        """True when the run needed all of its limit or more.

        A group is never charged above its limit, the kernel reclaims or kills, so reaching it is
        what going over looks like from outside.
        """
        return self.peak_bytes >= self.case.budget_bytes or self.exit_code in (-9, 137)

    @property
    def refused(self) -> bool:
        """True when a faulty disk ended the run as it should: with the error for that."""
        kind = self.found.get("error", {}).get("kind", "")
        allowed = {"StorageError": 1, "ModelError": 3}
        return bool(self.case.fault) and kind in allowed and self.exit_code == allowed[kind]

    @property
    def recovered(self) -> bool:
        """True when the engine was told of a failed read and then went on."""
        return "recovered" in self.found

    @property
    def stats(self) -> dict[str, Any]:
        """The engine's figures of the first prompt; empty when there are none."""
        stats: dict[str, Any] = self.found.get("stats", {})
        return stats

    @property
    def timed(self) -> bool:
        """True when its speed says something: weights streamed, disk sound, budget at rest."""
        misses = self.found.get("experts") and self.stats.get("read_bytes_per_token", 0) > 0
        streams = self.found.get("streamed_bytes", 0) > 0 or bool(misses)
        runs = streams and self.stats.get("decode_tok_s", 0) > 0 and self.device_bytes_per_s > 0
        return runs and self.case.plain and self.exit_code == 0

    @property
    def read_share(self) -> float | None:
        """Read rate while decoding, as a share of the device's."""
        return self.stats["read_bytes_per_s"] / self.device_bytes_per_s if self.timed else None

    @property
    def roof_share(self) -> float | None:
        """Decode speed as a share of rate / streamed bytes: 1 is a disk that never rests."""
        if not self.timed or self.found["experts"]:
            return None
        moved: float = self.stats["decode_tok_s"] * self.found["streamed_bytes"]
        return moved / self.device_bytes_per_s

    @property
    def resident_share(self) -> float | None:
        """Weights in memory, as a share of the budget; None where engines share it."""
        if self.case.engines > 1 or not self.stats or not self.found["streamed_bytes"]:
            return None
        share: float = self.stats["resident_bytes"] / self.case.budget_bytes
        return share

    @property
    def prediction(self) -> float | None:
        """Predicted tokens/s over measured, less 1; None where nothing was predicted."""
        predicted: float = self.stats.get("predicted_tok_s", 0.0)  # without guesses
        # A short run misses more experts than the steady one that is predicted.
        says = self.timed and predicted and not (self.case.speculate or self.found["experts"])
        return predicted / self.stats["decode_tok_s"] - 1 if says else None

    @property
    def drafts_itself(self) -> bool:
        """True when the model guessed tokens with the bits of it that were in memory."""
        return any(d["drafter"] == "self" for d in self.stats.get("drafts", []))

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens that a pass gave while decoding."""
        passes = self.stats.get("decode_passes", 0)
        return (self.stats["generated_tokens"] - 1) / passes if passes else None

    @property
    def first_token(self) -> tuple[float, float] | None:
        """Seconds from the start of the process to the first token, and the bound for them.

        The bound is 1.1 x first pass / rate + 1 s: a first pass of a short prompt waits for the
        disk alone.
        """
        if not self.timed or self.case.prompt_tokens > 16 or self.found["experts"]:
            return None
        bound = 1.1 * self.found["first_pass_bytes"] / self.device_bytes_per_s + 1
        return self.found["first_token_seconds"], bound

    @property
    def growth_bytes(self) -> int | None:
        """How much the resident size grew over the last four fifths of a long run."""
        sizes: list[int] = [size for _, size in self.found.get("rss", [])]
        if len(sizes) < 10 or self.case.live:
            return None
        return max(sizes[len(sizes) // 5 :]) - max(sizes[: len(sizes) // 5])

    def summary(self) -> str:
        """The run in a few words, for a line on stderr."""
        ended = "too late" if self.exit_code is None else f"exit {self.exit_code}"
        peak, limit = format_bytes(self.peak_bytes), format_bytes(self.case.budget_bytes)
        parts = [f"{ended}, peak {peak} of {limit}"]
        if self.refused or self.recovered:
            parts.append("refused" if self.refused else "an error, then equal output again")
        if self.stats:
            parts.append(f"{self.stats['decode_tok_s']:.2f} tok/s")
        if self.stats.get("drafted_tokens"):
            right, made = self.stats["accepted_tokens"], self.stats["drafted_tokens"]
            parts.append(f"guessed {right} of {made}")
        if self.read_share is not None:
            parts.append(f"{100 * self.read_share:.0f} % of the device")
        return ", ".join([*parts, f"{self.seconds:.1f} s"])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = {k: v for k, v in self.found.items() if k not in ("tokens", "stats")}
        first = self.first_token or (None, None)
        return {
            **asdict(self.case), "judged_by": self.judged_by, "exit_code": self.exit_code,
            "peak_bytes": self.peak_bytes, "over": self.over, "limit_hits": self.limit_hits,
            "seconds": self.seconds, "device_bytes_per_s": self.device_bytes_per_s,
            "read_share": self.read_share, "roof_share": self.roof_share,
            "resident_share": self.resident_share, "prediction_error": self.prediction,
            "tokens_per_pass": self.tokens_per_pass,
            "first_token_bound_seconds": first[1], "growth_bytes": self.growth_bytes,
            "message": self.message, "tokens": self.found.get("tokens", []), "stats": self.stats,
            "found": found,
        }  # fmt: skip


class Task(NamedTuple):
    """What a worker is told."""

    path: str
    budgets: list[int]  # one an engine; each counts the engines before it
    context_length: int
    threads: int | None
    kv_cache_type: str
    verify_checksums: bool
    prompt_tokens: int
    max_tokens: int
    live: tuple[int, ...]
    fault: str
    fault_number: int
    sampling: dict[str, Any]  # options of `generate`
    started: float  # of `time.monotonic`, which all processes share


def _command(case: Case) -> list[str]:
    engines = case.engines
    task = Task(
        path=str(case.model),
        budgets=[case.budget_bytes * (i + 1) // engines for i in range(engines)],
        context_length=case.context_length,
        threads=case.threads,
        kv_cache_type=case.kv_cache_type,
        verify_checksums=case.verify_checksums,
        prompt_tokens=case.prompt_tokens,
        max_tokens=case.max_tokens,
        live=case.live,
        fault=case.fault,
        fault_number=case.fault_number,
        sampling={
            "temperature": case.temperature,
            "seed": case.seed,
            "speculate": case.speculate,
        },
        started=time.monotonic(),
    )
    return [sys.executable, "-m", "edgert.cli.stress_worker", json.dumps(task._asdict())]


def open_group(limit_bytes: int, read_rate: int, disk: Path) -> MemoryGroup | None:
    """A group for a run; None, said on stderr, where no memory can be limited.

    Raises `EdgertError` when it is the disk that cannot be slowed.
    """
    try:
        return MemoryGroup(limit_bytes, read_rate=read_rate, disk=disk)
    except MemoryGroupError as error:
        if read_rate:
            raise edgert.EdgertError(f"--disk-rate needs a control group: {error}") from None
        note(f"no control group ({error}); sampling the resident size instead")
        return None


def run_case(case: Case, time_limit: float) -> Run:
    """Try a case. A floor that the process itself finds higher than planned is taken over."""
    run = _try(case, time_limit)
    need = run.found.get("error", {}).get("need_bytes", 0)
    if case.raised and need and run.exit_code == 5:  # a share: nobody named this size
        run = _try(replace(case, budget_bytes=need * case.engines), time_limit)
    return run


def _try(case: Case, time_limit: float) -> Run:
    run = Run(case)
    drop_page_cache(edgert.read_manifest(case.model).files)
    group = open_group(case.budget_bytes, case.disk_rate, case.model)
    run.judged_by = group.kind if group else _SAMPLED
    probed = not case.resident and not case.fault
    with group or nullcontext():
        rates = [probe_disk(case.model, group)] if probed else []
        _watch(run, group, time_limit)
        rates += [probe_disk(case.model, group)] if probed else []
    run.device_bytes_per_s = sum(rates) / 2 if all(rates) else 0.0
    return run


def probe_disk(path: Path, group: MemoryGroup | None) -> float:
    """Direct-read rate in bytes/s as a process in the group sees it now; 0 if it cannot."""
    argv = [sys.executable, "-I", "-S", str(_PROBE), str(path), str(_PROBE_SECONDS)]
    done = subprocess.run(_within(group, argv), capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else 0.0


def _within(group: MemoryGroup | None, argv: Sequence[str]) -> list[str]:
    return group.command(argv) if group else list(argv)


def _watch(run: Run, group: MemoryGroup | None, time_limit: float) -> None:
    import psutil

    argv = _within(group, _command(run.case))
    begin = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=errors)
        in_time = True
        try:
            process = psutil.Process(child.pid)
            while child.poll() is None and in_time:
                try:
                    now = group.current_bytes() if group else process.memory_info().rss
                    run.peak_bytes = max(run.peak_bytes, now)
                except (psutil.Error, OSError):
                    pass  # it ended between the two calls
                time.sleep(_POLL_SECONDS)
                in_time = time.monotonic() < begin + time_limit
        finally:
            child.kill()
            child.wait()
        run.exit_code = child.returncode if in_time else None
        run.seconds = time.monotonic() - begin
        if group:
            run.peak_bytes = group.peak_bytes() or run.peak_bytes
            run.limit_hits = group.limit_hits()
        out.seek(0)
        errors.seek(0)
        answer = out.read()
        if in_time and answer:
            run.found = json.loads(answer)
        if not in_time:
            run.message = f"it did not end within {time_limit:.0f} s"
        elif run.exit_code != 0:
            lines = errors.read().decode("utf-8", "replace").strip().splitlines()
            known = run.found.get("error", {}).get("text", "")
            run.message = known or (lines[-1] if lines else "")
