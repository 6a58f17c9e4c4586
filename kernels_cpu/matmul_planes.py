"""Plane formats times quantised activations: weights d * q + m of 1 to 4 bits.

    y[row, t] = acc over blocks b = 0, 1, 2, ... of 32 weights, g the group of b, of
        acc = fma(float32(dot_b), float32(d[row, g] * d_x[t, b]), acc)
        acc = fma(m[row, g], float32(d_x[t, b] * float32(sum_x[t, b])), acc)
    dot_b = sum of the 32 integer products q_w * q_x, exact

Owns: the loop over one tile, for a pack of tokens (`packs`), and which widths look sums up in
tables instead (`lut`). Must not know: how tokens are found or results stored
(`matmul_drive`). Layout of a block of 16 rows: d (32 bytes), m (32), then units of 4 bytes a row
in the order of `packing`, 64 bytes each.
"""

from __future__ import annotations

from typing import Any

from edgert.kernels_cpu.activations import BLOCK_BYTES
from edgert.kernels_cpu.isa import ISA
from edgert.kernels_cpu.jit import Kernel, inline, kernel
from edgert.kernels_cpu.lanes import LANES, field, mixed, prefetch_lines
from edgert.kernels_cpu.lut import AVAILABLE, lookup_drive
from edgert.kernels_cpu.matmul_block32 import dot_nibbles
from edgert.kernels_cpu.matmul_drive import MATMUL, drive, up_to_most
from edgert.kernels_cpu.packs import (
    accumulators,
    fma_sum,
    fma_totals,
    halves,
    integers,
    mac_u8,
    step,
    total,
    weights,
)
from edgert.kernels_cpu.simd import ld_i64
from edgert.quant.formats import PLANES

__all__ = ["DIRECT", "KERNELS", "LOOKUP", "dot_threes", "dot_twos", "eight_threes"]

_bit_0, _bit_1, _bit_2, _bit_3 = (field(i, 1) for i in range(4))
_bit_4, _bit_5, _bit_6, _bit_7 = (field(i, 1) for i in range(4, 8))
_pair_0, _pair_1, _pair_2, _pair_3 = (field(2 * i, 3) for i in range(4))
_low_three, _high_three = field(0, 7), field(4, 7)
# Two-bit numbers from one unit, their third bits from the other: two of them in each byte.
_three_0, _three_1 = mixed(0x33, 0, -2), mixed(0x33, 0, -1)
_three_2, _three_3 = mixed(0x33, 2, 0), mixed(0x33, 2, 1)
_LEAST_TILES = 8  # below, making the tables costs more than they save
_prefetch_1, _prefetch_2 = prefetch_lines(1), prefetch_lines(2)
_prefetch_3, _prefetch_4 = prefetch_lines(3), prefetch_lines(4)


@inline
def _one(w: Any, xs: Any, acc: Any) -> Any:
    """Totals of 32 weights 0..1: bit i of byte j is weight 4 i + j."""
    q = weights(acc, w)
    i = mac_u8(mac_u8(integers(acc), _bit_0(q), xs, 0), _bit_1(q), xs, 4)
    i = mac_u8(mac_u8(i, _bit_2(q), xs, 8), _bit_3(q), xs, 12)
    i = mac_u8(mac_u8(i, _bit_4(q), xs, 16), _bit_5(q), xs, 20)
    return total(mac_u8(mac_u8(i, _bit_6(q), xs, 24), _bit_7(q), xs, 28))


@inline
def dot_twos(w: Any, xs: Any, acc: Any) -> Any:
    """Totals of 32 weights 0..3: field i of byte j of both units is weight 8 i + j."""
    q = weights(acc, w)
    i = mac_u8(mac_u8(integers(acc), _pair_0(q), xs, 0), _pair_1(q), xs, 8)
    i = mac_u8(mac_u8(i, _pair_2(q), xs, 16), _pair_3(q), xs, 24)
    q = weights(acc, w + 64)
    i = mac_u8(mac_u8(i, _pair_0(q), xs, 4), _pair_1(q), xs, 12)
    return total(mac_u8(mac_u8(i, _pair_2(q), xs, 20), _pair_3(q), xs, 28))


@inline
def eight_threes(w: Any, acc: Any) -> Any:
    """The units of 32 weights 0..7 in order, laid out as for `dot_threes`."""
    h, q, r = weights(acc, w + 128), weights(acc, w), weights(acc, w + 64)
    n_0, n_1, n_2, n_3 = _three_0(q, h), _three_1(r, h), _three_2(q, h), _three_3(r, h)
    return (
        _low_three(n_0), _low_three(n_1), _low_three(n_2), _low_three(n_3),
        _high_three(n_0), _high_three(n_1), _high_three(n_2), _high_three(n_3),
    )  # fmt: skip


