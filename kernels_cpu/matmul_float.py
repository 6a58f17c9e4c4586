"""F32, F16 and BF16 weights times float32 activations.

    acc_p = fma(w[k], x[k], acc_p) for k = p, p + 4, p + 8, ...
    y = (acc_0 + acc_1) + (acc_2 + acc_3)

Four sums, because one chain of fused multiply-adds would wait for its own latency. Halves become
float32 exactly. Any K. Owns: the inner loop over one tile. Must not know: how tokens are found.
"""

from __future__ import annotations

from typing import Any

from edgert.kernels_cpu.jit import Kernel, inline, kernel
from edgert.kernels_cpu.lanes import LANES, prefetch_lines
from edgert.kernels_cpu.matmul_drive import MATMUL, drive, up_to_four
from edgert.kernels_cpu.packs import (
    accumulators,
    add_floats,
    bfloats,
    floats,
    fma_values,
    halves,
    step,
)

__all__ = ["KERNELS"]

_prefetch_2, _prefetch_4 = prefetch_lines(2), prefetch_lines(4)


@inline
def _sums(load: Any, prefetch: Any, size: Any, p: Any, part: Any, K: Any, xs: Any) -> Any:
    """The body for weights of `size` bytes that `load` turns into float32."""
    s0, s1, s2, s3 = accumulators(xs), accumulators(xs), accumulators(xs), accumulators(xs)
    p += size * LANES * part
    unit = 16 * size
    for _ in range(K // 4):
        prefetch(p)
        s0 = fma_values(s0, load(s0, p), xs, 0)
        s1 = fma_values(s1, load(s0, p + unit), xs, 4)
        s2 = fma_values(s2, load(s0, p + 2 * unit), xs, 8)
        s3 = fma_values(s3, load(s0, p + 3 * unit), xs, 12)
        p += 4 * unit
        xs = step(xs, 16)
    if K % 4 > 0:
        s0 = fma_values(s0, load(s0, p), xs, 0)
    if K % 4 > 1:
        s1 = fma_values(s1, load(s0, p + unit), xs, 4)
    if K % 4 > 2:
        s2 = fma_values(s2, load(s0, p + 2 * unit), xs, 8)
    return add_floats(add_floats(s0, s1), add_floats(s2, s3))


@inline
def _f32(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _sums(floats, _prefetch_4, 4, p, part, K, xs)


@inline
def _f16(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _sums(halves, _prefetch_2, 2, p, part, K, xs)


@inline
def _bf16(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _sums(bfloats, _prefetch_2, 2, p, part, K, xs)


@kernel(MATMUL)
def _matmul_f32_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_four, _f32, 64 * K, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_f16_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_four, _f16, 32 * K, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_bf16_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        up_to_four, _bf16, 32 * K, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


KERNELS: dict[str, Kernel] = {
    "F32": _matmul_f32_kernel,
    "F16": _matmul_f16_kernel,
    "BF16": _matmul_bf16_kernel,
}
