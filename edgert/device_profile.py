"""How fast this machine reads, computes and places weights: measured once, kept in a file.

Owns: the record, its file, and when a record may no longer be believed. Must not know how figures
are measured (profiling.py) nor what follows from them (prediction.py, plan_policy.py).

One file for each disk, CPU, number of threads and version of the kernels. A file that cannot be
read, or holds nonsense, counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgert.kept_files import keep_file, prune_files
from edgert.kernels_cpu.cache import cache_root, machine_parts
from edgert.units import KIB, MIB

__all__ = [
    "DeviceProfile", "KernelRate", "ReadRate", "drifted", "load_profile", "note_drift",
    "profile_path", "save_profile",
]  # fmt: skip

DAYS = 30  # a record is believed for so long
DRIFT = 0.25  # and while the disk delivers what it did, give or take this share
KEPT_FILES = 16
SMALL_READ = 4096
LATENCY_READ = 256 * KIB  # long enough that its latency is that of larger ones
SATURATING = (MIB, 4)  # size and readers from which devices deliver all they can
SAMPLE_BYTES = 256 * MIB  # a smaller file may lie in the cache of its device
_VERSION = 2


@dataclass(frozen=True, slots=True)
class ReadRate:
    """Direct reads of one size by several threads at once."""

    request_bytes: int
    readers: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class KernelRate:
    """One number format, weights from memory, all threads."""

    token_bytes_per_s: float  # weights in memory, for one token
    batch_macs_per_s: float  # multiply-adds, for many tokens at once
    repack_bytes_per_s: float  # bytes of the file, one thread


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What was measured. Rates are in bytes or multiply-adds a second, times in seconds."""

    threads: int
    measured_at: float  # seconds since 1970
    direct: bool  # False: the file system has no direct reads
    sample_bytes: int  # of the files whose reading was measured
    reads: tuple[ReadRate, ...]
    burst_bytes_per_s: float  # reads of a tenth of a second after a rest: a held disk grants more
    busy_read_bytes_per_s: float  # reads while all threads read memory
    busy_memory_share: float  # what such reads leave of the rate of memory
    memory_bytes_per_s: float
    op_seconds: float  # of a small op with its barrier
    kernels: Mapping[str, KernelRate] = field(hash=False)  # by format
    disk_drifted: bool = False  # a run met another rate: measure the disk again

    def read_bytes_per_s(self, request_bytes: int, readers: int) -> float:
        """The median of what was measured with no smaller requests and no fewer readers.

        Where that saturates the device, one short measurement is off by a fifth; their median is
        not. 1 MiB from four readers stands for everything above.
        """
        size, most = min(request_bytes, SATURATING[0]), min(readers, SATURATING[1])
        enough = [
            r.bytes_per_s for r in self.reads if r.request_bytes >= size and r.readers >= most
        ]
        return statistics.median(enough or [r.bytes_per_s for r in self.reads])

    @property
    def read_seconds(self) -> float:
        """What a small read takes, alone."""
        return next(
            (r.request_bytes / r.bytes_per_s for r in self.reads if r.request_bytes == SMALL_READ),
            0.0,
        )

    @property
    def latency_seconds(self) -> float:
        """What a read of 256 KiB takes, alone, beside moving its bytes."""
        alone = [r for r in self.reads if r.readers == 1 and r.request_bytes == LATENCY_READ]
        if not alone:
            return self.read_seconds
        moving = LATENCY_READ / self.disk_bytes_per_s
        return max(LATENCY_READ / alone[0].bytes_per_s - moving, 0.0)

    @property
    def disk_bytes_per_s(self) -> float:
        """What the disk delivers at most."""
        return self.read_bytes_per_s(*SATURATING)

    def covers_disk(self, file_bytes: int) -> bool:
        """True when the disk was measured on enough bytes to say something of a model this big."""
        return not self.disk_drifted and 2 * self.sample_bytes >= min(file_bytes, SAMPLE_BYTES)

    def covers(self, formats: Sequence[str]) -> bool:
        """True when the kernels of all these formats were measured."""
        return all(name in self.kernels for name in formats)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Any) -> DeviceProfile:
        """The inverse of `to_dict`. Raises KeyError, TypeError or ValueError for nonsense."""
        values = {name: plain[name] for name in cls.__slots__}
        values["reads"] = tuple(ReadRate(**rate) for rate in plain["reads"])
        values["kernels"] = {n: KernelRate(**rate) for n, rate in plain["kernels"].items()}
        found = cls(**values)
        rates = [found.burst_bytes_per_s, found.busy_read_bytes_per_s, found.busy_memory_share,
                 found.memory_bytes_per_s, found.op_seconds, found.sample_bytes,
                 found.measured_at, found.threads]  # fmt: skip
        rates += [v for rate in found.reads for v in asdict(rate).values()]
        rates += [v for rate in found.kernels.values() for v in asdict(rate).values()]
        good = (isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in rates)
        if not found.reads or not all(good):
            raise ValueError("a rate is not a positive number")
        return found


def drifted(profiled: float, now: float) -> bool:
    """True when a disk that was profiled at one rate delivers clearly another now."""
    return now > 0 and abs(now - profiled) > DRIFT * profiled


def profile_path(files: Sequence[Path], threads: int) -> Path:
    """The file that holds the profile for models on the disk of `files[0]`. Raises OSError."""
    device = os.stat(files[0]).st_dev
    parts = [f"{os.major(device)}:{os.minor(device)}", str(threads), str(os.cpu_count())]
    key = hashlib.sha256("\0".join([*parts, *machine_parts()]).encode()).hexdigest()[:20]
    return cache_root().parent / "devices" / f"{key}.json"


def load_profile(
    files: Sequence[Path], threads: int, now: float | None = None
) -> DeviceProfile | None:
    """The profile for this disk and machine, or None: never measured, too old, or damaged."""
    now = time.time() if now is None else now
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        plain = json.loads(profile_path(files, threads).read_text(encoding="utf-8"))
        found = DeviceProfile.from_dict(plain["profile"])
        fresh = 0 <= now - found.measured_at < DAYS * 86_400
        if plain["version"] == _VERSION and found.threads == threads and fresh:
            return found
    return None


def save_profile(profile: DeviceProfile, files: Sequence[Path]) -> bool:
    """Keep a profile; False where the cache folder cannot be written."""
    text = json.dumps({"version": _VERSION, "profile": profile.to_dict()}, indent=1)
    with contextlib.suppress(OSError):
        path = profile_path(files, profile.threads)
        if keep_file(path, text.encode()):
            prune_files(path.parent, KEPT_FILES)  # each version of the kernels leaves one behind
            return True
    return False


def note_drift(profile: DeviceProfile, files: Sequence[Path], rate: float) -> None:
    """A run streams at `rate`: if that is not what was profiled, the disk is due again."""
    if not profile.disk_drifted and drifted(profile.disk_bytes_per_s, rate):
        save_profile(replace(profile, disk_drifted=True), files)
