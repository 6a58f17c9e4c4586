"""The one DRAM layout of weights: tiles of 16 rows, interleaved, for every CPU.

Rows are taken 16 at a time; missing rows of the last tile count as bytes of zero. A tile holds its
blocks one after another, and a block holds the GGUF blocks of its 16 rows cut into units of 1, 2
or 4 bytes: unit i of rows 0..15, then unit i + 1, ... So a kernel reads one sequential stream, and
64 bytes of 4-byte units are one AVX-512 register (two AVX2 ones) with four bytes of each row.
(Rows read separately fall to a third of the memory rate: the hardware prefetcher loses so many
streams.)

    format         order of units in a block                                     bytes : GGUF
    F32 F16 BF16   element
    Q8_0           d (2), 8 x 4
    Q4_0 IQ4_NL    d (2), 4 x 4
    MXFP4          e (1), 4 x 4
    Q4_1           d (2), m (2), 4 x 4
    Q5_0           d (2), high bits (1 x 4), 4 x 4
    Q5_1           d (2), m (2), high bits (1 x 4), 4 x 4
    Q2_K           d (2), dmin (2), 2 x [4 x scale and min (2), 8 x 4]
    Q3_K           d (2), high bits (8 x 4), 2 x [4 scale pairs (2), 8 x 4]      114 : 110
    Q4_K           d (2), dmin (2), 4 x [scale, min, scale, min (1), 8 x 4]      148 : 144
    Q5_K           d (2), dmin (2), high bits (8 x 4), 4 x [as Q4_K]             180 : 176
    Q6_K           d (2), 2 x [4 scale pairs (2), 16 x 4 low, 8 x 4 high]
    IQ4_XS         d (2), 8 x [scale (1), 4 x 4]                                 138 : 136
    B3 B4 B5 B*_Q4_0 B*_Q5_0       d (2), bits x 4
    B*_Q4_1 B*_Q5_1                d (2), m (2), bits x 4
    B*_Q4_K B*_Q5_K                d (2), dmin (2), 4 x [scale, min, scale, min (1), 2 bits x 4]
    B*_Q6_K                        d (2), 4 x [2 scale pairs (2), 2 bits x 4]
    P1_32 .. P4_32     d (2), m (2), bits x 4
    P1_128 .. P4_128   d (2), m (2), 4 x [bits x 4]

Scales packed in six bits become bytes, and the high bits of Q5_0 and Q5_1 change their order
(`layout_tables`); everything else only moves. `unpack_ref` is the exact inverse. Owns: sizes,
moving bytes. Must not know: what the bytes mean to a kernel, files, or threads.
"""

from __future__ import annotations

from functools import cache
from math import gcd

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError
from edgert.kernels_cpu.lanes import TILE_ROWS
from edgert.kernels_cpu.layout_tables import PIECES, STEPS, Piece
from edgert.kernels_cpu.repack import repack_blocks
from edgert.kernels_cpu.repack_expand import STEP_CODES
from edgert.quant.formats import QuantFormat

__all__ = [
    "TILE_ROWS", "matrix_bytes", "repack", "repack_address", "repack_ref", "tile_bytes",
    "tile_count", "unpack_ref",
]  # fmt: skip

_U8 = npt.NDArray[np.uint8]


@cache
def _plan(fmt: QuantFormat, K: int) -> tuple[int, int, tuple[Piece, ...]]:
    """(bytes of a GGUF block as moved, blocks of a row, pieces in the order they are written)."""
    assert K > 0 and K % fmt.block_size == 0, (fmt.name, K)
    if fmt.is_float:  # runs of up to 64 elements, so that the stores of a run stay in L1
        run = gcd(K, 64)
        return run * fmt.block_bytes, K // run, ((0, fmt.block_bytes, run),)
    return fmt.block_bytes, K // fmt.block_size, PIECES[fmt.name]


@cache
def _piece_array(fmt: QuantFormat, K: int) -> npt.NDArray[np.int64]:
    """The pieces as `repack_blocks` takes them: expanded bytes lie by words of 16 rows."""
    block_bytes, _, pieces = _plan(fmt, K)
    entries = []
    for offset, unit, count in pieces:
        nbytes, at = unit * count, offset - block_bytes
        if at < 0:
            entries.append((0, offset, unit, nbytes))
        for start in range(at, at + nbytes, 4) if at >= 0 else ():
            place = start // 4 * 64 + start % 4
            entries.append((1, place, unit, min(4, at + nbytes - start)))
    array = np.array(entries, np.int64)
    array.setflags(write=False)
    return array


