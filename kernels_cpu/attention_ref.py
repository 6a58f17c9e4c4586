"""What attention computes, in NumPy: the order of additions that the kernels keep.

Owns: the twin of `attention`, and the constants of its arithmetic. Must not know kernels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu.kv_cache import BLOCK, LANES
from edgert.kernels_cpu.vmath import LOG2E, exp2_ref, fma_ref, lane_sum_ref

__all__ = ["NATURAL", "NO_WINDOW", "SPAN", "attention_ref"]

SPAN = 1024  # positions summed apart from the rest, at absolute multiples: a multiple of BLOCK
NO_WINDOW = 1 << 40  # positions
NATURAL = np.float32(LOG2E)  # sinks are logits of e, weights powers of two

_F32 = npt.NDArray[np.float32]
_KV = npt.NDArray[np.floating]
_Ints = npt.NDArray[np.int64]
_Record = tuple[_F32, _F32, _F32]


def attention_ref(
    q: _F32, keys: _KV, values: _KV, position: int, scale: float, *, window: int = 0,
    sinks: _F32 | None = None,
) -> _F32:  # fmt: skip
    """The same arithmetic in NumPy, equal to the bit.

    q (T, n_heads, head_dim) float32, keys and values as `KvLayout` lays them out, position of the
    first token, window 0 for none, sinks (n_heads,) float32 -> (T, n_heads, head_dim) float32.
    """
    T, n_heads, D = q.shape
    at = position + np.arange(T)
    low = np.maximum(at - (window or NO_WINDOW) + 1, 0)
    q = q * np.float32(scale * LOG2E)
    top = np.full((T, n_heads), -np.inf, np.float32)
    weights = np.zeros((T, n_heads, LANES), np.float32)
    total = np.zeros((T, n_heads, values.shape[2]), np.float32)
    for span in range(0, position + T, SPAN):
        sees = (at >= span) & (low < span + SPAN)
        new = _span_ref(q[sees], keys, values, span, low[sees], at[sees])
        old = (top[sees], weights[sees], total[sees])
        with np.errstate(all="ignore"):  # a first span is taken as it is
            both = np.where(old[0] > new[0], old[0], new[0])
            a, b = exp2_ref(old[0] - both)[..., None], exp2_ref(new[0] - both)[..., None]
        first = (low[sees] >= span)[:, None]
        top[sees] = np.where(first, new[0], both)
        weights[sees] = np.where(first[..., None], new[1], fma_ref(new[1], b, old[1] * a))
        total[sees] = np.where(first[..., None], new[2], fma_ref(new[2], b, old[2] * a))
    divisor = lane_sum_ref(weights)
    if sinks is not None:
        sink = sinks * NATURAL
        both = np.where(top > sink, top, sink)
        correction = exp2_ref(top - both)
        total = total * correction[..., None]
        divisor = lane_sum_ref(weights * correction[..., None]) + exp2_ref(sink - both)
    return (total / divisor[..., None])[..., :D]


def _span_ref(q: _F32, keys: _KV, values: _KV, span: int, low: _Ints, at: _Ints) -> _Record:
    """Maximum, weights and weighted sum of positions `low` to `at` of each query in one span."""
    T, n_heads, D = q.shape
    shared = n_heads // keys.shape[0]  # query heads of one KV head
    top = np.full((T, n_heads), -np.inf, np.float32)
    weights = np.zeros((T, n_heads, LANES), np.float32)
    total = np.zeros((T, n_heads, values.shape[2]), np.float32)
    for first in range(span, min(span + SPAN, int(at.max(initial=-1)) + 1), BLOCK):
        rows = (at >= first) & (low < first + BLOCK)
        p = first + np.arange(BLOCK)[None, :]
        seen = (p <= at[rows, None]) & (p >= low[rows, None])  # (rows, 64)
        k = np.repeat(keys[:, first // BLOCK].astype(np.float32), shared, axis=0)
        v = np.repeat(values[:, first : first + BLOCK].astype(np.float32), shared, axis=0)
        score = np.zeros((int(rows.sum()), n_heads, BLOCK), np.float32)
        for d in range(D):
            score = fma_ref(q[rows, :, d, None], k[None, :, d, :], score)
        with np.errstate(all="ignore"):  # what was never written may be anything
            score = np.where(seen[:, None, :], score, np.float32(-np.inf))
        new_top = np.maximum(top[rows], score.max(axis=2))
        correction = exp2_ref(top[rows] - new_top)
        weight = exp2_ref(score - new_top[..., None])
        a, b, c, d4 = np.split(weight, 4, axis=2)
        weights[rows] = weights[rows] * correction[..., None] + ((a + b) + (c + d4))
        block_total = total[rows] * correction[..., None]
        for j in range(BLOCK):
            with np.errstate(all="ignore"):
                added = fma_ref(weight[:, :, j, None], v[None, :, j, :], block_total)
            block_total = np.where(seen[:, j, None, None], added, block_total)
        total[rows] = block_total
        top[rows] = new_top
    return top, weights, total
