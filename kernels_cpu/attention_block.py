"""One block of attention: 64 positions for a few queries that share them.

Owns: the inner loops of `attention` and the scratch of a query. Must not know: which positions,
tokens or heads these are. Every query is computed by the same operations in the same order whether
it goes with three others or alone.
"""

from __future__ import annotations

import numpy as np

from edgert.kernels_cpu.isa import ISA
from edgert.kernels_cpu.jit import inline
from edgert.kernels_cpu.kv_cache import BLOCK, LANES
from edgert.kernels_cpu.simd import (
    F32x16,
    bc_f32x16,
    const_of,
    fma,
    ld_f16x16,
    ld_f32,
    ld_f32x16,
    prefetch,
    reduce_max,
    select_gt,
    splat_f32x16,
    splat_i32x16,
    st_f32,
    st_f32x16,
    vadd,
    vec,
    vmax,
    vmul,
    vsub,
    zero_f32x16,
)
from edgert.kernels_cpu.vmath import exp2_16

__all__ = [
    "SCORES",
    "VECTOR",
    "attend_block",
    "copy_record",
    "merge_record",
    "query_bytes",
    "record_bytes",
    "reset_record",
]

# Scratch of one query: the query (`width` floats), 64 scores, and the record of the span at work. A
# record is the weighted sum (`width` floats), a vector that begins with the maximum, and 16 partial
# sums of the weights. Records of the spans before are elsewhere: the first-level cache is small.
SCORES = 4 * BLOCK
VECTOR = 4 * LANES


_lane = const_of(vec("i32", 16), list(range(16)))
_minus_infinity = const_of(vec("f32", 16), [float("-inf")])
_WIDE = ISA.lanes == LANES  # 32 registers of 16 lanes: four queries by four vectors at once


@inline
def _load_kv(address: int, half: bool) -> F32x16:
    """16 elements of the cache as float32; `half` is a constant once inlined."""
    if half:
        return ld_f16x16(address)
    return ld_f32x16(address)


@inline
def _add_four_by_four(
    out: int, a: int, each: int, rows: int, step: int, n: int, ahead: int, half: bool
) -> None:
    """out[i][0:64] += sum over j of a[i][j] * row j[0:64], j = 0 .. n-1 in order, for 4 queries.

    Query i is `each` bytes after query i - 1, row j of the cache at rows + j * step. 16 independent
    sums hide the latency of an addition, and every load serves four of them. What comes next (from
    `ahead`) is asked for along the way.
    """
    size = 2 if half else 4
    b, c, d = each, 2 * each, 3 * each
    a0, a1 = ld_f32x16(out), ld_f32x16(out + 64)
    a2, a3 = ld_f32x16(out + 128), ld_f32x16(out + 192)
    b0, b1 = ld_f32x16(out + b), ld_f32x16(out + b + 64)
    b2, b3 = ld_f32x16(out + b + 128), ld_f32x16(out + b + 192)
    c0, c1 = ld_f32x16(out + c), ld_f32x16(out + c + 64)
    c2, c3 = ld_f32x16(out + c + 128), ld_f32x16(out + c + 192)
    d0, d1 = ld_f32x16(out + d), ld_f32x16(out + d + 64)
    d2, d3 = ld_f32x16(out + d + 128), ld_f32x16(out + d + 192)
    for _ in range(n):
        prefetch(ahead)
        prefetch(ahead + 64)
        ahead += 64 * size
        r0, r1 = _load_kv(rows, half), _load_kv(rows + LANES * size, half)
        r2, r3 = _load_kv(rows + 2 * LANES * size, half), _load_kv(rows + 3 * LANES * size, half)
        x = bc_f32x16(a)
        a0, a1, a2, a3 = fma(x, r0, a0), fma(x, r1, a1), fma(x, r2, a2), fma(x, r3, a3)
        x = bc_f32x16(a + b)
        b0, b1, b2, b3 = fma(x, r0, b0), fma(x, r1, b1), fma(x, r2, b2), fma(x, r3, b3)
        x = bc_f32x16(a + c)
        c0, c1, c2, c3 = fma(x, r0, c0), fma(x, r1, c1), fma(x, r2, c2), fma(x, r3, c3)
        x = bc_f32x16(a + d)
        d0, d1, d2, d3 = fma(x, r0, d0), fma(x, r1, d1), fma(x, r2, d2), fma(x, r3, d3)
        a += 4
        rows += step
    _store_four(out, a0, a1, a2, a3)
    _store_four(out + b, b0, b1, b2, b3)
    _store_four(out + c, c0, c1, c2, c3)
    _store_four(out + d, d0, d1, d2, d3)


