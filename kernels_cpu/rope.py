"""From projections to queries and cache: q/k normalisation, rotary embedding, storing k and v.

    (a, b) -> (a * cos - b * sin, b * cos + a * sin)
    angle = position * scale / (theta**(2i/n) * f_i)

for pair i of the n = rope_dim rotated dimensions of a head: "norm" pairs dimensions 2i and 2i + 1,
"neox" i and i + n/2. Cosines and sines come from a float32 table computed in float64, so no CPU
differs. A RMS normalisation with weight may come first, over each head or over a whole projection.

Owns: table, reference, checks, kernels. Must not know: attention.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError
from edgert.kernels_cpu import abi
from edgert.kernels_cpu.abi import POSITION, activation_rows
from edgert.kernels_cpu.elementwise import inverse_rms, inverse_rms_ref, load_first
from edgert.kernels_cpu.jit import Kernel, inline, kernel, void
from edgert.kernels_cpu.kv_cache import BLOCK, LANES, KvLayout
from edgert.kernels_cpu.simd import (
    const_of,
    fma,
    ld_f32,
    ld_f32x16,
    ld_i16,
    ld_i64,
    shuffle_of,
    splat_f32x16,
    st_f16x16,
    st_f32,
    st_f32x16,
    st_i16,
    stack_buffer,
    vec,
    vmul,
    vneg,
)
from edgert.kernels_cpu.vmath import fma_ref

__all__ = [
    "rope_and_store",
    "rope_and_store_kernel",
    "rope_and_store_op",
    "rope_and_store_ref",
    "rope_table",
]

_NORM_MODES = {None: 0, "head": 1, "full": 2}
_PER_HEAD, _FULL = 1, 2
_STYLES = {"norm": 0, "neox": 1}

# Arguments of the op row.
(
    _Q, _Q_STRIDE, _K, _K_STRIDE, _V, _V_STRIDE, _KEYS, _VALUES, _N_HEADS, _N_KV, _HEAD_DIM,
    _CONTEXT, _WIDTH, _ROPE_DIM, _NEOX, _TABLE, _NORM, _Q_WEIGHT, _K_WEIGHT, _EPS,
) = abi.arguments(20)  # fmt: skip

_F32 = npt.NDArray[np.float32]
_KV = npt.NDArray[np.floating]


def rope_table(
    theta: float,
    rope_dim: int,
    scale: float,
    freq_factors: npt.NDArray[np.floating] | None,
    context: int,
) -> _F32:
    """Cosine and sine of every position: float32 [context, rope_dim / 2, 2].

    `scale` multiplies positions (1 / the linear factor); `freq_factors` (rope_dim / 2) divide
    frequencies (`rope_freqs.weight`). Raises InputError for an odd rope_dim or a wrong length.
    """
    pairs = rope_dim // 2
    if rope_dim % 2 or (freq_factors is not None and freq_factors.shape != (pairs,)):
        shape = None if freq_factors is None else freq_factors.shape
        raise InputError(f"rotary dimensions must be pairs: {rope_dim} with factors {shape}")
    frequency = theta ** (-np.arange(pairs, dtype=np.float64) / max(pairs, 1))
    if freq_factors is not None:
        frequency = frequency / freq_factors.astype(np.float64)
    angle = np.arange(context, dtype=np.float64)[:, None] * scale * frequency
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)


def rope_and_store_op(
    *, q: int, q_stride: int, k: int, k_stride: int, v: int, v_stride: int, keys: int, values: int,
    n_heads: int, layout: KvLayout, rope_dim: int, style: str, table: int,
    qk_norm: str | None = None, q_weight: int = 0, k_weight: int = 0, eps: float = 0.0,
) -> list[int]:  # fmt: skip
    """The arguments of a rope_and_store row; one unit for each token.

    Shapes: q rows of n_heads * head_dim float32, rotated in place; k, v rows of n_kv * head_dim
    (k is scratch afterwards); keys, values: the layer's cache (`KvLayout`); table: `rope_table`;
    qk_norm None, "head" (weights of head_dim) or "full" (weights of the whole row).
    Give it chunks of 64 tokens: neighbouring positions share cache lines of the keys (512 tokens,
    8 heads of 64, 2 threads: 0.4 ms a layer, and 0.46 to 1.1 in chunks of 16).
    """
    assert rope_dim % 2 == 0 and rope_dim <= layout.head_dim, rope_dim
    assert qk_norm is None or (q_weight and k_weight), "normalisation needs weights"
    return [
        q, q_stride, k, k_stride, v, v_stride, keys, values, n_heads, layout.num_key_value_heads,
        layout.head_dim, layout.rounded_context, layout.value_width, rope_dim, _STYLES[style],
        table, _NORM_MODES[qk_norm], q_weight, k_weight, abi.float_bits(eps),
    ]  # fmt: skip


def rope_and_store_ref(
    q: _F32, k: _F32, v: _F32, keys: _KV, values: _KV, position: int, table: _F32, *,
    style: str, qk_norm: str | None = None, q_weight: _F32 | None = None,
    k_weight: _F32 | None = None, eps: float = 0.0,
) -> _F32:  # fmt: skip
    """The same arithmetic in NumPy, equal to the bit; returns the rotated q, writes the cache.

    q (T, n_heads, head_dim), k and v (T, n_kv, head_dim) float32, keys and values as `KvLayout`
    lays them out, table of `rope_table` -> (T, n_heads, head_dim) float32.
    """
    T, D = len(q), q.shape[2]
    if qk_norm is not None:
        assert q_weight is not None and k_weight is not None
        q, k = (_norm_ref(x, w, qk_norm, eps) for x, w in ((q, q_weight), (k, k_weight)))
    at = position + np.arange(T)
    q, k = (_rotate_ref(x, table[at], style) for x in (q, k))
    with np.errstate(over="ignore"):  # beyond 65504 a half is infinite
        for t, p in enumerate(at):
            keys[:, p // BLOCK, :, p % BLOCK] = k[t].astype(keys.dtype)
            values[:, p, :D] = v[t].astype(values.dtype)
    return q


def _norm_ref(x: _F32, weight: _F32, mode: str, eps: float) -> _F32:
    rows = x if mode == "head" else x.reshape(len(x), 1, -1)
    return (rows * inverse_rms_ref(rows, eps)[..., None] * weight).reshape(x.shape)


def _rotate_ref(x: _F32, table: _F32, style: str) -> _F32:
    pairs = table.shape[1]
    first, second = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
    if style == "neox":
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    out = x.copy()
    out[..., first] = fma_ref(x[..., first], cos, -(x[..., second] * sin))
    out[..., second] = fma_ref(x[..., second], cos, x[..., first] * sin)
    return out


def rope_and_store(
    q: _F32, k: _F32, v: _F32, keys: _KV, values: _KV, position: int, table: _F32, *,
    style: str, qk_norm: str | None = None, q_weight: _F32 | None = None,
    k_weight: _F32 | None = None, eps: float = 0.0,
) -> _F32:  # fmt: skip
    """As `rope_and_store_ref`, compiled. Raises `InputError` when the shapes do not fit."""
    T, n_heads, D = q.shape
    n_kv, blocks = keys.shape[:2]
    kv_type = "f16" if keys.dtype == np.float16 else "f32"
    layout = KvLayout(n_kv, D, blocks * BLOCK, kv_type)
    if k.shape != (T, n_kv, D) or v.shape != k.shape or 2 * table.shape[1] > D:
        raise InputError(f"q {q.shape}, k {k.shape}, v {v.shape}, table {table.shape} do not fit")
    if position < 0 or position + T > min(len(table), layout.rounded_context):
        raise InputError(f"positions {position} to {position + T} are outside {keys.shape}")
    rows = [activation_rows(x.reshape(T, -1)) for x in (q, k, v)]
    table = np.ascontiguousarray(table, np.float32)
    weights = [
        None if w is None else np.ascontiguousarray(w, np.float32) for w in (q_weight, k_weight)
    ]
    arguments = rope_and_store_op(
        q=abi.address_of(rows[0]), q_stride=abi.row_stride(rows[0]), k=abi.address_of(rows[1]),
        k_stride=abi.row_stride(rows[1]), v=abi.address_of(rows[2]),
        v_stride=abi.row_stride(rows[2]), keys=abi.address_of(keys),
        values=abi.address_of(values), n_heads=n_heads, layout=layout,
        rope_dim=2 * table.shape[1], style=style, table=abi.address_of(table), qk_norm=qk_norm,
        q_weight=abi.address_of(weights[0]), k_weight=abi.address_of(weights[1]), eps=eps,
    )  # fmt: skip
    abi.run_op(rope_and_store_kernel(kv_type), arguments, T, n_tokens=T, position=position)
    return rows[0][:, : n_heads * D].reshape(T, n_heads, D)


_F = vec("f32", 16)
_cosines = shuffle_of(_F, list(range(0, 32, 2)))  # of two vectors of (cos, sin)
_sines = shuffle_of(_F, list(range(1, 32, 2)))
_both_cosines = shuffle_of(_F, [i // 2 * 2 for i in range(16)])  # of one, each for both of a pair
_both_sines = shuffle_of(_F, [i // 2 * 2 + 1 for i in range(16)])
_swapped = shuffle_of(_F, [i ^ 1 for i in range(16)])
_signs = const_of(_F, [-1.0, 1.0] * 8)
_halves = stack_buffer(2 * LANES)


@inline
def _scale_row(x: int, weight: int, K: int, eps: float) -> None:
    """RMS normalisation of K floats in place, touching nothing after them."""
    factor = inverse_rms(x, K, eps)
    vector = splat_f32x16(factor)
    whole = K // LANES * LANES
    for i in range(0, 4 * whole, 64):
        st_f32x16(x + i, vmul(vmul(ld_f32x16(x + i), vector), ld_f32x16(weight + i)))
    for i in range(4 * whole, 4 * K, 4):
        st_f32(x + i, ld_f32(x + i) * factor * ld_f32(weight + i))


@inline
def _normalise(x: int, weight: int, heads: int, D: int, mode: int, eps: float) -> None:
    n = heads if mode == _PER_HEAD else 1
    for head in range(n):
        _scale_row(x + 4 * head * D, weight, heads * D // n, eps)


@inline
def _rotate_pair(a: int, b: int, table: int) -> None:
    """Rotate the floats at `a` and `b` by the angle whose cosine and sine are at `table`."""
    x, y = ld_f32(a), ld_f32(b)
    cos, sin = ld_f32(table), ld_f32(table + 4)
    st_f32(a, fma(x, cos, -(y * sin)))
    st_f32(b, fma(y, cos, x * sin))


@inline
def _rotate(x: int, heads: int, D: int, rope_dim: int, neox: int, table: int) -> None:
    """Rotate the first `rope_dim` of each head's D floats in place; whole vectors, then pairs."""
    pairs = rope_dim // 2
    for head in range(heads):
        row = x + 4 * head * D
        if neox != 0:
            whole = pairs // 16 * 16
            for i in range(0, whole, 16):
                a, b = row + 4 * i, row + 4 * (pairs + i)
                t, u = ld_f32x16(table + 8 * i), ld_f32x16(table + 8 * i + 64)
                cos, sin = _cosines(t, u), _sines(t, u)
                first, second = ld_f32x16(a), ld_f32x16(b)
                st_f32x16(a, fma(first, cos, vneg(vmul(second, sin))))
                st_f32x16(b, fma(second, cos, vmul(first, sin)))
        else:
            whole = pairs // 8 * 8
            for i in range(0, whole, 8):
                t, v = ld_f32x16(table + 8 * i), ld_f32x16(row + 8 * i)
                turned = vmul(_swapped(v, v), vmul(_both_sines(t, t), _signs()))
                st_f32x16(row + 8 * i, fma(v, _both_cosines(t, t), turned))
        for i in range(whole, pairs):
            a = row + (4 * i if neox != 0 else 8 * i)
            _rotate_pair(a, a + (4 * pairs if neox != 0 else 4), table + 8 * i)


@inline
def _store_key(op: int, k: int, position: int, half: bool) -> None:
    """Scatter the keys of one position: its lane in every dimension of every head's block."""
    size = 2 if half else 4
    D = ld_i64(op + _HEAD_DIM)
    block = BLOCK * size * D
    target = ld_i64(op + _KEYS) + position // BLOCK * block + position % BLOCK * size
    step = ld_i64(op + _CONTEXT) * D * size - block  # from the end of one head's block to the next
    halves = _halves()
    d = 0
    for i in range(ld_i64(op + _N_KV) * D):
        if half:
            if i % LANES == 0:
                st_f16x16(halves, ld_f32x16(k + 4 * i))
            st_i16(target, ld_i16(halves + 2 * (i % LANES)))
        else:
            st_f32(target, ld_f32(k + 4 * i))
        target += BLOCK * size
        d += 1
        if d == D:
            d = 0
            target += step


@inline
def _store_value(op: int, v: int, position: int, half: bool) -> None:
    """Copy the values of one position: one row for each head, its pad zero."""
    size = 2 if half else 4
    D = ld_i64(op + _HEAD_DIM)
    width = ld_i64(op + _WIDTH)
    for head in range(ld_i64(op + _N_KV)):
        row = ld_i64(op + _VALUES) + (head * ld_i64(op + _CONTEXT) + position) * width * size
        for i in range(0, width, LANES):
            lanes = load_first(v + 4 * (head * D + i), D - i)
            if half:
                st_f16x16(row + i * size, lanes)
            else:
                st_f32x16(row + i * size, lanes)


