"""Bases of nested packs times quantised activations: the top 2 to 4 bits of super-blocks.

Over sub-blocks b = 0, 1, 2, ... of 32 weights:

    of Q4_K, Q5_K:  acc = fma(float32(dot_b), ((d / 2) * sc_b) * d_x[b], acc)
                    acc = fma(-(dmin * mn_b), d_x[b] * float32(sum_x[b]), acc)
                    dot_b = 2 s * sum(u * q_x) + (s - 1) * sum(q_x)
    of Q6_K:        acc = fma(float32(dot_b), (d / 2) * d_x[b], acc)
                    dot_b = sum over both 16s of sc * (2 s * dot16 + (s - 65) * sum_x16)

s = 2^(n - bits) codes share a code u, which stands for their middle. dot_b is exact; of Q6_K it may
reach 128 * 61 * 32 * 127 < 2**25 and is then rounded once, to float32.

Owns: the loop over one tile, for a pack of tokens (`packs`). Must not know: how a base is split off
(`nested`), how tokens are found or results stored (`matmul_drive`). Layout of a super-block of 16
rows: d (32 bytes), dmin (32) if there is one, 4 x [64 bytes of scales (and mins), 2 x `bits` units
of 4 bytes a row].
"""

from __future__ import annotations

from typing import Any

from edgert.kernels_cpu.activations import BLOCK_BYTES
from edgert.kernels_cpu.jit import Kernel, inline, kernel
from edgert.kernels_cpu.lanes import (
    LANES,
    high_nibbles,
    low_nibbles,
    pair_high,
    pair_low,
    prefetch_lines,
)
from edgert.kernels_cpu.lanes import times as times_pairs
from edgert.kernels_cpu.matmul_block32 import dot_nibbles
from edgert.kernels_cpu.matmul_drive import MATMUL, drive, up_to_most
from edgert.kernels_cpu.matmul_planes import dot_threes, dot_twos, eight_threes
from edgert.kernels_cpu.packs import (
    accumulators,
    add,
    bytes_as_float,
    constant_pairs,
    dot_pairs,
    fma_sum,
    fma_totals,
    half_scales,
    halves,
    pairs,
    scaled_16,
    step,
    times,
    weights,
)
from edgert.kernels_cpu.simd import vmul, vneg

__all__ = ["KERNELS"]

# Bytes of 64 weights of 16 rows by bits, and of a super-block with d or with d and dmin.
_G2, _G3, _G4 = (64 + 128 * bits for bits in (2, 3, 4))
_D3, _D4 = 32 + 4 * _G3, 32 + 4 * _G4
_M2, _M3, _M4 = 64 + 4 * _G2, 64 + 4 * _G3, 64 + 4 * _G4
_times_4, _times_8, _times_16 = times(4), times(8), times(16)
_plus_1, _plus_3 = constant_pairs(1), constant_pairs(3)
_zero_6_3, _zero_6_4 = times_pairs(8 - 65), times_pairs(4 - 65)
_prefetch_3, _prefetch_4, _prefetch_5 = prefetch_lines(3), prefetch_lines(4), prefetch_lines(5)


@inline
def _affine_sub(
    dot: Any, widen: Any, plus: Any, w: Any, scales: Any, d: Any, dmin: Any, xs: Any, acc: Any
) -> Any:
    totals = dot_pairs(widen(dot(w, xs, acc)), plus(acc), xs, 0)
    acc = fma_totals(acc, totals, vmul(d, bytes_as_float(acc, scales)), xs, 0)
    return fma_sum(acc, vneg(vmul(dmin, bytes_as_float(acc, scales + 16))), xs, 0)


