"""Compiled kernels for CPUs, each with its NumPy twin; README.md is the guide.

`matmul_kernel(format)` and `tile_bytes(format, K)` are what a planner and an executor need;
importing this package imports Numba, compiling waits until a kernel is first used.
"""

from edgert.kernels_cpu.activations import activation_bytes
from edgert.kernels_cpu.isa import ISA
from edgert.kernels_cpu.jit import Kernel, cache_folder
from edgert.kernels_cpu.layout import TILE_ROWS, matrix_bytes, repack, tile_bytes, tile_count
from edgert.kernels_cpu.matmul import describe, matmul_kernel, takes_quantized_input, warm_up

__all__ = [
    "ISA", "Kernel", "TILE_ROWS", "activation_bytes", "cache_folder", "describe", "matmul_kernel",
    "matrix_bytes", "repack", "takes_quantized_input", "tile_bytes", "tile_count", "warm_up",
]  # fmt: skip
