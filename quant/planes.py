"""From float32 to plane formats: fewer bits, chosen by least squares.

    w = d * q + m,   q in 0..2^bits - 1,   d and m float16, one pair for a group of weights

`quantize_planes_ref` makes one record of a matrix, `quantize_stack` several that are added: each
quantises what the ones before left over. A stack of one-bit formats is the greedy binary coding
w = m + sum_b alpha_b * (+-1) of LUT-GEMM (arXiv 2206.09557) and BitStack (arXiv 2410.23918), with
d = 2 alpha and m = -alpha; (P3, P1) is a 3-bit matrix with a fourth plane that may stay away.
So one record form serves both, and a stack is computed by kernels that add to their result.

All arithmetic is in float32, sums of a group in 16 lanes that are added by halves, so that the
kernel (kernels_cpu/plane_fit.py), which is some 100 times as fast, gives the same bytes.

Owns: how scales, offsets and codes are chosen. Must not know: files, kernels, where a field sits
in its block (packing.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgert.errors import InputError
from edgert.quant.formats import PlaneFormat
from edgert.quant.packing import Array, pack
from edgert.quant.reference import dequantize_ref

__all__ = ["ROUNDS", "SPANS", "column_weights", "dequantize_stack_ref", "quantize_planes_ref",
           "quantize_stack"]  # fmt: skip

# Shares of a group's range that the codes may span at first: the fewer the codes, the more it
# pays to clip the largest weights. Against the first start alone the error of normally distributed
# weights in groups of 128 falls by 0.4, 2.8 and 1.5 % at 2, 3 and 4 bits; ten more: 0.2, 0.3, 1.1.
SPANS = (1.0, 0.8, 0.6)
ROUNDS = 8  # of least squares and rounding in turn; most groups no longer change after five
_AT_ONCE = 1 << 20  # weights in flight, so that temporaries stay below 100 MB


def quantize_planes_ref(
    fmt: PlaneFormat, x: Array, importance: Array | None = None, *, refine: bool = True
) -> Array:
    """The bytes that store `x` in `fmt`, with the least (weighted) square error that was found.

    Shapes: x float32 [..., n], n a multiple of fmt.block_size; importance [n] or None, the weight
    of each column's square error, e.g. the mean square of its activations -> uint8
    [..., fmt.row_bytes(n)]. `refine=False` is plain round to nearest over the group's range.
    Raises InputError when the shapes do not fit.
    """
    weight = column_weights(fmt, x, importance)
    n = x.shape[-1]
    rows = x.reshape(-1, n)
    step = max(1, _AT_ONCE // n)
    parts = [
        _quantize_rows(fmt, rows[i : i + step], weight, refine) for i in range(0, len(rows), step)
    ]
    return np.concatenate(parts).reshape(*x.shape[:-1], -1)


def quantize_stack(
    formats: Sequence[PlaneFormat], x: Array, importance: Array | None = None
) -> list[Array]:
    """One `quantize_planes_ref` for each format, of what the ones before it left of `x`."""
    stack: list[Array] = []
    left = x
    for fmt in formats:
        stack.append(quantize_planes_ref(fmt, left, importance))
        left = left - dequantize_ref(fmt, stack[-1])
    return stack


def dequantize_stack_ref(formats: Sequence[PlaneFormat], stack: Sequence[Array]) -> Array:
    """The weights a stack stores, added in its order: float32 [..., n]."""
    total: Array = dequantize_ref(formats[0], stack[0])
    for fmt, raw in zip(formats[1:], stack[1:], strict=True):
        total = total + dequantize_ref(fmt, raw)
    return total


def column_weights(fmt: PlaneFormat, x: Array, importance: Array | None) -> Array:
    """What the square error of each column of `x` counts: float32 [n], at most 1.

    A group of which no column counts is weighted evenly. Raises InputError when shapes do not fit.
    """
    n = x.shape[-1]
    if x.dtype != np.float32 or n % fmt.block_size:
        raise InputError(f"{fmt.name}: {x.dtype} {list(x.shape)} in groups of {fmt.block_size}")
    if importance is None:
        return np.ones(n, np.float32)
    if importance.shape != (n,):
        raise InputError(f"importance must be [{n}], not {list(importance.shape)}")
    most = float(importance.max())
    weight = (importance.astype(np.float64) / (most or 1.0)).astype(np.float32)
    groups = weight.reshape(-1, fmt.block_size)
    even = groups.sum(-1, keepdims=True) > 0
    return np.where(even, groups, np.float32(1)).reshape(-1)


def _quantize_rows(fmt: PlaneFormat, x: Array, weight: Array, refine: bool) -> Array:
    """`quantize_planes_ref` for x [rows, n] and weights of its columns [n]."""
    groups = x.reshape(-1, fmt.block_size)
    weight = np.tile(weight.reshape(-1, fmt.block_size), (len(x), 1))
    levels = np.float32(2**fmt.bits - 1)
    with np.errstate(all="ignore"):
        d, m = _start(groups, levels, 1.0)
        if refine:
            d, m = _best(groups, weight, levels)
        d, m = d.astype(np.float16), m.astype(np.float16)
        codes = _codes(groups, d.astype(np.float32), m.astype(np.float32), levels)
    shape = (*x.shape[:-1], -1)
    codes = codes.astype(np.uint8).reshape(*x.shape[:-1], -1, fmt.block_size)
    fields = {"d": d.reshape(*shape, 1), "m": m.reshape(*shape, 1), "codes": codes}
    if fmt.bits == 3:
        fields |= {"low": codes & 3, "high": codes >> 2}
    return pack(fmt, fields)


def _start(x: Array, levels: np.float32, span: float) -> tuple[Array, Array]:
    """Scale and offset [groups, 1] whose codes span the middle `span` of each group's range.

    NaN where a weight is not finite.
    """
    usable = np.isfinite(x).all(-1, keepdims=True)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    low, high = (np.where(usable, v, np.float32(np.nan)) for v in (low, high))
    d = np.float32(span) * (high - low) / levels
    return d, (low + high - d * levels) * np.float32(0.5) + np.float32(0)  # no -0


def _codes(x: Array, d: Array, m: Array, levels: np.float32) -> Array:
    """The nearest codes, 0 where d is 0 or not a number."""
    inverse = np.where(d != 0, np.float32(1) / d, np.float32(0))
    codes = np.rint((x - m) * inverse)
    return np.where(codes > 0, np.minimum(codes, levels), np.float32(0))


def _best(x: Array, weight: Array, levels: np.float32) -> tuple[Array, Array]:
    """Scale and offset [groups, 1] of the least weighted square error over all starts."""
    best_d, best_m = _start(x, levels, 1.0)
    best = np.full_like(best_d, np.inf)
    for span in SPANS:
        d, m = _start(x, levels, span)
        for _ in range(ROUNDS):
            d, m = _least_squares(x, _codes(x, d, m, levels), weight, d, m)
        d, m = (v.astype(np.float16).astype(np.float32) for v in (d, m))
        left = d * _codes(x, d, m, levels) + m - x
        error = _sum(weight * left * left)
        better = error < best
        best = np.where(better, error, best)
        best_d, best_m = np.where(better, d, best_d), np.where(better, m, best_m)
    return best_d, best_m


def _least_squares(x: Array, q: Array, weight: Array, d: Array, m: Array) -> tuple[Array, Array]:
    """The d and m that minimise sum(weight * (d q + m - x)^2); unchanged where q has one value."""
    total = _sum(weight)
    mean_q = _sum(weight * q) / total
    mean_x = _sum(weight * x) / total
    spread = q - mean_q
    square = _sum(weight * spread * spread)
    slope = _sum(weight * spread * x) / square
    solvable = square > 0
    return np.where(solvable, slope, d), np.where(solvable, mean_x - slope * mean_q, m)


def _sum(x: Array) -> Array:
    """Sums of groups [groups, 1]: 16 lanes in the order of the group, then the lanes by halves."""
    lanes = np.zeros((len(x), 16), np.float32)
    for at in range(0, x.shape[1], 16):
        lanes = lanes + x[:, at : at + 16]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes
