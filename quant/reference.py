"""What the bytes of each format mean: dequantisation in plain NumPy, the truth all kernels meet.

Owns: one short function for each format, equal to the bit to ggml's own dequantisation.
Must not know: files, kernels, or where a field sits in its block (packing.py).
Source: the OCP MX v1.0 specification for MXFP4; ggml's `ggml-quants.c` for all others.

In the formulas q is a weight's stored integer and every product is a float32, in the order
written: `(d * scale) * q` and `d * (scale * q)` differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgert.quant.formats import QuantFormat
from edgert.quant.packing import Array, unpack

__all__ = ["IQ4_VALUES", "MXFP4_VALUES", "dequantize_ref", "exponent_to_scale"]

# The sixteen steps of IQ4_NL and IQ4_XS: denser near zero, where weights are.
IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)
# E2M1 numbers times two, so that they are integers; the scale is halved for it.
MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)

_Fields = dict[str, Array]


def dequantize_ref(fmt: QuantFormat, raw: Array) -> Array:
    """The weights that `raw` stores.

    Shapes: raw uint8 [..., blocks * block_bytes] -> float32 [..., blocks * block_size].
    """
    assert raw.dtype == np.uint8 and raw.shape[-1] % fmt.block_bytes == 0, (fmt.name, raw.shape)
    if fmt.is_float:
        return _FLOATS[fmt.name](np.ascontiguousarray(raw))
    weights = _BLOCKS[fmt.name](unpack(fmt, raw))
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


def _q8_0(f: _Fields) -> Array:
    """w = d * q, q in -128..127."""
    return _f(f["d"]) * _f(f["codes"])


def _q4_0(f: _Fields) -> Array:
    """w = d * (q - 8), q in 0..15."""
    return _f(f["d"]) * (_f(f["codes"]) - 8)


def _q4_1(f: _Fields) -> Array:
    """w = d * q + m, q in 0..15."""
    return _f(f["d"]) * _f(f["codes"]) + _f(f["m"])


def _q5_0(f: _Fields) -> Array:
    """w = d * (q - 16), q in 0..31."""
    return _f(f["d"]) * (_f(_joined(f, "low", "high", 4)) - 16)


def _q5_1(f: _Fields) -> Array:
    """w = d * q + m, q in 0..31."""
    return _f(f["d"]) * _f(_joined(f, "low", "high", 4)) + _f(f["m"])


def _q2_k(f: _Fields) -> Array:
    """w = (d * scale) * q - (m * min), q in 0..3; 16 sub-blocks of 16; scale, min in 0..15."""
    return _affine(f, f["codes"], subs=16)


def _q3_k(f: _Fields) -> Array:
    """w = (d * (scale - 32)) * (q - 4), q in 0..7; 16 sub-blocks of 16; scale in 0..63."""
    scales = _f(_joined(f, "scales_low", "scales_high", 4)) - 32
    return _symmetric(f["d"], scales, _f(_joined(f, "low", "high", 2)) - 4)


def _q4_k(f: _Fields) -> Array:
    """w = (d * scale) * q - (m * min), q in 0..15; 8 sub-blocks of 32; scale, min in 0..63."""
    return _affine(f, f["codes"], subs=8)


def _q5_k(f: _Fields) -> Array:
    """w = (d * scale) * q - (m * min), q in 0..31; 8 sub-blocks of 32; scale, min in 0..63."""
    return _affine(f, _joined(f, "low", "high", 4), subs=8)


def _q6_k(f: _Fields) -> Array:
    """w = (d * scale) * (q - 32), q in 0..63; 16 sub-blocks of 16; scale in -128..127."""
    return _symmetric(f["d"], _f(f["scales"]), _f(_joined(f, "low", "high", 4)) - 32)


def _iq4_nl(f: _Fields) -> Array:
    """w = d * IQ4_VALUES[q]."""
    return _f(f["d"]) * _f(IQ4_VALUES[f["codes"]])


def _iq4_xs(f: _Fields) -> Array:
    """w = (d * (scale - 32)) * IQ4_VALUES[q]; 8 sub-blocks of 32; scale in 0..63."""
    scales = _f(_joined(f, "scales_low", "scales_high", 4)) - 32
    return _symmetric(f["d"], scales, _f(IQ4_VALUES[f["codes"]]))


def _mxfp4(f: _Fields) -> Array:
    """w = 2^(e - 128) * MXFP4_VALUES[q]."""
    return exponent_to_scale(f["exponent"]) * _f(MXFP4_VALUES[f["codes"]])


_FLOATS: dict[str, Callable[[Array], Array]] = {"F32": _f32, "F16": _f16, "BF16": _bf16}
_BLOCKS: dict[str, Callable[[_Fields], Array]] = {
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
}


def _f(numbers: Array) -> NDArray[np.float32]:
    return numbers.astype(np.float32)


def _joined(f: _Fields, low: str, high: str, bits: int) -> Array:
    """Integers stored apart: the low `bits` bits in one field, the rest in another."""
    joined: Array = f[low] | (f[high] << np.uint8(bits))
    return joined


def _affine(f: _Fields, codes: Array, subs: int) -> Array:
    """(d * scale) * q - (m * min) over `subs` sub-blocks: codes [..., n] -> float32 [..., n]."""
    scales, mins = np.split(_f(f["scales_mins"]), 2, axis=-1)
    steps = (_f(f["d"]) * scales)[..., None]
    offsets = (_f(f["m"]) * mins)[..., None]
    q = _f(codes).reshape(*codes.shape[:-1], subs, -1)
    return (steps * q - offsets).reshape(codes.shape)


def _symmetric(d: Array, scales: Array, q: Array) -> Array:
    """(d * scale) * q: scales [..., subs], q [..., n] -> float32 [..., n]."""
    steps = (_f(d) * scales)[..., None]
    return (steps * q.reshape(*scales.shape, -1)).reshape(q.shape)
