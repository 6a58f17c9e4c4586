"""NumPy twins of the matmul kernels: the same sums in the same order, equal to the bit.

Block formats take quantised activations (`activations`). Per (row, token), over the canonical
blocks b = 0, 1, 2, ... of 32 weights:

    acc = fma(float32(dot_b), float32(scale_b * d_x[b]), acc)
    then, in formats with offsets, acc = fma(offset_b, float32(d_x[b] * float32(sum_x[b])), acc)
    then, in Q2_K,                 acc = fma(-float32(mins_b), float32(m * d_x[b]), acc)

    format                        dot                                 scale     offset
    Q8_0 Q4_0 Q5_0 IQ4_NL MXFP4   sum q * q_x                         d
    B3 B4 B5                      sum q * q_x                         d / 2
    Q4_1 Q5_1 P1_32 .. P4_128     sum q * q_x                         d         m
    IQ4_XS                        sum q * q_x                         d * sc_b
    Q4_K Q5_K                     sum q * q_x                         d * sc_b  -(m * mn_b)
    Q3_K Q6_K                     sum over both 16s sc * sum q * q_x  d
    Q2_K                          sum over both 16s sc * sum q * q_x  d

with the q, d, m, scales and mins of `edgert.quant.reference`, sums over the block, and Q2_K's
mins_b = sum over both 16s mn * sum q_x. |q_x| <= 127. All dots are exact integers below 2**24 in
magnitude, so exact in float32: the largest are Q6_K's 128 * 32 * 32 * 127 = 16,646,144, Q3_K's
32 * 4 * 32 * 127 = 520,192, the bases' 249 * 32 * 127 = 1,011,936 and IQ4's 127 * 32 * 127 =
516,128. d * sc and m * mn are exact too (a float16 and 7 bits with sign), and so is d / 2.

Float weights take float activations: four sums over k mod 4, acc_p = fma(w[k], x[k], acc_p),
combined (acc_0 + acc_1) + (acc_2 + acc_3).

Owns: this definition. Must not know: tiles or CPUs. It allocates freely and is slow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu.activations import BLOCK, RECORD
from edgert.kernels_cpu.vmath import fma_ref
from edgert.quant.formats import FORMATS, QuantFormat
from edgert.quant.reference import dequantize_ref, numbers_ref

__all__ = ["QUANTIZED_INPUT", "matmul_ref"]

QUANTIZED_INPUT = tuple(f.name for f in FORMATS.values() if not f.is_float)
_F32 = npt.NDArray[np.float32]
_U8 = npt.NDArray[np.uint8]


def matmul_ref(
    fmt: QuantFormat,
    raw: _U8,
    x: npt.NDArray[np.generic],
    *,
    bias: _F32 | None = None,
    residual: _F32 | None = None,
) -> _F32:
    """raw (M, row_bytes) GGUF rows, x (T, K) float32 or (T, K / 32 * 40) uint8 -> (T, M) float32.

    `bias` (M,) is added to the sums, then the sums to `residual` (T, M).
    """
    with np.errstate(all="ignore"):
        if fmt.name in QUANTIZED_INPUT:
            acc = _quantised(fmt, raw, np.ascontiguousarray(x).view(RECORD))
        else:
            acc = _float(dequantize_ref(fmt, raw), x.astype(np.float32))
        if bias is not None:
            acc = acc + bias
        return acc if residual is None else residual + acc


def _float(w: _F32, x: _F32) -> _F32:
    acc = np.zeros((4, len(x), len(w)), np.float32)
    for k in range(w.shape[1]):
        acc[k % 4] = fma_ref(w[None, :, k], x[:, k, None], acc[k % 4])
    return np.asarray((acc[0] + acc[1]) + (acc[2] + acc[3]), np.float32)


def _quantised(fmt: QuantFormat, raw: _U8, x: npt.NDArray[np.void]) -> _F32:
    w = _canonical(fmt, raw)
    q_x, d_x = x["q"].astype(np.int64), x["d"]
    acc = np.zeros((len(x), len(raw)), np.float32)
    for b in range(w.q.shape[1]):
        dot = (q_x[:, b] @ w.q[:, b].T).astype(np.float32)
        acc = fma_ref(dot, w.scale[:, b] * d_x[:, b, None], acc)
        if w.offset is not None:
            sums = q_x[:, b].sum(1).astype(np.float32)
            acc = fma_ref(w.offset[:, b], (d_x[:, b] * sums)[:, None], acc)
        if w.mins is not None and w.m is not None:
            mins = (q_x[:, b] @ w.mins[:, b].T).astype(np.float32)
            acc = fma_ref(-mins, w.m[:, b] * d_x[:, b, None], acc)
    return acc


class _Canonical(NamedTuple):
    """A matrix in blocks of 32. Sub-blocks of 16 have their scale in q, and mins beside it."""

    q: npt.NDArray[np.int64]  # (M, B, 32)
    scale: _F32  # (M, B)
    offset: _F32 | None = None  # (M, B)
    mins: npt.NDArray[np.int64] | None = None  # (M, B, 32), the min of each weight
    m: _F32 | None = None  # (M, B)


def _canonical(fmt: QuantFormat, raw: _U8) -> _Canonical:
    d, q, m, scales, mins = numbers_ref(fmt, raw)
    B = fmt.block_size // BLOCK

    def blocks(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.repeat(values, B // values.shape[-1], axis=-1).reshape(len(raw), -1)

    def weights(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        each = np.repeat(values, fmt.block_size // values.shape[-1], axis=-1)
        return each.astype(np.int64).reshape(len(raw), -1, BLOCK)

    if scales is None:
        return _Canonical(weights(q), blocks(d), None if m is None else blocks(m))
    if scales.shape[-1] == B:
        offset = None if m is None or mins is None else blocks(-(m * mins.astype(np.float32)))
        return _Canonical(weights(q), blocks(d * scales.astype(np.float32)), offset)
    w = _Canonical(weights(q) * weights(scales), blocks(d))
    return w if m is None or mins is None else w._replace(mins=weights(mins), m=blocks(m))