@inline
def _store_four(out: int, a: F32x16, b: F32x16, c: F32x16, d: F32x16) -> None:
    st_f32x16(out, a)
    st_f32x16(out + 64, b)
    st_f32x16(out + 128, c)
    st_f32x16(out + 192, d)


@inline
def _add_four_by_one(
    out: int, a: int, each: int, rows: int, step: int, n: int, ahead: int, half: bool
) -> None:
    """As `_add_four_by_four` for 16 columns: what 16 registers of 8 lanes can hold."""
    size = 2 if half else 4
    b, c, d = each, 2 * each, 3 * each
    s0, s1 = ld_f32x16(out), ld_f32x16(out + b)
    s2, s3 = ld_f32x16(out + c), ld_f32x16(out + d)
    for _ in range(n):
        prefetch(ahead)
        ahead += LANES * size
        row = _load_kv(rows, half)
        s0, s1 = fma(bc_f32x16(a), row, s0), fma(bc_f32x16(a + b), row, s1)
        s2, s3 = fma(bc_f32x16(a + c), row, s2), fma(bc_f32x16(a + d), row, s3)
        a += 4
        rows += step
    st_f32x16(out, s0)
    st_f32x16(out + b, s1)
    st_f32x16(out + c, s2)
    st_f32x16(out + d, s3)


@inline
def _add_one_by_four(out: int, a: int, rows: int, step: int, n: int, half: bool) -> None:
    """As `_add_four_by_four` for one query."""
    size = 2 if half else 4
    s0, s1 = ld_f32x16(out), ld_f32x16(out + 64)
    s2, s3 = ld_f32x16(out + 128), ld_f32x16(out + 192)
    for _ in range(n):
        x = bc_f32x16(a)
        s0, s1 = fma(x, _load_kv(rows, half), s0), fma(x, _load_kv(rows + LANES * size, half), s1)
        s2 = fma(x, _load_kv(rows + 2 * LANES * size, half), s2)
        s3 = fma(x, _load_kv(rows + 3 * LANES * size, half), s3)
        a += 4
        rows += step
    _store_four(out, s0, s1, s2, s3)


@inline
def _add_one_by_one(out: int, a: int, rows: int, step: int, n: int, half: bool) -> None:
    """As `_add_four_by_four` for one query and 16 columns."""
    s = ld_f32x16(out)
    for _ in range(n):
        s = fma(bc_f32x16(a), _load_kv(rows, half), s)
        a += 4
        rows += step
    st_f32x16(out, s)


@inline
def _multiply(
    out: int, a: int, each: int, queries: int, rows: int, step: int, n: int, width: int,
    ahead: int, half: bool,
) -> None:  # fmt: skip
    """out[i] += a[i] @ rows for `queries` queries and `width` columns, a multiple of 16."""
    size = 2 if half else 4
    i = 0
    while i < queries:
        four = i + 4 <= queries
        column = 0
        while column < width:
            o, x, r = out + i * each + 4 * column, a + i * each, rows + column * size
            columns = 64 if column + 64 <= width and (_WIDE or not four) else LANES
            if four and columns == 64:
                _add_four_by_four(o, x, each, r, step, n, ahead, half)
            elif four:
                _add_four_by_one(o, x, each, r, step, n, ahead, half)
            elif columns == 64:
                _add_one_by_four(o, x, r, step, n, half)
            else:
                _add_one_by_one(o, x, r, step, n, half)
            ahead += columns * n * size
            column += columns
        i += 4 if four else 1


