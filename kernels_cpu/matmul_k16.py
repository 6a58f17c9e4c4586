"""Q2_K, Q3_K, Q6_K: super-blocks of 256 weights with a scale for each 16.

Over sub-blocks b = 0, 1, 2, ... of 32 weights:

    acc = fma(float32(dot_b), d * d_x[b], acc),  dot_b = sum over both 16s of sc * dot16
    Q2_K then: acc = fma(-float32(mins_b), dmin * d_x[b], acc),
               mins_b = sum over both 16s of mn * sum_x16

dot_b and mins_b are integers below 2**24. Owns: the loop over one tile, for a pack of tokens
(`packs`). Must not know: how tokens are found or results stored (`matmul_drive`). Layout: `layout`.
"""

from __future__ import annotations

from typing import Any

from edgert.kernels_cpu.activations import BLOCK_BYTES
from edgert.kernels_cpu.jit import Kernel, inline, kernel
from edgert.kernels_cpu.lanes import (
    LANES,
    field,
    high_nibbles,
    low_nibbles,
    negated,
    pair_high,
    pair_high_nibbles,
    pair_low,
    pair_low_nibbles,
    prefetch_lines,
    shifted,
    times,
)
from edgert.kernels_cpu.matmul_drive import MATMUL, drive, up_to_most
from edgert.kernels_cpu.packs import (
    accumulators,
    add,
    dot_pairs,
    fma_pairs,
    fma_totals,
    halves,
    pairs,
    scaled_16,
    step,
    unsigned_pairs,
    weights,
)
from edgert.kernels_cpu.simd import vor

__all__ = ["KERNELS"]

# Bytes of a super-block of 16 rows and of its halves (128 weights).
_Q2_K_BYTES, _Q2_K_HALF = 1344, 640  # d, dmin, 2 x [4 x 16 pairs, 8 x 64 of 2 bits]
_Q3_K_BYTES, _Q3_K_HALF = 1824, 640  # d, 8 x 64 third bits, 2 x [4 x 16 pairs, 8 x 64 of 2 bits]
_Q6_K_BYTES, _Q6_K_HALF = 3360, 1664  # d, 2 x [4 x 16 pairs, 16 x 64 of 4, 8 x 64 of 2 bits]

_AT_1, _AT_2, _AT_3 = BLOCK_BYTES, 2 * BLOCK_BYTES, 3 * BLOCK_BYTES  # blocks of activations
_twos_0, _twos_1, _twos_2, _twos_3 = (field(shift, 0x03) for shift in (0, 2, 4, 6))
_third_0, _third_1, _third_2, _third_3 = (field(shift, 0x04) for shift in (-2, -1, 0, 1))
_top_0, _top_1, _top_2, _top_3 = (field(shift, 0x30) for shift in (-4, -2, 0, 2))
_times_minus_4, _times_minus_32 = times(-4), times(-32)

_prefetch_3, _prefetch_4 = prefetch_lines(3, far=True), prefetch_lines(4, far=True)
_prefetch_7 = prefetch_lines(7, far=True)

# unit(acc, low, high, shift, take, top) makes 4 weights of each row: `take` of the bytes at `low`,
# and, where the format has more bits, `top` of those at `high`.


@inline
def _two(acc: Any, low: Any, high: Any, shift: Any, take: Any, top: Any) -> Any:
    return take(weights(acc, low))


@inline
def _three(acc: Any, low: Any, high: Any, shift: Any, take: Any, top: Any) -> Any:
    return vor(take(weights(acc, low)), top(shifted(weights(acc, high), shift)))


@inline
def _six(acc: Any, low: Any, high: Any, shift: Any, take: Any, top: Any) -> Any:
    return vor(take(weights(acc, low)), top(weights(acc, high)))


@inline
def _dot_16(
    unit: Any, take: Any, top: Any, low: Any, high: Any, shift: Any, scale: Any, xs: Any, at: Any,
    acc: Any,
) -> Any:  # fmt: skip
    """Totals of 16 weights in 4 units, times `scale`."""
    w0 = unit(acc, low, high, shift, take, top)
    w1 = unit(acc, low + 64, high + 64, shift, take, top)
    w2 = unit(acc, low + 128, high + 128, shift, take, top)
    w3 = unit(acc, low + 192, high + 192, shift, take, top)
    return scaled_16(acc, w0, w1, w2, w3, xs, at, scale)


@inline
def _dot_32(
    unit: Any, take: Any, top: Any, low: Any, high: Any, shift: Any, scales: Any, xs: Any, at: Any,
    acc: Any,
) -> Any:  # fmt: skip
    """Totals of 32 weights in 8 units, each 16 times its scale of the pair `scales`."""
    first = _dot_16(unit, take, top, low, high, shift, pair_low(scales), xs, at, acc)
    low += 256
    high += 256
    return add(
        first, _dot_16(unit, take, top, low, high, shift, pair_high(scales), xs, at + 16, acc)
    )


@inline
def _q2_k_sub(take: Any, w: Any, scales: Any, d: Any, dmin: Any, xs: Any, at: Any, acc: Any) -> Any:
    both = unsigned_pairs(acc, scales)
    totals = _dot_32(_two, take, take, w, w, 0, pair_low_nibbles(both), xs, at, acc)
    acc = fma_totals(acc, totals, d, xs, at)
    return fma_pairs(acc, dmin, negated(pair_high_nibbles(both)), xs, at)


