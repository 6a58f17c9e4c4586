"""Measuring a device profile: the disk, memory, both at once, and the kernels of one model.

Owns: what is measured and for how long. Must not know what the figures are for. Takes some two
seconds and up to 300 MiB; only what the kept profile lacks is measured. One run at a time gives
good figures: whatever else the machine does is measured with it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from edgert.bench_harness import Case, read_case
from edgert.compiling import compile_apart
from edgert.device_profile import (
    LATENCY_READ,
    SAMPLE_BYTES,
    SATURATING,
    SMALL_READ,
    DeviceProfile,
    KernelRate,
    ReadRate,
    load_profile,
    save_profile,
)
from edgert.kernel_bench import Matrices
from edgert.machine import available_bytes
from edgert.opening import Opened
from edgert.quant.formats import FORMATS
from edgert.storage.backend import FileBackend
from edgert.storage.device import measure_read_rate
from edgert.threads import ThreadTeam
from edgert.units import MIB

__all__ = ["ensure_profile"]

Progress = Callable[[str, int, int], object]
REQUESTS = (LATENCY_READ, MIB, 2 * MIB)
READERS = (1, 4, 6)
_SECONDS = 0.06  # of one rate
_ROUNDS = 2
_REST_SECONDS = 0.1
_TRIALS = 3
_OPS = 200
_ARENA_BYTES = 256 * MIB  # far more than any cache
_ARENA_LEAST = 64 * MIB


def ensure_profile(
    opened: Opened,
    threads: int,
    on_progress: Progress | None = None,
    *,
    fresh: bool = False,
) -> tuple[DeviceProfile, bool]:
    """The profile for a model's disk and formats, measured where it is missing or due.

    With `fresh` all is measured again. True beside it when it could be kept. Compiles the kernels
    of the model if they are not yet. Raises `StorageError` when the model cannot be read.
    """
    files, size = opened.manifest.files, sum(opened.manifest.file_bytes)
    wanted = opened.kernel_set("f16")
    found = None if fresh else load_profile(files, threads)
    if found and found.covers(wanted.formats) and found.covers_disk(size):
        return found, True
    for name, done, total in compile_apart(wanted, None):
        if on_progress:
            on_progress(f"compile {name}", done, total)
    if on_progress:
        on_progress("measuring the disk, memory and kernels", 0, 1)
    with _bench(threads) as bench:
        if found is None:
            found = bench.machine(size)
        new = [name for name in wanted.formats if name not in found.kernels]
        found = bench.kernels(found, new)
        if not found.reads or not found.covers_disk(size):
            backend = FileBackend(files, file_bytes=opened.manifest.file_bytes)
            try:
                found = bench.disk(found, backend, size)
            finally:
                backend.close()
            found = bench.kernels(found, new)
    return found, save_profile(found, files)


@contextmanager
def _bench(threads: int) -> Iterator[_Bench]:
    bench = _Bench(threads)
    try:
        yield bench
    finally:
        bench.team.close()
        bench.alone.close()


class _Bench:
    """A team, a team of one, and memory to work on."""

    def __init__(self, threads: int) -> None:
        self.team, self.alone = ThreadTeam(threads), ThreadTeam(1)
        room = max(_ARENA_LEAST, min(_ARENA_BYTES, available_bytes() // 4))
        self.arena: npt.NDArray[np.uint8] = np.ones(room // MIB * MIB, np.uint8)
        self.sums = np.zeros((threads, 16), np.int32)
        self.reading = read_case(self.team, self.arena, self.sums)
        self.matrices = Matrices(self.team, self.alone, self.arena)

    def machine(self, sample_bytes: int) -> DeviceProfile:
        """A profile without disk and kernels."""
        memory = self.reading.nbytes / _seconds(self.reading)
        return DeviceProfile(
            threads=self.team.threads, measured_at=time.time(), direct=True,
            sample_bytes=sample_bytes, reads=(), burst_bytes_per_s=0.0, busy_read_bytes_per_s=0.0,
            busy_memory_share=1.0, memory_bytes_per_s=memory,
            op_seconds=float("inf"), kernels={},
        )  # fmt: skip

    def disk(self, profile: DeviceProfile, backend: FileBackend, size: int) -> DeviceProfile:
        """The rates of reads: alone by size and readers, and beside computing."""

        def rate(request: int, readers: int, seconds: float = _SECONDS) -> float:
            return measure_read_rate(
                backend, request_bytes=request, threads=readers, seconds=seconds
            )

        bursts = []
        for _ in range(_ROUNDS):
            time.sleep(_REST_SECONDS)
            bursts.append(rate(*SATURATING, _SECONDS / 2))
        rate(*SATURATING, 2 * _SECONDS)  # not counted: what a throttled disk grants is used up
        points = [(SMALL_READ, 1), *((n, readers) for n in REQUESTS for readers in READERS)]
        found = [[rate(*point) for point in points] for _ in range(_ROUNDS)]
        means = [sum(rates) / _ROUNDS for rates in zip(*found, strict=True)]
        reads = tuple(ReadRate(*p, mean) for p, mean in zip(points, means, strict=True))
        alone = self.reading.nbytes / self.reading.seconds()
        busy, memory = self._busy(partial(rate, *SATURATING, 4 * _SECONDS))
        return replace(
            profile, direct=backend.direct, reads=reads,
            sample_bytes=min(size, SAMPLE_BYTES), burst_bytes_per_s=max(bursts),
            busy_read_bytes_per_s=busy,
            busy_memory_share=min(memory / alone, 1.0), measured_at=time.time(),
            disk_drifted=False,
        )  # fmt: skip

    def _busy(self, reads: Callable[[], float]) -> tuple[float, float]:
        """(bytes read a second from the disk, and from memory) with both at once."""
        with ThreadPoolExecutor(1, "edgert-busy") as pool:
            rate = pool.submit(reads)
            begin, walks = time.perf_counter(), 0
            while not rate.done():
                self.team.run(self.reading.program)
                walks += 1
            seconds = time.perf_counter() - begin
            return rate.result(), max(walks, 1) * self.reading.nbytes / seconds

    def kernels(self, profile: DeviceProfile, names: Sequence[str]) -> DeviceProfile:
        """The profile with the mean of what was and is now measured of formats.

        Called twice, apart in time: memory gives another rate from one second to the next.
        """
        rates = dict(profile.kernels)
        small = profile.op_seconds
        for name in names:
            now = self.kernel(name)
            before = rates.get(name, now)
            rates[name] = KernelRate(
                (before.token_bytes_per_s + now.token_bytes_per_s) / 2,
                (before.batch_macs_per_s + now.batch_macs_per_s) / 2,
                (before.repack_bytes_per_s + now.repack_bytes_per_s) / 2,
            )
            small = min(small, _seconds(self.matrices.small_case(FORMATS[name], _OPS)) / _OPS)
        return replace(profile, kernels=rates, op_seconds=small)

    def kernel(self, name: str) -> KernelRate:
        """How fast the kernels of a format are."""
        self.matrices.fill(FORMATS[name])
        token, batch = self.matrices.limit_cases(FORMATS[name])
        return KernelRate(
            token_bytes_per_s=token.nbytes / _seconds(token),
            batch_macs_per_s=batch.macs / _seconds(batch),
            repack_bytes_per_s=1e9 * self.matrices.repack(FORMATS[name], _TRIALS).gb_s,
        )


def _seconds(case: Case) -> float:
    case.seconds()  # not counted: pages are touched
    return statistics.median(case.seconds() for _ in range(_TRIALS))
