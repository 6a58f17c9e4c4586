"""What the machine gives this process: memory, cores, and what it uses of them.

Owns: cgroup v1 and v2 limits, free memory and pressure on it, resident and peak memory, the default
thread count. Must not know models or plans. Only reads; nothing here changes the machine, except
`release_cache`, which gives clean file pages back, and `trim_heap`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from edgert.units import MIB

__all__ = [
    "CgroupMemory",
    "ProcessMemory",
    "allowed_cores",
    "available_bytes",
    "cgroup_limit_bytes",
    "cgroup_memory",
    "cgroup_usage_bytes",
    "cpu_quota",
    "default_threads",
    "high_events",
    "memory_domains",
    "memory_stall_seconds",
    "peak_bytes",
    "process_memory",
    "release_cache",
    "resident_bytes",
    "trim_heap",
]

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60  # v1 writes "no limit" as a number near 2^63
_MARGIN = 0.10  # of what is free, left to others when no budget is given
_MARGIN_MIN = 256 * MIB


def _cgroup_paths(controller: str) -> list[Path]:
    """Folders of this process's cgroup and its ancestors for a controller, v2 or v1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = _CGROUP if not controllers else _CGROUP / controller
        if controllers and not root.is_dir():
            root = _CGROUP / controllers  # "cpu,cpuacct" where nobody made the short names
        if (not controllers and (_CGROUP / "cgroup.controllers").exists()) or (
            controller in controllers.split(",")
        ):
            leaf = root / path.lstrip("/")
            found = [leaf, *leaf.parents]
            return [p for p in found if p.is_relative_to(root) and p.is_dir()]
    return []


