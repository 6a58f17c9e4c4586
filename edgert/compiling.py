"""Compiling kernels without holding the compiler's memory: in child processes, once.

Owns: knowing what is compiled already, and running the children. Imports no Numba.

LLVM keeps what it allocates: after compiling a model's kernels a process holds about 110 MiB more
than one that loads them from the cache (218 against 106 MiB measured). Under a memory budget that
is too dear, so a cold cache is filled by a child process that exits, before this process has
loaded Numba itself; by several at once where cores and memory allow (compiling takes one core, and
a child 0.4 s to start). Where a budget is small, each child compiles one kernel only.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO

from edgert.errors import EdgertError
from edgert.kept_files import keep_file
from edgert.kernels_cpu.cache import (
    cache_root,
    can_start_python,
    child_environment,
    machine_parts,
    read_note,
    target_note,
    use_temporary_root,
    writable,
)
from edgert.machine import available_bytes, default_threads
from edgert.units import MIB, format_bytes

__all__ = ["KernelSet", "compile_apart", "is_compiled"]

SMALL_BUDGET = 512 * MIB  # below it, one kernel a child
ONE_BYTES = 220 * MIB  # that a child needs for one kernel, measured
CHILD_BYTES = 512 * MIB  # of budget or free memory for each child: one holds ONE_BYTES and more
MOST_CHILDREN = 4  # a model needs about a dozen kernels
_ALL = 2**20
_KILLED = -9  # SIGKILL, which not every system has a name for
# With Numba first, so that no stand-in takes its place (kernels_cpu/compiler.py).
_CHILD = "import sys, numba; from edgert.kernels import main; main(sys.argv[1:])"


@dataclass(frozen=True, slots=True)
class KernelSet:
    """What a model needs: formats of its matrices by name, KV cache type, routed experts or not."""

    formats: tuple[str, ...]
    kv_cache_type: str
    experts: bool
    splits: tuple[str, ...] = ()  # of nested matrices: bits of a base and of the parts beside it

    def __str__(self) -> str:
        kind = "moe" if self.experts else "dense"
        return ",".join([self.kv_cache_type, kind, *self.formats, *self.splits])

    @classmethod
    def parse(cls, text: str) -> KernelSet:
        """The inverse of `str`."""
        kv, kind, *names = text.split(",")
        formats, splits = (tuple(n for n in names if ("+" in n) == has) for has in (False, True))
        return cls(formats, kv, kind == "moe", splits)


def _stamp(wanted: KernelSet) -> Path:
    """The file that says a set is compiled."""
    key = hashlib.sha256("\0".join([*machine_parts(), str(wanted)]).encode()).hexdigest()[:20]
    return cache_root() / f"ready-{key}"


def is_compiled(wanted: KernelSet) -> bool:
    """True when the kernels are in the user's cache."""
    note = read_note(_stamp(wanted))
    return note is not None and note.folder.is_absolute() and note.folder.is_dir()


def compile_apart(wanted: KernelSet, budget_bytes: int | None) -> Iterator[tuple[str, int, int]]:
    """Fill the cache from child processes unless it is full: (name, number done, number).

    Where the user's cache cannot be written, the children fill a temporary one for this process.
    What no child can do (no process can be started) is left to this process, whose memory is then
    measured with the compiler in it. Raises `EdgertError` where the system kills even a child that
    compiles one kernel, as a control group with little memory does: it would kill this one too.
    """
    if is_compiled(wanted) or not can_start_python():
        return
    if not writable(cache_root()):
        use_temporary_root()
    one_by_one = budget_bytes is not None and budget_bytes < SMALL_BUDGET
    step = 1 if one_by_one else _children(budget_bytes)
    done, total, note = 0, 1, ""
    while done < total:
        # Every child takes every `step`-th kernel: dear ones stand together.
        firsts = range(done, done + step)
        stop = done + 1 if one_by_one else _ALL
        try:
            ended = yield from _round(wanted, [(first, stop, step) for first in firsts])
        except _Killed:
            if one_by_one:
                raise EdgertError(
                    "the system killed the process that compiles kernels, as it does where memory "
                    f"is short: compiling takes about {format_bytes(ONE_BYTES)}; run edgert warmup "
                    "where that is allowed, then this again"
                ) from None
            one_by_one, step = True, 1
            continue
        if ended is None:
            return
        note, total = ended
        done = min(stop, total)
    for path in (_stamp(wanted), target_note()):
        _keep_note(path, note)


def _children(budget_bytes: int | None) -> int:
    """How many compile at once: as the cores and the memory allow."""
    room = available_bytes() if budget_bytes is None else min(budget_bytes, available_bytes())
    return max(1, min(default_threads(), MOST_CHILDREN, room // CHILD_BYTES))


class _Killed(Exception):
    """The system killed a child: memory was short."""


_Part = tuple[int, int, int]  # first, stop, step: numbers of the kernels that a child compiles


def _start(wanted: KernelSet, part: _Part) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", _CHILD, str(wanted), *map(str, part)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=child_environment(),
    )  # fmt: skip


def _round(
    wanted: KernelSet, parts: Sequence[_Part]
) -> Generator[tuple[str, int, int], None, tuple[str, int] | None]:
    """Let a child for each part compile, all at once, and yield their progress.

    Returns the note to keep (`read_note`) and the number of all kernels, None if a child failed.
    Raises `_Killed` if one was killed.
    """
    children: list[subprocess.Popen[str]] = []
    lines: SimpleQueue[str | None] = SimpleQueue()
    ended = None
    done, running = parts[0][0], len(parts)
    try:
        for part in parts:
            children.append(_start(wanted, part))
            Thread(target=_pass_on, args=(children[-1].stdout, lines), daemon=True).start()
        while running:
            line = lines.get()
            if line is None:
                running -= 1
                continue
            name, _, count = line.rsplit(" ", 2)
            if name.startswith("= "):
                ended = name[2:], int(count)
            else:
                yield name, done, int(count)
                done += 1
    except (OSError, ValueError):  # no process can be started
        ended = None
        _end(children)
    except BaseException:  # the caller gave up: Ctrl-C, or the generator was closed
        _end(children)
        raise
    finally:
        codes = [child.wait() for child in children]
    if _KILLED in codes:
        raise _Killed
    return ended if not any(codes) else None


def _pass_on(output: IO[str], lines: SimpleQueue[str | None]) -> None:
    with output:
        for line in output:
            lines.put(line)
    lines.put(None)


def _end(children: Sequence[subprocess.Popen[str]]) -> None:
    for child in children:
        child.terminate()


def _keep_note(path: Path, note: str) -> None:
    """Note where the kernels are, and for what CPU."""
    if note and Path(note.partition("\t")[0]).is_dir():
        keep_file(path, note.encode())
