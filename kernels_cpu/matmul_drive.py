"""The loop over tiles and tokens that all matmul kernels share, and their signature.

    void(w, x, x_stride, y, y_stride, K, tile_start, tile_stop, n, xi, yi, mode, bias)

For t in 0..n-1 and tiles tile_start..tile_stop-1: rows [16 tile, 16 tile + 16) of Y[yi[t]] =
W[tile] . X[xi[t]]. `w` is the address of tile 0; `x + xi[t] * x_stride` of an activation row,
`y + yi[t] * y_stride` of a float32 row; `xi`, `yi` of int64 arrays. `bias` is 0 or the address of
float32[rows rounded up to 16], added to the sum; `mode` 1 then adds the sum to what `y` holds,
mode 0 replaces it. Always 16 floats are stored for a tile.

Owns: the order of work. Tokens go in packs of up to `MOST`, all over one tile before the next, so
that weights come from DRAM once. A short pack repeats its last token: computing a token twice is
cheaper than another pass over the tile. Must not know: formats.
"""

from __future__ import annotations

from typing import Any

from edgert.kernels_cpu.jit import inline, void
from edgert.kernels_cpu.lanes import LANES, PARTS
from edgert.kernels_cpu.packs import addresses, store_pack
from edgert.kernels_cpu.simd import ld_f32x16, ld_i64, st_f32x16, stack_buffer, vadd

__all__ = ["MATMUL", "drive", "drive_from", "up_to_four", "up_to_most"]

MATMUL = void("i" * 13)
MOST = 8 if LANES == 16 else 4  # tokens whose sums fit the registers: 8 of 32, 4 of 16
_one_address, _four_addresses, _most_addresses = addresses(1), addresses(4), addresses(MOST)
_results = stack_buffer(64 * MOST)


@inline
def _in_parts(body: Any, p: Any, K: Any, xs: Any, results: Any) -> None:
    for part in range(PARTS):
        store_pack(results + 4 * LANES * part, body(p, part, K, xs))


@inline
def up_to_four(
    body: Any, p: Any, K: Any, index: Any, x: Any, stride: Any, left: Any, results: Any
) -> Any:
    """Compute a tile for min(left, 4) tokens into `results`; returns how many."""
    count = min(left, 4)
    if count == 1:
        store_pack(results, body(p, 0, K, _one_address(index, x, stride, 0)))
    else:
        _in_parts(body, p, K, _four_addresses(index, x, stride, count - 1), results)
    return count


if MOST == 4:
    up_to_most = up_to_four
else:

    @inline
    def up_to_most(
        body: Any, p: Any, K: Any, index: Any, x: Any, stride: Any, left: Any, results: Any
    ) -> Any:
        """Compute a tile for min(left, MOST) tokens into `results`; returns how many."""
        if left <= 4:
            return up_to_four(body, p, K, index, x, stride, left, results)
        count = min(left, MOST)
        _in_parts(body, p, K, _most_addresses(index, x, stride, count - 1), results)
        return count


@inline
def _consecutive(w: Any, tile: Any, tile_bytes: Any) -> Any:
    return w + tile * tile_bytes


@inline
def drive(
    pack: Any, body: Any, tile_bytes: Any, w: Any, x: Any, x_stride: Any, y: Any, y_stride: Any,
    K: Any, tile_start: Any, tile_stop: Any, n: Any, xi: Any, yi: Any, mode: Any, bias: Any,
) -> None:  # fmt: skip
    """Run `body(p, part, K, xs) -> acc` over packs of tokens, made by `pack`: an `up_to_...`."""
    drive_from(
        _consecutive, pack, body, tile_bytes, w, x, x_stride, y, y_stride, K, tile_start,
        tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@inline
def drive_from(
    place: Any, pack: Any, body: Any, size: Any, w: Any, x: Any, x_stride: Any, y: Any,
    y_stride: Any, K: Any, tile_start: Any, tile_stop: Any, n: Any, xi: Any, yi: Any, mode: Any,
    bias: Any,
) -> None:  # fmt: skip
    """As `drive`, where tile t is at `place(w, t, size)`: an address, or whatever `body` takes."""
    results = _results()
    for tile in range(tile_start, tile_stop):
        p = place(w, tile, size)
        t = 0
        while t < n:
            count = pack(body, p, K, xi + 8 * t, x, x_stride, n - t, results)
            for i in range(count):
                out = y + ld_i64(yi + 8 * (t + i)) * y_stride + 64 * tile
                value = ld_f32x16(results + 64 * i)
                if bias != 0:
                    value = vadd(value, ld_f32x16(bias + 64 * tile))
                if mode != 0:
                    value = vadd(ld_f32x16(out), value)
                st_f32x16(out, value)
            t += count