@inline
def dot_threes(w: Any, xs: Any, acc: Any) -> Any:
    """Totals of 32 weights 0..7: low bits as in `dot_twos`, then the high ones as in `_one`."""
    h, q = weights(acc, w + 128), weights(acc, w)
    n = _three_0(q, h)
    i = mac_u8(mac_u8(integers(acc), _low_three(n), xs, 0), _high_three(n), xs, 16)
    n = _three_2(q, h)
    i = mac_u8(mac_u8(i, _low_three(n), xs, 8), _high_three(n), xs, 24)
    q = weights(acc, w + 64)
    n = _three_1(q, h)
    i = mac_u8(mac_u8(i, _low_three(n), xs, 4), _high_three(n), xs, 20)
    n = _three_3(q, h)
    return total(mac_u8(mac_u8(i, _low_three(n), xs, 12), _high_three(n), xs, 28))


@inline
def _groups(
    dot: Any, ask: Any, lines: Any, blocks: Any, p: Any, part: Any, K: Any, xs: Any,
) -> Any:  # fmt: skip
    """A tile in groups of `blocks` x 32 weights, each block `lines` cache lines."""
    acc = accumulators(xs)
    at, w = p + 2 * LANES * part, p + 64 + 4 * LANES * part
    for _ in range(K // (32 * blocks)):
        d, m = halves(acc, at), halves(acc, at + 32)
        _prefetch_1(at)
        for _ in range(blocks):
            ask(w)
            acc = fma_sum(fma_totals(acc, dot(w, xs, acc), d, xs, 0), m, xs, 0)
            w += 64 * lines
            xs = step(xs, BLOCK_BYTES)
        at += 64 + 64 * lines * blocks
        w += 64
    return acc


@inline
def _p1_32(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _groups(_one, _prefetch_1, 1, 1, p, part, K, xs)


@inline
def _p1_128(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _groups(_one, _prefetch_1, 1, 4, p, part, K, xs)


@inline
def _p2_32(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _groups(dot_twos, _prefetch_2, 2, 1, p, part, K, xs)


@inline
def _p2_128(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _groups(dot_twos, _prefetch_2, 2, 4, p, part, K, xs)


@inline
def _p3_32(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _groups(dot_threes, _prefetch_3, 3, 1, p, part, K, xs)


@inline
def _p3_128(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _groups(dot_threes, _prefetch_3, 3, 4, p, part, K, xs)


@inline
def _p4_32(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _groups(dot_nibbles, _prefetch_4, 4, 1, p, part, K, xs)


@inline
def _p4_128(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _groups(dot_nibbles, _prefetch_4, 4, 4, p, part, K, xs)


@kernel(MATMUL)
def _matmul_p1_32_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _p1_32, K // 32 * 128, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_p1_128_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _p1_128, K // 128 * 320, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_p2_32_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _p2_32, K // 32 * 192, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_p2_128_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _p2_128, K // 128 * 576, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_p3_32_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _p3_32, K // 32 * 256, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_p3_128_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _p3_128, K // 128 * 832, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_p4_32_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _p4_32, K // 32 * 320, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_p4_128_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _p4_128, K // 128 * 1088, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_p1_32_lookup_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    if n == 1 and tile_stop - tile_start >= _LEAST_TILES:
        x_0, y_0 = x + ld_i64(xi) * x_stride, y + ld_i64(yi) * y_stride
        lookup_drive(1, w, x_0, y_0, K, tile_start, tile_stop, mode, bias)
    else:
        drive(
            up_to_most, _p1_32, K // 32 * 128, w, x, x_stride, y, y_stride, K,
            tile_start, tile_stop, n, xi, yi, mode, bias,
        )  # fmt: skip


@kernel(MATMUL)
def _matmul_p1_128_lookup_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    if n == 1 and tile_stop - tile_start >= _LEAST_TILES:
        x_0, y_0 = x + ld_i64(xi) * x_stride, y + ld_i64(yi) * y_stride
        lookup_drive(4, w, x_0, y_0, K, tile_start, tile_stop, mode, bias)
    else:
        drive(
            up_to_most, _p1_128, K // 128 * 320, w, x, x_stride, y, y_stride, K,
            tile_start, tile_stop, n, xi, yi, mode, bias,
        )  # fmt: skip


DIRECT: dict[str, Kernel] = {
    "P1_32": _matmul_p1_32_kernel,
    "P1_128": _matmul_p1_128_kernel,
    "P2_32": _matmul_p2_32_kernel,
    "P2_128": _matmul_p2_128_kernel,
    "P3_32": _matmul_p3_32_kernel,
    "P3_128": _matmul_p3_128_kernel,
    "P4_32": _matmul_p4_32_kernel,
    "P4_128": _matmul_p4_128_kernel,
}
LOOKUP: dict[str, Kernel] = {}
if AVAILABLE:
    LOOKUP = {"P1_32": _matmul_p1_32_lookup_kernel, "P1_128": _matmul_p1_128_lookup_kernel}

# (instruction set, bits) where a single token goes through tables. None so far: tables compute
# 1.5 times as fast from the cache (AVX-512), but streams from DRAM feed them only half as well.
_BY_LOOKUP: frozenset[tuple[str, int]] = frozenset()
KERNELS = DIRECT | {
    name: found for name, found in LOOKUP.items() if (ISA.name, PLANES[name].bits) in _BY_LOOKUP
}
