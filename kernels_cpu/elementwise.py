"""Operations on rows of activations: RMS normalisation, the gated unit, quantisation.

    rmsnorm     out = x * (1 / sqrt(mean(x**2) + eps)) * weight
    swiglu      out = gate / (1 + exp(-gate)) * up
    quantize    int8 per 32 (activations.py)

Each writes a float32 row, a quantised row, or both: `y` or `q` of 0 means not wanted. Sums of
squares run in four times 16 partial sums over the row, then a fixed tree, so that a row's result
depends on the row alone. Rows of float32 are read and written in whole vectors: their memory (that
of norm weights too) must reach to the next multiple of 16 elements; what lies there never gets into
a result.

Owns: reference, checks, kernels. Must not know: which layer or tensor a row belongs to.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError
from edgert.kernels_cpu import abi
from edgert.kernels_cpu.abi import activation_rows
from edgert.kernels_cpu.activations import BLOCK_BYTES, quantize_row
from edgert.kernels_cpu.jit import inline, kernel, void
from edgert.kernels_cpu.simd import (
    F32x16,
    const_of,
    fma,
    ld_f32,
    ld_f32x16,
    ld_i64,
    reduce_add,
    splat_f32x16,
    st_f32,
    st_f32x16,
    stack_buffer,
    vadd,
    vdiv,
    vec,
    vmul,
    vneg,
    vsqrt,
    zero_f32x16,
)
from edgert.kernels_cpu.vmath import LANES, exp16, exp_ref, fma_ref, lane_sum_ref

__all__ = [
    "CHUNK",
    "inverse_rms",
    "inverse_rms_ref",
    "load_first",
    "quantize_kernel",
    "quantize_op",
    "rmsnorm",
    "rmsnorm_kernel",
    "rmsnorm_op",
    "rmsnorm_ref",
    "swiglu",
    "swiglu_kernel",
    "swiglu_op",
    "swiglu_ref",
    "units_per_row",
]

CHUNK = 1024  # columns of one unit of swiglu and quantize: 14 units for a row of 14336
_F32 = npt.NDArray[np.float32]
_U8 = npt.NDArray[np.uint8]


def units_per_row(K: int) -> int:
    """Units of one row of `K` columns in swiglu and quantize: unit u is row u // units_per_row."""
    return -(-K // CHUNK)


# --- rmsnorm: unit = token ------------------------------------------------------------------

_X, _X_STRIDE, _WEIGHT, _EPS, _K, _Y, _Y_STRIDE, _QUANT, _QUANT_STRIDE = abi.arguments(9)


def rmsnorm_op(
    *, x: int, x_stride: int, weight: int, eps: float, K: int, y: int = 0, y_stride: int = 0,
    q: int = 0, q_stride: int = 0,
) -> list[int]:  # fmt: skip
    """The arguments of an rmsnorm row; one unit for each token.

    Shapes: x, y: rows of K float32 (y may be x); weight K float32; q: rows of K / 32 * 44 bytes.
    """
    assert y or q, "rmsnorm writes nowhere"
    assert not q or K % 32 == 0, K
    return [x, x_stride, weight, abi.float_bits(eps), K, y, y_stride, q, q_stride]


def inverse_rms_ref(x: _F32, eps: float) -> _F32:
    """1 / sqrt(mean(x**2) + eps) over the last axis, equal to the bit to `inverse_rms`."""
    K = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-K // 64) * 64), np.float32)
    padded[..., :K] = x
    steps = padded.reshape(*x.shape[:-1], -1, 4, LANES)
    sums = np.zeros((*x.shape[:-1], 4, LANES), np.float32)
    for i in range(steps.shape[-3]):
        sums = fma_ref(steps[..., i, :, :], steps[..., i, :, :], sums)
    lanes = (sums[..., 0, :] + sums[..., 1, :]) + (sums[..., 2, :] + sums[..., 3, :])
    mean = lane_sum_ref(lanes) / np.float32(K)
    return np.asarray(np.float32(1) / np.sqrt(mean + np.float32(eps)))


def rmsnorm_ref(x: _F32, weight: _F32, eps: float) -> _F32:
    """x (..., K), weight (K,) float32 -> (..., K) float32."""
    return x * inverse_rms_ref(x, eps)[..., None] * weight


def rmsnorm(x: _F32, weight: _F32, eps: float) -> _F32:
    """As `rmsnorm_ref` for x (T, K), compiled. Raises InputError when shapes do not fit."""
    T, K = x.shape
    if weight.shape != (K,):
        raise InputError(f"rmsnorm of rows of {K} needs a weight of {K}, not {weight.shape}")
    rows, weights, y = activation_rows(x), activation_rows(weight[None]), activation_rows(x)
    arguments = rmsnorm_op(
        x=abi.address_of(rows), x_stride=abi.row_stride(rows), weight=abi.address_of(weights),
        eps=eps, K=K, y=abi.address_of(y), y_stride=abi.row_stride(y),
    )  # fmt: skip
    abi.run_op(rmsnorm_kernel, arguments, T, n_tokens=T)
    return y[:, :K]


_one = const_of(vec("f32", 16), [1.0])
_buffer = stack_buffer(4 * CHUNK)
_vector = stack_buffer(64)


@inline
def load_first(x: int, n: int) -> F32x16:
    """16 floats at `x`; of fewer, the `n` there and zeros, reading nothing after them."""
    if n >= LANES:
        return ld_f32x16(x)
    copy = _vector()
    st_f32x16(copy, zero_f32x16())
    for i in range(0, 4 * n, 4):
        st_f32(copy + i, ld_f32(x + i))
    return ld_f32x16(copy)


@inline
def inverse_rms(x: int, K: int, eps: float) -> float:
    """1 / sqrt(mean of the K squares at `x` + eps)."""
    a = zero_f32x16()
    b = zero_f32x16()
    c = zero_f32x16()
    d = zero_f32x16()
    i = 0
    while i + 64 <= K:
        v = ld_f32x16(x + 4 * i)
        a = fma(v, v, a)
        v = ld_f32x16(x + 4 * i + 64)
        b = fma(v, v, b)
        v = ld_f32x16(x + 4 * i + 128)
        c = fma(v, v, c)
        v = ld_f32x16(x + 4 * i + 192)
        d = fma(v, v, d)
        i += 64
    while i < K:
        v = load_first(x + 4 * i, K - i)
        part = (i // 16) % 4
        if part == 0:
            a = fma(v, v, a)
        elif part == 1:
            b = fma(v, v, b)
        elif part == 2:
            c = fma(v, v, c)
        else:
            d = fma(v, v, d)
        i += 16
    mean = reduce_add(vadd(vadd(a, b), vadd(c, d))) / np.float32(K)
    result: float = np.float32(1.0) / vsqrt(mean + eps)
    return result


@kernel(void("iiiii"))
def rmsnorm_kernel(op: int, frame: int, start: int, stop: int, tid: int) -> None:
    """rmsnorm of tokens start..stop-1."""
    K = ld_i64(op + _K)
    weight = ld_i64(op + _WEIGHT)
    quant = ld_i64(op + _QUANT)
    buffer = _buffer()
    for t in range(start, stop):
        x = ld_i64(op + _X) + t * ld_i64(op + _X_STRIDE)
        row = ld_i64(op + _Y) + t * ld_i64(op + _Y_STRIDE)
        factor = splat_f32x16(inverse_rms(x, K, ld_f32(op + _EPS)))
        for begin in range(0, K, CHUNK):
            columns = min(CHUNK, K - begin)
            y = buffer if ld_i64(op + _Y) == 0 else row + 4 * begin
            for i in range(0, 4 * columns, 64):
                v = vmul(ld_f32x16(x + 4 * begin + i), factor)
                st_f32x16(y + i, vmul(v, ld_f32x16(weight + 4 * begin + i)))
            if quant != 0:
                target = quant + t * ld_i64(op + _QUANT_STRIDE) + begin // 32 * BLOCK_BYTES
                quantize_row(y, target, columns)


# --- swiglu: unit = row x 1024 columns ------------------------------------------------------

_GATE, _GATE_STRIDE, _UP, _UP_STRIDE, _COLUMNS, _OUT, _OUT_STRIDE, _Q, _Q_STRIDE, _ROWS = (
    abi.arguments(10)
)


def swiglu_op(
    *, gate: int, gate_stride: int, up: int, up_stride: int, K: int, y: int = 0, y_stride: int = 0,
    q: int = 0, q_stride: int = 0, rows: int = 0,
) -> list[int]:  # fmt: skip
    """The arguments of a swiglu row; `units_per_row(K)` units for each row of gate and up.

    Shapes: gate, up, y: rows of K float32 (y may be gate or up); q: rows of K / 32 * 44 bytes;
    rows: address of int64 row numbers, the i-th row done being rows[i], or 0 for row i.
    """
    assert y or q, "swiglu writes nowhere"
    assert not q or K % 32 == 0, K
    return [gate, gate_stride, up, up_stride, K, y, y_stride, q, q_stride, rows]


def swiglu_ref(gate: _F32, up: _F32) -> _F32:
    """gate, up (..., K) float32 -> (..., K) float32, equal to the bit."""
    with np.errstate(all="ignore"):
        return np.asarray(gate / (np.float32(1) + exp_ref(-gate)) * up)


def swiglu(gate: _F32, up: _F32) -> _F32:
    """As `swiglu_ref` for rows (T, K), compiled. Raises InputError when shapes differ."""
    if gate.shape != up.shape or gate.ndim != 2:
        raise InputError(f"swiglu needs two equal [rows, columns], not {gate.shape} and {up.shape}")
    T, K = gate.shape
    g, u = activation_rows(gate), activation_rows(up)
    arguments = swiglu_op(
        gate=abi.address_of(g), gate_stride=abi.row_stride(g), up=abi.address_of(u),
        up_stride=abi.row_stride(u), K=K, y=abi.address_of(g), y_stride=abi.row_stride(g),
    )  # fmt: skip
    abi.run_op(swiglu_kernel, arguments, T * units_per_row(K), n_tokens=T)
    return g[:, :K]


@kernel(void("iiiii"))
def swiglu_kernel(op: int, frame: int, start: int, stop: int, tid: int) -> None:
    """silu(gate) * up for the column chunks start..stop-1."""
    K = ld_i64(op + _COLUMNS)
    per_row = (K + CHUNK - 1) // CHUNK
    quant = ld_i64(op + _Q)
    buffer = _buffer()
    for unit in range(start, stop):
        row = unit // per_row
        begin = unit % per_row * CHUNK
        columns = min(CHUNK, K - begin)
        if ld_i64(op + _ROWS) != 0:
            row = ld_i64(ld_i64(op + _ROWS) + 8 * row)
        gate = ld_i64(op + _GATE) + row * ld_i64(op + _GATE_STRIDE) + 4 * begin
        up = ld_i64(op + _UP) + row * ld_i64(op + _UP_STRIDE) + 4 * begin
        y = ld_i64(op + _OUT) + row * ld_i64(op + _OUT_STRIDE) + 4 * begin
        if ld_i64(op + _OUT) == 0:
            y = buffer
        for i in range(0, 4 * columns, 64):
            g = ld_f32x16(gate + i)
            silu = vdiv(g, vadd(_one(), exp16(vneg(g))))
            st_f32x16(y + i, vmul(silu, ld_f32x16(up + i)))
        if quant != 0:
            quantize_row(
                y, quant + row * ld_i64(op + _Q_STRIDE) + begin // 32 * BLOCK_BYTES, columns
            )


# --- quantize: unit = row x 1024 columns ----------------------------------------------------

_FROM, _FROM_STRIDE, _WIDTH, _TO, _TO_STRIDE, _LIST = abi.arguments(6)


def quantize_op(
    *, x: int, x_stride: int, K: int, q: int, q_stride: int, rows: int = 0
) -> list[int]:
    """The arguments of a quantize row; units and `rows` as for swiglu, K a multiple of 32."""
    assert K % 32 == 0, K
    return [x, x_stride, K, q, q_stride, rows]


@kernel(void("iiiii"))
def quantize_kernel(op: int, frame: int, start: int, stop: int, tid: int) -> None:
    """Quantise the column chunks start..stop-1."""
    K = ld_i64(op + _WIDTH)
    per_row = (K + CHUNK - 1) // CHUNK
    for unit in range(start, stop):
        row = unit // per_row
        begin = unit % per_row * CHUNK
        if ld_i64(op + _LIST) != 0:
            row = ld_i64(ld_i64(op + _LIST) + 8 * row)
        x = ld_i64(op + _FROM) + row * ld_i64(op + _FROM_STRIDE) + 4 * begin
        q = ld_i64(op + _TO) + row * ld_i64(op + _TO_STRIDE) + begin // 32 * BLOCK_BYTES
        quantize_row(x, q, min(CHUNK, K - begin))
