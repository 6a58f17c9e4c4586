"""Measuring compiled kernels on a real thread team, by turns with what the machine can do at most.

Owns: the teams, the memory, the limits, the clock. Must not know which kernels are measured.
Limits and kernels are measured by turns in each round, because memory gives another rate from one
second to the next; shares are medians over the rounds.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu import limits, rows
from edgert.kernels_cpu.isa import ISA
from edgert.kernels_cpu.jit import Kernel
from edgert.kernels_cpu.program import Program, ProgramBuilder
from edgert.threads import ThreadTeam
from edgert.units import MIB

__all__ = ["Case", "Harness", "KernelFigures", "measure_memory", "read_case", "result_hash"]

READ_BYTES = 512 * MIB  # far more than any cache
PEAK_UNITS = 2000
_LIMIT_CHUNK = 4  # units taken at once where only a limit is measured
_WALKS = 3  # of each measurement in a round
_LONG_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class KernelFigures:
    """One measurement: `what` is "matmul" of a format with so many tokens, its "repack",
    "attention" over a KV cache of `format`, or the "limit" of the machine that `format` then
    names: read, dot or fma.

    `source` is where the weights come from: "DRAM", or "L2" of one core. The shares are of limits
    measured in the same rounds: `of_read` of the read rate (DRAM only), `of_peak` of the rate of
    multiply-adds that the kernel's arithmetic allows. 0 is "does not apply".
    """

    format: str
    what: str
    tokens: int
    source: str
    threads: int
    seconds: float  # of one walk, the median
    gb_s: float  # weights as the kernel reads them; of the file for a repack
    gmac_s: float = 0.0
    of_read: float = 0.0
    of_peak: float = 0.0
    context: int = 0  # positions that attention looks at
    hash: str = ""  # of the results: equal on every machine
    kv_heads: int = 0  # of a layer, for attention

    def to_dict(self) -> dict[str, Any]:
        """For JSON and CSV."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Case:
    """A program, the team that walks it, and what one walk does."""

    program: Program
    team: ThreadTeam
    tokens: int
    nbytes: int  # read
    macs: int
    source: str = "DRAM"
    peak: str = ""  # the limit of its multiply-adds
    position: int = 0  # of the first token

    def seconds(self) -> float:
        """The fastest of a few walks, of one where it is long."""
        self.team.frame[rows.F_N_TOKENS] = self.tokens
        self.team.frame[rows.F_POSITION] = self.position
        fastest = float("inf")
        for _ in range(_WALKS):
            begin = time.perf_counter()
            self.team.run(self.program)
            fastest = min(fastest, time.perf_counter() - begin)
            if fastest > _LONG_SECONDS:
                break
        return fastest


def read_case(team: ThreadTeam, data: npt.NDArray[np.uint8], sums: npt.NDArray[np.int32]) -> Case:
    """Reading all of `data`, whole pieces; the sums go to int32 [threads, 16]. Keep both alive."""
    builder = ProgramBuilder()
    pieces = data.nbytes // limits.PIECE
    builder.call(limits.read_kernel, [data.ctypes.data, sums.ctypes.data], pieces, _LIMIT_CHUNK)
    return Case(builder.finish(), team, 1, pieces * limits.PIECE, 0)


def measure_memory(threads: int, nbytes: int = READ_BYTES) -> float:
    """Bytes a second that `threads` threads read from memory: the best of several walks."""
    data = np.ones(nbytes, np.uint8)  # touched: untouched pages would all be the same zeros
    sums = np.zeros((threads, 16), np.int32)
    team = ThreadTeam(threads)
    try:
        case = read_case(team, data, sums)
        return case.nbytes / min(case.seconds() for _ in range(4))
    finally:
        team.close()


def result_hash(result: npt.NDArray[np.generic]) -> str:
    """16 hex digits of the bytes of a result."""
    return hashlib.sha256(result.tobytes()).hexdigest()[:16]


