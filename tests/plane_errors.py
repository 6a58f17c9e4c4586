"""Print how far plane formats are from a model's weights: python -m tests.plane_errors FILE."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgert.kernels_cpu.plane_fit import quantize_planes
from edgert.models.reference import load_reference_weights
from edgert.quant.formats import BASES, FORMATS, PLANES, PlaneFormat, QuantFormat
from edgert.quant.packing import Array
from edgert.quant.planes import dequantize_stack_ref
from edgert.quant.quantize import quantize_ref
from edgert.quant.reference import dequantize_ref
from edgert.storage.gguf import read_gguf


def matrices(path: Path) -> list[Array]:
    """The weight matrices of a GGUF file as float32 [rows, n]."""
    manifest, raw = read_gguf(path), path.read_bytes()
    weights = load_reference_weights(
        manifest, lambda extent: raw[extent.offset : extent.offset + extent.nbytes]
    )
    return [w.reshape(-1, w.shape[-1]) for w in weights.values() if w.ndim >= 2]


def nearest(fmt: PlaneFormat, w: Array) -> Array:
    """Round to nearest over each group's range."""
    return dequantize_ref(fmt, quantize_planes(fmt, w, refine=False))


def refined(fmt: PlaneFormat, w: Array) -> Array:
    """Least squares."""
    return dequantize_ref(fmt, quantize_planes(fmt, w))


def stacked(formats: list[PlaneFormat], w: Array) -> Array:
    """Each of `formats` quantises what the ones before it left over (`quantize_stack`)."""
    stack, left = list[Array](), w
    for fmt in formats:
        stack.append(quantize_planes(fmt, left))
        left = left - dequantize_ref(fmt, stack[-1])
    return dequantize_stack_ref(formats, stack)


def greedy(fmt: PlaneFormat, w: Array) -> Array:
    """A stack of one-bit matrices, as many as `fmt` has bits."""
    formats = [PLANES[f"P1_{fmt.block_size}"]] * fmt.bits
    return stacked(formats, w)


def one_more(fmt: PlaneFormat, w: Array) -> Array:
    """A refined matrix of one bit less and a one-bit matrix of what is left."""
    if fmt.bits == 1:
        return refined(fmt, w)
    formats = [PLANES[f"P{fmt.bits - 1}_{fmt.block_size}"], PLANES[f"P1_{fmt.block_size}"]]
    return stacked(formats, w)


METHODS: tuple[Callable[[PlaneFormat, Array], Array], ...] = (nearest, refined, greedy, one_more)


def error(fmt: QuantFormat, weights: list[Array], method: Callable[..., Array]) -> float:
    """Relative RMS error over the matrices whose rows are whole groups, in percent; NaN if none."""
    fitting = [w for w in weights if w.shape[-1] % fmt.block_size == 0]
    if not fitting:
        return float("nan")
    size, squares = 0.0, 0.0
    for w in fitting:
        size += float(np.square(w, dtype=np.float64).sum())
        squares += float(np.square(method(fmt, w) - w, dtype=np.float64).sum())
    return 100 * (squares / size) ** 0.5


def main() -> None:
    weights = matrices(Path(sys.argv[1]))
    print("| format | bits per weight | nearest | refined | greedy stack | one plane apart |")
    print("| --- | --- | --- | --- | --- | --- |")
    for fmt in PLANES.values():
        errors = " | ".join(f"{error(fmt, weights, method):.2f} %" for method in METHODS)
        print(f"| {fmt.name} | {fmt.bits_per_weight} | {errors} |")
    for name in (
        "Q4_0",
        "Q4_1",
        *(base.name for bases in BASES.values() for base in bases.values()),
    ):
        e = error(FORMATS[name], weights, lambda f, w: dequantize_ref(f, quantize_ref(f, w)))
        print(f"| {name} | {FORMATS[name].bits_per_weight} | {e:.2f} % | | | |")


if __name__ == "__main__":
    main()
