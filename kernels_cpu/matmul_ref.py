"""NumPy twins of the matmul kernels: the same sums in the same order, equal to the bit.

Quantised activations, per (row, token), over the canonical blocks b = 0, 1, 2, ... of 32 weights:

    acc = fma(float32(dot_b), float32(scale_b * d_x[b]), acc)
    Q4_K then also: acc = fma(-min_b, float32(d_x[b] * float32(sum_x[b])), acc)

    Q8_0, Q4_0   dot = sum q_w * q_x                        scale = d
    Q4_K         dot = sum q_w * q_x, 0 <= q_w <= 15        scale = d * sc_b, min = dmin * mn_b
    Q6_K         dot = sum over both 16s of sc * sum q_w * q_x,  -32 <= q_w <= 31,  scale = d

All dots are exact integers below 2**24 in magnitude, all scales exact products of a float16 and a
small integer. Float activations (float weights, and formats that are dequantised): four sums
over k mod 4, acc_p = fma(w[k], x[k], acc_p), combined (acc_0 + acc_1) + (acc_2 + acc_3).

Owns: this definition. Must not know: tiles or CPUs. It allocates freely and is slow.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu.activations import RECORD
from edgert.kernels_cpu.vmath import fma_ref
from edgert.quant.formats import QuantFormat
from edgert.quant.reference import dequantize_ref

__all__ = ["QUANTIZED_INPUT", "matmul_ref"]

QUANTIZED_INPUT = ("Q8_0", "Q4_0", "Q4_K", "Q6_K")
_F32 = npt.NDArray[np.float32]
_I32 = npt.NDArray[np.int32]
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
    q, scale, minimum = _SPLIT[fmt.name](raw)
    q_x, d_x = x["q"].astype(np.int64), x["d"]
    acc = np.zeros((len(x), len(raw)), np.float32)
    for b in range(q.shape[1]):
        dot = (q_x[:, b] @ q[:, b].T).astype(np.float32)
        acc = fma_ref(dot, scale[None, :, b] * d_x[:, b, None], acc)
        if minimum is not None:
            sums = q_x[:, b].sum(1).astype(np.float32)
            acc = fma_ref(-minimum[None, :, b], (d_x[:, b] * sums)[:, None], acc)
    return acc


_Split = tuple[npt.NDArray[np.int64], _F32, _F32 | None]  # q (M, B, 32), scale and min (M, B)


def _half(blocks: _U8, offset: int) -> _F32:
    return (
        np.ascontiguousarray(blocks[..., offset : offset + 2])
        .view(np.float16)[..., 0]
        .astype(np.float32)
    )


def _split_q8_0(raw: _U8) -> _Split:
    blocks = raw.reshape(len(raw), -1, 34)
    return blocks[..., 2:].view(np.int8).astype(np.int64), _half(blocks, 0), None


def _split_q4_0(raw: _U8) -> _Split:
    blocks = raw.reshape(len(raw), -1, 18)
    q = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    return q.astype(np.int64) - 8, _half(blocks, 0), None


def _split_q4_k(raw: _U8) -> _Split:
    blocks = raw.reshape(len(raw), -1, 144)
    s = blocks[..., 4:16].astype(np.int32)
    low, high, mixed = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    scale = np.concatenate([low & 63, (mixed & 15) | (low >> 6 << 4)], axis=-1)
    minimum = np.concatenate([high & 63, (mixed >> 4) | (high >> 6 << 4)], axis=-1)
    bytes_ = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    q = np.stack([bytes_ & 15, bytes_ >> 4], axis=-2)
    d, dmin = _half(blocks, 0)[..., None], _half(blocks, 2)[..., None]
    rows = len(raw)
    return (
        q.reshape(rows, -1, 32).astype(np.int64),
        (d * scale.astype(np.float32)).reshape(rows, -1),
        (dmin * minimum.astype(np.float32)).reshape(rows, -1),
    )


def _split_q6_k(raw: _U8) -> _Split:
    """The scales of the two halves of a block are multiplied into q: an integer all the same."""
    blocks = raw.reshape(len(raw), -1, 210)
    low = blocks[..., :128].reshape(*blocks.shape[:2], 2, 2, 32)
    high = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    nibbles = np.concatenate([low & 15, low >> 4], axis=-2)  # (M, S, half, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    q = (nibbles | ((high >> shifts & 3) << 4)).astype(np.int64) - 32
    scales = blocks[..., 192:208].view(np.int8).astype(np.int64).reshape(*q.shape[:-1], 2, 1)
    q = (q.reshape(*q.shape[:-1], 2, 16) * scales).reshape(len(raw), -1, 32)
    return q, np.repeat(_half(blocks, 208), 8, axis=1), None


_SPLIT = {"Q8_0": _split_q8_0, "Q4_0": _split_q4_0, "Q4_K": _split_q4_k, "Q6_K": _split_q6_k}
