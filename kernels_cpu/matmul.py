"""Matrix times activations for every format: which kernel, and a checked call for single use.

Owns: the choice, made once from the format. The arithmetic is defined in `matmul_ref`, the
signature in `matmul_drive`, the weight layout in `layout`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError, UnsupportedError
from edgert.kernels_cpu import (
    activations,
    matmul_base,
    matmul_base_k,
    matmul_block32,
    matmul_float,
    matmul_k16,
    matmul_k32,
    matmul_planes,
    matmul_refined,
)
from edgert.kernels_cpu.compiler import target_key
from edgert.kernels_cpu.isa import ISA
from edgert.kernels_cpu.jit import Kernel, cache_folder
from edgert.kernels_cpu.layout import TILE_ROWS, matrix_bytes, tile_count
from edgert.kernels_cpu.matmul_ref import QUANTIZED_INPUT, matmul_ref
from edgert.kernels_cpu.repack import repack_blocks
from edgert.quant.formats import QuantFormat

__all__ = [
    "describe", "matmul", "matmul_kernel", "matmul_ref", "takes_parts", "takes_quantized_input",
    "warm_up",
]  # fmt: skip

_KERNELS: dict[str, Kernel] = {
    **matmul_float.KERNELS,
    **matmul_block32.KERNELS,
    **matmul_k16.KERNELS,
    **matmul_k32.KERNELS,
    **matmul_planes.KERNELS,
    **matmul_base.KERNELS,
    **matmul_base_k.KERNELS,
}
_REFINED = {("Q8_0", *split): found for split, found in matmul_refined.KERNELS.items()}
_F32 = npt.NDArray[np.float32]
_U8 = npt.NDArray[np.uint8]


def matmul_kernel(fmt: QuantFormat, split: Sequence[int] = ()) -> Kernel:
    """The kernel for weights of `fmt`; its signature is in `matmul_drive`.

    With `split` for weights that lie in a base and parts of so many bits (`matmul_refined`).
    """
    found = _REFINED.get((fmt.name, *split)) if split else _KERNELS.get(fmt.name)
    if found is None:
        what = f"{fmt.name} in parts of {'+'.join(map(str, split))} bits" if split else fmt.name
        raise UnsupportedError(f"no matmul kernel for {what}; there are {' '.join(_KERNELS)}")
    return found


def takes_parts(fmt: QuantFormat, split: Sequence[int]) -> bool:
    """True when there is a kernel for weights of `fmt` in a base and parts of so many bits."""
    return (fmt.name, *split) in _REFINED


def takes_quantized_input(fmt: QuantFormat) -> bool:
    """True when the activations must be quantised rows (`activations`), False for float32."""
    return fmt.name in QUANTIZED_INPUT


def matmul(
    fmt: QuantFormat,
    tiles: _U8,
    x: npt.NDArray[np.generic],
    rows: int,
    *,
    bias: _F32 | None = None,
    residual: _F32 | None = None,
) -> _F32:
    """As `matmul_ref`, compiled, from a matrix of `rows` rows in tiles.

    Shapes: tiles uint8[matrix_bytes], x (T, K) float32, quantised here where the format wants it,
    or (T, K / 32 * 44) uint8 quantised rows -> (T, rows) float32. Raises InputError on mismatch.
    """
    K = _check_input(fmt, tiles, x, rows)
    if takes_quantized_input(fmt) and x.dtype == np.float32:
        x = activations.quantize(x.astype(np.float32, copy=False))
    T, padded = len(x), tile_count(rows) * TILE_ROWS
    for name, array, shape in (("bias", bias, (rows,)), ("residual", residual, (T, rows))):
        if array is not None and (array.shape != shape or array.dtype != np.float32):
            raise InputError(f"{name} must be float32 {list(shape)}, not {list(array.shape)}")
    y = np.zeros((T, padded), np.float32)
    if residual is not None:
        y[:, :rows] = residual
    biases = np.zeros(padded, np.float32)
    if bias is not None:
        biases[:rows] = bias
    index = np.arange(T, dtype=np.int64)
    matmul_kernel(fmt)(
        tiles.ctypes.data, x.ctypes.data, x.strides[0], y.ctypes.data, y.strides[0], K,
        0, tile_count(rows), T, index.ctypes.data, index.ctypes.data,
        int(residual is not None), 0 if bias is None else biases.ctypes.data,
    )  # fmt: skip
    return np.ascontiguousarray(y[:, :rows])


def _check_input(fmt: QuantFormat, tiles: _U8, x: npt.NDArray[np.generic], rows: int) -> int:
    """K of a matmul whose arguments fit each other."""
    quantised = x.dtype == np.uint8 and takes_quantized_input(fmt)
    if x.ndim != 2 or not x.flags.c_contiguous or not (x.dtype == np.float32 or quantised):
        raise InputError(f"{fmt.name}: x must be contiguous rows, not {x.dtype} {list(x.shape)}")
    K: int = x.shape[1]
    if quantised:
        K = K // activations.BLOCK_BYTES * activations.BLOCK
    if rows < 1 or K < 1 or K % fmt.block_size:
        raise InputError(f"{fmt.name}: {rows} rows of {K} weights in blocks of {fmt.block_size}")
    expected = matrix_bytes(fmt, rows, K)
    if tiles.dtype != np.uint8 or not tiles.flags.c_contiguous or tiles.nbytes != expected:
        raise InputError(
            f"{fmt.name} [{rows}, {K}]: tiles must be {expected:,} contiguous bytes, "
            f"not {tiles.dtype} {list(tiles.shape)}"
        )
    return K


def warm_up(formats: Iterable[QuantFormat]) -> Iterator[str]:
    """Compile, or load from the cache, what matrices of `formats` need; yields each name done."""
    wanted: list[Kernel] = []
    for fmt in formats:
        wanted.append(repack_blocks)
        if takes_quantized_input(fmt):
            wanted.append(activations.quantize_rows)
        wanted.append(matmul_kernel(fmt))
    for kernel in dict.fromkeys(wanted):
        kernel.compile()
        yield kernel.name


def describe() -> dict[str, str]:
    """What was chosen on this machine, for a person to read."""
    triple, cpu, _ = target_key()
    return {
        "instruction_set": ISA.name,
        "cpu": cpu,
        "target": triple,
        "float_lanes_in_batches": str(ISA.lanes),
        "kernel_cache": str(cache_folder()),
    }
