"""How far two arrays of numbers are apart, each measure with its formula.

Owns: the error metrics that tests and tools state their tolerances in. Must not know formats.
All sums are float64, and a shape that does not match is an error, not a broadcast.
"""

from __future__ import annotations

import numpy as np

from edgert.quant.packing import Array

__all__ = ["max_abs_error", "relative_rms", "rms_error"]


def rms_error(a: Array, b: Array) -> float:
    """sqrt(mean((a - b)^2)), in the unit of the arrays; NaN if a difference is NaN."""
    return float(np.sqrt(np.mean(np.square(_difference(a, b)))))


def relative_rms(a: Array, b: Array) -> float:
    """rms_error(a, b) / sqrt(mean(b^2)): the error of `a` as a share of the reference `b`.

    0 when both are zero everywhere, infinite when only `b` is.
    """
    error = rms_error(a, b)
    size = float(np.sqrt(np.mean(np.square(b.astype(np.float64)))))
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return error / size


def max_abs_error(a: Array, b: Array) -> float:
    """max(|a - b|), in the unit of the arrays; NaN if a difference is NaN."""
    return float(np.max(np.abs(_difference(a, b))))


def _difference(a: Array, b: Array) -> Array:
    assert a.shape == b.shape and a.size, (a.shape, b.shape)
    return a.astype(np.float64) - b.astype(np.float64)
