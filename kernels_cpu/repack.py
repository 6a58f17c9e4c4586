"""The compiled mover of weight bytes from GGUF rows to tiles; `layout` says what goes where.

Four bytes of each of 16 rows are one 64-byte vector, which is how 4-byte units are stored; for
smaller units its bytes are put in order. Owns: moving. Must not know: formats.
"""

from __future__ import annotations

from typing import Any

from edgert.kernels_cpu.compiler import ir, types
from edgert.kernels_cpu.jit import inline, kernel, void
from edgert.kernels_cpu.repack_expand import WORDS, expand, ld_words, st_words
from edgert.kernels_cpu.simd import (
    bitcast_to,
    const_of,
    ld_i8,
    ld_i16,
    ld_i64,
    loader,
    prefetch,
    shuffle_of,
    st_i8,
    st_i16,
    stack_buffer,
    storer,
    vec,
)
from edgert.kernels_cpu.vectors import I32, load, operation, store

__all__ = ["repack_blocks"]

# The next tile is asked for where a row is too short for the hardware to see where it goes: 10 GB/s
# instead of 5 with 500-byte rows, equal at 2 KiB, a tenth less at 4 KiB.
_SHORT_ROW = 2048

_BYTES, _HALVES = vec("i8", 64), vec("i16", 32)
_expanded_buffer = stack_buffer(4 * 64)
_rows_buffer = stack_buffer(16 * 256)
_ld_bytes, _st_bytes = loader(_BYTES), storer(_BYTES)
_ld_halves, _st_halves = loader(_HALVES), storer(_HALVES)
_ld_words = loader(WORDS)
_as_words, _zero = bitcast_to(_BYTES, WORDS), const_of(_BYTES, [0])
# [row][2 halves] -> [half][16 rows]; [row][4 bytes] -> [byte][16 rows] by way of 16-byte groups.
_by_half = shuffle_of(_HALVES, [2 * (i % 16) + i // 16 for i in range(32)])
_by_byte_in_group = shuffle_of(_BYTES, [i - i % 16 + 4 * (i % 4) + i % 16 // 4 for i in range(64)])
_by_group = shuffle_of(WORDS, [4 * (i % 4) + i // 4 for i in range(16)])


@(lambda f: operation(types.void, (types.intp,) * 3, f))
def _transpose(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """transpose(address, stride, out): 16 bytes of 16 rows -> their four words, row by row each.

    Only the first step crosses 16-byte groups, which is what AVX2 and AVX-512 do cheaply.
    """
    source, stride, out = args

    def shuffled(a: Any, b: Any, lanes: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, i) for i in lanes])
        return builder.shuffle_vector(a, b, mask)

    def pairs(a: Any, b: Any, of: list[int]) -> Any:  # within each group of four words
        return shuffled(a, b, [4 * group + lane for group in range(4) for lane in of])

    rows = [
        load(builder, builder.add(source, builder.mul(stride, stride.type(r))), vec("i32", 4).llvm)
        for r in range(16)
    ]
    groups = []  # group i of vector g is row 4i + g
    for g in range(4):
        low = shuffled(rows[g], rows[g + 4], list(range(8)))
        high = shuffled(rows[g + 8], rows[g + 12], list(range(8)))
        groups.append(shuffled(low, high, list(range(16))))
    for half in (0, 2):
        of = [half, 16 + half, half + 1, 17 + half]
        a, b = pairs(groups[0], groups[1], of), pairs(groups[2], groups[3], of)
        for word, of in ((half, [0, 1, 16, 17]), (half + 1, [2, 3, 18, 19])):
            store(builder, builder.add(out, out.type(64 * word)), pairs(a, b, of))
    return context.get_dummy_value()


@inline
def _move(source: Any, stride: Any, out: Any, unit: Any, nbytes: Any) -> None:
    """`nbytes` at `source` of 16 rows `stride` apart, in units of `unit` bytes, to `out`."""
    at = out
    for _ in range(nbytes >> 4):
        _transpose(source, stride, at)
        source += 16
        at += 256
    for _ in range((nbytes & 15) >> 2):
        st_words(at, ld_words(source, stride))
        source += 4
        at += 64
    if unit == 2:
        for i in range(nbytes >> 2):
            halves = _ld_halves(out + 64 * i)
            _st_halves(out + 64 * i, _by_half(halves, halves))
    elif unit == 1:
        for i in range(nbytes >> 2):
            v = _ld_bytes(out + 64 * i)
            words = _as_words(_by_byte_in_group(v, v))
            st_words(out + 64 * i, _by_group(words, words))
    if nbytes & 3:
        if unit == 2:
            for r in range(16):
                st_i16(at + 2 * r, ld_i16(source + r * stride))
        else:
            for i in range(nbytes & 3):
                for r in range(16):
                    st_i8(at + 16 * i + r, ld_i8(source + r * stride + i))


@inline
def _prefetch(source: Any, block_bytes: Any) -> None:
    """Ask for the share of one block in the 16 rows at `source`, which lie together."""
    for line in range((block_bytes + 3) >> 2):
        prefetch(source + 64 * line)


@inline
def _copy_rows(source: Any, stride: Any, rows: Any, nbytes: Any, out: Any) -> None:
    for r in range(rows):
        for i in range(nbytes):
            st_i8(out + r * nbytes + i, ld_i8(source + r * stride + i))


@kernel(void("iiiiiiiiii"))
def repack_blocks(
    raw: int, out: int, rows: int, row_bytes: int, blocks: int, block_bytes: int, step: int,
    step_start: int, pieces: int, n_pieces: int,
) -> None:  # fmt: skip
    """`rows` rows at `raw` to tiles at `out`.

    `pieces` is the address of int64[n_pieces, 4]: whether the piece is expanded, its offset in the
    block, or among 16 expanded words; bytes of a unit; bytes of a row. `step`: see `expand`.
    """
    expanded, few = _expanded_buffer(), _rows_buffer()
    for tile in range((rows + 15) >> 4):
        tail = rows - 16 * tile
        if tail < 16:
            for i in range(64):
                _st_bytes(few + 64 * i, _zero())
        for block in range(blocks):
            source, stride = raw + 16 * tile * row_bytes + block * block_bytes, row_bytes
            if row_bytes <= _SHORT_ROW:
                _prefetch(raw + 16 * ((tile + 1) * row_bytes + block * block_bytes), block_bytes)
            if tail < 16:
                _copy_rows(source, row_bytes, tail, block_bytes, few)
                source, stride = few, block_bytes
            expand(step, source + step_start, stride, expanded)
            for piece in range(n_pieces):
                entry = pieces + 32 * piece
                offset, unit, nbytes = ld_i64(entry + 8), ld_i64(entry + 16), ld_i64(entry + 24)
                if ld_i64(entry) != 0:
                    _move(expanded + offset, 4, out, unit, nbytes)
                else:
                    _move(source + offset, stride, out, unit, nbytes)
                out += 16 * nbytes