def _read_int(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def cgroup_limit_bytes() -> int | None:
    """The smallest memory limit of the enclosing cgroups, or None when there is none."""
    limits = []
    for folder in _cgroup_paths("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            value = _read_int(folder / name)
            if value is not None and value < _UNLIMITED:
                limits.append(value)
    return min(limits) if limits else None


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """What the kernel charges to this process's own cgroup, everybody in it included."""

    usage_bytes: int  # the sum that is held against the limit
    anonymous_bytes: int
    file_bytes: int  # page cache: libraries too, mapped or not, where this group read them first
    kernel_bytes: int  # page tables, sockets and the like


def cgroup_usage_bytes() -> int | None:
    """What the innermost memory cgroup of this process is charged, or None without one."""
    for folder in _cgroup_paths("memory")[:1]:
        return _read_int(folder / "memory.current") or _read_int(folder / "memory.usage_in_bytes")
    return None


def cgroup_memory() -> CgroupMemory | None:
    """The innermost memory cgroup's figures, v1 or v2, or None without one."""
    usage = cgroup_usage_bytes()
    if usage is None:
        return None
    folder = _cgroup_paths("memory")[0]
    stat: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text().splitlines():
            key, value = line.split()
            stat[key] = int(value)
    kernel = stat.get("kernel", 0) or _read_int(folder / "memory.kmem.usage_in_bytes") or 0
    anonymous = stat.get("anon", stat.get("total_rss", 0))
    return CgroupMemory(usage, anonymous, stat.get("file", stat.get("total_cache", 0)), kernel)


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """The resident size of this process and its parts; parts are 0 where the system has none."""

    resident_bytes: int
    anonymous_bytes: int = 0
    file_bytes: int = 0
    shared_bytes: int = 0


def process_memory() -> ProcessMemory:
    """This process's memory in DRAM now, from one reading."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/self/status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        names = ("VmRSS", "RssAnon", "RssFile", "RssShmem")
        parts = [1024 * int(values[name].split()[0]) for name in names]
        return ProcessMemory(*parts)
    return ProcessMemory(resident_bytes())


def _cgroup_domains() -> list[tuple[int, int]]:
    """(free, limit) of each enclosing cgroup with a limit; clean file pages count as free."""
    found = []
    for folder in _cgroup_paths("memory"):
        limit = _read_int(folder / "memory.max") or _read_int(folder / "memory.limit_in_bytes")
        used = _read_int(folder / "memory.current") or _read_int(folder / "memory.usage_in_bytes")
        if limit is None or used is None or limit >= _UNLIMITED:
            continue
        reclaimable = 0
        with contextlib.suppress(OSError, ValueError):
            for line in (folder / "memory.stat").read_text().splitlines():
                key, value = line.split()
                if key in ("inactive_file", "total_inactive_file"):
                    reclaimable = int(value)
        found.append((limit - used + reclaimable, limit))
    return found


def _cgroup_free_bytes() -> int | None:
    """Room left under the tightest cgroup limit."""
    return min((free for free, _ in _cgroup_domains()), default=None)


def memory_domains() -> list[tuple[int, int]]:
    """(free bytes, all bytes) of the machine and of each enclosing cgroup with a limit."""
    machine = psutil.virtual_memory()
    return [(int(machine.available), int(machine.total)), *_cgroup_domains()]


def memory_stall_seconds() -> float:
    """Time since the start in which some task of the cgroup, or of the machine where there is no
    such group, waited for memory (pressure stall information); 0 where the kernel does not say.
    """
    own = [folder / "memory.pressure" for folder in _cgroup_paths("memory")[:1]]
    for path in (*own, Path("/proc/pressure/memory")):
        with contextlib.suppress(OSError, ValueError):
            line = path.read_text().partition("\n")[0]  # some avg10=0.00 ... total=MICROSECONDS
            return int(line.rpartition("total=")[2]) / 1e6
    return 0.0


def high_events() -> int:
    """How often the cgroup went above its `memory.high`; 0 where it has none (cgroup v1)."""
    with contextlib.suppress(OSError, ValueError):
        for folder in _cgroup_paths("memory")[:1]:
            for line in (folder / "memory.events").read_text().splitlines():
                if line.startswith("high "):
                    return int(line.split()[1])
    return 0


def available_bytes() -> int:
    """A budget for this process when none is given: what is free, its own memory included.

    A tenth, and at least 256 MiB where there is room for it, is left to other programs; inside a
    cgroup, which holds nobody else, a twentieth.
    """
    own = resident_bytes()
    machine = int(psutil.virtual_memory().available) + own
    budget = machine - max(int(machine * _MARGIN), min(_MARGIN_MIN, machine // 4))
    group = _cgroup_free_bytes()
    if group is not None:
        budget = min(budget, int((group + own) * (1 - _MARGIN / 2)))
    return budget


def allowed_cores() -> int:
    """Cores this process may run on: its CPU affinity where the system has one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Cores' worth of time that the enclosing cgroups grant, the smallest; None without a limit."""
    quotas = []
    for folder in _cgroup_paths("cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                quotas.append(int(quota) / int(period))
        quota_us = _read_int(folder / "cpu.cfs_quota_us")
        period_us = _read_int(folder / "cpu.cfs_period_us")
        if quota_us and period_us and quota_us > 0:
            quotas.append(quota_us / period_us)
    return min(quotas) if quotas else None


def default_threads() -> int:
    """Cores this process may use: CPU affinity, cut to the cgroup's CPU quota, at least 1.

    A part of a core is left: a thread more than the quota would stop all of them for the rest of
    each period, as they wait for each other.
    """
    quota = cpu_quota()
    cores = allowed_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def resident_bytes() -> int:
    """Memory of this process in DRAM now: anonymous pages, and file pages it has mapped."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most memory this process has had in DRAM so far."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(psutil.Process().memory_info().peak_wset)


def trim_heap() -> None:
    """Give free heap pages back to the system (glibc keeps them otherwise)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def release_cache() -> None:
    """Drop unmapped clean pages of the libraries and modules loaded, where a cgroup counts them.

    A cold start reads some 100 MiB of library files ahead of what it maps, and the cgroup of the
    reader is charged for it. Does nothing outside a limited cgroup: other programs may want them.
    """
    if cgroup_limit_bytes() is None or not hasattr(os, "posix_fadvise"):
        return
    paths = {getattr(m, "__cached__", None) for m in list(sys.modules.values())}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            parts = line.split(maxsplit=5)
            if len(parts) == 6 and parts[5].startswith("/"):
                paths.add(parts[5])
    for path in paths:
        if not path:
            continue
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
