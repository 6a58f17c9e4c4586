"""Speeds of the matrix kernels, against what the machine can do at most.

Owns: which programs are run, on what data. Must not know how figures are taken (bench_harness.py)
or printed. A program is what a pass of a model is: a chain of matrices with a barrier after each,
chunks handed out dynamically.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from edgert.bench_harness import Case, Harness, KernelFigures, result_hash
from edgert.errors import InputError
from edgert.kernels_cpu import activations, layout
from edgert.kernels_cpu.matmul import takes_quantized_input
from edgert.kernels_cpu.program import Matrix, Program, ProgramBuilder, Rows, Segment
from edgert.machine import default_threads
from edgert.quant.formats import BY_NAME, FORMATS, PlaneFormat, QuantFormat
from edgert.quant.planes import quantize_planes_ref
from edgert.quant.quantize import quantize_ref
from edgert.threads import ThreadTeam
from edgert.units import KIB, MIB

__all__ = ["Matrices", "bench_kernels"]

ROWS = COLUMNS = 4096  # of a matrix
CHAIN_BYTES = 256 * MIB  # of the matrices of one walk: far more than any cache
CACHE_BYTES = 384 * KIB  # of one matrix that stays in the second-level cache
BATCHES = (1, 4, 8)
GEMM_TOKENS = 512
REPACK_ROWS = 1024
_CACHE_REPEATS = 64


def bench_kernels(
    formats: Sequence[str] | None = None,
    *,
    threads: int | None = None,
    trials: int = 5,
    on_progress: Callable[[str, int, int], object] | None = None,
) -> Iterator[KernelFigures]:
    """Measure the kernels of `formats`, by default of all of GGUF, and yield figures once known.

    `threads`: by default the cores this process may use; needs some 600 MiB of memory. Raises
    `InputError` for a format that is not known.
    """
    names = list(BY_NAME if formats is None else formats)
    for name in names:
        if name not in FORMATS:
            raise InputError(f"{name} is no number format; there are {' '.join(FORMATS)}")
    harness = Harness(default_threads() if threads is None else threads)
    try:
        bench = Matrices(harness.team, harness.alone, harness.arena)
        for number, name in enumerate(names):
            if on_progress:
                on_progress(name, number, len(names))
            fmt = FORMATS[name]
            bench.fill(fmt)
            cases = bench.cases(fmt)
            yield from harness.measure(name, "matmul", cases, bench.result, trials)
            yield bench.repack(fmt, trials)
        yield from harness.limit_figures()
    finally:
        harness.close()


class Matrices:
    """Weights all over `arena`, and activations to multiply them with on two teams."""

    def __init__(self, team: ThreadTeam, alone: ThreadTeam, arena: npt.NDArray[np.uint8]) -> None:
        self._team, self._alone, self._arena = team, alone, arena
        self._index = np.arange(GEMM_TOKENS, dtype=np.int64)
        self._y = np.zeros((GEMM_TOKENS, ROWS), np.float32)
        rng = np.random.default_rng(0)
        self._x = rng.standard_normal((GEMM_TOKENS, COLUMNS)).astype(np.float32)
        self._quantized = activations.quantize(self._x)
        self._w = rng.standard_normal((layout.TILE_ROWS, COLUMNS)).astype(np.float32)

    def fill(self, fmt: QuantFormat) -> None:
        """Weights of `fmt` all over the arena: one random tile, repeated."""
        raw = _quantized(fmt, self._w)
        tile = np.zeros(layout.tile_bytes(fmt, COLUMNS), np.uint8)
        layout.repack(fmt, raw.reshape(-1), layout.TILE_ROWS, COLUMNS, tile)
        arena = self._arena
        whole = len(arena) // len(tile)
        arena[: whole * len(tile)].reshape(whole, -1)[:] = tile

    def cases(self, fmt: QuantFormat) -> list[Case]:
        """What is measured of a format: batches from memory, a large one, one token from cache."""
        team, macs = self._team, ROWS * COLUMNS
        peak = "dot" if takes_quantized_input(fmt) else "fma"
        matrix = layout.matrix_bytes(fmt, ROWS, COLUMNS)
        count = min(-(-CHAIN_BYTES // matrix), len(self._arena) // matrix)
        chain = self._chain(fmt, ROWS, [i * matrix for i in range(count)])
        found = [Case(chain, team, n, count * matrix, count * n * macs, peak=peak) for n in BATCHES]
        one = self._chain(fmt, ROWS, [0])
        found.append(Case(one, team, GEMM_TOKENS, matrix, GEMM_TOKENS * macs, peak=peak))
        n_rows = layout.TILE_ROWS * max(1, CACHE_BYTES // layout.tile_bytes(fmt, COLUMNS))
        nbytes = layout.matrix_bytes(fmt, n_rows, COLUMNS) * _CACHE_REPEATS
        small = self._chain(fmt, n_rows, [0] * _CACHE_REPEATS)
        macs = n_rows * COLUMNS * _CACHE_REPEATS
        return [*found, Case(small, self._alone, 1, nbytes, macs, "L2", peak)]

    def limit_cases(self, fmt: QuantFormat) -> tuple[Case, Case]:
        """What limits decoding and what limits a prompt: one token from memory, many tokens."""
        one, *_, many, _ = self.cases(fmt)
        return one, many

    def small_case(self, fmt: QuantFormat, count: int) -> Case:
        """`count` products of one tile of rows each, a barrier between: next to no arithmetic."""
        return Case(self._chain(fmt, layout.TILE_ROWS, [0] * count), self._team, 1, 0, 0)

    def _chain(self, fmt: QuantFormat, n_rows: int, offsets: Sequence[int]) -> Program:
        """Matrices of `n_rows` at `offsets` of the arena, one after another, a barrier between."""
        x: npt.NDArray[np.generic] = self._quantized if takes_quantized_input(fmt) else self._x
        inputs = Rows(x.ctypes.data, x.strides[0])
        outputs = Rows(self._y.ctypes.data, self._y.strides[0])
        builder = ProgramBuilder()
        for offset in offsets:
            address = self._arena.ctypes.data + offset
            matrix = Matrix(fmt, COLUMNS, (Segment(layout.tile_count(n_rows), address),))
            builder.matmul(matrix, inputs, outputs, self._index.ctypes.data)
            builder.barrier()
        return builder.finish()

    def result(self, case: Case) -> str:
        """The hash of what a walk has just computed; the next one starts from zeros."""
        found = result_hash(self._y[: case.tokens])
        self._y[:] = 0
        return found

    def repack(self, fmt: QuantFormat, trials: int) -> KernelFigures:
        """How fast one thread turns rows of a file into tiles, in bytes of the file."""
        raw = np.tile(_quantized(fmt, self._w), (REPACK_ROWS // layout.TILE_ROWS, 1))
        out = self._arena[: layout.matrix_bytes(fmt, REPACK_ROWS, COLUMNS)]
        times = []
        for _ in range(trials + 1):
            begin = time.perf_counter()
            layout.repack(fmt, raw.reshape(-1), REPACK_ROWS, COLUMNS, out)
            times.append(time.perf_counter() - begin)
        seconds = statistics.median(times[1:])
        gb_s = raw.nbytes / seconds / 1e9
        digest = result_hash(out)
        return KernelFigures(fmt.name, "repack", 0, "DRAM", 1, seconds, gb_s, hash=digest)


def _quantized(fmt: QuantFormat, w: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Rows of `w` as a file stores them; any error of rounding will do."""
    if isinstance(fmt, PlaneFormat):
        return quantize_planes_ref(fmt, w, refine=False)
    return quantize_ref(fmt, w)