@inline
def _q2_k(p: Any, part: Any, K: Any, xs: Any) -> Any:
    acc, ahead = accumulators(xs), p
    for h in range(K // 128):
        block = p + (h >> 1) * _Q2_K_BYTES
        at = block + 2 * LANES * part
        d, dmin = halves(acc, at), halves(acc, at + 32)
        half = block + 64 + (h & 1) * _Q2_K_HALF
        s, w = half + 2 * LANES * part, half + 128 + 4 * LANES * part
        _prefetch_3(ahead)
        acc = _q2_k_sub(_twos_0, w, s, d, dmin, xs, 0, acc)
        _prefetch_3(ahead + 168)
        acc = _q2_k_sub(_twos_1, w, s + 32, d, dmin, xs, _AT_1, acc)
        _prefetch_3(ahead + 336)
        acc = _q2_k_sub(_twos_2, w, s + 64, d, dmin, xs, _AT_2, acc)
        _prefetch_3(ahead + 504)
        acc = _q2_k_sub(_twos_3, w, s + 96, d, dmin, xs, _AT_3, acc)
        ahead += 672
        xs = step(xs, 4 * BLOCK_BYTES)
    return acc


@inline
def _q3_k_sub(
    take: Any,
    top: Any,
    w: Any,
    high: Any,
    shift: Any,
    scales: Any,
    d: Any,
    xs: Any,
    at: Any,
    acc: Any,
) -> Any:
    """Weights are 0..7 first, then 4 * sum_x is taken off."""
    scale = pairs(acc, scales)
    totals = _dot_32(_three, take, top, w, high, shift, scale, xs, at, acc)
    return fma_totals(acc, dot_pairs(totals, _times_minus_4(scale), xs, at), d, xs, at)


@inline
def _q3_k(p: Any, part: Any, K: Any, xs: Any) -> Any:
    acc, ahead = accumulators(xs), p
    for h in range(K // 128):
        block = p + (h >> 1) * _Q3_K_BYTES
        d = halves(acc, block + 2 * LANES * part)
        high, shift = block + 32 + 4 * LANES * part, 4 * (h & 1)
        half = block + 544 + (h & 1) * _Q3_K_HALF
        s, w = half + 2 * LANES * part, half + 128 + 4 * LANES * part
        _prefetch_4(ahead)
        acc = _q3_k_sub(_twos_0, _third_0, w, high, shift, s, d, xs, 0, acc)
        _prefetch_4(ahead + 228)
        acc = _q3_k_sub(_twos_1, _third_1, w, high, shift, s + 32, d, xs, _AT_1, acc)
        _prefetch_4(ahead + 456)
        acc = _q3_k_sub(_twos_2, _third_2, w, high, shift, s + 64, d, xs, _AT_2, acc)
        _prefetch_4(ahead + 684)
        acc = _q3_k_sub(_twos_3, _third_3, w, high, shift, s + 96, d, xs, _AT_3, acc)
        ahead += 912
        xs = step(xs, 4 * BLOCK_BYTES)
    return acc


@inline
def _q6_k_sub(
    take: Any, top: Any, w: Any, high: Any, scales: Any, d: Any, xs: Any, at: Any, acc: Any
) -> Any:
    """Weights are 0..63 first, then 32 * sum_x is taken off."""
    scale = pairs(acc, scales)
    totals = _dot_32(_six, take, top, w, high, 0, scale, xs, at, acc)
    return fma_totals(acc, dot_pairs(totals, _times_minus_32(scale), xs, at), d, xs, at)


@inline
def _q6_k(p: Any, part: Any, K: Any, xs: Any) -> Any:
    acc, ahead = accumulators(xs), p
    for h in range(K // 128):
        block = p + (h >> 1) * _Q6_K_BYTES
        d = halves(acc, block + 2 * LANES * part)
        half = block + 32 + (h & 1) * _Q6_K_HALF
        s, w = half + 2 * LANES * part, half + 128 + 4 * LANES * part
        high = w + 1024
        _prefetch_7(ahead)
        acc = _q6_k_sub(low_nibbles, _top_0, w, high, s, d, xs, 0, acc)
        _prefetch_7(ahead + 420)
        acc = _q6_k_sub(low_nibbles, _top_1, w + 512, high, s + 32, d, xs, _AT_1, acc)
        _prefetch_7(ahead + 840)
        acc = _q6_k_sub(high_nibbles, _top_2, w, high, s + 64, d, xs, _AT_2, acc)
        _prefetch_7(ahead + 1260)
        acc = _q6_k_sub(high_nibbles, _top_3, w + 512, high, s + 96, d, xs, _AT_3, acc)
        ahead += 1680
        xs = step(xs, 4 * BLOCK_BYTES)
    return acc


@kernel(MATMUL)
def _matmul_q2_k_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _q2_k, K // 256 * _Q2_K_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_q3_k_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _q3_k, K // 256 * _Q3_K_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_q6_k_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _q6_k, K // 256 * _Q6_K_BYTES, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


KERNELS: dict[str, Kernel] = {
    "Q2_K": _matmul_q2_k_kernel,
    "Q3_K": _matmul_q3_k_kernel,
    "Q6_K": _matmul_q6_k_kernel,
}
