"""From float32 to plane formats: fewer bits, chosen by least squares.

    w = d * q + m,   q in 0..2^bits - 1,   d and m float16, one pair for a group of weights

`quantize` makes one record of a matrix, `quantize_stack` several that are added: each quantises
what the ones before left over. A stack of one-bit formats is the greedy binary coding
w = m + sum_b alpha_b * (+-1) of LUT-GEMM (arXiv 2206.09557) and BitStack (arXiv 2410.23918), with
d = 2 alpha and m = -alpha; (P3, P1) is a 3-bit matrix with a fourth plane that may stay away.
So one record form serves both, and a stack is computed by kernels that add to their result.

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

__all__ = ["dequantize_stack_ref", "quantize", "quantize_stack"]

# Shares of a group's range that the codes may span at first: the fewer the codes, the more it
# pays to clip the largest weights. Against the first start alone the error of normally distributed
# weights in groups of 128 falls by 0.4, 2.8 and 1.5 % at 2, 3 and 4 bits; ten more: 0.2, 0.3, 1.1.
_SPANS = (1.0, 0.8, 0.6)
_ROUNDS = 8  # of least squares and rounding in turn; most groups no longer change after five
_AT_ONCE = 1 << 20  # weights in flight, so that temporaries stay below 100 MB


def quantize(
    fmt: PlaneFormat, x: Array, importance: Array | None = None, *, refine: bool = True
) -> Array:
    """The bytes that store `x` in `fmt`, with the least (weighted) square error that was found.

    Shapes: x float32 [..., n], n a multiple of fmt.block_size; importance [n] or None, the weight
    of each column's square error, e.g. the mean square of its activations -> uint8
    [..., fmt.row_bytes(n)]. `refine=False` is plain round to nearest over the group's range.
    Raises InputError when the shapes do not fit.
    """
    n = x.shape[-1]
    if x.dtype != np.float32 or n % fmt.block_size:
        raise InputError(f"{fmt.name}: {x.dtype} {list(x.shape)} in groups of {fmt.block_size}")
    if importance is not None and importance.shape != (n,):
        raise InputError(f"importance must be [{n}], not {list(importance.shape)}")
    rows = x.reshape(-1, n)
    step = max(1, _AT_ONCE // n)
    parts = [
        _quantize_rows(fmt, rows[i : i + step], importance, refine)
        for i in range(0, len(rows), step)
    ]
    return np.concatenate(parts).reshape(*x.shape[:-1], -1)


def quantize_stack(
    formats: Sequence[PlaneFormat], x: Array, importance: Array | None = None
) -> list[Array]:
    """One `quantize` for each format, of what the ones before it left of `x`."""
    stack: list[Array] = []
    left = x
    for fmt in formats:
        stack.append(quantize(fmt, left, importance))
        left = left - dequantize_ref(fmt, stack[-1])
    return stack


def dequantize_stack_ref(formats: Sequence[PlaneFormat], stack: Sequence[Array]) -> Array:
    """The weights a stack stores, added in its order: float32 [..., n]."""
    total: Array = dequantize_ref(formats[0], stack[0])
    for fmt, raw in zip(formats[1:], stack[1:], strict=True):
        total = total + dequantize_ref(fmt, raw)
    return total


def _quantize_rows(fmt: PlaneFormat, x: Array, importance: Array | None, refine: bool) -> Array:
    """`quantize` for x [rows, n]."""
    groups = x.astype(np.float64).reshape(-1, fmt.block_size)
    weight = np.ones((1, fmt.block_size))
    if importance is not None:
        weight = np.tile(_usable(importance, fmt.block_size), (len(x), 1))
    levels = 2**fmt.bits - 1
    with np.errstate(all="ignore"):
        d, m = _start(groups, levels, 1.0)
        if refine:
            d, m = _best(groups, weight, levels)
        d, m = d.astype(np.float16), m.astype(np.float16)
        codes = _codes(groups, d.astype(np.float64), m.astype(np.float64), levels)
    shape = (*x.shape[:-1], -1)
    codes = codes.astype(np.uint8).reshape(*x.shape[:-1], -1, fmt.block_size)
    fields = {"d": d.reshape(*shape, 1), "m": m.reshape(*shape, 1), "codes": codes}
    if fmt.bits == 3:
        fields |= {"low": codes & 3, "high": codes >> 2}
    return pack(fmt, fields)


def _usable(importance: Array, group: int) -> Array:
    """Importance by groups; a group of which no column counts is weighted evenly."""
    weight = importance.astype(np.float64).reshape(-1, group)
    return np.where(weight.sum(-1, keepdims=True) > 0, weight, 1.0)


def _start(x: Array, levels: int, span: float) -> tuple[Array, Array]:
    """Scale and offset [groups, 1] whose codes span the middle `span` of each group's range."""
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    d = span * (high - low) / levels
    return d, (low + high - d * levels) / 2


def _codes(x: Array, d: Array, m: Array, levels: int) -> Array:
    """The nearest codes, 0 where d is 0 or not finite."""
    codes = np.rint((x - m) / d).clip(0, levels)
    return np.where(np.isfinite(codes), codes, 0.0)


def _best(x: Array, weight: Array, levels: int) -> tuple[Array, Array]:
    """Scale and offset [groups, 1] of the least weighted square error over all starts."""
    best_d, best_m = _start(x, levels, 1.0)
    best = np.full_like(best_d, np.inf)
    for span in _SPANS:
        d, m = _start(x, levels, span)
        for _ in range(_ROUNDS):
            d, m = _least_squares(x, _codes(x, d, m, levels), weight, d, m)
        d, m = (v.astype(np.float16).astype(np.float64) for v in (d, m))
        error = weight * np.square(d * _codes(x, d, m, levels) + m - x)
        error = error.sum(-1, keepdims=True)
        better = error < best
        best = np.where(better, error, best)
        best_d, best_m = np.where(better, d, best_d), np.where(better, m, best_m)
    return best_d, best_m


def _least_squares(x: Array, q: Array, weight: Array, d: Array, m: Array) -> tuple[Array, Array]:
    """The d and m that minimise sum(weight * (d q + m - x)^2); unchanged where q has one value."""
    total = weight.sum(-1, keepdims=True)
    mean_q = (weight * q).sum(-1, keepdims=True) / total
    mean_x = (weight * x).sum(-1, keepdims=True) / total
    spread = q - mean_q
    square = (weight * spread * spread).sum(-1, keepdims=True)
    slope = (weight * spread * x).sum(-1, keepdims=True) / square
    solvable = square > 0
    return np.where(solvable, slope, d), np.where(solvable, mean_x - slope * mean_q, m)