@inline
def _rope_and_store(op: int, frame: int, start: int, stop: int, half: bool) -> None:
    n_heads, n_kv = ld_i64(op + _N_HEADS), ld_i64(op + _N_KV)
    D = ld_i64(op + _HEAD_DIM)
    mode = ld_i64(op + _NORM)
    rope_dim = ld_i64(op + _ROPE_DIM)
    for t in range(start, stop):
        position = ld_i64(frame + POSITION) + t
        table = ld_i64(op + _TABLE) + position * 4 * rope_dim
        for is_k in range(2):
            if is_k:
                x, heads, weight = ld_i64(op + _K), n_kv, ld_i64(op + _K_WEIGHT)
                x += t * ld_i64(op + _K_STRIDE)
            else:
                x, heads, weight = ld_i64(op + _Q), n_heads, ld_i64(op + _Q_WEIGHT)
                x += t * ld_i64(op + _Q_STRIDE)
            if mode != 0:
                _normalise(x, weight, heads, D, mode, ld_f32(op + _EPS))
            _rotate(x, heads, D, rope_dim, ld_i64(op + _NEOX), table)
        _store_key(op, ld_i64(op + _K) + t * ld_i64(op + _K_STRIDE), position, half)
        _store_value(op, ld_i64(op + _V) + t * ld_i64(op + _V_STRIDE), position, half)


@kernel(void("iiiii"))
def _rope_and_store_f16_kernel(op: int, frame: int, start: int, stop: int, tid: int) -> None:
    _rope_and_store(op, frame, start, stop, True)


@kernel(void("iiiii"))
def _rope_and_store_f32_kernel(op: int, frame: int, start: int, stop: int, tid: int) -> None:
    _rope_and_store(op, frame, start, stop, False)


def rope_and_store_kernel(kv_type: str) -> Kernel:
    """The kernel for a cache of type "f16" or "f32"."""
    return _rope_and_store_f16_kernel if kv_type == "f16" else _rope_and_store_f32_kernel
