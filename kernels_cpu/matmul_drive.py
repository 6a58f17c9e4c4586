"""The loop over tiles and tokens that all matmul kernels share, and their signature.

    void(w, x, x_stride, y, y_stride, K, tile_start, tile_stop, n, xi, yi, mode, bias)

For t in 0..n-1 and tiles tile_start..tile_stop-1: rows [16 tile, 16 tile + 16) of Y[yi[t]] =
W[tile] . X[xi[t]]. `w` is the address of tile 0; `x + xi[t] * x_stride` of an activation row,
`y + yi[t] * y_stride` of a float32 row; `xi`, `yi` of int64 arrays. `bias` is 0 or the address of
float32[rows rounded up to 16], added to the sum; `mode` 1 then adds the sum to what `y` holds,
mode 0 replaces it. Always 16 floats are stored for a tile.

Owns: the order of work. Tokens go in fours, then one at a time, all over one tile before the next,
so that weights come from DRAM once. Must not know: formats.
"""

from __future__ import annotations

from typing import Any

from edgert.kernels_cpu.jit import inline, void
from edgert.kernels_cpu.lanes import LANES, PARTS, ld16, ldL, st16, stL
from edgert.kernels_cpu.simd import ld_i64, vadd

__all__ = ["MATMUL", "drive", "finish16"]

MATMUL = void("i" * 13)


@inline
def finish16(y: Any, acc: Any, mode: Any, bias: Any) -> None:
    """Store 16 results at address `y`; `bias` is 0 or the address of their 16 biases."""
    if bias != 0:
        acc = vadd(acc, ld16(bias))
    if mode != 0:
        acc = vadd(ld16(y), acc)
    st16(y, acc)


@inline
def _finishL(y: Any, acc: Any, mode: Any, bias: Any) -> None:
    if bias != 0:
        acc = vadd(acc, ldL(bias))
    if mode != 0:
        acc = vadd(ldL(y), acc)
    stL(y, acc)


@inline
def drive(
    tile1: Any, tile4: Any, tile_bytes: Any, w: Any, x: Any, x_stride: Any, y: Any, y_stride: Any,
    K: Any, tile_start: Any, tile_stop: Any, n: Any, xi: Any, yi: Any, mode: Any, bias: Any,
) -> None:  # fmt: skip
    """Run tile1(p, K, a) -> acc and tile4(p, part, K, a0, a1, a2, a3) -> four accs."""
    for tile in range(tile_start, tile_stop):
        p = w + tile * tile_bytes
        out = y + 64 * tile
        t = 0
        while t + 4 <= n:
            a0, a1 = x + ld_i64(xi + 8 * t) * x_stride, x + ld_i64(xi + 8 * t + 8) * x_stride
            a2, a3 = x + ld_i64(xi + 8 * t + 16) * x_stride, x + ld_i64(xi + 8 * t + 24) * x_stride
            for part in range(PARTS):
                r0, r1, r2, r3 = tile4(p, part, K, a0, a1, a2, a3)
                at = out + 4 * LANES * part
                b = bias
                if bias != 0:
                    b = bias + 64 * tile + 4 * LANES * part
                _finishL(at + ld_i64(yi + 8 * t) * y_stride, r0, mode, b)
                _finishL(at + ld_i64(yi + 8 * t + 8) * y_stride, r1, mode, b)
                _finishL(at + ld_i64(yi + 8 * t + 16) * y_stride, r2, mode, b)
                _finishL(at + ld_i64(yi + 8 * t + 24) * y_stride, r3, mode, b)
            t += 4
        while t < n:
            acc = tile1(p, K, x + ld_i64(xi + 8 * t) * x_stride)
            b = bias
            if bias != 0:
                b = bias + 64 * tile
            finish16(out + ld_i64(yi + 8 * t) * y_stride, acc, mode, b)
            t += 1
