"""The loops that kernels are compared with compute what their twins say."""

from __future__ import annotations

import numpy as np
import pytest

from edgert.kernels_cpu import limits
from edgert.kernels_cpu.abi import run_op
from edgert.kernels_cpu.isa import ISA


def test_every_byte_is_read_once(rng: np.random.Generator) -> None:
    data = rng.integers(0, 256, 3 * limits.PIECE, dtype=np.uint8)
    sums = np.ones(16, np.int32)
    run_op(limits.read_kernel, [data.ctypes.data, sums.ctypes.data], 3, order=[(1, 3), (0, 1)])
    assert (sums == 1 + limits.read_ref(data)).all()


@pytest.mark.skipif(not limits.DOT_MACS, reason="this CPU has no integer dot product")
def test_the_integer_peak_is_no_empty_loop(rng: np.random.Generator) -> None:
    shape = (limits.CHAINS + 2, limits.LANES)
    operands = rng.integers(-(2**31), 2**31, shape, dtype=np.int32)
    sums = np.zeros(limits.LANES, np.int32)
    run_op(limits.dot_peak_kernel, [operands.ctypes.data, sums.ctypes.data], 2)
    assert (sums == limits.dot_peak_ref(operands, 2)).all() and sums.any()


def test_the_float_peak_is_no_empty_loop(rng: np.random.Generator) -> None:
    operands = rng.standard_normal((limits.CHAINS + 2, ISA.lanes)).astype(np.float32)
    operands[limits.CHAINS] = 0.999
    sums = np.zeros(ISA.lanes, np.float32)
    run_op(limits.float_peak_kernel, [operands.ctypes.data, sums.ctypes.data], 1)
    assert (sums == limits.float_peak_ref(operands, 1)).all() and np.isfinite(sums).all()
