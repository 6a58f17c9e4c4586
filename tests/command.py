"""The `edgert` command as a child process, for tests."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgert.cli.main import main

ROOT = Path(__file__).parents[1]
STATS = (
    r"# \d+ tok  prefill [\d.]+  decode [\d.]+ tok/s(  read [\d.]+ MiB/tok  [\d.]+ GB/s"
    r"( \(\d+ % of device\))?  stall \d+ %)?(  guessed \d+ of \d+)?"
    r"  peak [\d.]+ [MG]iB  seed \d+  #[0-9a-f]{8}"
)


def argv(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "edgert", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """The environment without our variables, with the checkout first on the path; nothing is
    learnt of a model, whose next run would differ."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("EDGERT_")}
    kept.pop("NO_COLOR", None)
    ours = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    learning = {"EDGERT_EXPERT_PROFILE": "off", "EDGERT_ACCEPTANCE": "off"}
    return kept | ours | learning | more


def edgert(
    *arguments: object, stdin: bytes = b"", env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run to the end; stdout and stderr as text."""
    run = subprocess.run(
        argv(*arguments),
        input=stdin,
        capture_output=True,
        env=environment(**(env or {})),
        timeout=150,
        **options,
    )
    return subprocess.CompletedProcess(
        run.args, run.returncode, run.stdout.decode(), run.stderr.decode()
    )


def inside(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    """As `edgert`, in this process: for what ends before a model is loaded, 1 s faster."""
    streams = [io.TextIOWrapper(io.BytesIO(data), "utf-8") for data in (stdin, b"", b"")]
    before, handler = (sys.stdin, sys.stdout, sys.stderr), signal.getsignal(signal.SIGINT)
    words = [str(argument) for argument in arguments]
    sys.stdin, sys.stdout, sys.stderr = streams
    try:
        main(words)
    except SystemExit as end:
        assert isinstance(end.code, int)
        code = end.code
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
        signal.signal(signal.SIGINT, handler)
    texts = []
    for stream in streams[1:]:
        stream.flush()
        assert isinstance(stream.buffer, io.BytesIO)
        texts.append(stream.buffer.getvalue().decode())
    return subprocess.CompletedProcess(words, code, *texts)


def assert_error(run: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One `error:` line with these words, nothing on stdout, no traceback."""
    assert run.returncode == code, run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, run.stderr
    for word in words:
        assert word in lines[0], run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