def tile_count(rows: int) -> int:
    """Tiles of a matrix of `rows` rows."""
    return -(-rows // TILE_ROWS)


def tile_bytes(fmt: QuantFormat, K: int) -> int:
    """Bytes of one tile: 16 rows of `K` weights, a multiple of the format's block."""
    _, blocks, pieces = _plan(fmt, K)
    return TILE_ROWS * blocks * sum(unit * count for _, unit, count in pieces)


def matrix_bytes(fmt: QuantFormat, rows: int, K: int) -> int:
    """Bytes of a matrix of `rows` x `K` weights in tiles."""
    return tile_count(rows) * tile_bytes(fmt, K)


def repack_address(fmt: QuantFormat, raw: int, rows: int, K: int, out: int) -> None:
    """As `repack` with addresses, unchecked. Releases the GIL; allocates nothing."""
    block_bytes, blocks, _ = _plan(fmt, K)
    pieces, step = _piece_array(fmt, K), STEPS.get(fmt.name)
    repack_blocks(
        raw, out, rows, fmt.row_bytes(K), blocks, block_bytes, STEP_CODES[step.name] if step else 0,
        step.start if step else 0, pieces.ctypes.data, len(pieces),
    )  # fmt: skip


def repack(fmt: QuantFormat, raw: _U8, rows: int, K: int, out: _U8) -> None:
    """GGUF rows -> tiles. raw: contiguous, rows * row_bytes(K) bytes; out: matrix_bytes.

    Rows that fill up the last tile become zeros. Raises InputError when a size is wrong. A matrix
    may be repacked in pieces that begin at multiples of 16 rows.
    """
    _check(fmt, raw, rows, K, rows * fmt.row_bytes(K), "raw")
    _check(fmt, out, rows, K, matrix_bytes(fmt, rows, K), "out")
    repack_address(fmt, raw.ctypes.data, rows, K, out.ctypes.data)


def _check(fmt: QuantFormat, array: _U8, rows: int, K: int, nbytes: int, name: str) -> None:
    if array.dtype != np.uint8 or not array.flags.c_contiguous or array.nbytes != nbytes:
        raise InputError(
            f"{fmt.name} [{rows}, {K}]: {name} must be {nbytes:,} contiguous bytes, "
            f"not {array.dtype} {list(array.shape)}"
        )


def repack_ref(fmt: QuantFormat, raw: _U8, rows: int, K: int) -> _U8:
    """The tiles of `raw` (rows * row_bytes(K) bytes): uint8[matrix_bytes]."""
    block_bytes, blocks, pieces = _plan(fmt, K)
    padded = np.zeros((tile_count(rows) * TILE_ROWS, blocks, block_bytes), np.uint8)
    padded[:rows] = raw.reshape(rows, blocks, block_bytes)
    step = STEPS.get(fmt.name)
    if step:
        expanded = step.expand(padded[..., step.start : step.stop])
        padded = np.concatenate([padded, expanded], axis=-1)
    by_tile = padded.reshape(-1, TILE_ROWS, *padded.shape[1:])
    parts = []
    for offset, unit, count in pieces:
        part = by_tile[..., offset : offset + unit * count]
        part = part.reshape(-1, TILE_ROWS, blocks, count, unit).transpose(0, 2, 3, 1, 4)
        parts.append(part.reshape(-1, blocks, count * TILE_ROWS * unit))
    return np.concatenate(parts, axis=-1).reshape(-1)


def unpack_ref(fmt: QuantFormat, tiles: _U8, rows: int, K: int) -> _U8:
    """The exact inverse of `repack`: uint8[rows, row_bytes(K)]."""
    block_bytes, blocks, pieces = _plan(fmt, K)
    step = STEPS.get(fmt.name)
    written = tiles.reshape(tile_count(rows), blocks, -1)
    moved = block_bytes + (step.nbytes if step else 0)
    out = np.zeros((len(written), TILE_ROWS, blocks, moved), np.uint8)
    at = 0
    for offset, unit, count in pieces:
        part = written[..., at : at + count * TILE_ROWS * unit]
        part = part.reshape(-1, blocks, count, TILE_ROWS, unit).transpose(0, 3, 1, 2, 4)
        out[..., offset : offset + unit * count] = part.reshape(*part.shape[:3], unit * count)
        at += count * TILE_ROWS * unit
    if step:
        out[..., step.start : step.stop] = step.pack(out[..., block_bytes:])
    return np.ascontiguousarray(out[..., :block_bytes].reshape(-1, fmt.row_bytes(K))[:rows])
