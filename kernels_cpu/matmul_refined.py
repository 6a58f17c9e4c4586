"""Q8_0 in parts times quantised activations: a base that stays in memory and the parts beside it.

    y as of Q8_0 (`matmul_block32`), to the bit: the fields of all parts are put together to codes
    in registers, and what follows is its arithmetic

Putting the parts together in memory first takes as long as multiplying: it writes a byte a weight
and the product reads it again. Here the base is read as a draft reads it, and the other parts as
they came from the file.

`w` is the address of int64[1 + other parts]: where the base's first tile lies, and each other
part's. Owns: the loop over one tile, for a pack of tokens (`packs`). Must not know: how tokens are
found or results stored (`matmul_drive`), nor who reads the parts. Layout of parts: `places`.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from edgert.kernels_cpu import dots
from edgert.kernels_cpu.activations import BLOCK_BYTES
from edgert.kernels_cpu.compiler import intrinsic, ir, types
from edgert.kernels_cpu.jit import Kernel, inline, kernel
from edgert.kernels_cpu.lanes import LANES, TILE_ROWS, shift_bytes
from edgert.kernels_cpu.matmul_drive import MATMUL, drive_from, up_to_most
from edgert.kernels_cpu.packs import Pack, accumulators, fma_totals, halves, signed_totals, step
from edgert.kernels_cpu.places import FIELDS
from edgert.kernels_cpu.vectors import I32, LLVM, constant, emit_prefetch, load, splat, vec
from edgert.quant.formats import BY_NAME, part_block_bytes

__all__ = ["KERNELS"]

_I64 = LLVM["i64"]
_SCALES = 2 * TILE_ROWS  # bytes of a block before the first part's units
_AHEAD = 4096  # bytes, as in `lanes`


class _Split:
    """The operations on a tile in parts of so many bits; its address is a `Pack` of the parts'.

    tile(w, number, blocks) -> p         the parts of tile `number` of those at `w`
    ask(p, block)                        for the same block some way ahead, of every part
    dot(totals, p, block, part, xs)      totals plus the 32 products of each row
    """

    def __init__(self, *bits: int) -> None:
        lows = [8 - end for end in accumulate(bits)]
        q8_0 = BY_NAME["Q8_0"]
        self.block_bytes = [
            TILE_ROWS * part_block_bytes(q8_0, n, is_first=not i) for i, n in enumerate(bits)
        ]
        self.address = Pack(types.int64, len(bits))
        # (part, width, lowest bit in the code, where its first unit lies in a block)
        self.fields: list[tuple[int, int, int, int]] = []
        for i, (n, low) in enumerate(zip(bits, lows, strict=True)):
            at = 0 if i else _SCALES
            for width, low_in_part in FIELDS[n]:
                self.fields.append((i, width, low + low_in_part, at))
                at += 4 * TILE_ROWS * width
        self.tile, self.ask, self.dot = self._tile(), self._ask(), self._dot()

    def _tile(self) -> Any:
        def emit(context: Any, b: Any, sig: Any, args: Any) -> Any:
            w, number, blocks = args
            before = b.mul(number, blocks)
            parts = ir.Constant(context.get_value_type(self.address), ir.Undefined)
            for i, nbytes in enumerate(self.block_bytes):
                first = load(b, b.add(w, _I64(8 * i)), _I64)
                parts = b.insert_value(parts, b.add(first, b.mul(before, _I64(nbytes))), i)
            return parts

        i64 = types.int64
        return intrinsic(lambda typingctx, w, n, blocks: (self.address(i64, i64, i64), emit))

    def _block(self, b: Any, p: Any, i: int, block: Any) -> Any:
        return b.add(b.extract_value(p, i), b.mul(block, _I64(self.block_bytes[i])))

    def _ask(self) -> Any:
        def emit(context: Any, b: Any, sig: Any, args: Any) -> Any:
            p, block = args
            for i, nbytes in enumerate(self.block_bytes):
                at = b.add(self._block(b, p, i, block), _I64(_AHEAD))
                for line in range(0, nbytes, 64):
                    emit_prefetch(b, b.add(at, _I64(line)), 3)
            return context.get_dummy_value()

        return intrinsic(lambda typingctx, p, block: (types.void(p, types.int64), emit))

    def _dot(self) -> Any:
        def emit(context: Any, b: Any, sig: Any, args: Any) -> Any:
            totals, p, block, part, xs = args
            rows = sig.return_type.item.n
            kind = vec("i8", 4 * rows).llvm
            skip = b.mul(part, _I64(4 * LANES))
            starts = [b.add(self._block(b, p, i, block), skip) for i in range(p.type.count)]
            units: dict[int, Any] = {}
            sums = [b.extract_value(totals, t) for t in range(totals.type.count)]
            for v in range(8):
                code = constant(kind, [-128] * kind.count)  # of zeros; u = q + 128
                for number, (i, width, low, at) in enumerate(self.fields):
                    key = 8 * number + v % width
                    if key not in units:
                        unit = b.add(starts[i], _I64(at + 4 * TILE_ROWS * (v % width)))
                        units[key] = load(b, unit, kind)
                    moved = shift_bytes(b, units[key], width * (v // width) - low)
                    mask = constant(kind, [(2**width - 1) << low] * kind.count)
                    code = b.xor(code, b.and_(moved, mask))
                for t in range(len(sums)):
                    x = load(b, b.add(b.extract_value(xs, t), _I64(4 * v)), I32)
                    x = b.bitcast(splat(b, x, rows), kind)
                    sums[t] = dots.mac_s8(b, sums[t], code, x)
            for t, total in enumerate(sums):
                totals = b.insert_value(totals, total, t)
            return totals

        def typed(totals: Pack, p: Pack, block: Any, part: Any, xs: Pack) -> Any:
            return totals(totals, p, types.int64, types.int64, xs), emit

        return intrinsic(
            lambda typingctx, totals, p, block, part, xs: typed(totals, p, block, part, xs)
        )


# first(p): the address of the first part, which begins with the scales
_first = intrinsic(
    lambda typingctx, p: (types.int64(p), lambda ctx, b, sig, args: b.extract_value(args[0], 0))
)


@inline
def _refined(dot: Any, ask: Any, base_bytes: Any, p: Any, part: Any, K: Any, xs: Any) -> Any:
    """A tile in parts, of which the first has blocks of `base_bytes`."""
    acc = accumulators(xs)
    d = _first(p) + 2 * LANES * part
    for block in range(K // 32):
        ask(p, block)
        totals = dot(signed_totals(acc, xs, 0), p, block, part, xs)
        acc = fma_totals(acc, totals, halves(acc, d), xs, 0)
        d += base_bytes
        xs = step(xs, BLOCK_BYTES)
    return acc


_4_4, _5_3, _3_1_4 = _Split(4, 4), _Split(5, 3), _Split(3, 1, 4)
_tile_4_4, _ask_4_4, _dot_4_4 = _4_4.tile, _4_4.ask, _4_4.dot
_tile_5_3, _ask_5_3, _dot_5_3 = _5_3.tile, _5_3.ask, _5_3.dot
_tile_3_1_4, _ask_3_1_4, _dot_3_1_4 = _3_1_4.tile, _3_1_4.ask, _3_1_4.dot
_B3_BYTES, _B4_BYTES, _B5_BYTES = (32 + 64 * bits for bits in (3, 4, 5))


@inline
def _refined_4_4(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _refined(_dot_4_4, _ask_4_4, _B4_BYTES, p, part, K, xs)


@inline
def _refined_5_3(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _refined(_dot_5_3, _ask_5_3, _B5_BYTES, p, part, K, xs)


@inline
def _refined_3_1_4(p: Any, part: Any, K: Any, xs: Any) -> Any:
    return _refined(_dot_3_1_4, _ask_3_1_4, _B3_BYTES, p, part, K, xs)


@kernel(MATMUL)
def _matmul_4_4_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive_from(
        _tile_4_4, up_to_most, _refined_4_4, K // 32, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_5_3_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive_from(
        _tile_5_3, up_to_most, _refined_5_3, K // 32, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


@kernel(MATMUL)
def _matmul_3_1_4_kernel(
    w: int, x: int, x_stride: int, y: int, y_stride: int, K: int, tile_start: int,
    tile_stop: int, n: int, xi: int, yi: int, mode: int, bias: int,
) -> None:  # fmt: skip
    drive_from(
        _tile_3_1_4, up_to_most, _refined_3_1_4, K // 32, w, x, x_stride, y, y_stride, K,
        tile_start, tile_stop, n, xi, yi, mode, bias,
    )  # fmt: skip


# By the bits of the base and of each part beside it.
KERNELS: dict[tuple[int, ...], Kernel] = {
    (4, 4): _matmul_4_4_kernel,
    (5, 3): _matmul_5_3_kernel,
    (3, 1, 4): _matmul_3_1_4_kernel,
}
