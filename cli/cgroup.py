"""A hard memory limit around a child process: a Linux control group, v1 or v2.

Owns: making a group, joining a command to it, its peak, removing it. Must not know what runs
inside. Everything the kernel charges to the group counts, page cache included, and swap is off,
so the peak read here is the judge of the memory promise, not the process's own word.
Source: kernel documentation, cgroup-v1/memory.rst and cgroup-v2.rst.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

__all__ = ["MemoryGroup", "MemoryGroupError", "drop_page_cache"]

_MOUNT = Path("/sys/fs/cgroup")


class MemoryGroupError(Exception):
    """This machine or this user cannot have a memory group; the message says why."""


class MemoryGroup:
    """A control group with a limit of `limit_bytes` and no swap; remove it with `close`.

    Raises `MemoryGroupError` when none can be made.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        version_2 = (_MOUNT / "cgroup.controllers").exists()
        self.kind = "cgroup v2" if version_2 else "cgroup v1"
        self._peak_name = "memory.peak" if version_2 else "memory.max_usage_in_bytes"
        reasons = []
        for parent in _parents_v2() if version_2 else _parents_v1():
            self._path = parent / f"edgert-stress-{os.getpid()}-{time.monotonic_ns()}"
            try:
                self._path.mkdir()
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror}")
                continue
            try:
                self._limit_v2() if version_2 else self._limit_v1()
                return
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror}")
                self.close()
        raise MemoryGroupError("; ".join(reasons) or "no memory control group is mounted")

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv` as a command that first joins the group, so that all its memory is charged."""
        join = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", join, str(self._path / "cgroup.procs"), *argv]

    def peak_bytes(self) -> int | None:
        """The most that was ever charged; None where the kernel (before 5.19) keeps no peak."""
        try:
            return int((self._path / self._peak_name).read_text())
        except OSError:
            return None

    def current_bytes(self) -> int:
        """What is charged now."""
        name = "memory.current" if self.kind == "cgroup v2" else "memory.usage_in_bytes"
        return int((self._path / name).read_text())

    def close(self) -> None:
        """End what still runs inside and remove the group. May be called again."""
        for _ in range(100):  # the kernel needs a moment after the last process has gone
            for process in self._processes():
                try:
                    os.kill(process, 9)
                except ProcessLookupError:
                    continue
            try:
                self._path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.02)

    def _processes(self) -> list[int]:
        try:
            return [int(line) for line in (self._path / "cgroup.procs").read_text().split()]
        except OSError:
            return []

    def _limit_v1(self) -> None:
        (self._path / "memory.limit_in_bytes").write_text(str(self.limit_bytes))
        try:
            (self._path / "memory.swappiness").write_text("0")
            swap = self._path / "memory.memsw.limit_in_bytes"
            if swap.exists():
                swap.write_text(str(self.limit_bytes))
        except OSError:
            pass  # a kernel without swap accounting; the limit itself holds

    def _limit_v2(self) -> None:
        (self._path / "memory.max").write_text(str(self.limit_bytes))
        swap = self._path / "memory.swap.max"
        if swap.exists():
            swap.write_text("0")


def _own_path(controller: str) -> str:
    """The path of this process's own group in the hierarchy of `controller` ("" is v2)."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return path
    return "/"


def _parents_v1() -> Iterator[Path]:
    mount = _MOUNT / "memory"
    if not mount.is_dir():
        return
    own = mount / _own_path("memory").lstrip("/")
    if own != mount and own.is_dir():
        yield own
    yield mount


def _parents_v2() -> Iterator[Path]:
    """Groups that may hold ours. A group with processes of its own cannot limit children, so
    the search starts beside the own group, not inside it.
    """
    own = _MOUNT / _own_path("").lstrip("/")
    for parent in (own.parent, _MOUNT):
        if _MOUNT not in (parent, *parent.parents):
            continue
        try:
            enabled = (parent / "cgroup.subtree_control").read_text().split()
            if "memory" not in enabled:
                (parent / "cgroup.subtree_control").write_text("+memory")
        except OSError:
            continue
        yield parent


def drop_page_cache(paths: Sequence[Path]) -> bool:
    """Ask the kernel to forget the cached pages of `paths`; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True
