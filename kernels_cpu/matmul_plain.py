"""The other formats times float32 activations: blocks are dequantised, then multiplied as floats.

    w[k] = the format's own float32 value (`edgert.quant.reference`), equal to the bit
    acc_p = fma(w[k], x[k], acc_p) for k = p, p + 4, ...;  y = (acc_0 + acc_1) + (acc_2 + acc_3)

One block of 16 rows is dequantised to the stack as [weight][16 rows] and used for up to 16 tokens.
Owns: the loop over blocks and tokens. How a block is read: `dequantize_simple`, `dequantize_k`.
Must not know: how tokens are found.
"""

from __future__ import annotations

from typing import Any

from edgert.kernels_cpu.dequantize_k import iq4_xs, q2_k, q3_k, q5_k
from edgert.kernels_cpu.dequantize_simple import iq4_nl, mxfp4, q4_1, q5_0, q5_1
from edgert.kernels_cpu.jit import Kernel, inline, kernel
from edgert.kernels_cpu.lanes import bc16, ld16, st16, zero16
from edgert.kernels_cpu.matmul_drive import MATMUL, finish16
from edgert.kernels_cpu.simd import fma, ld_i64, stack_buffer, vadd

__all__ = ["KERNELS"]

_TOKENS = 16  # that share one dequantised block; their four sums take 4 KiB of stack
_weights_buffer = stack_buffer(256 * 64)
_sums_buffer = stack_buffer(_TOKENS * 256)


@inline
def _add_block(w: Any, count: Any, a: Any, sums: Any) -> None:
    """`count` weights of 16 rows at `w`, a multiple of 4, times x at `a`, into four sums."""
    s0, s1, s2, s3 = ld16(sums), ld16(sums + 64), ld16(sums + 128), ld16(sums + 192)
    for _ in range(count // 4):
        s0 = fma(ld16(w), bc16(a), s0)
        s1 = fma(ld16(w + 64), bc16(a + 4), s1)
        s2 = fma(ld16(w + 128), bc16(a + 8), s2)
        s3 = fma(ld16(w + 192), bc16(a + 12), s3)
        w += 256
        a += 16
    st16(sums, s0)
    st16(sums + 64, s1)
    st16(sums + 128, s2)
    st16(sums + 192, s3)


@inline
def _run(
    dequantize: Any, block: Any, block_bytes: Any, w: Any, x: Any, x_stride: Any, y: Any,
    y_stride: Any, K: Any, tile_start: Any, tile_stop: Any, n: Any, xi: Any, yi: Any, mode: Any,
    bias: Any,
) -> None:  # fmt: skip
    weights, sums = _weights_buffer(), _sums_buffer()
    blocks = K // block
    for tile in range(tile_start, tile_stop):
        for first in range(0, n, _TOKENS):
            tokens = min(_TOKENS, n - first)
            for i in range(4 * tokens):
                st16(sums + 64 * i, zero16())
            for b in range(blocks):
                dequantize(w + (tile * blocks + b) * (16 * block_bytes), weights)
                for t in range(tokens):
                    a = x + ld_i64(xi + 8 * (first + t)) * x_stride + 4 * block * b
                    _add_block(weights, block, a, sums + 256 * t)
            for t in range(tokens):
                s = sums + 256 * t
                acc = vadd(vadd(ld16(s), ld16(s + 64)), vadd(ld16(s + 128), ld16(s + 192)))
                at = y + ld_i64(yi + 8 * (first + t)) * y_stride + 64 * tile
                finish16(at, acc, mode, bias + 64 * tile if bias != 0 else bias)


@kernel(MATMUL)
def _matmul_q4_1_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    _run(
        q4_1, 32, 20, w, x, x_stride, y, y_stride, K, tile_start, tile_stop, n, xi, yi, mode,
        bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_q5_0_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    _run(
        q5_0, 32, 22, w, x, x_stride, y, y_stride, K, tile_start, tile_stop, n, xi, yi, mode,
        bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_q5_1_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    _run(
        q5_1, 32, 24, w, x, x_stride, y, y_stride, K, tile_start, tile_stop, n, xi, yi, mode,
        bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_q2_k_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    _run(
        q2_k, 256, 84, w, x, x_stride, y, y_stride, K, tile_start, tile_stop, n, xi, yi, mode,
        bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_q3_k_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    _run(
        q3_k, 256, 110, w, x, x_stride, y, y_stride, K, tile_start, tile_stop, n, xi, yi, mode,
        bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_q5_k_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    _run(
        q5_k, 256, 176, w, x, x_stride, y, y_stride, K, tile_start, tile_stop, n, xi, yi, mode,
        bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_iq4_nl_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    _run(
        iq4_nl, 32, 18, w, x, x_stride, y, y_stride, K, tile_start, tile_stop, n, xi, yi, mode,
        bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_iq4_xs_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    _run(
        iq4_xs, 256, 136, w, x, x_stride, y, y_stride, K, tile_start, tile_stop, n, xi, yi, mode,
        bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_mxfp4_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    _run(
        mxfp4, 32, 17, w, x, x_stride, y, y_stride, K, tile_start, tile_stop, n, xi, yi, mode,
        bias,
    )  # fmt: skip


KERNELS: dict[str, Kernel] = {
    "Q4_1": _matmul_q4_1_kernel,
    "Q5_0": _matmul_q5_0_kernel,
    "Q5_1": _matmul_q5_1_kernel,
    "Q2_K": _matmul_q2_k_kernel,
    "Q3_K": _matmul_q3_k_kernel,
    "Q5_K": _matmul_q5_k_kernel,
    "IQ4_NL": _matmul_iq4_nl_kernel,
    "IQ4_XS": _matmul_iq4_xs_kernel,
    "MXFP4": _matmul_mxfp4_kernel,
}
