"""Making plane formats: the scale and offset of each group by least squares, and its packed codes.

Same bytes as `quantize_planes_ref` of quant/planes.py, its slow twin, which has the formulas and
says why they are so. A group of 32 or 128 weights is 2 or 8 vectors; nothing leaves the first-level
cache.

Owns: that arithmetic. Must not know: files, threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.kernels_cpu.jit import inline, kernel, void
from edgert.kernels_cpu.simd import (
    convert_to,
    f32_to_i32,
    ld_f16,
    ld_f32x16,
    ld_i16,
    ld_u8,
    reduce_add,
    reduce_max,
    splat_f32x16,
    st_f16x16,
    st_f32x16,
    st_i8,
    st_i16,
    stack_buffer,
    storer,
    vadd,
    vec,
    vmax,
    vmin,
    vmul,
    vneg,
    vrint,
    vsub,
    zero_f32x16,
)
from edgert.quant.formats import PlaneFormat
from edgert.quant.packing import Array
from edgert.quant.planes import ROUNDS, SPANS, column_weights

__all__ = ["quantize_planes"]

# Any: to mypy the arithmetic of NumPy scalars is not that of floats.
_F: Any = np.float32
_ZERO: Any = np.float32(0)
_HALF: Any = np.float32(0.5)
_ONE: Any = np.float32(1)
_NAN: Any = np.float32(np.nan)
_SPAN_0: Any = np.float32(SPANS[0])
_SPAN_1: Any = np.float32(SPANS[1])
_SPAN_2: Any = np.float32(SPANS[2])
_LANE_BYTES = 64
_codes_buffer, _bytes_buffer = stack_buffer(8 * _LANE_BYTES), stack_buffer(8 * 16)
_half_buffer = stack_buffer(32)
_to_i8 = convert_to("trunc", vec("i32", 16), vec("i8", 16))
_st_i8x16 = storer(vec("i8", 16))


def quantize_planes(
    fmt: PlaneFormat, x: Array, importance: Array | None = None, *, refine: bool = True
) -> Array:
    """As `quantize_planes_ref`, to the byte: float32 [..., n] -> uint8 [..., fmt.row_bytes(n)].

    Runs without the GIL. Raises InputError when the shapes do not fit.
    """
    weight = column_weights(fmt, x, importance)
    n = x.shape[-1]
    x = np.ascontiguousarray(x)
    out = np.empty((*x.shape[:-1], fmt.row_bytes(n)), np.uint8)
    _quantize_planes_kernel(
        x.ctypes.data, weight.ctypes.data, out.ctypes.data, x.size // fmt.block_size,
        n // fmt.block_size, fmt.block_size, fmt.bits, int(refine),
    )  # fmt: skip
    return out


@inline
def rounded(value: float, half: int) -> Any:
    """`value` rounded to float16; its bits are left at `half`."""
    st_f16x16(half, splat_f32x16(value))
    return ld_f16(half)


@inline
def fit_codes(x: int, nbytes: int, d: float, m: float, levels: float, codes: int) -> None:
    """The nearest codes of a group, as float32 at `codes`; 0 where d is 0 or not a number."""
    inverse = _ZERO
    if d != _ZERO:
        inverse = _ONE / d
    scale, offset, most = splat_f32x16(inverse), splat_f32x16(m), splat_f32x16(levels)
    for at in range(0, nbytes, _LANE_BYTES):
        q = vrint(vmul(vsub(ld_f32x16(x + at), offset), scale))
        st_f32x16(codes + at, vmin(vmax(q, zero_f32x16()), most))


@inline
def weighted_sum(w: int, a: int, nbytes: int) -> Any:
    """sum(w * a) over a group."""
    total = zero_f32x16()
    for at in range(0, nbytes, _LANE_BYTES):
        total = vadd(total, vmul(ld_f32x16(w + at), ld_f32x16(a + at)))
    return reduce_add(total)


@inline
def square_error(x: int, w: int, codes: int, nbytes: int, d: float, m: float) -> Any:
    """sum(w * (d q + m - x)^2) over a group."""
    scale, offset, total = splat_f32x16(d), splat_f32x16(m), zero_f32x16()
    for at in range(0, nbytes, _LANE_BYTES):
        left = vsub(vadd(vmul(scale, ld_f32x16(codes + at)), offset), ld_f32x16(x + at))
        total = vadd(total, vmul(vmul(ld_f32x16(w + at), left), left))
    return reduce_add(total)


@inline
def pack_codes(codes: int, numbers: int, group: int, bits: int, out: int) -> None:
    """The codes of a group, packed as quant/packing.py lays them out."""
    for at in range(0, group, 16):
        _st_i8x16(numbers + at, _to_i8(f32_to_i32(ld_f32x16(codes + 4 * at))))
    kept = 2 if bits == 3 else bits  # 3 bits: the low two of all weights, then the top ones
    each = 4 * kept
    for run in range(group // 32):
        for j in range(each):
            byte = 0
            for i in range(8 // kept):
                code = ld_u8(numbers + 32 * run + i * each + j)
                byte |= (code & ((1 << kept) - 1)) << (i * kept)
            st_i8(out + run * each + j, byte)
    if bits == 3:
        high = out + group // 4
        for run in range(group // 32):
            for j in range(4):
                byte = 0
                for i in range(8):
                    byte |= (ld_u8(numbers + 32 * run + 4 * i + j) >> 2) << i
                st_i8(high + 4 * run + j, byte)


@kernel(void("iiiiiiii"))
def _quantize_planes_kernel(
    x: int, weight: int, out: int, groups: int, in_row: int, group: int, bits: int, refine: int
) -> None:
    """`groups` groups of `group` float32 at x, rows of `in_row` groups, to blocks at `out`."""
    codes, numbers, half = _codes_buffer(), _bytes_buffer(), _half_buffer()
    nbytes = 4 * group
    levels = _F((1 << bits) - 1)
    block = 4 + bits * group // 8
    for g in range(groups):
        w = weight + nbytes * (g % in_row)
        low = ld_f32x16(x)
        high, nothing = low, zero_f32x16()
        for at in range(0, nbytes, _LANE_BYTES):
            low, high = vmin(low, ld_f32x16(x + at)), vmax(high, ld_f32x16(x + at))
            nothing = vadd(nothing, vmul(ld_f32x16(x + at), zero_f32x16()))
        least, most = -reduce_max(vneg(low)), reduce_max(high)
        if not reduce_add(nothing) == _ZERO:  # something is not finite
            least, most = _NAN, _NAN
        best_d = _SPAN_0 * (most - least) / levels
        best_m = (least + most - best_d * levels) * _HALF + _ZERO
        if refine:
            total = zero_f32x16()
            for at in range(0, nbytes, _LANE_BYTES):
                total = vadd(total, ld_f32x16(w + at))
            weights = reduce_add(total)
            mean_x = weighted_sum(w, x, nbytes) / weights
            best = _F(np.inf)
            for start in range(3):
                span = _SPAN_0 if start == 0 else (_SPAN_1 if start == 1 else _SPAN_2)
                d = span * (most - least) / levels
                m = (least + most - d * levels) * _HALF + _ZERO
                for _ in range(ROUNDS):
                    fit_codes(x, nbytes, d, m, levels, codes)
                    mean_q = weighted_sum(w, codes, nbytes) / weights
                    middle = splat_f32x16(mean_q)
                    squares, products = zero_f32x16(), zero_f32x16()
                    for at in range(0, nbytes, _LANE_BYTES):
                        spread = vsub(ld_f32x16(codes + at), middle)
                        weighted = vmul(ld_f32x16(w + at), spread)
                        squares = vadd(squares, vmul(weighted, spread))
                        products = vadd(products, vmul(weighted, ld_f32x16(x + at)))
                    square = reduce_add(squares)
                    if not square > _ZERO:
                        break  # no other d and m come of it
                    before_d, before_m = d, m
                    d = reduce_add(products) / square
                    m = mean_x - d * mean_q
                    if d == before_d and m == before_m:
                        break  # nor will they in the rounds that are left
                d, m = rounded(d, half), rounded(m, half)
                fit_codes(x, nbytes, d, m, levels, codes)
                error = square_error(x, w, codes, nbytes, d, m)
                if error < best:
                    best, best_d, best_m = error, d, m
        best_d = rounded(best_d, half)
        st_i16(out, ld_i16(half))
        best_m = rounded(best_m, half)
        st_i16(out + 2, ld_i16(half))
        fit_codes(x, nbytes, best_d, best_m, levels, codes)
        pack_codes(codes, numbers, group, bits, out + 4)
        x += nbytes
        out += block