@inline
def _affine(
    dot: Any, widen: Any, plus: Any, ask: Any, group: Any, p: Any, part: Any, K: Any, xs: Any
) -> Any:
    """A tile of Q4_K or Q5_K: 64 weights of 16 rows are `group` bytes."""
    acc = accumulators(xs)
    for g in range(K // 64):
        block = p + (g >> 2) * (64 + 4 * group)
        at = block + 2 * LANES * part
        d, dmin = half_scales(acc, at), halves(acc, at + 32)
        start = block + 64 + (g & 3) * group
        s, w = start + LANES * part, start + 64 + 4 * LANES * part
        ask(start)
        acc = _affine_sub(dot, widen, plus, w, s, d, dmin, xs, acc)
        xs = step(xs, BLOCK_BYTES)
        ask(start + group // 2)
        w += (group - 64) // 2
        acc = _affine_sub(dot, widen, plus, w, s + 32, d, dmin, xs, acc)
        xs = step(xs, BLOCK_BYTES)
    return acc


@inline
def _dot_fours(w: Any, scale: Any, xs: Any, acc: Any) -> Any:
    """Totals of 32 weights 0..15, each 16 times its scale of the pair `scale`."""
    q_0, q_1, q_2, q_3 = (
        weights(acc, w), weights(acc, w + 64), weights(acc, w + 128), weights(acc, w + 192),
    )  # fmt: skip
    return add(
        scaled_16(
            acc, low_nibbles(q_0), low_nibbles(q_1), low_nibbles(q_2), low_nibbles(q_3), xs, 0,
            pair_low(scale),
        ),
        scaled_16(
            acc, high_nibbles(q_0), high_nibbles(q_1), high_nibbles(q_2), high_nibbles(q_3), xs, 16,
            pair_high(scale),
        ),
    )  # fmt: skip


@inline
def _dot_threes(w: Any, scale: Any, xs: Any, acc: Any) -> Any:
    """As `_dot_fours` of weights 0..7."""
    q_0, q_1, q_2, q_3, q_4, q_5, q_6, q_7 = eight_threes(w, acc)
    return add(
        scaled_16(acc, q_0, q_1, q_2, q_3, xs, 0, pair_low(scale)),
        scaled_16(acc, q_4, q_5, q_6, q_7, xs, 16, pair_high(scale)),
    )


@inline
def _scaled_sub(
    dot: Any, widen: Any, zero: Any, w: Any, scales: Any, d: Any, xs: Any, acc: Any
) -> Any:
    scale = pairs(acc, scales)
    totals = dot_pairs(widen(dot(w, scale, xs, acc)), zero(scale), xs, 0)
    return fma_totals(acc, totals, d, xs, 0)


@inline
def _scaled(
    dot: Any, widen: Any, zero: Any, ask: Any, group: Any, p: Any, part: Any, K: Any, xs: Any
) -> Any:
    """A tile of Q6_K: 64 weights of 16 rows are `group` bytes."""
    acc = accumulators(xs)
    for g in range(K // 64):
        block = p + (g >> 2) * (32 + 4 * group)
        d = half_scales(acc, block + 2 * LANES * part)
        start = block + 32 + (g & 3) * group
        s, w = start + 2 * LANES * part, start + 64 + 4 * LANES * part
        ask(start)
        acc = _scaled_sub(dot, widen, zero, w, s, d, xs, acc)
        xs = step(xs, BLOCK_BYTES)
        ask(start + group // 2)
        w += (group - 64) // 2
        acc = _scaled_sub(dot, widen, zero, w, s + 32, d, xs, acc)
        xs = step(xs, BLOCK_BYTES)
    return acc


@inline
def _b3_q6_k(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _scaled(_dot_threes, _times_16, _zero_6_3, _prefetch_4, _G3, p, part, K, xs)


@inline
def _b4_q6_k(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _scaled(_dot_fours, _times_8, _zero_6_4, _prefetch_5, _G4, p, part, K, xs)


@inline
def _b3_q5_k(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _affine(dot_threes, _times_8, _plus_3, _prefetch_4, _G3, p, part, K, xs)


@inline
def _b4_q5_k(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _affine(dot_nibbles, _times_4, _plus_1, _prefetch_5, _G4, p, part, K, xs)


@inline
def _b2_q4_k(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _affine(dot_twos, _times_8, _plus_3, _prefetch_3, _G2, p, part, K, xs)


@inline
def _b3_q4_k(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _affine(dot_threes, _times_4, _plus_1, _prefetch_4, _G3, p, part, K, xs)


@kernel(MATMUL)
def _matmul_b3_q6_k_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b3_q6_k, K // 256 * _D3, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b4_q6_k_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b4_q6_k, K // 256 * _D4, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b3_q5_k_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b3_q5_k, K // 256 * _M3, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b4_q5_k_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b4_q5_k, K // 256 * _M4, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b2_q4_k_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b2_q4_k, K // 256 * _M2, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_b3_q4_k_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_most, _b3_q4_k, K // 256 * _M3, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


KERNELS: dict[str, Kernel] = {
    "B3_Q6_K": _matmul_b3_q6_k_kernel,
    "B4_Q6_K": _matmul_b4_q6_k_kernel,
    "B3_Q5_K": _matmul_b3_q5_k_kernel,
    "B4_Q5_K": _matmul_b4_q5_k_kernel,
    "B2_Q4_K": _matmul_b2_q4_k_kernel,
    "B3_Q4_K": _matmul_b3_q4_k_kernel,
}
