"""Speeds of the matrix kernels, against what the machine can do at most.

Owns: what is run, on what data, and the clock. Must not know how figures are printed. Everything
runs on a real thread team with real programs, as a pass of a model does: a chain of matrices with
a barrier after each, chunks handed out dynamically.

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

from edgert.errors import InputError
from edgert.kernels_cpu import activations, layout, limits, rows
from edgert.kernels_cpu.isa import ISA
from edgert.kernels_cpu.jit import Kernel
from edgert.kernels_cpu.matmul import takes_quantized_input
from edgert.kernels_cpu.program import Matrix, Program, ProgramBuilder, Rows, Segment
from edgert.machine import default_threads
from edgert.quant.formats import BY_NAME, QuantFormat
from edgert.quant.quantize import quantize_ref
from edgert.threads import ThreadTeam
from edgert.units import KIB, MIB

__all__ = ["KernelFigures", "bench_kernels", "measure_memory"]

ROWS = COLUMNS = 4096  # of a matrix
READ_BYTES = 512 * MIB
CHAIN_BYTES = 256 * MIB  # of the matrices of one walk: far more than any cache
CACHE_BYTES = 384 * KIB  # of one matrix that stays in the second-level cache
BATCHES = (1, 4, 8)
GEMM_TOKENS = 512
_PEAK_UNITS = 2000
_LIMIT_CHUNK = 4  # units taken at once where only a limit is measured
_CACHE_REPEATS = 64
_REPACK_ROWS = 1024
_WALKS = 3  # of each measurement in a round
_LONG_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class KernelFigures:
    """One measurement: `what` is "matmul" of a format with so many tokens, its "repack", or the
    "limit" of the machine that `format` then names: read, dot or fma.

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
    hash: str = ""  # of the results: equal on every machine

    def to_dict(self) -> dict[str, Any]:
        """For JSON and CSV."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Case:
    """A program, the team that walks it, and what one walk does."""

    program: Program
    team: ThreadTeam
    tokens: int
    nbytes: int  # read
    macs: int
    source: str = "DRAM"
    peak: str = ""  # the limit of its multiply-adds

    def seconds(self) -> float:
        """The fastest of a few walks, of one where it is long."""
        self.team.frame[rows.F_N_TOKENS] = self.tokens
        fastest = float("inf")
        for _ in range(_WALKS):
            begin = time.perf_counter()
            self.team.run(self.program)
            fastest = min(fastest, time.perf_counter() - begin)
            if fastest > _LONG_SECONDS:
                break
        return fastest


def _read_case(team: ThreadTeam, data: npt.NDArray[np.uint8], sums: npt.NDArray[np.int32]) -> _Case:
    """Reading all of `data`, whole pieces; the sums go to int32 [threads, 16]. Keep both alive."""
    builder = ProgramBuilder()
    pieces = data.nbytes // limits.PIECE
    builder.call(limits.read_kernel, [data.ctypes.data, sums.ctypes.data], pieces, _LIMIT_CHUNK)
    return _Case(builder.finish(), team, 1, pieces * limits.PIECE, 0)


def measure_memory(threads: int, nbytes: int = READ_BYTES) -> float:
    """Bytes a second that `threads` threads read from memory: the best of several walks."""
    data = np.ones(nbytes, np.uint8)  # touched: untouched pages would all be the same zeros
    sums = np.zeros((threads, 16), np.int32)
    team = ThreadTeam(threads)
    try:
        case = _read_case(team, data, sums)
        return case.nbytes / min(case.seconds() for _ in range(4))
    finally:
        team.close()


class _Bench:
    """The teams and the memory that all formats share."""

    def __init__(self, threads: int) -> None:
        self.team = ThreadTeam(threads)
        self.alone = ThreadTeam(1)
        self.arena = np.ones(READ_BYTES, np.uint8)
        self._index = np.arange(GEMM_TOKENS, dtype=np.int64)
        self.y = np.zeros((GEMM_TOKENS, ROWS), np.float32)
        rng = np.random.default_rng(0)
        self._x = rng.standard_normal((GEMM_TOKENS, COLUMNS)).astype(np.float32)
        self._quantized = activations.quantize(self._x)
        self._w = rng.standard_normal((layout.TILE_ROWS, COLUMNS)).astype(np.float32)
        self._sums = np.zeros((threads, 16), np.int32)
        self._dot = rng.integers(0, 64, (limits.CHAINS + 2, limits.LANES), dtype=np.int32)
        self._fma = rng.random((limits.CHAINS + 2, ISA.lanes), np.float32)
        self.best: dict[str, float] = {}  # of each limit, GB/s or GMAC/s
        self.limits = {"fma": self._peak(limits.float_peak_kernel)}
        if limits.DOT_MACS:
            self.limits["dot"] = self._peak(limits.dot_peak_kernel)
        self.limits["read"] = _read_case(
            self.team, self.arena, self._sums
        )  # last: just before what it is compared with

    def close(self) -> None:
        self.team.close()
        self.alone.close()

    def _peak(self, kernel: Kernel) -> _Case:
        dot = kernel is limits.dot_peak_kernel
        builder = ProgramBuilder()
        arguments = [(self._dot if dot else self._fma).ctypes.data, self._sums.ctypes.data]
        builder.call(kernel, arguments, _PEAK_UNITS, _LIMIT_CHUNK)
        macs = _PEAK_UNITS * (limits.DOT_MACS if dot else limits.FLOAT_MACS)
        return _Case(builder.finish(), self.team, 1, 0, macs)

    def fill(self, fmt: QuantFormat) -> None:
        """Weights of `fmt` all over the arena: one random tile, repeated."""
        raw = quantize_ref(fmt, self._w)
        tile = np.zeros(layout.tile_bytes(fmt, COLUMNS), np.uint8)
        layout.repack(fmt, raw.reshape(-1), layout.TILE_ROWS, COLUMNS, tile)
        whole = len(self.arena) // len(tile)
        self.arena[: whole * len(tile)].reshape(whole, -1)[:] = tile

    def cases(self, fmt: QuantFormat) -> list[_Case]:
        """What is measured of a format."""
        matrix = layout.matrix_bytes(fmt, ROWS, COLUMNS)
        count = -(-CHAIN_BYTES // matrix)
        chain = self._chain(fmt, ROWS, [i * matrix for i in range(count)])
        macs = ROWS * COLUMNS
        peak = "dot" if takes_quantized_input(fmt) else "fma"
        found = [
            _Case(chain, self.team, n, count * matrix, count * n * macs, peak=peak) for n in BATCHES
        ]
        one = self._chain(fmt, ROWS, [0])
        gemm = _Case(one, self.team, GEMM_TOKENS, matrix, GEMM_TOKENS * macs, peak=peak)
        tile = layout.tile_bytes(fmt, COLUMNS)
        n_rows = layout.TILE_ROWS * max(1, CACHE_BYTES // tile)
        nbytes = layout.matrix_bytes(fmt, n_rows, COLUMNS) * _CACHE_REPEATS
        small = self._chain(fmt, n_rows, [0] * _CACHE_REPEATS)
        macs = n_rows * COLUMNS * _CACHE_REPEATS
        return [*found, gemm, _Case(small, self.alone, 1, nbytes, macs, "L2", peak)]

    def _chain(self, fmt: QuantFormat, n_rows: int, offsets: Sequence[int]) -> Program:
        """Matrices of `n_rows` at `offsets` of the arena, one after another, a barrier between."""
        x: npt.NDArray[np.generic] = self._quantized if takes_quantized_input(fmt) else self._x
        inputs = Rows(x.ctypes.data, x.strides[0])
        outputs = Rows(self.y.ctypes.data, self.y.strides[0])
        builder = ProgramBuilder()
        for offset in offsets:
            segment = Segment(layout.tile_count(n_rows), self.arena.ctypes.data + offset)
            matrix = Matrix(fmt, COLUMNS, (segment,))
            builder.matmul(matrix, inputs, outputs, self._index.ctypes.data)
            builder.barrier()
        return builder.finish()

    def repack(self, fmt: QuantFormat, trials: int) -> KernelFigures:
        """How fast one thread turns rows of a file into tiles, in bytes of the file."""
        raw = np.tile(quantize_ref(fmt, self._w), (_REPACK_ROWS // layout.TILE_ROWS, 1))
        out = self.arena[: layout.matrix_bytes(fmt, _REPACK_ROWS, COLUMNS)]
        times = []
        for _ in range(trials + 1):
            begin = time.perf_counter()
            layout.repack(fmt, raw.reshape(-1), _REPACK_ROWS, COLUMNS, out)
            times.append(time.perf_counter() - begin)
        seconds = statistics.median(times[1:])
        gb_s = raw.nbytes / seconds / 1e9
        return KernelFigures(fmt.name, "repack", 0, "DRAM", 1, seconds, gb_s, hash=_hash(out))

    def limit_figures(self) -> Iterator[KernelFigures]:
        """The best of each limit over everything measured so far."""
        for name, case in self.limits.items():
            best = self.best[name]
            seconds = (case.nbytes or case.macs) / best / 1e9
            read, macs = (best, 0.0) if case.nbytes else (0.0, best)
            source = "DRAM" if case.nbytes else "registers"
            yield KernelFigures(name, "limit", 0, source, case.team.threads, seconds, read, macs)


def _hash(result: npt.NDArray[np.generic]) -> str:
    return hashlib.sha256(result.tobytes()).hexdigest()[:16]


def bench_kernels(
    formats: Sequence[str] | None = None,
    *,
    threads: int | None = None,
    trials: int = 5,
    on_progress: Callable[[str, int, int], object] | None = None,
) -> Iterator[KernelFigures]:
    """Measure the kernels of `formats`, by default of all, and yield the figures as they are known.

    `threads`: by default the cores this process may use; needs some 600 MiB of memory. Raises
    `InputError` for a format that is not known.
    """
    names = list(BY_NAME if formats is None else formats)
    for name in names:
        if name not in BY_NAME:
            raise InputError(f"{name} is no number format; there are {' '.join(BY_NAME)}")
    bench = _Bench(default_threads() if threads is None else threads)
    try:
        for number, name in enumerate(names):
            if on_progress:
                on_progress(name, number, len(names))
            yield from _figures(bench, BY_NAME[name], trials)
        yield from bench.limit_figures()
    finally:
        bench.close()


def _figures(bench: _Bench, fmt: QuantFormat, trials: int) -> Iterator[KernelFigures]:
    bench.fill(fmt)
    cases = bench.cases(fmt)
    hashes = []
    for case in cases:  # not counted: pages are touched, and the results looked at
        bench.y[:] = 0
        case.seconds()
        hashes.append(_hash(bench.y[: case.tokens]))
    times: list[list[float]] = [[] for _ in cases]
    rates: dict[str, list[float]] = {name: [] for name in bench.limits}
    for _ in range(trials):
        for name, case in bench.limits.items():
            rates[name].append((case.nbytes or case.macs) / case.seconds() / 1e9)
        for case, seconds in zip(cases, times, strict=True):
            seconds.append(case.seconds())
    for name, found in rates.items():
        bench.best[name] = max(found + [bench.best.get(name, 0.0)])
    for case, seconds, digest in zip(cases, times, hashes, strict=True):
        alone = 1 if case.source == "DRAM" else case.team.threads / bench.team.threads
        middle = statistics.median(seconds)
        yield KernelFigures(
            fmt.name, "matmul", case.tokens, case.source, case.team.threads, middle,
            case.nbytes / middle / 1e9,
            case.macs / middle / 1e9,
            _share(case.nbytes, seconds, rates["read"]) if case.source == "DRAM" else 0.0,
            _share(case.macs, seconds, rates.get(case.peak, [])) / alone,
            digest,
        )  # fmt: skip
    yield bench.repack(fmt, trials)


def _share(amount: int, seconds: list[float], limit: list[float]) -> float:
    """Median over the rounds of what was reached of a limit in 1e9 a second; 0 without one."""
    if not limit:
        return 0.0
    pairs = zip(seconds, limit, strict=True)
    return statistics.median(amount / time / 1e9 / most for time, most in pairs)
