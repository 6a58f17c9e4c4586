"""Activations as 8-bit integers with one scale for each 32, the input of quantised matmuls.

    d = max|x| / 127,   q = rint(x * (127 / max|x|)),   one block of 32 values = 44 bytes:

    offset 0   int8[32]    q, in -127..127 (never -128: the integer dot products rely on it)
    offset 32  float32     d (0 when all 32 values are 0, or so small that 127 / max|x|
                           is infinite)
    offset 36  int16[2]    sums of q[0:16] and of q[16:32]
    offset 40  float32     d * float32(sum of all q): what an offset of the weights is multiplied by

A NaN gives q = -127 and is ignored by the maximum; with an infinity d is infinite and q is 0 or
NaN's -127. Nothing crashes; the products are then not finite.

Owns: this format. Must not know: weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError
from edgert.kernels_cpu.compiler import types
from edgert.kernels_cpu.jit import inline, kernel, void
from edgert.kernels_cpu.simd import (
    convert_to,
    f32_to_i32,
    ld_f32x16,
    reduce_max,
    splat_f32x16,
    st_f32,
    st_i16,
    storer,
    vabs,
    vec,
    vmax,
    vmin,
    vmul,
    vrint,
    zero_f32x16,
)
from edgert.kernels_cpu.vectors import I32, declare, operation

__all__ = [
    "BLOCK", "BLOCK_BYTES", "activation_bytes", "dequantize_activations_ref", "quantize",
    "quantize_ref", "quantize_row", "quantize_rows",
]  # fmt: skip

BLOCK = 32
BLOCK_BYTES = 44
RECORD = np.dtype(
    [("q", np.int8, 32), ("d", np.float32), ("sums", np.int16, 2), ("dsum", np.float32)]
)
assert RECORD.itemsize == BLOCK_BYTES

_F32 = npt.NDArray[np.float32]


def activation_bytes(K: int) -> int:
    """Bytes of a quantised row of `K` values, a multiple of 32."""
    assert K % BLOCK == 0, K
    return K // BLOCK * BLOCK_BYTES


def quantize_ref(x: _F32) -> npt.NDArray[np.uint8]:
    """x (..., K) float32 -> (..., K / 32 * 44) uint8, equal to the bit to `quantize`."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, BLOCK)
    with np.errstate(all="ignore"):
        largest = np.fmax.reduce(np.abs(blocks), axis=-1)
        largest = np.where(np.isnan(largest), np.float32(0), largest)
        inverse = np.float32(127) / largest
        usable = (largest > 0) & np.isfinite(inverse)
        inverse = np.where(usable, inverse, np.float32(0))
        scaled = np.rint(blocks * inverse[..., None])
        scaled = np.where(scaled > -127, scaled, np.float32(-127))
        scaled = np.where(scaled < 127, scaled, np.float32(127))
        out = np.zeros(blocks.shape[:-1], RECORD)
        out["q"] = scaled.astype(np.int8)
        out["d"] = np.where(usable, largest / np.float32(127), np.float32(0))
    out["sums"] = out["q"].astype(np.int16).reshape(*blocks.shape[:-1], 2, 16).sum(-1)
    with np.errstate(all="ignore"):
        out["dsum"] = out["d"] * out["sums"].sum(-1).astype(np.float32)
    return out.view(np.uint8).reshape(*x.shape[:-1], -1)


def dequantize_activations_ref(rows: npt.NDArray[np.uint8]) -> _F32:
    """The values a quantised row stands for: (..., K / 32 * 44) uint8 -> (..., K) float32."""
    blocks = np.ascontiguousarray(rows).view(RECORD)
    values: _F32 = blocks["q"].astype(np.float32) * blocks["d"][..., None]
    return values.reshape(*rows.shape[:-1], -1)


def quantize(x: _F32) -> npt.NDArray[np.uint8]:
    """As `quantize_ref`, compiled. Raises InputError for a wrong type or width."""
    if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] % BLOCK or not x.flags.c_contiguous:
        raise InputError(
            f"activations must be a contiguous float32 [tokens, multiple of {BLOCK}], "
            f"not {x.dtype} {list(x.shape)}"
        )
    n, K = x.shape
    out = np.empty((n, activation_bytes(K)), np.uint8)
    quantize_rows(x.ctypes.data, 4 * K, out.ctypes.data, out.shape[1], K, 0, n)
    return out


_LOWEST, _HIGHEST = np.float32(-127), np.float32(127)
_LARGEST = np.finfo(np.float32).max
_to_bytes = convert_to("trunc", vec("i32", 16), vec("i8", 16))
_store_bytes = storer(vec("i8", 16))


@(lambda f: operation(types.int32, (vec("i32", 16),), f))
def _sum_lanes(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    call = declare(builder, "llvm.vector.reduce.add.v16i32", I32, [args[0].type])
    return builder.call(call, args)


@inline
def _quantize_half(x: Any, out: Any, inverse: Any) -> Any:
    """16 values at address `x` -> 16 bytes at `out`; returns their sum."""
    scaled = vrint(vmul(ld_f32x16(x), splat_f32x16(inverse)))
    scaled = vmin(vmax(scaled, splat_f32x16(_LOWEST)), splat_f32x16(_HIGHEST))
    q = f32_to_i32(scaled)
    _store_bytes(out, _to_bytes(q))
    return _sum_lanes(q)


@inline
def quantize_row(x: Any, out: Any, K: Any) -> None:
    """`K` float32 at address `x`, a multiple of 32, -> `activation_bytes(K)` bytes at `out`."""
    for block in range(K // BLOCK):
        a, b = x + 4 * BLOCK * block, out + BLOCK_BYTES * block
        zero = zero_f32x16()
        high = vmax(vabs(ld_f32x16(a + 64)), zero)  # vmax drops a NaN in its first argument
        largest = reduce_max(vmax(vabs(ld_f32x16(a)), high))
        inverse, d = np.float32(0), np.float32(0)
        if largest > 0:
            inverse = _HIGHEST / largest
            d = largest / _HIGHEST
            if not inverse <= _LARGEST:
                inverse, d = np.float32(0), np.float32(0)
        low_sum = _quantize_half(a, b, inverse)
        high_sum = _quantize_half(a + 64, b + 16, inverse)
        st_f32(b + 32, d)
        st_i16(b + 36, np.int16(low_sum))
        st_i16(b + 38, np.int16(high_sum))
        st_f32(b + 40, d * np.float32(low_sum + high_sum))


@kernel(void("iiiiiii"))
def quantize_rows(
    x: int, x_stride: int, out: int, out_stride: int, K: int, row_start: int, row_stop: int
) -> None:
    """Rows row_start..row_stop-1 of float32 at `x` to quantised rows at `out`; strides in bytes."""
    for row in range(row_start, row_stop):
        quantize_row(x + row * x_stride, out + row * out_stride, K)
