"""What the bytes of each format mean: dequantisation in plain NumPy, the truth all kernels meet.

Owns: the numbers of a block, one short function for each format, and the weights they make, equal
to the bit to ggml's own dequantisation.
Must not know: files, kernels, or where a field sits in its block (packing.py).
Source: the OCP MX v1.0 specification for MXFP4; ggml's `ggml-quants.c` for all others.

In the formulas q is a weight's stored integer and every product is a float32, in the order
written: `(d * scale) * q` and `d * (scale * q)` differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgert.quant.formats import BASES, CODE_BITS, PLANES, BaseFormat, QuantFormat
from edgert.quant.packing import Array, unpack

__all__ = [
    "IQ4_VALUES", "MXFP4_VALUES", "Numbers", "dequantize_ref", "exponent_to_scale", "numbers_ref",
]  # fmt: skip

# The sixteen steps of IQ4_NL and IQ4_XS: denser near zero, where weights are.
IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)
# E2M1 numbers times two, so that they are integers; the scale is halved for it.
MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)

_Fields = dict[str, Array]


class Numbers(NamedTuple):
    """Quantised blocks as numbers: a weight is (d * scale) * q, + m or - (m * min) if it has them.

    A scale and a min each belong to a sub-block, an equal share of the block's weights.
    """

    d: Array  # float32 [..., blocks, 1]
    q: Array  # int8, of bases int16 [..., blocks, weights of a block]
    m: Array | None = None  # float32 [..., blocks, 1]
    scales: Array | None = None  # int8 [..., blocks, sub-blocks]
    mins: Array | None = None  # int8 [..., blocks, sub-blocks]


def numbers_ref(fmt: QuantFormat, raw: Array) -> Numbers:
    """The numbers that `raw`, uint8 [..., blocks * block_bytes] of a quantised format, stores."""
    return _NUMBERS[fmt.name](unpack(fmt, raw))


def dequantize_ref(fmt: QuantFormat, raw: Array) -> Array:
    """The weights that `raw` stores.

    Shapes: raw uint8 [..., blocks * block_bytes] -> float32 [..., blocks * block_size].
    """
    assert raw.dtype == np.uint8 and raw.shape[-1] % fmt.block_bytes == 0, (fmt.name, raw.shape)
    if fmt.is_float:
        return _FLOATS[fmt.name](np.ascontiguousarray(raw))
    d, q, m, scales, mins = numbers_ref(fmt, raw)
    steps = d if scales is None else d * _f(scales)
    weights = steps[..., None] * _f(q).reshape(*steps.shape, -1)
    if m is not None:
        offsets = m if mins is None else -(m * _f(mins))
        weights = weights + offsets[..., None]
    assert weights.dtype == np.float32, fmt.name
    return weights.reshape(*raw.shape[:-1], -1)


def exponent_to_scale(exponent: Array) -> Array:
    """MXFP4's scale, halved: uint8 e -> float32 `2^(e - 127) / 2`; e < 2 gives a subnormal."""
    return np.ldexp(np.float32(1), exponent.astype(np.int32) - 128).astype(np.float32)


def _f32(raw: Array) -> Array:
    """w = the float32 itself."""
    return raw.view("<f4").astype(np.float32, copy=False)


def _f16(raw: Array) -> Array:
    """w = the float16, widened."""
    return raw.view("<f2").astype(np.float32)


def _bf16(raw: Array) -> Array:
    """w = the upper half of a float32."""
    upper: Array = raw.view("<u2").astype(np.uint32)
    return (upper << 16).view(np.float32)


def _q8_0(f: _Fields) -> Numbers:
    """w = d * q, q in -128..127."""
    return Numbers(_f(f["d"]), f["codes"])


def _q4_0(f: _Fields) -> Numbers:
    """w = d * (q - 8), q in 0..15."""
    return Numbers(_f(f["d"]), _i(f["codes"]) - 8)


def _q4_1(f: _Fields) -> Numbers:
    """w = d * q + m, q in 0..15."""
    return Numbers(_f(f["d"]), _i(f["codes"]), _f(f["m"]))


def _q5_0(f: _Fields) -> Numbers:
    """w = d * (q - 16), q in 0..31."""
    return Numbers(_f(f["d"]), _joined(f, "low", "high", 4) - 16)


def _q5_1(f: _Fields) -> Numbers:
    """w = d * q + m, q in 0..31."""
    return Numbers(_f(f["d"]), _joined(f, "low", "high", 4), _f(f["m"]))


