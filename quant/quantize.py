"""From float32 to the bytes of each format, by rounding to the nearest step.

Owns: the quantisers of the float types and the 32-weight blocks, equal to the bit to ggml's
reference quantisers (`quantize_row_*_ref` in `ggml-quants.c`); quantize_k.py has the others.
Must not know: files, kernels, where a field sits in its block (packing.py).
Divisions by the scale are products with its float32 inverse, and ties round away from zero, as
in ggml: both show in the last bit of the codes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgert.quant.bases import base_ref
from edgert.quant.formats import BaseFormat, QuantFormat
from edgert.quant.packing import Array, pack
from edgert.quant.quantize_k import BLOCKS_K, inverse, nearest
from edgert.quant.reference import IQ4_VALUES, MXFP4_VALUES, exponent_to_scale

__all__ = ["quantize_ref"]

_Fields = dict[str, Array]


def quantize_ref(fmt: QuantFormat, x: Array) -> Array:
    """The bytes that store the weights `x` in `fmt`.

    Shapes: x float32 [..., n], n a multiple of fmt.block_size -> uint8 [..., fmt.row_bytes(n)].
    Values beyond float16's range become infinite in F16 and in the scales of the blocks.
    """
    assert x.dtype == np.float32 and x.shape[-1] % fmt.block_size == 0, (fmt.name, x.shape)
    if fmt.is_float:
        return _FLOATS[fmt.name](np.ascontiguousarray(x))
    if isinstance(fmt, BaseFormat):
        return base_ref(fmt, quantize_ref(fmt.of, x))
    blocks = x.reshape(*x.shape[:-1], -1, fmt.block_size)
    return pack(fmt, _BLOCKS[fmt.name](blocks))


def _f32(x: Array) -> Array:
    """The float32 itself."""
    return x.astype("<f4", copy=False).view(np.uint8)


def _f16(x: Array) -> Array:
    """The nearest float16, ties to even."""
    return x.astype("<f2").view(np.uint8)


def _bf16(x: Array) -> Array:
    """The nearest upper half of a float32, ties to even; a NaN stays one."""
    bits = x.view(np.uint32).astype(np.uint64)
    quiet_nan = (bits & 0xFFFF0000) | 0x00400000
    bits = np.where(np.isnan(x), quiet_nan, bits)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2").view(np.uint8)


def _q8_0(x: Array) -> _Fields:
    """d = max|x| / 127; q = round(x / d)."""
    d = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    scaled = x * inverse(d)
    size = np.abs(scaled)
    whole = np.floor(size)
    # floor(size + 0.5) would round 0.49999997 up: the sum itself rounds to 1.
    rounded = np.sign(scaled) * (whole + (size - whole >= 0.5))
    return {"d": d.astype(np.float16), "codes": rounded.astype(np.int8)}


def _q4_0(x: Array) -> _Fields:
    """d = (the x of largest magnitude) / -8; q = round(x / d) + 8, at most 15."""
    d, codes = _signed_codes(x, 8)
    return {"d": d, "codes": codes}


def _q4_1(x: Array) -> _Fields:
    """m = min(x); d = (max(x) - m) / 15; q = round((x - m) / d)."""
    d, m, codes = _offset_codes(x, 15)
    return {"d": d, "m": m, "codes": codes}


def _q5_0(x: Array) -> _Fields:
    """d = (the x of largest magnitude) / -16; q = round(x / d) + 16, at most 31."""
    d, codes = _signed_codes(x, 16)
    return {"d": d, "high": codes >> 4, "low": codes & 15}


def _q5_1(x: Array) -> _Fields:
    """m = min(x); d = (max(x) - m) / 31; q = round((x - m) / d)."""
    d, m, codes = _offset_codes(x, 31)
    return {"d": d, "m": m, "high": codes >> 4, "low": codes & 15}


def _iq4_nl(x: Array) -> _Fields:
    """d = (the x of largest magnitude) / -127; q = the nearest of IQ4_VALUES to x / d."""
    d = (_largest(x) / np.float32(-127)).astype(np.float16)
    return {"d": d, "codes": nearest(x * inverse(d.astype(np.float32)), IQ4_VALUES)}


def _mxfp4(x: Array) -> _Fields:
    """2^(e-127) = 2^floor(log2 max|x|) / 4; q = the nearest of MXFP4_VALUES to x / 2^(e-128)."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    # frexp is exact where log2 may round up to the next power of two, and it is the same on
    # every machine: largest = mantissa * 2^power with the mantissa in [0.5, 1).
    power = np.frexp(largest)[1] - 1
    exponent = np.where(largest > 0, power - 2 + 127, 0).clip(0, 254).astype(np.uint8)
    scaled = x / exponent_to_scale(exponent)  # exact: a power of two
    codes = nearest(np.abs(scaled), MXFP4_VALUES[:8])
    codes |= ((x < 0) & (codes > 0)).astype(np.uint8) << np.uint8(3)  # -0 is stored as 0
    return {"exponent": exponent, "codes": codes}


_FLOATS: dict[str, Callable[[Array], Array]] = {"F32": _f32, "F16": _f16, "BF16": _bf16}
_BLOCKS: dict[str, Callable[[Array], _Fields]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "IQ4_NL": _iq4_nl,
    "MXFP4": _mxfp4,
    **BLOCKS_K,
}


def _largest(x: Array) -> Array:
    """The first x of largest magnitude, with its sign: [..., n] -> [..., 1]."""
    index = np.abs(x).argmax(axis=-1, keepdims=True)
    return np.take_along_axis(x, index, axis=-1)


def _signed_codes(x: Array, middle: int) -> tuple[Array, Array]:
    """Scale and codes of w = d * (q - middle), 0 <= q < 2 * middle."""
    d = _largest(x) / np.float32(-middle)
    codes = np.trunc(x * inverse(d) + np.float32(middle + 0.5))
    return d.astype(np.float16), codes.clip(0, 2 * middle - 1).astype(np.uint8)


def _offset_codes(x: Array, levels: int) -> tuple[Array, Array, Array]:
    """Scale, offset and codes of w = d * q + m, 0 <= q <= levels."""
    m = x.min(axis=-1, keepdims=True)
    d = (x.max(axis=-1, keepdims=True) - m) / np.float32(levels)
    codes = np.trunc((x - m) * inverse(d) + np.float32(0.5))
    return d.astype(np.float16), m.astype(np.float16), codes.clip(0, levels).astype(np.uint8)
