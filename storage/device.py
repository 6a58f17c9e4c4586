"""How fast the device under a model delivers direct reads, measured now.

Owns: the measurement. Must not know the model. The figure is what a streaming run is compared
with, so it is taken with the run's own request size and number of threads.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, count
from math import gcd

from edgert.storage.arena import Arena
from edgert.storage.backend import ALIGNMENT, Backend
from edgert.storage.manifest import Extent
from edgert.storage.reader import Bytes, ReaderTeam
from edgert.units import MIB, align_up

__all__ = ["measure_read_rate"]


def measure_read_rate(
    backend: Backend,
    *,
    request_bytes: int = 2 * MIB,
    threads: int = 4,
    seconds: float = 0.5,
    limit_bytes: int = 512 * MIB,
    staging: Sequence[Bytes] | None = None,
) -> float:
    """Bytes per second of reads of `request_bytes` from `threads` threads, spread over the files.

    Ends after `seconds` or `limit_bytes`, whichever is first. Holds `threads * request_bytes` of
    memory and gives it back, or uses the buffers in `staging`, one for each thread. Where files
    cannot be read directly, or fit the device's own cache, that is what is measured. Raises
    `StorageError`.
    """
    unit = align_up(max(request_bytes, 1), backend.alignment)
    arena = None
    if staging is None:
        arena = Arena(threads * align_up(unit, ALIGNMENT))
        staging = [arena.take(f"reader {i}", unit, ALIGNMENT) for i in range(threads)]
    requests = _spread(backend, unit)
    team = ReaderTeam(backend, staging[:threads], "edgert-rate")
    begin = time.perf_counter()

    def work(reader: int) -> None:
        while not team.stopping and time.perf_counter() < begin + seconds:
            with team.lock:
                if team.read_bytes >= limit_bytes:
                    return
                extent = next(requests)
            team.read(reader, (extent,))

    try:
        team.start([partial(work, r) for r in range(team.n_readers)])
        team.join()
        elapsed = time.perf_counter() - begin
        team.raise_if_failed()
    finally:
        team.stopping = True
        team.join()
        if arena is not None:
            arena.close()
    return team.read_bytes / elapsed


def _spread(backend: Backend, unit: int) -> Iterator[Extent]:
    """Requests of `unit` bytes over all files, each once before any is repeated, far apart."""
    sizes = [backend.size(i) for i in range(len(backend.paths))]
    firsts = [0, *accumulate(-(-size // unit) for size in sizes)]
    n = firsts[-1]
    assert n > 0, "there is nothing to read"
    stride = max(1, int(n * 0.618))  # the golden section: no two successive requests are near
    while gcd(stride, n) != 1:
        stride += 1
    for i in count():
        number = i * stride % n
        file_index = bisect_right(firsts, number) - 1
        offset = (number - firsts[file_index]) * unit
        yield Extent(file_index, offset, min(unit, sizes[file_index] - offset))
