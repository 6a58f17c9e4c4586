"""Bases of nested packs times quantised activations: the top 3 to 5 bits of Q8_0.

    y[row, t] = acc over blocks b = 0, 1, 2, ... of
        acc = fma(float32(dot_b), float32((d[row, b] / 2) * d_x[t, b]), acc)
    dot_b = 2 s * sum(u * q_x) - (257 - s) * sum(q_x), s = 2^(8 - bits), exact

A code u stands for the middle of the s codes of Q8_0 with the same top bits, half of an odd number:
hence d / 2. Codes lie as in P3_32, Q4_0 and Q5_0, and their dots are those formats' own.

Owns: the loop over one tile, for a pack of tokens (`packs`). Must not know: how a base is split off
(`nested`), how tokens are found or results stored (`matmul_drive`). Layout of a block of 16 rows:
d (32 bytes), then `bits` units of 4 bytes a row, 64 bytes each.
"""

from __future__ import annotations

from typing import Any

from edgert.kernels_cpu.activations import BLOCK_BYTES
from edgert.kernels_cpu.jit import Kernel, inline, kernel
from edgert.kernels_cpu.lanes import LANES, prefetch_lines
from edgert.kernels_cpu.matmul_block32 import dot_fives, dot_nibbles
from edgert.kernels_cpu.matmul_drive import MATMUL, drive, up_to_most
from edgert.kernels_cpu.matmul_planes import dot_threes
from edgert.kernels_cpu.packs import (
    accumulators,
    constant_pairs,
    dot_pairs,
    fma_totals,
    half_scales,
    step,
    times,
)

__all__ = ["KERNELS"]

_B3_BYTES, _B4_BYTES, _B5_BYTES = (32 + 64 * bits for bits in (3, 4, 5))
_times_64, _times_32, _times_16 = times(64), times(32), times(16)
_minus_225, _minus_241, _minus_249 = (constant_pairs(s - 257) for s in (32, 16, 8))
_prefetch_4, _prefetch_5, _prefetch_6 = prefetch_lines(4), prefetch_lines(5), prefetch_lines(6)


@inline
def _base(
    dot: Any, widen: Any, zero: Any, ask: Any, nbytes: Any, p: Any, part: Any, K: Any, xs: Any
) -> Any:
    """A tile in blocks of `nbytes`: d, then what `dot` reads; u becomes `widen` of it + `zero`."""
    acc = accumulators(xs)
    d, w = p + 2 * LANES * part, p + 32 + 4 * LANES * part
    for _ in range(K // 32):
        ask(w)
        totals = dot_pairs(widen(dot(w, xs, acc)), zero(acc), xs, 0)
        acc = fma_totals(acc, totals, half_scales(acc, d), xs, 0)
        d += nbytes
        w += nbytes
        xs = step(xs, BLOCK_BYTES)
    return acc


@inline
def _b3(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _base(dot_threes, _times_64, _minus_225, _prefetch_4, _B3_BYTES, p, part, K, xs)


@inline
def _b4(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _base(dot_nibbles, _times_32, _minus_241, _prefetch_5, _B4_BYTES, p, part, K, xs)


@inline
def _b5(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _base(dot_fives, _times_16, _minus_249, _prefetch_6, _B5_BYTES, p, part, K, xs)


@kernel(MATMUL)
def _matmul_b3_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b3, K // 32 * _B3_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b4_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b4, K // 32 * _B4_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b5_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b5, K // 32 * _B5_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


KERNELS: dict[str, Kernel] = {
    "B3": _matmul_b3_kernel,
    "B4": _matmul_b4_kernel,
    "B5": _matmul_b5_kernel,
}
