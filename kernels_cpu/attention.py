"""Causal grouped-query attention over the KV cache of one layer.

    out[t, h] = sum_p softmax_p(scale * q[t, h] . k[p]) * v[p],   p = 0 .. position of token t

Queries are scaled once, with log2(e), so that weights are powers of two. The softmax is online:
blocks of 64 positions, at absolute multiples of 64, in order; each moves the running maximum,
rescales what was summed and adds its positions in order. A query's arithmetic is fixed by its
position alone: not by the chunk it arrives in, the queries it shares loads with, or the thread.
Positions after the query's own are never used (their scores are replaced before the maximum, their
values not read): a cache may hold anything where nothing was written.

Owns: reference, checks, kernels for f16 and f32 caches. Must not know: rotary embedding, threads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError
from edgert.kernels_cpu import abi
from edgert.kernels_cpu.abi import N_TOKENS, POSITION
from edgert.kernels_cpu.attention_block import (
    SCORES,
    VECTOR,
    attend_block,
    query_bytes,
    reset_query,
)
from edgert.kernels_cpu.jit import Kernel, inline, kernel, void
from edgert.kernels_cpu.kv_cache import BLOCK, LANES, KvLayout
from edgert.kernels_cpu.simd import (
    ld_f32,
    ld_f32x16,
    ld_i64,
    reduce_add,
    splat_f32x16,
    st_f32,
    st_f32x16,
    vdiv,
    vmul,
)
from edgert.kernels_cpu.vmath import LOG2E, exp2_ref, fma_ref, lane_sum_ref
from edgert.units import align_up

__all__ = [
    "attention",
    "attention_kernel",
    "attention_op",
    "attention_ref",
    "attention_scratch_bytes",
    "attention_units",
]

# Queries (tokens x heads that share a KV head) that walk the cache together. 16 of them keep their
# sums and scores in the first-level cache (head_dim 128: 16 x 1.4 KB).
TILE_QUERIES = 16

# Arguments of the op row.
(
    _Q, _Q_STRIDE, _OUT, _OUT_STRIDE, _KEYS, _VALUES, _N_HEADS, _N_KV, _HEAD_DIM, _CONTEXT,
    _SCALE, _SCRATCH, _SCRATCH_STRIDE, _WIDTH, _QUERY_BYTES,
) = abi.arguments(15)  # fmt: skip

_F32 = npt.NDArray[np.float32]
_KV = npt.NDArray[np.floating]


def attention_scratch_bytes(n_heads: int, n_kv: int, head_dim: int) -> int:
    """Bytes of scratch that each thread needs, a multiple of 64."""
    queries = max(TILE_QUERIES, n_heads // n_kv)
    return queries * query_bytes(align_up(head_dim, LANES))


def attention_units(n_kv: int, n_tokens: int) -> int:
    """Units of one call: unit u is token u % n_tokens for KV head u // n_tokens.

    Tokens go in tiles that share loads of the cache; the unit of a tile's first token does them
    all and the others nothing, so chunks of one unit are right for one token and for many.
    """
    return n_kv * n_tokens


def attention_op(
    *, q: int, q_stride: int, out: int, out_stride: int, keys: int, values: int, n_heads: int,
    layout: KvLayout, scale: float, scratch: int, scratch_stride: int,
) -> list[int]:  # fmt: skip
    """The arguments of an attention row.

    Shapes: q, out: rows of n_heads * head_dim float32, one for each token of the call;
    keys, values: addresses of the two parts of the layer (`KvLayout`);
    scratch: `attention_scratch_bytes` for each thread, `scratch_stride` bytes apart.
    """
    return [
        q, q_stride, out, out_stride, keys, values, n_heads, layout.num_key_value_heads,
        layout.head_dim, layout.rounded_context, abi.float_bits(scale * LOG2E), scratch,
        scratch_stride, layout.value_width, query_bytes(layout.value_width),
    ]  # fmt: skip


def attention_ref(q: _F32, keys: _KV, values: _KV, position: int, scale: float) -> _F32:
    """The same arithmetic in NumPy, equal to the bit.

    q (T, n_heads, head_dim) float32, keys and values as `KvLayout` lays them out, position of the
    first token -> (T, n_heads, head_dim) float32.
    """
    T, n_heads, D = q.shape
    shared = n_heads // keys.shape[0]  # query heads of one KV head
    at = position + np.arange(T)
    q = q * np.float32(scale * LOG2E)
    top = np.full((T, n_heads), -np.inf, np.float32)
    weights = np.zeros((T, n_heads, LANES), np.float32)
    total = np.zeros((T, n_heads, values.shape[2]), np.float32)
    for block in range((position + T - 1) // BLOCK + 1):
        first = block * BLOCK
        rows = at >= first
        seen = (first + np.arange(BLOCK))[None, :] <= at[rows, None]  # (rows, 64)
        k = np.repeat(keys[:, block].astype(np.float32), shared, axis=0)
        v = np.repeat(values[:, first : first + BLOCK].astype(np.float32), shared, axis=0)
        score = np.zeros((int(rows.sum()), n_heads, BLOCK), np.float32)
        for d in range(D):
            score = fma_ref(q[rows, :, d, None], k[None, :, d, :], score)
        with np.errstate(all="ignore"):  # what was never written may be anything
            score = np.where(seen[:, None, :], score, np.float32(-np.inf))
        new_top = np.maximum(top[rows], score.max(axis=2))
        correction = exp2_ref(top[rows] - new_top)
        p = exp2_ref(score - new_top[..., None])
        a, b, c, d4 = np.split(p, 4, axis=2)
        weights[rows] = weights[rows] * correction[..., None] + ((a + b) + (c + d4))
        block_total = total[rows] * correction[..., None]
        for j in range(BLOCK):
            with np.errstate(all="ignore"):
                added = fma_ref(p[:, :, j, None], v[None, :, j, :], block_total)
            block_total = np.where(seen[:, j, None, None], added, block_total)
        total[rows] = block_total
        top[rows] = new_top
    return (total / lane_sum_ref(weights)[..., None])[..., :D]


def attention(q: _F32, keys: _KV, values: _KV, position: int, scale: float) -> _F32:
    """As `attention_ref`, compiled: q (T, n_heads, head_dim) -> (T, n_heads, head_dim).

    Raises `InputError` when the shapes do not fit each other. Allocates; the engine runs the
    kernel itself.
    """
    T, n_heads, D = q.shape
    n_kv, blocks, keys_dim, _ = keys.shape
    kv_type = "f16" if keys.dtype == np.float16 else "f32"
    layout = KvLayout(n_kv, D, blocks * BLOCK, kv_type)
    expected = (n_kv, layout.rounded_context, layout.value_width)
    if keys_dim != D or values.shape != expected or n_heads % n_kv or values.dtype != keys.dtype:
        raise InputError(
            f"attention of {q.shape} over keys {keys.shape} and values {values.shape}: "
            f"expected head_dim {D} in the keys, values {expected} of the same type, "
            "and heads a multiple of the KV heads"
        )
    if position < 0 or position + T > layout.rounded_context:
        raise InputError(
            f"positions {position} to {position + T} are outside the cache of {keys.shape}"
        )
    rows = np.ascontiguousarray(q, np.float32).reshape(T, n_heads * D)
    out = np.empty_like(rows)
    scratch = np.empty(attention_scratch_bytes(n_heads, n_kv, D), np.uint8)
    arguments = attention_op(
        q=abi.address_of(rows), q_stride=abi.row_stride(rows), out=abi.address_of(out),
        out_stride=abi.row_stride(out), keys=abi.address_of(keys), values=abi.address_of(values),
        n_heads=n_heads, layout=layout, scale=scale, scratch=abi.address_of(scratch),
        scratch_stride=0,
    )  # fmt: skip
    abi.run_op(
        attention_kernel(kv_type),
        arguments,
        attention_units(n_kv, T),
        n_tokens=T,
        position=position,
    )
    return out.reshape(T, n_heads, D)


@inline
def _load_queries(op: int, t0: int, n_tokens: int, kv: int, shared: int, scratch: int) -> None:
    """Copy the queries of `n_tokens` tokens and the heads of one KV head, scaled, into scratch."""
    D = ld_i64(op + _HEAD_DIM)
    scale = ld_f32(op + _SCALE)
    width = ld_i64(op + _WIDTH)
    each = ld_i64(op + _QUERY_BYTES)
    for t in range(n_tokens):
        row = ld_i64(op + _Q) + (t0 + t) * ld_i64(op + _Q_STRIDE) + 4 * D * kv * shared
        for head in range(shared):
            q = scratch + (t * shared + head) * each
            x = row + 4 * head * D
            whole = D // LANES * LANES
            for i in range(0, 4 * whole, VECTOR):
                st_f32x16(q + i, vmul(ld_f32x16(x + i), splat_f32x16(scale)))
            for i in range(4 * whole, 4 * D, 4):
                st_f32(q + i, ld_f32(x + i) * scale)
            reset_query(q, width)


@inline
def _store_outputs(op: int, t0: int, n_tokens: int, kv: int, shared: int, scratch: int) -> None:
    """Divide the weighted sums by the sum of the weights."""
    D = ld_i64(op + _HEAD_DIM)
    width = ld_i64(op + _WIDTH)
    each = ld_i64(op + _QUERY_BYTES)
    for t in range(n_tokens):
        row = ld_i64(op + _OUT) + (t0 + t) * ld_i64(op + _OUT_STRIDE) + 4 * D * kv * shared
        for head in range(shared):
            total = scratch + (t * shared + head) * each + 4 * width
            divisor = reduce_add(ld_f32x16(total + 4 * width + SCORES + VECTOR))
            out = row + 4 * head * D
            whole = D // LANES * LANES
            for i in range(0, 4 * whole, VECTOR):
                st_f32x16(out + i, vdiv(ld_f32x16(total + i), splat_f32x16(divisor)))
            # Not by vectors: what follows a narrow head is another thread's.
            for i in range(4 * whole, 4 * D, 4):
                st_f32(out + i, ld_f32(total + i) / divisor)


@inline
def _attend(op: int, frame: int, start: int, stop: int, tid: int, half: bool) -> None:
    n_kv = ld_i64(op + _N_KV)
    D = ld_i64(op + _HEAD_DIM)
    context = ld_i64(op + _CONTEXT)
    scratch = ld_i64(op + _SCRATCH) + tid * ld_i64(op + _SCRATCH_STRIDE)
    shared = ld_i64(op + _N_HEADS) // n_kv
    tokens = ld_i64(frame + N_TOKENS)
    width = ld_i64(op + _WIDTH)
    each = ld_i64(op + _QUERY_BYTES)
    size = 2 if half else 4
    tile = max(TILE_QUERIES // shared, 1)
    for unit in range(start, stop):
        kv = unit // tokens
        t0 = unit % tokens
        if t0 % tile != 0:
            continue
        T = min(tile, tokens - t0)
        position = ld_i64(frame + POSITION) + t0
        keys = ld_i64(op + _KEYS) + kv * context * D * size
        values = ld_i64(op + _VALUES) + kv * context * width * size
        _load_queries(op, t0, T, kv, shared, scratch)
        for block in range((position + T - 1) // BLOCK + 1):
            first = block * BLOCK
            t = max(first - position, 0)  # the first token that sees the block
            attend_block(
                scratch + t * shared * each, T - t, shared, keys + first * D * size,
                values + first * width * size, D, width, each, position + t + 1 - first, half,
            )  # fmt: skip
        _store_outputs(op, t0, T, kv, shared, scratch)


@kernel(void("iiiii"))
def _attention_f16_kernel(op: int, frame: int, start: int, stop: int, tid: int) -> None:
    _attend(op, frame, start, stop, tid, True)


@kernel(void("iiiii"))
def _attention_f32_kernel(op: int, frame: int, start: int, stop: int, tid: int) -> None:
    _attend(op, frame, start, stop, tid, False)


def attention_kernel(kv_type: str) -> Kernel:
    """The kernel for a cache of type "f16" or "f32"."""
    return _attention_f16_kernel if kv_type == "f16" else _attention_f32_kernel
