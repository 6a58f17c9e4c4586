"""Functions of 16 float32 lanes that no instruction computes, equal to the bit on every CPU.

    exp(x) = 2**n * (1 + r + r**2 * q(r)),  n = round(x / ln 2),  r = x - n * ln 2 in two parts

`q` has five coefficients, fitted for the smallest relative error on |r| <= ln 2 / 2 (3e-9). The
softmax of attention takes powers of two, at half the operations:

    2**x = 2**n * (1 + r * q(r)),  n = round(x),  r = x - n,  x <= 0

Every step is one IEEE operation (explicit fused multiply-adds, no fast-math), so the NumPy twins
agree with compiled code to the bit, on every CPU and whatever LLVM makes of 16 lanes.

Owns: vector exp and the sums and maxima over lanes. Must not know: who calls them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu.jit import inline
from edgert.kernels_cpu.simd import (
    F32x16,
    bitcast_to,
    const_of,
    fma,
    fnma,
    select_gt,
    shift_of,
    vadd,
    vec,
    vmul,
    vsub,
)

__all__ = [
    "EXP2_MAX_ULP", "EXP_MAX_ULP", "LANES", "LOG2E", "exp16", "exp2_16", "exp2_ref", "exp_ref",
    "fma_ref", "lane_sum_ref",
]  # fmt: skip

LANES = 16
EXP_MAX_ULP = 1.0  # largest error found against float64: 0.87 units in the last place
EXP2_MAX_ULP = 1.0  # 0.93
LOG2E = np.log2(np.e)  # in float64: folded into other factors before they become float32

_F32 = npt.NDArray[np.float32]

_LOG2E = np.float32(1.442695)
_LN2_HIGH = np.float32(0.693359375)  # 10 bits: n * _LN2_HIGH is exact
_LN2_LOW = np.float32(-0.00021219444)
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits
_LOWEST = np.float32(-104.0)  # exp is 0 below
_HIGHEST = np.float32(89.0)  # and infinite above
_Q0 = np.float32(float.fromhex("0x1.fffffcp-2"))
_Q1 = np.float32(float.fromhex("0x1.555492p-3"))
_Q2 = np.float32(float.fromhex("0x1.5558f2p-5"))
_Q3 = np.float32(float.fromhex("0x1.123a20p-7"))
_Q4 = np.float32(float.fromhex("0x1.6a23cep-10"))
_BIASED = np.float32(12583039.0)  # 1.5 * 2**23 + 127: the low bits become a biased exponent
_SMALLEST = np.float32(-126.0)  # 2**x stays 2**-126 below: nothing beside a weight of 1
_C1 = np.float32(float.fromhex("0x1.62e430p-1"))
_C2 = np.float32(float.fromhex("0x1.ebfbdcp-3"))
_C3 = np.float32(float.fromhex("0x1.c6aee8p-5"))
_C4 = np.float32(float.fromhex("0x1.3b2d4cp-7"))
_C5 = np.float32(float.fromhex("0x1.5f3e54p-10"))
_C6 = np.float32(float.fromhex("0x1.41fbbap-13"))


def fma_ref(a: Any, b: Any, c: Any) -> _F32:
    """`a * b + c` of float32 arrays rounded once, like the fused instruction.

    The product is exact in float64. The sum is rounded to odd there (an inexact result gets its
    last bit set), after which the second rounding, to float32, cannot go wrong (Boldo and
    Melquiond 2008).
    """
    with np.errstate(all="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        addend = np.asarray(c, np.float64)
        total = np.asarray(product + addend)
        back = total - product
        error = (product - (total - back)) + (addend - back)
        bits = total.view(np.int64)
        inexact = (error != 0) & (bits & 1 == 0) & np.isfinite(total)
        towards = np.where((error > 0) == (total > 0), 1, -1)
        return np.where(inexact, bits + towards, bits).view(np.float64).astype(np.float32)


def exp_ref(x: Any) -> _F32:
    """e**x of a float32 array, equal to the bit to `exp16`; error below `EXP_MAX_ULP`."""
    x = np.asarray(x, np.float32)
    with np.errstate(all="ignore"):
        x = np.where(x < _LOWEST, _LOWEST, x)
        x = np.where(x > _HIGHEST, _HIGHEST, x)
        shifted = fma_ref(x, _LOG2E, _ROUND)
        whole = shifted - _ROUND
        r = fma_ref(whole, -_LN2_LOW, fma_ref(whole, -_LN2_HIGH, x))
        p = fma_ref(_Q4, r, _Q3)
        for coefficient in (_Q2, _Q1, _Q0, np.float32(1), np.float32(1)):
            p = fma_ref(p, r, coefficient)
        n = shifted.view(np.int32) - _ROUND.view(np.int32)
        half = n >> 1
        return p * _power_of_two_ref(half) * _power_of_two_ref(n - half)


def exp2_ref(x: Any) -> _F32:
    """2**x of a float32 array of x <= 0, equal to the bit to `exp2_16`; 2**-126 below -126."""
    x = np.asarray(x, np.float32)
    with np.errstate(all="ignore"):
        x = np.where(x < _SMALLEST, _SMALLEST, x)
        shifted = x + _BIASED
        r = x - (shifted - _BIASED)
        p = fma_ref(_C6, r, _C5)
        for coefficient in (_C4, _C3, _C2, _C1, np.float32(1)):
            p = fma_ref(p, r, coefficient)
        return np.asarray(p * (shifted.view(np.int32) << np.int32(23)).view(np.float32))


def lane_sum_ref(v: _F32) -> _F32:
    """Sum over the last axis (16 lanes) in the fixed tree: halves, quarters, pairs."""
    for width in (8, 4, 2, 1):
        v = v[..., :width] + v[..., width : 2 * width]
    return v[..., 0]


_F = vec("f32", 16)
_I = vec("i32", 16)
_log2e, _ln2_high = const_of(_F, [float(_LOG2E)]), const_of(_F, [float(_LN2_HIGH)])
_ln2_low, _round = const_of(_F, [float(_LN2_LOW)]), const_of(_F, [float(_ROUND)])
_lowest, _highest = const_of(_F, [float(_LOWEST)]), const_of(_F, [float(_HIGHEST)])
_q0, _q1 = const_of(_F, [float(_Q0)]), const_of(_F, [float(_Q1)])
_q2, _q3 = const_of(_F, [float(_Q2)]), const_of(_F, [float(_Q3)])
_q4, _one = const_of(_F, [float(_Q4)]), const_of(_F, [1.0])
_biased, _smallest = const_of(_F, [float(_BIASED)]), const_of(_F, [float(_SMALLEST)])
_c1, _c2, _c3 = (const_of(_F, [float(c)]) for c in (_C1, _C2, _C3))
_c4, _c5, _c6 = (const_of(_F, [float(c)]) for c in (_C4, _C5, _C6))
_bias = const_of(_I, [127])
_as_int, _as_float = bitcast_to(_F, _I), bitcast_to(_I, _F)
_halve, _to_exponent = shift_of("ashr", _I, 1), shift_of("shl", _I, 23)


@inline
def exp16(x: F32x16) -> F32x16:
    """e**x of 16 lanes: 0 below -104, infinity above 88.7, NaN for NaN, subnormals kept."""
    x = select_gt(_lowest(), x, _lowest(), x)
    x = select_gt(x, _highest(), _highest(), x)
    shifted = fma(x, _log2e(), _round())
    whole = vsub(shifted, _round())
    r = fnma(whole, _ln2_low(), fnma(whole, _ln2_high(), x))
    p = fma(fma(fma(fma(_q4(), r, _q3()), r, _q2()), r, _q1()), r, _q0())
    p = fma(fma(p, r, _one()), r, _one())
    # 2**n in two factors, so that results near infinity and below 2**-126 come out right.
    n = vsub(_as_int(shifted), _as_int(_round()))
    half = _halve(n)
    first = _as_float(_to_exponent(vadd(half, _bias())))
    second = _as_float(_to_exponent(vadd(vsub(n, half), _bias())))
    return vmul(vmul(p, first), second)


@inline
def exp2_16(x: F32x16) -> F32x16:
    """2**x of 16 lanes of x <= 0: 2**-126 below -126, exactly 1 for 0, NaN for NaN."""
    x = select_gt(_smallest(), x, _smallest(), x)
    shifted = vadd(x, _biased())
    r = vsub(x, vsub(shifted, _biased()))
    p = fma(fma(fma(fma(_c6(), r, _c5()), r, _c4()), r, _c3()), r, _c2())
    p = fma(fma(p, r, _c1()), r, _one())
    return vmul(p, _as_float(_to_exponent(_as_int(shifted))))


def _power_of_two_ref(n: npt.NDArray[np.int32]) -> _F32:
    return ((n + np.int32(127)) << np.int32(23)).view(np.float32)