@inline
def _mask(scores: int, low: int, seen: int) -> None:
    """Make the scores of positions outside `low` .. `seen` - 1 -infinity."""
    for i in range(BLOCK // LANES):
        s = ld_f32x16(scores + VECTOR * i)
        after = splat_i32x16(np.int32(seen - LANES * i))
        before = splat_i32x16(np.int32(low - 1 - LANES * i))
        s = select_gt(after, _lane(), s, _minus_infinity())
        st_f32x16(scores + VECTOR * i, select_gt(_lane(), before, s, _minus_infinity()))


@inline
def _softmax_step(scores: int, record: int, width: int) -> None:
    """Turn the 64 scores into weights and move the running maximum, sum and weighted sum.

    Where the maximum stays, the correction is exactly 1 and left out: so it is for nearly all
    blocks of a long context.
    """
    state = record + 4 * width
    a, b = ld_f32x16(scores), ld_f32x16(scores + VECTOR)
    c, d = ld_f32x16(scores + 2 * VECTOR), ld_f32x16(scores + 3 * VECTOR)
    old = ld_f32(state)
    top = reduce_max(vmax(vmax(a, b), vmax(c, d)))
    sums = ld_f32x16(state + VECTOR)
    if top <= old:
        top = old
    else:
        correction = exp2_16(vsub(splat_f32x16(old), splat_f32x16(top)))
        sums = vmul(sums, correction)
        for i in range(0, 4 * width, VECTOR):
            st_f32x16(record + i, vmul(ld_f32x16(record + i), correction))
        st_f32(state, top)
    tops = splat_f32x16(top)
    a, b = exp2_16(vsub(a, tops)), exp2_16(vsub(b, tops))
    c, d = exp2_16(vsub(c, tops)), exp2_16(vsub(d, tops))
    _store_four(scores, a, b, c, d)
    st_f32x16(state + VECTOR, vadd(sums, vadd(vadd(a, b), vadd(c, d))))


def record_bytes(width: int) -> int:
    """Bytes of a record: what a query has summed. `width` is head_dim rounded up to 16."""
    return 4 * width + 2 * VECTOR


def query_bytes(width: int) -> int:
    """Bytes of scratch of one query."""
    return 4 * width + SCORES + record_bytes(width)


@inline
def reset_record(record: int, width: int) -> None:
    """Nothing seen yet."""
    for i in range(0, 4 * width, VECTOR):
        st_f32x16(record + i, zero_f32x16())
    st_f32x16(record + 4 * width, _minus_infinity())
    st_f32x16(record + 4 * width + VECTOR, zero_f32x16())


@inline
def copy_record(into: int, record: int, width: int) -> None:
    """The first span that a query sees is taken as it is."""
    for i in range(0, 4 * width + 2 * VECTOR, VECTOR):
        st_f32x16(into + i, ld_f32x16(record + i))


@inline
def merge_record(into: int, record: int, width: int) -> None:
    """Add the sums of a later span, both moved to the greater maximum; a NaN spreads."""
    state, other = into + 4 * width, record + 4 * width
    tops, others = splat_f32x16(ld_f32(state)), splat_f32x16(ld_f32(other))
    top = vmax(tops, others)
    a, b = exp2_16(vsub(tops, top)), exp2_16(vsub(others, top))
    for i in range(0, 4 * width, VECTOR):
        st_f32x16(into + i, fma(ld_f32x16(record + i), b, vmul(ld_f32x16(into + i), a)))
    st_f32x16(state, top)
    sums = vmul(ld_f32x16(state + VECTOR), a)
    st_f32x16(state + VECTOR, fma(ld_f32x16(other + VECTOR), b, sums))


@inline
def attend_block(
    scratch: int, tokens: int, shared: int, keys: int, values: int, D: int, width: int, each: int,
    low: int, seen: int, half: bool,
) -> None:  # fmt: skip
    """Let `shared` queries of each of `tokens` tokens in a row attend to a block.

    The queries are side by side in `scratch`; the first token sees the positions `low` (which may
    be negative) to `seen` - 1 of the block, each further one the same a position later, and every
    token at least one. What a token does not see is not multiplied by its value either.
    """
    size = 2 if half else 4
    queries = tokens * shared
    scores = scratch + 4 * width
    record = scores + SCORES
    for i in range(queries):
        _store_four(scores + i * each, zero_f32x16(), zero_f32x16(), zero_f32x16(), zero_f32x16())
    _multiply(scores, scratch, each, queries, keys, BLOCK * size, D, BLOCK, values, half)
    for i in range(queries):
        t = i // shared
        if seen + t < BLOCK or low + t > 0:
            _mask(scores + i * each, max(low + t, 0), seen + t)
        _softmax_step(scores + i * each, record + i * each, width)
    # The values that all see for all queries, then for each token those it sees beyond. Where a
    # window begins in the block each token takes its own: once in a window, so it need not be fast.
    common = min(seen, BLOCK) if low + tokens <= 1 else 0
    _multiply(
        record, scores, each, queries, values, width * size, common, width,
        keys + BLOCK * D * size, half,
    )  # fmt: skip
    for t in range(tokens if common < BLOCK else 0):
        begin, end = max(low + t, common), min(seen + t, BLOCK)
        if begin < end:
            at, own = t * shared * each, values + begin * width * size
            _multiply(
                record + at, scores + at + 4 * begin, each, shared, own, width * size,
                end - begin, width, own, half,
            )  # fmt: skip