def _q2_k(f: _Fields) -> Numbers:
    """w = (d * scale) * q - (m * min), q in 0..3; 16 sub-blocks of 16; scale, min in 0..15."""
    return _affine(f, _i(f["codes"]))


def _q3_k(f: _Fields) -> Numbers:
    """w = (d * (scale - 32)) * (q - 4), q in 0..7; 16 sub-blocks of 16; scale in 0..63."""
    scales = _joined(f, "scales_low", "scales_high", 4) - 32
    return Numbers(_f(f["d"]), _joined(f, "low", "high", 2) - 4, scales=scales)


def _q4_k(f: _Fields) -> Numbers:
    """w = (d * scale) * q - (m * min), q in 0..15; 8 sub-blocks of 32; scale, min in 0..63."""
    return _affine(f, _i(f["codes"]))


def _q5_k(f: _Fields) -> Numbers:
    """w = (d * scale) * q - (m * min), q in 0..31; 8 sub-blocks of 32; scale, min in 0..63."""
    return _affine(f, _joined(f, "low", "high", 4))


def _q6_k(f: _Fields) -> Numbers:
    """w = (d * scale) * (q - 32), q in 0..63; 16 sub-blocks of 16; scale in -128..127."""
    return Numbers(_f(f["d"]), _joined(f, "low", "high", 4) - 32, scales=f["scales"])


def _iq4_nl(f: _Fields) -> Numbers:
    """w = d * IQ4_VALUES[q]."""
    return Numbers(_f(f["d"]), IQ4_VALUES[f["codes"]])


def _iq4_xs(f: _Fields) -> Numbers:
    """w = (d * (scale - 32)) * IQ4_VALUES[q]; 8 sub-blocks of 32; scale in 0..63."""
    scales = _joined(f, "scales_low", "scales_high", 4) - 32
    return Numbers(_f(f["d"]), IQ4_VALUES[f["codes"]], scales=scales)


def _mxfp4(f: _Fields) -> Numbers:
    """w = 2^(e - 128) * MXFP4_VALUES[q]."""
    return Numbers(exponent_to_scale(f["exponent"]), MXFP4_VALUES[f["codes"]])


def _plane(f: _Fields) -> Numbers:
    """w = d * q + m, q in 0..2^bits - 1."""
    codes = _i(f["codes"]) if "codes" in f else _joined(f, "low", "high", 2)
    return Numbers(_f(f["d"]), codes, _f(f["m"]))


def _base(fmt: BaseFormat, f: _Fields) -> Numbers:
    """w = (d / 2) * (2 s u + s - 1 - 2 z), s = 2^(n - bits): the middle of s codes q - z.

    u is q >> (n - bits) of the n-bit code q in the block that it was taken from. z is 2^(n - 1)
    where weights are d (q - z), and 0 where they have an offset, which is kept; d includes a scale.
    """
    low_bits = {3: 2, 5: 4}.get(fmt.bits)
    codes = _joined(f, "low", "high", low_bits) if low_bits else f["codes"]
    n = CODE_BITS[fmt.of.name]
    steps, zero = 2 ** (n - fmt.bits), 0 if "m" in f else 2 ** (n - 1)
    q = codes.astype(np.int16) * np.int16(2 * steps) + np.int16(steps - 1 - 2 * zero)
    half = _f(f["d"]) * np.float32(0.5)
    if "scales_mins" in f:
        return Numbers(half, q, _f(f["m"]), *np.split(_i(f["scales_mins"]), 2, axis=-1))
    return Numbers(half, q, _f(f["m"]) if "m" in f else None, f.get("scales"))


_FLOATS: dict[str, Callable[[Array], Array]] = {"F32": _f32, "F16": _f16, "BF16": _bf16}
_NUMBERS: dict[str, Callable[[_Fields], Numbers]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    **dict.fromkeys(PLANES, _plane),
    **{f.name: partial(_base, f) for bases in BASES.values() for f in bases.values()},
}


def _f(numbers: Array) -> NDArray[np.float32]:
    return numbers.astype(np.float32)


def _i(numbers: Array) -> NDArray[np.int8]:
    return numbers.astype(np.int8)


def _joined(f: _Fields, low: str, high: str, bits: int) -> NDArray[np.int8]:
    """Integers stored apart: the low `bits` bits in one field, the rest in another."""
    return _i(f[low] | (f[high] << np.uint8(bits)))


def _affine(f: _Fields, q: Array) -> Numbers:
    scales, mins = np.split(_i(f["scales_mins"]), 2, axis=-1)
    return Numbers(_f(f["d"]), q, _f(f["m"]), scales, mins)
