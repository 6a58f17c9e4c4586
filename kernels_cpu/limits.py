"""What a machine can do at most: kernels that only read, only multiply integers, only floats.

Owns: the loops that other kernels' speeds are compared with, and their twins. All three are op
kernels (abi.py). A unit of `read_kernel` is `PIECE` bytes, a unit of the others `STEPS` operations
on each of several independent sums that stay in registers.

    variant        integer product                                 multiply-adds of one
    avx512-vnni    vpdpbusd                                        64
    avx2           vpmaddubsw, vpmaddwd: what a dot product needs  32
    portable       none: there is no instruction to compare with
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu import abi
from edgert.kernels_cpu.isa import AVX2, AVX512_VNNI, ISA
from edgert.kernels_cpu.jit import inline, kernel, void
from edgert.kernels_cpu.simd import (
    fma,
    ld_i64,
    llvm_op,
    loader,
    storer,
    vadd,
    vec,
    zero_i32x16,
)
from edgert.kernels_cpu.vectors import declare, operation
from edgert.kernels_cpu.vmath import fma_ref

__all__ = [
    "CHAINS", "DOT_MACS", "FLOAT_MACS", "LANES", "PIECE", "STEPS", "dot_peak_kernel",
    "dot_peak_ref", "float_peak_kernel", "float_peak_ref", "read_kernel", "read_ref",
]  # fmt: skip

PIECE = 65536  # bytes
STEPS = 1000
CHAINS = 12  # sums in registers: more than the latency of the longest step, fewer than registers
LANES = 8 if ISA is AVX2 else 16  # int32 lanes of a register
DOT_MACS = {"avx512-vnni": 64, "avx2": 32}.get(ISA.name, 0) * CHAINS * STEPS  # of a unit
FLOAT_MACS = ISA.lanes * CHAINS * STEPS

_I32 = vec("i32", LANES)
_F32 = vec("f32", ISA.lanes)
_ld_i32x16, _st_i32x16 = loader(vec("i32", 16)), storer(vec("i32", 16))
_ld_i, _st_i = loader(_I32), storer(_I32)
_ld_f, _st_f = loader(_F32), storer(_F32)
_I, _F = 4 * LANES, 4 * ISA.lanes  # bytes of a register
_Ints = npt.NDArray[np.int32]
_Floats = npt.NDArray[np.float32]
_ADDRESS, _SUMS = abi.arguments(2)


def _emit_pair_dots(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """Bytes of the first times signed bytes of the second, summed in pairs; those with int16."""
    i8, i16, i32 = (vec(elt, n).llvm for elt, n in (("i8", 32), ("i16", 16), ("i32", 8)))
    total, x, ones = args
    pairs = declare(builder, "llvm.x86.avx2.pmadd.ub.sw", i16, [i8, i8])
    fours = declare(builder, "llvm.x86.avx2.pmadd.wd", i32, [i16, i16])
    value = builder.call(pairs, [builder.bitcast(v, i8) for v in (total, x)])
    return builder.call(fours, [value, builder.bitcast(ones, i16)])


if ISA is AVX2:
    _dot = operation(_I32, (_I32,) * 3, _emit_pair_dots)
elif ISA is AVX512_VNNI:
    _dot = llvm_op("llvm.x86.avx512.vpdpbusd.512", _I32, _I32, _I32, _I32)
else:
    _dot = operation(_I32, (_I32,) * 3, lambda context, builder, sig, args: args[0])


def read_ref(data: npt.NDArray[np.uint8]) -> _Ints:
    """Wrapping sums of every 16th int32 of whole pieces: (n * PIECE,) uint8 -> (16,) int32."""
    sums: _Ints = data.view(np.int32).reshape(-1, 16).sum(axis=0, dtype=np.int32)
    return sums


@kernel(void("iiiii"))
def read_kernel(op: int, frame: int, start: int, stop: int, tid: int) -> None:
    """Add the int32 of pieces start..stop-1 of `address` to the 16 sums of the thread at `sums`."""
    a = b = c = d = zero_i32x16()
    address = ld_i64(op + _ADDRESS)
    for at in range(address + PIECE * start, address + PIECE * stop, 256):
        a = vadd(a, _ld_i32x16(at))
        b = vadd(b, _ld_i32x16(at + 64))
        c = vadd(c, _ld_i32x16(at + 128))
        d = vadd(d, _ld_i32x16(at + 192))
    sums = ld_i64(op + _SUMS) + 64 * tid
    _st_i32x16(sums, vadd(_ld_i32x16(sums), vadd(vadd(a, b), vadd(c, d))))


@inline
def _run_chains(
    step: Any, ld: Any, st: Any, nbytes: Any, op: Any, start: Any, stop: Any, tid: Any
) -> None:
    """STEPS times step(total, x, w) a unit on each of twelve sums in registers of `nbytes`."""
    at = ld_i64(op + _ADDRESS)
    a, b, c, d = ld(at), ld(at + nbytes), ld(at + 2 * nbytes), ld(at + 3 * nbytes)
    at += 4 * nbytes
    e, f, g, h = ld(at), ld(at + nbytes), ld(at + 2 * nbytes), ld(at + 3 * nbytes)
    at += 4 * nbytes
    i, j, k, m = ld(at), ld(at + nbytes), ld(at + 2 * nbytes), ld(at + 3 * nbytes)
    x, w = ld(at + 4 * nbytes), ld(at + 5 * nbytes)
    for _ in range(STEPS * (stop - start)):
        a, b, c, d = step(a, x, w), step(b, x, w), step(c, x, w), step(d, x, w)
        e, f, g, h = step(e, x, w), step(f, x, w), step(g, x, w), step(h, x, w)
        i, j, k, m = step(i, x, w), step(j, x, w), step(k, x, w), step(m, x, w)
    abcd, efgh = vadd(vadd(a, b), vadd(c, d)), vadd(vadd(e, f), vadd(g, h))
    total = vadd(vadd(abcd, efgh), vadd(vadd(i, j), vadd(k, m)))
    st(ld_i64(op + _SUMS) + nbytes * tid, total)


def dot_peak_ref(operands: _Ints, units: int) -> _Ints:
    """The wrapping sum of all chains after `units` units.

    Shapes: (CHAINS + 2, LANES) int32, where the chains start and both operands -> (LANES,) int32.
    """
    totals, (x, w) = operands[:CHAINS], operands[CHAINS:]
    if ISA is AVX512_VNNI:  # vpdpbusd(total, x, w): unsigned x, signed w
        products = x.view(np.uint8).astype(np.int32) * w.view(np.int8)
        fours = products.reshape(LANES, 4).sum(axis=1, dtype=np.int32)
        totals = totals + np.int32(units * STEPS) * fours
    for _ in range(units * STEPS if ISA is AVX2 else 0):
        products = totals.view(np.uint8).astype(np.int32) * x.view(np.int8)
        pairs = products.reshape(CHAINS, -1, 2).sum(axis=2).clip(-32768, 32767)
        fours = (pairs * w.view(np.int16)).reshape(CHAINS, -1, 2).sum(axis=2)
        totals = fours.astype(np.int32)
    total: _Ints = totals.sum(axis=0, dtype=np.int32)
    return total


@kernel(void("iiiii"))
def dot_peak_kernel(op: int, frame: int, start: int, stop: int, tid: int) -> None:
    """STEPS integer products a unit on each chain.

    `address`: the operands of `dot_peak_ref`; `sums`: LANES int32 for each thread, overwritten.
    """
    _run_chains(_dot, _ld_i, _st_i, _I, op, start, stop, tid)


def float_peak_ref(operands: _Floats, units: int) -> _Floats:
    """The sum of all chains after `units` units: (CHAINS + 2, ISA.lanes) float32 -> (ISA.lanes,).

    Every step of a chain is total * x + w, rounded once.
    """
    totals, (x, w) = operands[:CHAINS], operands[CHAINS:]
    for _ in range(units * STEPS):
        totals = fma_ref(totals, x, w)
    abcd, efgh, ijkm = ((p[0] + p[1]) + (p[2] + p[3]) for p in totals.reshape(3, 4, -1))
    total: _Floats = (abcd + efgh) + ijkm
    return total


@kernel(void("iiiii"))
def float_peak_kernel(op: int, frame: int, start: int, stop: int, tid: int) -> None:
    """STEPS fused multiply-adds a unit on each chain; arguments as in `dot_peak_kernel`."""
    _run_chains(fma, _ld_f, _st_f, _F, op, start, stop, tid)
