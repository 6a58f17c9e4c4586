"""F32, F16 and BF16 weights times float32 activations.

    acc_p = fma(w[k], x[k], acc_p) for k = p, p + 4, p + 8, ...
    y = (acc_0 + acc_1) + (acc_2 + acc_3)

Four sums, because one chain of fused multiply-adds would wait for its own latency. Halves become
float32 exactly. Owns: the inner loops over one tile for one token (16 rows wide) and for two
tokens (`LANES` rows wide: eight accumulators). Any K. Must not know: how tokens are found.
"""

from __future__ import annotations

from typing import Any

from edgert.kernels_cpu.jit import Kernel, inline, kernel
from edgert.kernels_cpu.lanes import (
    LANES,
    bc16,
    bcL,
    ld16,
    ld_bf16L,
    ld_f16_16,
    ld_f16L,
    ldL,
    zero16,
    zeroL,
)
from edgert.kernels_cpu.matmul_drive import MATMUL, drive
from edgert.kernels_cpu.simd import fma, ld_bf16x16, vadd

__all__ = ["KERNELS"]


@inline
def _tile1(load: Any, step: Any, p: Any, K: Any, a: Any) -> Any:
    s0, s1, s2, s3 = zero16(), zero16(), zero16(), zero16()
    for _ in range(K // 4):
        s0 = fma(load(p), bc16(a), s0)
        s1 = fma(load(p + step), bc16(a + 4), s1)
        s2 = fma(load(p + 2 * step), bc16(a + 8), s2)
        s3 = fma(load(p + 3 * step), bc16(a + 12), s3)
        p += 4 * step
        a += 16
    if K % 4 > 0:
        s0 = fma(load(p), bc16(a), s0)
    if K % 4 > 1:
        s1 = fma(load(p + step), bc16(a + 4), s1)
    if K % 4 > 2:
        s2 = fma(load(p + 2 * step), bc16(a + 8), s2)
    return vadd(vadd(s0, s1), vadd(s2, s3))


@inline
def _tile2(load: Any, step: Any, p: Any, K: Any, a: Any, b: Any) -> Any:
    s0, s1, s2, s3 = zeroL(), zeroL(), zeroL(), zeroL()
    t0, t1, t2, t3 = zeroL(), zeroL(), zeroL(), zeroL()
    for _ in range(K // 4):
        w = load(p)
        s0, t0 = fma(w, bcL(a), s0), fma(w, bcL(b), t0)
        w = load(p + step)
        s1, t1 = fma(w, bcL(a + 4), s1), fma(w, bcL(b + 4), t1)
        w = load(p + 2 * step)
        s2, t2 = fma(w, bcL(a + 8), s2), fma(w, bcL(b + 8), t2)
        w = load(p + 3 * step)
        s3, t3 = fma(w, bcL(a + 12), s3), fma(w, bcL(b + 12), t3)
        p += 4 * step
        a += 16
        b += 16
    if K % 4 > 0:
        s0, t0 = fma(load(p), bcL(a), s0), fma(load(p), bcL(b), t0)
    if K % 4 > 1:
        w = load(p + step)
        s1, t1 = fma(w, bcL(a + 4), s1), fma(w, bcL(b + 4), t1)
    if K % 4 > 2:
        w = load(p + 2 * step)
        s2, t2 = fma(w, bcL(a + 8), s2), fma(w, bcL(b + 8), t2)
    return vadd(vadd(s0, s1), vadd(s2, s3)), vadd(vadd(t0, t1), vadd(t2, t3))


@inline
def _f32_16(p: Any) -> Any:
    return ld16(p)


@inline
def _f32_L(p: Any) -> Any:
    return ldL(p)


@inline
def _f16_16(p: Any) -> Any:
    return ld_f16_16(p)


@inline
def _f16_L(p: Any) -> Any:
    return ld_f16L(p)


@inline
def _bf16_16(p: Any) -> Any:
    return ld_bf16x16(p)


@inline
def _bf16_L(p: Any) -> Any:
    return ld_bf16L(p)


@inline
def _tile4(
    load: Any, size: Any, p: Any, part: Any, K: Any, a0: Any, a1: Any, a2: Any, a3: Any
) -> Any:
    p += size * LANES * part
    r0, r1 = _tile2(load, 16 * size, p, K, a0, a1)
    r2, r3 = _tile2(load, 16 * size, p, K, a2, a3)
    return r0, r1, r2, r3


@inline
def _f32_tile1(p: Any, K: Any, a: Any) -> Any:
    return _tile1(_f32_16, 64, p, K, a)


@inline
def _f32_tile4(p: Any, part: Any, K: Any, a0: Any, a1: Any, a2: Any, a3: Any) -> Any:
    return _tile4(_f32_L, 4, p, part, K, a0, a1, a2, a3)


@inline
def _f16_tile1(p: Any, K: Any, a: Any) -> Any:
    return _tile1(_f16_16, 32, p, K, a)


@inline
def _f16_tile4(p: Any, part: Any, K: Any, a0: Any, a1: Any, a2: Any, a3: Any) -> Any:
    return _tile4(_f16_L, 2, p, part, K, a0, a1, a2, a3)


@inline
def _bf16_tile1(p: Any, K: Any, a: Any) -> Any:
    return _tile1(_bf16_16, 32, p, K, a)


@inline
def _bf16_tile4(p: Any, part: Any, K: Any, a0: Any, a1: Any, a2: Any, a3: Any) -> Any:
    return _tile4(_bf16_L, 2, p, part, K, a0, a1, a2, a3)


@kernel(MATMUL)
def _matmul_f32_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        _f32_tile1, _f32_tile4, 64 * K, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_f16_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        _f16_tile1, _f16_tile4, 32 * K, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_bf16_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive(
        _bf16_tile1, _bf16_tile4, 32 * K, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


KERNELS: dict[str, Kernel] = {
    "F32": _matmul_f32_kernel,
    "F16": _matmul_f16_kernel,
    "BF16": _matmul_bf16_kernel,
}
