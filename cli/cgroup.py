"""A hard memory limit around a child process, and a slow disk: a Linux control group, v1 or v2.

Owns: making a group, joining a command to it, its peak, removing it. Must not know what runs
inside. Everything the kernel charges to the group counts, page cache included, and swap is off,
so the peak read here is the judge of the memory promise, not the process's own word.
Source: kernel documentation, cgroup-v1/memory.rst, cgroup-v1/blkio-controller.rst, cgroup-v2.rst.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

__all__ = ["MemoryGroup", "MemoryGroupError", "device_of", "drop_page_cache"]

_MOUNT = Path("/sys/fs/cgroup")


class MemoryGroupError(Exception):
    """This machine or this user cannot have a memory group; the message says why."""


class MemoryGroup:
    """A control group with a limit of `limit_bytes` and no swap; remove it with `close`.

    With `read_rate` (bytes/s) the disk under the file `disk` is read no faster than that from
    inside; that asks for a group of its own under v1. Raises `MemoryGroupError` when none can be
    made.
    """

    def __init__(
        self, limit_bytes: int, *, read_rate: int = 0, disk: str | Path | None = None
    ) -> None:
        self.limit_bytes = limit_bytes
        self._paths: list[Path] = []  # of the memory group, and under v1 of the one for the disk
        version_2 = (_MOUNT / "cgroup.controllers").exists()
        self.kind = "cgroup v2" if version_2 else "cgroup v1"
        self._peak_name = "memory.peak" if version_2 else "memory.max_usage_in_bytes"
        rate = f"{device_of(disk)} {{}}{read_rate}" if read_rate and disk is not None else ""
        try:
            if version_2:
                files = {"memory.max": str(limit_bytes)}
                if rate:
                    files["io.max"] = rate.format("rbps=")
                self._make(_parents_v2("memory", *(["io"] if rate else [])), files)
                self._without_swap_v2()
            else:
                self._make(_parents_v1("memory"), {"memory.limit_in_bytes": str(limit_bytes)})
                self._without_swap_v1()
                if rate:
                    throttle = {"blkio.throttle.read_bps_device": rate.format("")}
                    self._make(_parents_v1("blkio"), throttle)
        except MemoryGroupError:
            self.close()
            raise

    def _make(self, parents: Iterable[Path], files: dict[str, str]) -> None:
        """A new group below the first parent that allows it, with these settings."""
        reasons = []
        for parent in parents:
            path = parent / f"edgert-stress-{os.getpid()}-{time.monotonic_ns()}"
            try:
                path.mkdir()
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror}")
                continue
            self._paths.append(path)
            try:
                for name, value in files.items():
                    (path / name).write_text(value)
                return
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror}")
                _remove(self._paths.pop())
        raise MemoryGroupError("; ".join(reasons) or "the control group is not mounted")

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
        joins = [str(path / "cgroup.procs") for path in self._paths]
        join = "".join('echo $$ > "$1" && shift && ' for _ in joins) + 'exec "$@"'
        return ["sh", "-c", join, "sh", *joins, *argv]

    def peak_bytes(self) -> int | None:
        """The most that was ever charged; None where the kernel (before 5.19) keeps no peak."""
        try:
            return int((self._paths[0] / self._peak_name).read_text())
        except OSError:
            return None

    def limit_hits(self) -> int:
        """How often the limit was met, so that the kernel had to reclaim."""
        if self.kind == "cgroup v1":
            return int((self._paths[0] / "memory.failcnt").read_text())
        events = (self._paths[0] / "memory.events").read_text().split()
        return int(dict(zip(events[::2], events[1::2], strict=True))["max"])

    def current_bytes(self) -> int:
        """What is charged now."""
        name = "memory.current" if self.kind == "cgroup v2" else "memory.usage_in_bytes"
        return int((self._paths[0] / name).read_text())

    def close(self) -> None:
        """End what still runs inside and remove the group. May be called again."""
        while self._paths:
            _remove(self._paths[-1])
            self._paths.pop()

    def _without_swap_v1(self) -> None:
        memory = self._paths[0]
        try:
            (memory / "memory.swappiness").write_text("0")
            swap = memory / "memory.memsw.limit_in_bytes"
            if swap.exists():
                swap.write_text(str(self.limit_bytes))
        except OSError:
            pass  # a kernel without swap accounting; the limit itself holds

    def _without_swap_v2(self) -> None:
        swap = self._paths[0] / "memory.swap.max"
        if swap.exists():
            swap.write_text("0")


def _remove(group: Path) -> None:
    for _ in range(100):  # the kernel needs a moment after the last process has gone
        try:
            for process in (group / "cgroup.procs").read_text().split():
                os.kill(int(process), signal.SIGKILL)
        except OSError:
            pass  # it has ended by itself
        try:
            group.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)


def device_of(path: str | Path) -> str:
    """MAJOR:MINOR of the whole disk that holds a file. Raises `MemoryGroupError`."""
    number = os.stat(path).st_dev
    if os.major(number) == 0:  # btrfs and overlays give made-up numbers: ask the mount table
        number = os.stat(_mounted_from(Path(path).resolve())).st_rdev
    device = f"{os.major(number)}:{os.minor(number)}"
    folder = Path("/sys/dev/block", device)
    if not folder.exists():
        raise MemoryGroupError(f"{path} does not lie on a disk that can be slowed")
    if (folder / "partition").exists():
        device = (folder.resolve().parent / "dev").read_text().strip()
    return device


def _mounted_from(path: Path) -> str:
    """The device file that the mount of `path` names."""
    found = ("", "")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point, source = line.split()[4], line.partition(" - ")[2].split()[1]
        if path.is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, source)
    if not found[1].startswith("/dev/"):
        raise MemoryGroupError(f"{path} does not lie on a disk that can be slowed")
    return found[1]


def _own_path(controller: str) -> str:
    """The path of this process's own group in the hierarchy of `controller` ("" is v2)."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return path
    return "/"


def _parents_v1(controller: str) -> Iterator[Path]:
    mount = _MOUNT / controller
    if not mount.is_dir():
        return
    own = mount / _own_path(controller).lstrip("/")
    if own != mount and own.is_dir():
        yield own
    yield mount


def _parents_v2(*controllers: str) -> Iterator[Path]:
    """Groups that may hold ours. A group with processes of its own cannot limit children, so
    the search starts beside the own group, not inside it.
    """
    own = _MOUNT / _own_path("").lstrip("/")
    for parent in (own.parent, _MOUNT):
        if _MOUNT not in (parent, *parent.parents):
            continue
        try:
            enabled = (parent / "cgroup.subtree_control").read_text().split()
            for name in controllers:
                if name not in enabled:
                    (parent / "cgroup.subtree_control").write_text(f"+{name}")
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
