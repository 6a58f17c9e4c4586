"""Causal grouped-query attention over the KV cache of one layer.

    out[t, h] = sum_p softmax_p(scale * q[t, h] . k[p]) * v[p],   p = 0 .. position of token t

With a window w a token sees its last w positions only, itself included. A sink is a logit for each
head that takes its part of the softmax and adds nothing.

Queries are scaled once, with log2(e), so that weights are powers of two. The softmax is online:
blocks of 64 positions, at absolute multiples of 64, in order; each moves the running maximum,
rescales what was summed and adds its positions in order. Every span of 1024 positions begins anew,
and what spans have summed is merged in order: so threads may share a long context. A query's
arithmetic is fixed by its position alone: not by the chunk it arrives in, the queries it shares
loads with, the parts its context is cut into, or the thread. Positions that a query does not see
are never used (their scores are replaced before the maximum, their values not multiplied, blocks
and spans of them not read): a cache may hold anything where nothing was written.
`attention_ref.py` is the same in NumPy.

Owns: checks, kernels for f16 and f32 caches. Must not know: rotary embedding, threads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError
from edgert.kernels_cpu import abi
from edgert.kernels_cpu.abi import N_TOKENS, POSITION
from edgert.kernels_cpu.atomic import atomic_add, store_int
from edgert.kernels_cpu.attention_block import (
    SCORES,
    VECTOR,
    attend_block,
    copy_record,
    merge_record,
    query_bytes,
    record_bytes,
    reset_record,
)
from edgert.kernels_cpu.attention_ref import NATURAL, NO_WINDOW, SPAN
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
    vmax,
    vmul,
    vsub,
)
from edgert.kernels_cpu.vmath import LOG2E, exp2_16
from edgert.units import align_up

__all__ = [
    "attention",
    "attention_kernel",
    "attention_op",
    "attention_scratch_bytes",
    "attention_units",
    "context_parts",
    "partials_bytes",
]

# Queries (tokens x heads that share a KV head) that walk the cache together. 16 of them keep their
# sums and scores in the first-level cache (head_dim 128: 16 x 1.4 KB).
TILE_QUERIES = 16

# Arguments of the op row.
(
    _Q, _Q_STRIDE, _OUT, _OUT_STRIDE, _KEYS, _VALUES, _N_HEADS, _N_KV, _HEAD_DIM, _CONTEXT,
    _SCALE, _SCRATCH, _SCRATCH_STRIDE, _WIDTH, _QUERY_BYTES, _WINDOW, _SINKS, _PARTS, _PARTIALS,
) = abi.arguments(19)  # fmt: skip

_CELL = 64  # bytes of the counter of a KV head

_F32 = npt.NDArray[np.float32]
_KV = npt.NDArray[np.floating]


def attention_scratch_bytes(n_heads: int, n_kv: int, head_dim: int) -> int:
    """Bytes of scratch that each thread needs, a multiple of 64."""
    width = align_up(head_dim, LANES)
    return max(TILE_QUERIES, n_heads // n_kv) * (query_bytes(width) + record_bytes(width))


def context_parts(n_kv: int, threads: int) -> int:
    """Parts that the context of a KV head is cut into for one token: 1 where heads are enough.

    Otherwise there are two units for each thread: every part starts reading from memory anew.
    """
    return 1 if n_kv % threads == 0 or n_kv >= 2 * threads else -(-2 * threads // n_kv)


def partials_bytes(n_heads: int, n_kv: int, head_dim: int, context: int, parts: int) -> int:
    """Bytes where parts of a context leave what they summed, a multiple of 64; 0 for one part."""
    if parts == 1:
        return 0
    spans = -(-context // SPAN)
    return n_kv * _CELL + n_heads * spans * record_bytes(align_up(head_dim, LANES))


def attention_units(n_kv: int, n_tokens: int, parts: int = 1) -> int:
    """Units of one call: unit u is for KV head u // (parts * n_tokens).

    Of one token each unit is a part of the context. Of several, unit t of a head is token t, in
    tiles that share loads of the cache: the unit of a tile's first token does them all and the
    others nothing, so chunks of one unit are right for one token and for many.
    """
    return n_kv * n_tokens * parts


def attention_op(
    *, q: int, q_stride: int, out: int, out_stride: int, keys: int, values: int, n_heads: int,
    layout: KvLayout, scale: float, scratch: int, scratch_stride: int, window: int = 0,
    sinks: int = 0, parts: int = 1, partials: int = 0,
) -> list[int]:  # fmt: skip
    """The arguments of an attention row.

    Shapes: q, out: rows of n_heads * head_dim float32, one for each token of the call;
    keys, values: addresses of the two parts of the layer (`KvLayout`);
    scratch: `attention_scratch_bytes` for each thread, `scratch_stride` bytes apart;
    window: positions a token sees, 0 for all; sinks: float32[n_heads] or 0;
    parts, partials: `context_parts` and `partials_bytes`, which begin as zeros. Rows that a
    barrier separates may share scratch and partials.
    """
    return [
        q, q_stride, out, out_stride, keys, values, n_heads, layout.num_key_value_heads,
        layout.head_dim, layout.rounded_context, abi.float_bits(scale * LOG2E), scratch,
        scratch_stride, layout.value_width, query_bytes(layout.value_width),
        window or NO_WINDOW, sinks, parts, partials,
    ]  # fmt: skip


def attention(
    q: _F32, keys: _KV, values: _KV, position: int, scale: float, *, window: int = 0,
    sinks: _F32 | None = None, parts: int = 1,
) -> _F32:  # fmt: skip
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
    if window < 0 or parts < 1 or (sinks is not None and sinks.shape != (n_heads,)):
        raise InputError(
            f"a window of {window}, {parts} parts and sinks "
            f"{None if sinks is None else sinks.shape}: expected a window of 0 (none) or more, "
            f"1 part or more, and a sink for each of {n_heads} heads"
        )
    if sinks is not None:
        sinks = np.ascontiguousarray(sinks, np.float32)
    rows = np.ascontiguousarray(q, np.float32).reshape(T, n_heads * D)
    out = np.empty_like(rows)
    scratch = np.empty(attention_scratch_bytes(n_heads, n_kv, D), np.uint8)
    partials = np.zeros(partials_bytes(n_heads, n_kv, D, blocks * BLOCK, parts), np.uint8)
    arguments = attention_op(
        q=abi.address_of(rows), q_stride=abi.row_stride(rows), out=abi.address_of(out),
        out_stride=abi.row_stride(out), keys=abi.address_of(keys), values=abi.address_of(values),
        n_heads=n_heads, layout=layout, scale=scale, scratch=abi.address_of(scratch),
        scratch_stride=0, window=window, sinks=abi.address_of(sinks), parts=parts,
        partials=abi.address_of(partials),
    )  # fmt: skip
    abi.run_op(
        attention_kernel(kv_type),
        arguments,
        attention_units(n_kv, T, parts),
        n_tokens=T,
        position=position,
    )
    return out.reshape(T, n_heads, D)


@inline
def _load_queries(op: int, t0: int, n_tokens: int, kv: int, shared: int, scratch: int) -> None:
    """Copy the queries of `n_tokens` tokens and the heads of one KV head, scaled, into scratch."""
    D = ld_i64(op + _HEAD_DIM)
    scale = ld_f32(op + _SCALE)
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


@inline
def _add_sink(record: int, width: int, sink: float) -> float:
    """Move a record's sum to the greater of its maximum and the sink's; the sum of all weights."""
    top, sinks = splat_f32x16(ld_f32(record + 4 * width)), splat_f32x16(sink)
    both = vmax(top, sinks)
    correction = exp2_16(vsub(top, both))
    for i in range(0, 4 * width, VECTOR):
        st_f32x16(record + i, vmul(ld_f32x16(record + i), correction))
    st_f32x16(record + 4 * width, exp2_16(vsub(sinks, both)))
    weights = vmul(ld_f32x16(record + 4 * width + VECTOR), correction)
    divisor: float = reduce_add(weights) + ld_f32(record + 4 * width)
    return divisor


@inline
def _store_outputs(
    op: int, t0: int, n_tokens: int, kv: int, shared: int, record: int, apart: int
) -> None:
    """Divide the weighted sums by the sum of the weights; records are `apart` bytes apart."""
    D = ld_i64(op + _HEAD_DIM)
    width = ld_i64(op + _WIDTH)
    sinks = ld_i64(op + _SINKS)
    for t in range(n_tokens):
        row = ld_i64(op + _OUT) + (t0 + t) * ld_i64(op + _OUT_STRIDE) + 4 * D * kv * shared
        for head in range(shared):
            if sinks != 0:
                sink = ld_f32(sinks + 4 * (kv * shared + head)) * NATURAL
                divisor = _add_sink(record, width, sink)
            else:
                divisor = reduce_add(ld_f32x16(record + 4 * width + VECTOR))
            out = row + 4 * head * D
            whole = D // LANES * LANES
            for i in range(0, 4 * whole, VECTOR):
                st_f32x16(out + i, vdiv(ld_f32x16(record + i), splat_f32x16(divisor)))
            # Not by vectors: what follows a narrow head is another thread's.
            for i in range(4 * whole, 4 * D, 4):
                st_f32(out + i, ld_f32(record + i) / divisor)
            record += apart


@inline
def _attend_span(
    op: int, scratch: int, kv: int, span: int, position: int, tokens: int, shared: int, half: bool
) -> None:
    """What the queries of `tokens` tokens sum over the span of positions that begins at `span`."""
    D = ld_i64(op + _HEAD_DIM)
    width = ld_i64(op + _WIDTH)
    each = ld_i64(op + _QUERY_BYTES)
    window = ld_i64(op + _WINDOW)
    size = 2 if half else 4
    before = kv * ld_i64(op + _CONTEXT)
    keys = ld_i64(op + _KEYS) + before * D * size
    values = ld_i64(op + _VALUES) + before * width * size
    for i in range(tokens * shared):
        reset_record(scratch + i * each + 4 * width + SCORES, width)
    begin = max(span, max(position + 1 - window, 0) // BLOCK * BLOCK)
    for first in range(begin, min(span + SPAN, position + tokens), BLOCK):
        # The tokens that see the block are t to stop - 1.
        t = max(first - position, 0)
        stop = min(tokens, first + BLOCK - 1 + window - position)
        attend_block(
            scratch + t * shared * each, stop - t, shared, keys + first * D * size,
            values + first * width * size, D, width, each, position + t + 1 - window - first,
            position + t + 1 - first, half,
        )  # fmt: skip


@inline
def _attend_tile(
    op: int, scratch: int, kv: int, position: int, tokens: int, shared: int, begin: int, stop: int,
    into: int, step: int, kept: int, half: bool,
) -> None:  # fmt: skip
    """Spans `begin` to `stop` - 1, merged in order at `into` for the first `kept` tokens.

    With a `step` (of one token) each span's are left as they are, `step` bytes after the last's.
    """
    width = ld_i64(op + _WIDTH)
    each = ld_i64(op + _QUERY_BYTES)
    window = ld_i64(op + _WINDOW)
    merging = 1 if step == 0 else 0  # a number: LLVM makes two of the whole loop for a condition
    for number in range(begin, stop):
        span = number * SPAN
        _attend_span(op, scratch, kv, span, position, tokens, shared, half)
        record, other = scratch + 4 * width + SCORES, into
        for at in range(position, position + kept):
            first = max(at + 1 - window, 0) >= span * merging
            for _ in range(shared):
                if first:
                    copy_record(other, record, width)
                elif at >= span:
                    merge_record(other, record, width)
                record += each
                other += 4 * width + 2 * VECTOR
        into += step


@inline
def _merge_parts(op: int, shared: int, begin: int, stop: int, merged: int, partials: int) -> None:
    """Merge the records of spans `begin` to `stop` - 1 of one token, in order, into `merged`."""
    width = ld_i64(op + _WIDTH)
    size = 4 * width + 2 * VECTOR
    for i in range(shared):
        into, record = merged + i * size, partials + (begin * shared + i) * size
        copy_record(into, record, width)
        for _ in range(begin + 1, stop):
            record += shared * size
            merge_record(into, record, width)


@inline
def _attend(op: int, frame: int, start: int, stop: int, tid: int, half: bool) -> None:
    n_kv = ld_i64(op + _N_KV)
    scratch = ld_i64(op + _SCRATCH) + tid * ld_i64(op + _SCRATCH_STRIDE)
    shared = ld_i64(op + _N_HEADS) // n_kv
    tokens = ld_i64(frame + N_TOKENS)
    tile = max(TILE_QUERIES // shared, 1)
    width = ld_i64(op + _WIDTH)
    each = ld_i64(op + _QUERY_BYTES)
    merged = scratch + max(TILE_QUERIES, shared) * each
    parts = ld_i64(op + _PARTS)
    for unit in range(start, stop):
        kv = unit // (tokens * parts)
        t0 = unit - kv * tokens * parts
        part = 0
        if tokens == 1:
            t0, part = 0, t0
        if t0 >= tokens or t0 % tile != 0:
            continue
        T = min(tile, tokens - t0)
        position = ld_i64(frame + POSITION) + t0
        begin = max(position + 1 - ld_i64(op + _WINDOW), 0) // SPAN
        end = (position + T - 1) // SPAN + 1
        # With several parts of several spans each part leaves records, and the last merges them.
        cut = min(parts, end - begin) if tokens == 1 else 1
        first, last, partials, step, kept = begin, end, 0, 0, T
        into, records, apart = merged, merged, 4 * width + 2 * VECTOR
        if end - begin == 1:
            records, apart, kept = scratch + 4 * width + SCORES, each, 0  # nothing to merge
        if cut > 1:
            first = begin + part * (end - begin) // parts
            last = begin + (part + 1) * (end - begin) // parts
            step = shared * (4 * width + 2 * VECTOR)
            spans = (ld_i64(op + _CONTEXT) + SPAN - 1) // SPAN
            partials = ld_i64(op + _PARTIALS) + n_kv * _CELL + kv * spans * step
            into = partials + first * step
        if first == last or (cut == 1 and part > 0):
            continue
        _load_queries(op, t0, T, kv, shared, scratch)
        _attend_tile(op, scratch, kv, position, T, shared, first, last, into, step, kept, half)
        if cut > 1:
            done = ld_i64(op + _PARTIALS) + kv * _CELL
            if atomic_add(done, 1) != cut - 1:
                continue
            store_int(done, 0)
            _merge_parts(op, shared, begin, end, merged, partials)
        _store_outputs(op, t0, T, kv, shared, records, apart)


@kernel(void("iiiii"))
def _attention_f16_kernel(op: int, frame: int, start: int, stop: int, tid: int) -> None:
    _attend(op, frame, start, stop, tid, True)


@kernel(void("iiiii"))
def _attention_f32_kernel(op: int, frame: int, start: int, stop: int, tid: int) -> None:
    _attend(op, frame, start, stop, tid, False)


def attention_kernel(kv_type: str) -> Kernel:
    """The kernel for a cache of type "f16" or "f32"."""
    return _attention_f16_kernel if kv_type == "f16" else _attention_f32_kernel
