"""Quantisers of the 256-weight super-blocks: round to nearest, scales from each sub-block's range.

Owns: Q2_K Q3_K Q4_K Q5_K Q6_K and IQ4_XS. Must not know: files, kernels, the byte map (packing.py).
ggml searches for the scales that minimise a weighted error; these take them straight from the
minimum and maximum, so their error is larger than ggml's (figures in quant/README.md). What they
store is decoded by the same rules, and each code is the nearest to its weight under the scales as
stored, so no error hides in the packing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgert.quant.packing import Array
from edgert.quant.reference import IQ4_VALUES

__all__ = ["BLOCKS_K", "inverse", "nearest"]

_Fields = dict[str, Array]


def inverse(d: Array) -> Array:
    """1 / d in float32, and 0 where d is 0: a block of zeros gets codes of zero."""
    result: Array = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    return result


def nearest(x: Array, values: Array) -> Array:
    """The index of the nearest of the ascending `values` to each x; of two as near, the lower.

    Shapes: x float32 [...] -> uint8 [...].
    """
    middles = (values[1:].astype(np.float32) + values[:-1].astype(np.float32)) / 2
    return np.searchsorted(middles, x).astype(np.uint8)


def _q2_k(x: Array) -> _Fields:
    """Affine, 16 sub-blocks of 16, codes 0..3, scales and offsets 0..15."""
    d, m, scales_mins, codes = _affine(x, subs=16, code_max=3, scale_max=15)
    return {"d": d, "m": m, "scales_mins": scales_mins, "codes": codes}


def _q3_k(x: Array) -> _Fields:
    """Symmetric, 16 sub-blocks of 16, codes -4..3, scales -32..31."""
    d, scales, q = _symmetric(x, subs=16, code_min=-4, scale_max=31)
    scales, codes = (scales + 32).astype(np.uint8), (q + 4).astype(np.uint8)
    return {
        "d": d,
        "scales_low": scales & 15,
        "scales_high": scales >> 4,
        "low": codes & 3,
        "high": codes >> 2,
    }


def _q4_k(x: Array) -> _Fields:
    """Affine, 8 sub-blocks of 32, codes 0..15, scales and offsets 0..63."""
    d, m, scales_mins, codes = _affine(x, subs=8, code_max=15, scale_max=63)
    return {"d": d, "m": m, "scales_mins": scales_mins, "codes": codes}


def _q5_k(x: Array) -> _Fields:
    """Affine, 8 sub-blocks of 32, codes 0..31, scales and offsets 0..63."""
    d, m, scales_mins, codes = _affine(x, subs=8, code_max=31, scale_max=63)
    return {"d": d, "m": m, "scales_mins": scales_mins, "low": codes & 15, "high": codes >> 4}


def _q6_k(x: Array) -> _Fields:
    """Symmetric, 16 sub-blocks of 16, codes -32..31, scales -127..127."""
    d, scales, q = _symmetric(x, subs=16, code_min=-32, scale_max=127)
    codes = (q + 32).astype(np.uint8)
    return {"d": d, "scales": scales.astype(np.int8), "low": codes & 15, "high": codes >> 4}


def _iq4_xs(x: Array) -> _Fields:
    """Symmetric over IQ4_VALUES, 8 sub-blocks of 32, scales -32..31."""
    d, scales, scaled = _sub_scales(x, subs=8, full=-127, scale_max=31)
    stored = (scales + 32).astype(np.uint8)
    codes = nearest(scaled, IQ4_VALUES).reshape(x.shape)
    return {"d": d, "scales_low": stored & 15, "scales_high": stored >> 4, "codes": codes}


BLOCKS_K: dict[str, Callable[[Array], _Fields]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
}


def _affine(
    x: Array, subs: int, code_max: int, scale_max: int
) -> tuple[Array, Array, Array, Array]:
    """d, m, scales and offsets, codes of w = (d * scale) * q - (m * min).

    Of each sub-block: offset = max(0, -min(x)); step = (max(x) + offset) / code_max. The largest
    step and offset get the integer scale_max, which fixes d and m; the others are rounded.
    """
    groups = x.reshape(*x.shape[:-1], subs, -1)
    offsets = np.maximum(-groups.min(axis=-1), 0)
    steps = np.maximum(groups.max(axis=-1) + offsets, 0) / np.float32(code_max)
    d = (steps.max(axis=-1, keepdims=True) / np.float32(scale_max)).astype(np.float16)
    m = (offsets.max(axis=-1, keepdims=True) / np.float32(scale_max)).astype(np.float16)
    wide_d, wide_m = d.astype(np.float32), m.astype(np.float32)
    scales = np.rint(steps * inverse(wide_d)).clip(0, scale_max)
    mins = np.rint(offsets * inverse(wide_m)).clip(0, scale_max)
    stored_step, stored_offset = (wide_d * scales)[..., None], (wide_m * mins)[..., None]
    codes = np.rint((groups + stored_offset) * inverse(stored_step)).clip(0, code_max)
    scales_mins = np.concatenate([scales, mins], axis=-1).astype(np.uint8)
    return d, m, scales_mins, codes.astype(np.uint8).reshape(x.shape)


def _symmetric(x: Array, subs: int, code_min: int, scale_max: int) -> tuple[Array, Array, Array]:
    """d, scales and signed codes of w = (d * scale) * q, code_min <= q < -code_min."""
    d, scales, scaled = _sub_scales(x, subs, code_min, scale_max)
    codes = np.rint(scaled).clip(code_min, -code_min - 1)
    return d, scales, codes.reshape(x.shape)


def _sub_scales(x: Array, subs: int, full: int, scale_max: int) -> tuple[Array, Array, Array]:
    """d float16 [..., 1], integer scales float32 [..., subs], x / (d * scale) [..., subs, n].

    The x of largest magnitude of a sub-block is to become `full`, the one code with the longest
    reach, so scales carry a sign; the largest of them gets the integer scale_max.
    """
    groups = x.reshape(*x.shape[:-1], subs, -1)
    index = np.abs(groups).argmax(axis=-1, keepdims=True)
    steps = np.take_along_axis(groups, index, axis=-1)[..., 0] / np.float32(full)
    d = (np.abs(steps).max(axis=-1, keepdims=True) / np.float32(scale_max)).astype(np.float16)
    wide_d = d.astype(np.float32)
    scales = np.rint(steps * inverse(wide_d)).clip(-scale_max, scale_max)
    return d, scales, groups * inverse((wide_d * scales)[..., None])
