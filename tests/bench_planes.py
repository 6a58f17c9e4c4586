"""Measure kernels of planes and bases: python -m tests.bench_planes [NAME...]. A minute, alone.

Every figure is the median of interleaved rounds in one process, in bytes of weights:

    L2        GB/s of one thread over a matrix of 640 KiB, one token
    1, 2      share of the read limit that one and two threads reach from DRAM, one token
    x4, x8    time of 4 and 8 tokens together from DRAM on two threads, in times of one token
"""

from __future__ import annotations

import sys
import threading
import time
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu import layout
from edgert.kernels_cpu.activations import quantize
from edgert.kernels_cpu.isa import ISA
from edgert.kernels_cpu.jit import Kernel, kernel, void
from edgert.kernels_cpu.matmul import matmul_kernel
from edgert.kernels_cpu.matmul_planes import DIRECT, LOOKUP
from edgert.kernels_cpu.simd import loader, storer, vec, vxor
from edgert.quant.formats import BASES, BY_NAME, PLANES

K, ROUNDS, CHUNK = 4096, 7, 512  # tiles of a call: calls from Python cost 3 us
_L2, _DRAM = 5 << 17, 1 << 28
_ld, _st = loader(vec("i8", 64)), storer(vec("i8", 64))


@kernel(void("iii"))
def read_bytes(start: int, stop: int, out: int) -> None:
    """Read all of it: the limit of every matrix times one vector."""
    a, b, c, d = _ld(start), _ld(start), _ld(start), _ld(start)
    for p in range(start, stop - 511, 512):
        a, b = vxor(vxor(a, _ld(p)), _ld(p + 256)), vxor(vxor(b, _ld(p + 64)), _ld(p + 320))
        c, d = vxor(vxor(c, _ld(p + 128)), _ld(p + 384)), vxor(vxor(d, _ld(p + 192)), _ld(p + 448))
    _st(out, vxor(vxor(a, b), vxor(c, d)))


def aligned(nbytes: int) -> npt.NDArray[np.uint8]:
    whole = np.ones(nbytes + 64, np.uint8)
    start = -whole.ctypes.data % 64
    return whole[start : start + nbytes]


WEIGHTS, Y, INDEX = aligned(_DRAM), aligned(4 * 8 * _DRAM // 256), np.arange(8)
X = quantize(np.random.default_rng(0).standard_normal((8, K)).astype(np.float32))


def run(call: Kernel, tile_bytes: int, nbytes: int, tokens: int, threads: int) -> float:
    """Seconds for `tokens` tokens times a matrix of `nbytes`, in chunks of `CHUNK` tiles."""
    tiles = nbytes // tile_bytes
    starts = iter(range(0, tiles, CHUNK))
    taking = threading.Lock()

    def work() -> None:
        while True:
            with taking:
                start = next(starts, None)
            if start is None:
                return
            call(
                WEIGHTS.ctypes.data, X.ctypes.data, X.strides[0], Y.ctypes.data, Y.nbytes // 8, K,
                start, min(start + CHUNK, tiles), tokens, INDEX.ctypes.data, INDEX.ctypes.data,
                0, 0,
            )  # fmt: skip

    return together(work, threads)


def together(work: Any, threads: int) -> float:
    team = [threading.Thread(target=work) for _ in range(threads - 1)]
    begin = time.perf_counter()
    for thread in team:
        thread.start()
    work()
    for thread in team:
        thread.join()
    return time.perf_counter() - begin


def read_limit(threads: int) -> float:
    """Seconds to read what `run` reads."""
    starts = iter(range(0, _DRAM, 1 << 20))
    taking, base = threading.Lock(), WEIGHTS.ctypes.data

    def work() -> None:
        out = np.zeros(64, np.uint8)
        while True:
            with taking:
                start = next(starts, None)
            if start is None:
                return
            read_bytes(base + start, base + start + (1 << 20), out.ctypes.data)

    return together(work, threads)


def cases(names: list[str]) -> dict[str, tuple[Kernel, int]]:
    """Name -> kernel and bytes of a tile."""
    found = {"Q4_0": (matmul_kernel(BY_NAME["Q4_0"]), layout.tile_bytes(BY_NAME["Q4_0"], K))}
    for form, kernels in (("direct", DIRECT), ("lookup", LOOKUP)):
        for name, call in kernels.items():
            found[f"{name} {form}"] = (call, layout.tile_bytes(PLANES[name], K))
    for fmt in (base for bases in BASES.values() for base in bases.values()):
        found[fmt.name] = (matmul_kernel(fmt), layout.tile_bytes(fmt, K))
    return {name: case for name, case in found.items() if not names or name.split()[0] in names}


def main() -> None:
    rows = cases(sys.argv[1:])
    for call, _ in rows.values():
        call.compile()
    read_bytes.compile()
    if sys.argv[1:] == ["compile"]:
        return
    seen: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        limits = {threads: read_limit(threads) / _DRAM for threads in (1, 2)}
        for threads, seconds in limits.items():
            seen.setdefault(("limit", str(threads)), []).append(1e-9 / seconds)
        for name, (call, tile) in rows.items():
            inside = _L2 // tile * tile
            whole = _DRAM // tile * tile
            l2 = median(run(call, tile, inside, 1, 1) for _ in range(15))
            times = {n: run(call, tile, whole, n, 2) for n in (1, 4, 8)}
            alone = run(call, tile, whole, 1, 1)
            for column, value in (
                ("L2", inside / l2 * 1e-9), ("1", limits[1] * whole / alone),
                ("2", limits[2] * whole / times[1]), ("x4", times[4] / times[1]),
                ("x8", times[8] / times[1]),
            ):  # fmt: skip
                seen.setdefault((name, column), []).append(value)
    limit = [median(seen["limit", threads]) for threads in "12"]
    print(f"{ISA.name}; read limit {limit[0]:.1f} GB/s with 1 thread, {limit[1]:.1f} with 2")
    print("| kernel | L2 | 1 | 2 | x4 | x8 |\n| --- | --- | --- | --- | --- | --- |")
    for name in rows:
        l2, one, two, four, eight = (median(seen[name, c]) for c in ("L2", "1", "2", "x4", "x8"))
        print(f"| {name} | {l2:.1f} | {one:.2f} | {two:.2f} | {four:.2f} | {eight:.2f} |")


if __name__ == "__main__":
    main()