class Harness:
    """Teams of `threads` and of one, an arena of `READ_BYTES`, and the limits of the machine."""

    def __init__(self, threads: int) -> None:
        self.team = ThreadTeam(threads)
        self.alone = ThreadTeam(1)
        self.arena = np.ones(READ_BYTES, np.uint8)
        rng = np.random.default_rng(0)
        self._sums = np.zeros((threads, 16), np.int32)
        self._dot = rng.integers(0, 64, (limits.CHAINS + 2, limits.LANES), dtype=np.int32)
        self._fma = rng.random((limits.CHAINS + 2, ISA.lanes), np.float32)
        self._best: dict[str, float] = {}  # of each limit, GB/s or GMAC/s
        self._limits = {"fma": self._peak(limits.float_peak_kernel)}
        if limits.DOT_MACS:
            self._limits["dot"] = self._peak(limits.dot_peak_kernel)
        # Last, just before what it is compared with.
        self._limits["read"] = read_case(self.team, self.arena, self._sums)

    def close(self) -> None:
        """End the threads."""
        self.team.close()
        self.alone.close()

    def _peak(self, kernel: Kernel) -> Case:
        dot = kernel is limits.dot_peak_kernel
        builder = ProgramBuilder()
        arguments = [(self._dot if dot else self._fma).ctypes.data, self._sums.ctypes.data]
        builder.call(kernel, arguments, PEAK_UNITS, _LIMIT_CHUNK)
        macs = PEAK_UNITS * (limits.DOT_MACS if dot else limits.FLOAT_MACS)
        return Case(builder.finish(), self.team, 1, 0, macs)

    def measure(
        self,
        name: str,
        what: str,
        cases: Sequence[Case],
        result: Callable[[Case], str],
        trials: int,
    ) -> Iterator[KernelFigures]:
        """Measure `cases` in `trials` rounds; `result` gives the hash of what one has computed."""
        hashes = []
        for case in cases:  # not counted: pages are touched, and the results looked at
            case.seconds()
            hashes.append(result(case))
        times: list[list[float]] = [[] for _ in cases]
        rates: dict[str, list[float]] = {name: [] for name in self._limits}
        for _ in range(trials):
            for limit, case in self._limits.items():
                rates[limit].append((case.nbytes or case.macs) / case.seconds() / 1e9)
            for case, seconds in zip(cases, times, strict=True):
                seconds.append(case.seconds())
        for limit, found in rates.items():
            self._best[limit] = max([*found, self._best.get(limit, 0.0)])
        for case, seconds, digest in zip(cases, times, hashes, strict=True):
            share_of_team = case.team.threads / self.team.threads
            from_memory = case.source == "DRAM"
            middle = statistics.median(seconds)
            yield KernelFigures(
                name, what, case.tokens, case.source, case.team.threads, middle,
                case.nbytes / middle / 1e9,
                case.macs / middle / 1e9,
                _share(case.nbytes, seconds, rates["read"]) if from_memory else 0.0,
                _share(case.macs, seconds, rates.get(case.peak, [])) / share_of_team,
                case.position + case.tokens if what == "attention" else 0,
                digest,
            )  # fmt: skip

    def limit_figures(self) -> Iterator[KernelFigures]:
        """The best of each limit over everything measured so far."""
        for name, case in self._limits.items():
            best = self._best[name]
            seconds = (case.nbytes or case.macs) / best / 1e9
            read, macs = (best, 0.0) if case.nbytes else (0.0, best)
            source = "DRAM" if case.nbytes else "registers"
            yield KernelFigures(name, "limit", 0, source, case.team.threads, seconds, read, macs)


def _share(amount: int, seconds: list[float], limit: list[float]) -> float:
    """Median over the rounds of what was reached of a limit in 1e9 a second; 0 without one."""
    if not limit:
        return 0.0
    pairs = zip(seconds, limit, strict=True)
    return statistics.median(amount / time / 1e9 / most for time, most in pairs)
