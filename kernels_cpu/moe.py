"""Mixture of experts around the expert matrices: routing before them, the weighted sum after.

    route     p = softmax(logits);  the k largest p (ties: the lower expert first), in that order;
              weight_j = p_j, divided by max(sum of the k, 2**-14) where asked, times a scale
    combine   y[t] += sum_j weight[t, j] * e[t * k + j],   j = 0 .. k-1 in router order

Owns: reference, checks, kernels. Must not know: where experts are or who computes them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError
from edgert.kernels_cpu import abi
from edgert.kernels_cpu.abi import activation_rows
from edgert.kernels_cpu.elementwise import CHUNK, units_per_row
from edgert.kernels_cpu.jit import inline, kernel, void
from edgert.kernels_cpu.simd import (
    bc_f32x16,
    const_of,
    fma,
    ld_f32,
    ld_f32x16,
    ld_i64,
    reduce_add,
    reduce_max,
    select_gt,
    splat_f32x16,
    splat_i32x16,
    st_f32,
    st_f32x16,
    st_i64,
    vadd,
    vdiv,
    vec,
    vmax,
    vsub,
    zero_f32x16,
)
from edgert.kernels_cpu.vmath import LANES, exp16, exp_ref, fma_ref, lane_sum_ref

__all__ = [
    "moe_combine",
    "moe_combine_kernel",
    "moe_combine_op",
    "moe_combine_ref",
    "moe_route",
    "moe_route_kernel",
    "moe_route_op",
    "moe_route_ref",
]

SMALLEST_SUM = 2.0**-14  # the smallest normal half, 6.1e-5: what weights are divided by at least

_F32 = npt.NDArray[np.float32]
_I64 = npt.NDArray[np.int64]

# --- route: unit = token --------------------------------------------------------------------

(
    _LOGITS, _LOGITS_STRIDE, _N_EXPERTS, _TOP_K, _NORM, _SCALE, _IDS, _IDS_STRIDE, _WEIGHTS,
    _WEIGHTS_STRIDE,
) = abi.arguments(10)  # fmt: skip


def moe_route_op(
    *, logits: int, logits_stride: int, n_experts: int, top_k: int, norm_topk: bool, scale: float,
    ids: int, ids_stride: int, weights: int, weights_stride: int,
) -> list[int]:  # fmt: skip
    """The arguments of a moe_route row; one unit for each token.

    Shapes: logits rows of n_experts float32, scratch afterwards; ids rows of top_k int64; weights
    rows of top_k float32. NaN logits give distinct ids in range and NaN weights.
    """
    assert 1 <= top_k <= n_experts, (top_k, n_experts)
    return [
        logits, logits_stride, n_experts, top_k, int(norm_topk), abi.float_bits(scale), ids,
        ids_stride, weights, weights_stride,
    ]  # fmt: skip


def moe_route_ref(
    logits: _F32, top_k: int, *, norm_topk: bool, scale: float = 1.0
) -> tuple[_I64, _F32]:
    """logits (T, n_experts) float32 -> ids (T, top_k) int64, weights (T, top_k) float32."""
    T, n_experts = logits.shape
    padded = np.full((T, -(-n_experts // LANES) * LANES), -np.inf, np.float32)
    padded[:, :n_experts] = logits
    with np.errstate(all="ignore"):
        p: _F32 = exp_ref(padded - np.fmax.reduce(logits, axis=1)[:, None])
    sums: _F32 = np.zeros((T, LANES), np.float32)
    for vector in np.split(p, p.shape[1] // LANES, axis=1):
        sums = sums + vector
    shares: _F32 = p[:, :n_experts] / lane_sum_ref(sums)[:, None]
    ids = np.argsort(-shares, axis=1, kind="stable")[:, :top_k].astype(np.int64)
    weights: _F32 = np.take_along_axis(shares, ids, axis=1)
    if norm_topk:
        total: _F32 = np.zeros(T, np.float32)
        for j in range(top_k):
            total = total + weights[:, j]
        weights = np.divide(weights, np.maximum(total, SMALLEST_SUM)[:, None], dtype=np.float32)
    return ids, weights * np.float32(scale)


def moe_route(
    logits: _F32, top_k: int, *, norm_topk: bool, scale: float = 1.0
) -> tuple[_I64, _F32]:
    """As `moe_route_ref`, compiled. Raises InputError for a top_k outside 1..n_experts."""
    T, n_experts = logits.shape
    if not 1 <= top_k <= n_experts:
        raise InputError(f"cannot choose {top_k} of {n_experts} experts")
    rows = activation_rows(logits)
    ids, weights = np.empty((T, top_k), np.int64), np.empty((T, top_k), np.float32)
    arguments = moe_route_op(
        logits=abi.address_of(rows), logits_stride=abi.row_stride(rows), n_experts=n_experts,
        top_k=top_k, norm_topk=norm_topk, scale=scale, ids=abi.address_of(ids),
        ids_stride=abi.row_stride(ids), weights=abi.address_of(weights),
        weights_stride=abi.row_stride(weights),
    )  # fmt: skip
    abi.run_op(moe_route_kernel, arguments, T, n_tokens=T)
    return ids, weights


_lane = const_of(vec("i32", 16), list(range(16)))
_minus_infinity = const_of(vec("f32", 16), [float("-inf")])
_TAKEN = np.float32(-2)  # below every probability: this expert has been chosen


@inline
def _softmax(logits: int, n: int) -> None:
    """Replace `n` logits by their probabilities."""
    top = _minus_infinity()
    for i in range(0, n, LANES):
        v = ld_f32x16(logits + 4 * i)
        v = select_gt(splat_i32x16(np.int32(n - i)), _lane(), v, _minus_infinity())
        st_f32x16(logits + 4 * i, v)
        top = vmax(v, top)  # a NaN in the first argument is dropped
    largest = splat_f32x16(reduce_max(top))
    sums = zero_f32x16()
    for i in range(0, 4 * n, 64):
        p = exp16(vsub(ld_f32x16(logits + i), largest))
        st_f32x16(logits + i, p)
        sums = vadd(sums, p)
    total = splat_f32x16(reduce_add(sums))
    for i in range(0, 4 * n, 64):
        st_f32x16(logits + i, vdiv(ld_f32x16(logits + i), total))


@inline
def _take_largest(p: int, n: int) -> int:
    """The first of the largest probabilities not yet taken; the first not taken if all are NaN."""
    best = -1
    largest = np.float32(-1)
    for e in range(n):
        value = ld_f32(p + 4 * e)
        if value > largest:
            best = e
            largest = value
        elif best < 0 and value != _TAKEN:
            best = e
    return best


@kernel(void("iiiii"))
def moe_route_kernel(op: int, frame: int, start: int, stop: int, tid: int) -> None:
    """Route tokens start..stop-1."""
    n = ld_i64(op + _N_EXPERTS)
    top_k = ld_i64(op + _TOP_K)
    for t in range(start, stop):
        p = ld_i64(op + _LOGITS) + t * ld_i64(op + _LOGITS_STRIDE)
        ids = ld_i64(op + _IDS) + t * ld_i64(op + _IDS_STRIDE)
        weights = ld_i64(op + _WEIGHTS) + t * ld_i64(op + _WEIGHTS_STRIDE)
        _softmax(p, n)
        total = np.float32(0)
        for j in range(top_k):
            expert = _take_largest(p, n)
            weight = ld_f32(p + 4 * expert)
            st_f32(p + 4 * expert, _TAKEN)
            st_i64(ids + 8 * j, expert)
            st_f32(weights + 4 * j, weight)
            total += weight
        divisor = np.float32(1)
        if ld_i64(op + _NORM) != 0:
            divisor = np.float32(SMALLEST_SUM) if total < np.float32(SMALLEST_SUM) else total
        for j in range(top_k):
            w = weights + 4 * j
            st_f32(w, ld_f32(w) / divisor * ld_f32(op + _SCALE))


# --- combine: unit = token x 1024 columns ---------------------------------------------------

_E, _E_STRIDE, _PER_TOKEN, _W, _W_STRIDE, _K, _Y, _Y_STRIDE = abi.arguments(8)


def moe_combine_op(
    *, experts: int, experts_stride: int, top_k: int, weights: int, weights_stride: int, K: int,
    y: int, y_stride: int,
) -> list[int]:  # fmt: skip
    """The arguments of a moe_combine row; `units_per_row(K)` units for each token.

    Shapes: experts rows of K float32, row t * top_k + j for choice j of token t; weights rows of
    top_k float32; y rows of K float32, added to.
    """
    return [experts, experts_stride, top_k, weights, weights_stride, K, y, y_stride]


def moe_combine_ref(y: _F32, experts: _F32, weights: _F32) -> _F32:
    """y (T, K), experts (T, top_k, K), weights (T, top_k) float32 -> (T, K) float32."""
    total = np.zeros_like(y)
    for j in range(weights.shape[1]):
        total = fma_ref(weights[:, j, None], experts[:, j], total)
    return y + total


def moe_combine(y: _F32, experts: _F32, weights: _F32) -> _F32:
    """As `moe_combine_ref`, compiled. Raises InputError when the shapes do not fit."""
    T, K = y.shape
    top_k = weights.shape[1]
    if experts.shape != (T, top_k, K) or weights.shape != (T, top_k):
        raise InputError(
            f"y {y.shape}, experts {experts.shape}, weights {weights.shape} do not fit"
        )
    out, rows = activation_rows(y), activation_rows(experts.reshape(-1, K))
    w = np.ascontiguousarray(weights, np.float32)
    arguments = moe_combine_op(
        experts=abi.address_of(rows), experts_stride=abi.row_stride(rows), top_k=top_k,
        weights=abi.address_of(w), weights_stride=abi.row_stride(w), K=K, y=abi.address_of(out),
        y_stride=abi.row_stride(out),
    )  # fmt: skip
    abi.run_op(moe_combine_kernel, arguments, T * units_per_row(K), n_tokens=T)
    return out[:, :K]


@kernel(void("iiiii"))
def moe_combine_kernel(op: int, frame: int, start: int, stop: int, tid: int) -> None:
    """Add the weighted experts in the column chunks start..stop-1."""
    K = ld_i64(op + _K)
    top_k = ld_i64(op + _PER_TOKEN)
    stride = ld_i64(op + _E_STRIDE)
    per_row = (K + CHUNK - 1) // CHUNK
    for unit in range(start, stop):
        t = unit // per_row
        begin = unit % per_row * CHUNK
        experts = ld_i64(op + _E) + t * top_k * stride + 4 * begin
        weights = ld_i64(op + _W) + t * ld_i64(op + _W_STRIDE)
        y = ld_i64(op + _Y) + t * ld_i64(op + _Y_STRIDE) + 4 * begin
        for i in range(0, 4 * min(CHUNK, K - begin), 64):
            total = zero_f32x16()
            for j in range(top_k):
                row = ld_f32x16(experts + j * stride + i)
                total = fma(bc_f32x16(weights + 4 * j), row, total)
            st_f32x16(y + i, vadd(ld_f32x16(y + i), total))
