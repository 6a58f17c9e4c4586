"""The one DRAM layout of weights: tiles of 16 rows, interleaved, for every CPU.

Rows are taken 16 at a time; missing rows of the last tile are zeros. A tile holds its blocks one
after another, and a block holds the GGUF blocks of its 16 rows cut into units of 1, 2 or 4 bytes:
unit i of rows 0..15, then unit i + 1, ... So a kernel reads one sequential stream, and 64 bytes of
4-byte units are one AVX-512 register (two AVX2 ones) with four weights of each row. (Rows read
separately fall to a third of the memory rate: the hardware prefetcher loses so many streams.)

    format        order of units in a block                                  bytes against GGUF
    F32 F16 BF16  element                                                    1
    Q8_0 Q4_0     scale (2), weights (4 bytes each)                          1
    Q4_K          d (2), dmin (2), 4 x [scale, min, scale, min (1), 8 x 4]   148 / 144
    Q6_K          d (2), 2 x [4 scale pairs (2), 16 x 4 low, 8 x 4 high]     1
    all others    byte                                                       1

The 6-bit scales and mins of Q4_K become bytes; everything else only moves. `unpack_ref` is the
exact inverse. Owns: this table, sizes, moving bytes. Must not know: what the bytes mean to a
kernel, files, or threads.
"""

from __future__ import annotations

from functools import cache
from math import gcd

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError
from edgert.kernels_cpu.lanes import TILE_ROWS
from edgert.kernels_cpu.repack import expand_q4_k, repack_blocks
from edgert.quant.formats import QuantFormat

__all__ = [
    "TILE_ROWS", "matrix_bytes", "repack", "repack_address", "repack_ref", "tile_bytes",
    "tile_count", "unpack_ref",
]  # fmt: skip

_U8 = npt.NDArray[np.uint8]
_Piece = tuple[int, int, int]  # offset in the (expanded) GGUF block, bytes of a unit, units
_Q4_K_BYTES = 148  # of a block with its 12 scale bytes expanded to 16

_BLOCK32: dict[str, tuple[_Piece, ...]] = {
    "Q8_0": ((0, 2, 1), (2, 4, 8)),
    "Q4_0": ((0, 2, 1), (2, 4, 4)),
}


def _q4_k_pieces() -> tuple[_Piece, ...]:
    pieces: list[_Piece] = [(0, 2, 1), (2, 2, 1)]
    for group in range(4):
        pieces += [(4 + 4 * group, 1, 4), (20 + 32 * group, 4, 8)]
    return tuple(pieces)


def _q6_k_pieces() -> tuple[_Piece, ...]:
    pieces: list[_Piece] = [(208, 2, 1)]
    for half in range(2):
        pieces += [(192 + 8 * half, 2, 4), (64 * half, 4, 16), (128 + 32 * half, 4, 8)]
    return tuple(pieces)


@cache
def _plan(fmt: QuantFormat, K: int) -> tuple[int, int, tuple[_Piece, ...]]:
    """(bytes of a GGUF block as moved, blocks of a row, pieces in the order they are written)."""
    assert K > 0 and K % fmt.block_size == 0, (fmt.name, K)
    blocks = K // fmt.block_size
    if fmt.is_float:  # runs of up to 64 elements, so that the stores of a run stay in L1
        run = gcd(K, 64)
        return run * fmt.block_bytes, K // run, ((0, fmt.block_bytes, run),)
    if fmt.name == "Q4_K":
        return _Q4_K_BYTES, blocks, _q4_k_pieces()
    if fmt.name == "Q6_K":
        return fmt.block_bytes, blocks, _q6_k_pieces()
    return fmt.block_bytes, blocks, _BLOCK32.get(fmt.name, ((0, 1, fmt.block_bytes),))


@cache
def _plan_array(fmt: QuantFormat, K: int) -> npt.NDArray[np.int64]:
    array = np.array(_plan(fmt, K)[2], np.int64)
    array.setflags(write=False)
    return array


def tile_count(rows: int) -> int:
    """Tiles of a matrix of `rows` rows."""
    return -(-rows // TILE_ROWS)


def tile_bytes(fmt: QuantFormat, K: int) -> int:
    """Bytes of one tile: 16 rows of `K` weights, a multiple of the format's block."""
    block_bytes, blocks, _ = _plan(fmt, K)
    return TILE_ROWS * block_bytes * blocks


def matrix_bytes(fmt: QuantFormat, rows: int, K: int) -> int:
    """Bytes of a matrix of `rows` x `K` weights in tiles."""
    return tile_count(rows) * tile_bytes(fmt, K)


def repack_address(fmt: QuantFormat, raw: int, rows: int, K: int, out: int) -> None:
    """As `repack` with addresses, unchecked. Releases the GIL; allocates nothing."""
    block_bytes, blocks, pieces = _plan(fmt, K)
    table = _plan_array(fmt, K)
    call = expand_q4_k if fmt.name == "Q4_K" else repack_blocks
    call(raw, out, rows, fmt.row_bytes(K), blocks, block_bytes, table.ctypes.data, len(pieces))


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
    moved = raw.reshape(rows, blocks, -1)
    if fmt.name == "Q4_K":
        moved = np.concatenate([moved[..., :4], _scales_ref(moved), moved[..., 16:]], axis=-1)
    padded = np.zeros((tile_count(rows) * TILE_ROWS, blocks, block_bytes), np.uint8)
    padded[:rows] = moved
    by_tile = padded.reshape(-1, TILE_ROWS, blocks, block_bytes)
    parts = []
    for offset, unit, count in pieces:
        part = by_tile[..., offset : offset + unit * count]
        part = part.reshape(-1, TILE_ROWS, blocks, count, unit).transpose(0, 2, 3, 1, 4)
        parts.append(part.reshape(-1, blocks, count * TILE_ROWS * unit))
    return np.concatenate(parts, axis=-1).reshape(-1)


def unpack_ref(fmt: QuantFormat, tiles: _U8, rows: int, K: int) -> _U8:
    """The exact inverse of `repack`: uint8[rows, row_bytes(K)]."""
    block_bytes, blocks, pieces = _plan(fmt, K)
    written = tiles.reshape(-1, blocks, TILE_ROWS * block_bytes)
    out = np.zeros((len(written), TILE_ROWS, blocks, block_bytes), np.uint8)
    at = 0
    for offset, unit, count in pieces:
        part = written[..., at : at + count * TILE_ROWS * unit]
        part = part.reshape(-1, blocks, count, TILE_ROWS, unit).transpose(0, 3, 1, 2, 4)
        out[..., offset : offset + unit * count] = part.reshape(*part.shape[:3], unit * count)
        at += count * TILE_ROWS * unit
    raw = out.reshape(-1, blocks, block_bytes)[:rows]
    if fmt.name == "Q4_K":
        packed = _pack_scales_ref(raw[..., 4:20])
        raw = np.concatenate([raw[..., :4], packed, raw[..., 20:]], axis=-1)
    return np.ascontiguousarray(raw.reshape(rows, -1))


def _scales_ref(blocks: _U8) -> _U8:
    """Q4_K blocks (..., 144) -> (..., 16): scale and min of sub-blocks 0..7, a byte each."""
    s = blocks[..., 4:16]
    low, high, mixed = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    scales = np.concatenate([low & 63, (mixed & 15) | (low >> 6 << 4)], axis=-1)
    mins = np.concatenate([high & 63, (mixed >> 4) | (high >> 6 << 4)], axis=-1)
    return np.stack([scales, mins], axis=-1).reshape(*s.shape[:-1], 16)


def _pack_scales_ref(pairs: _U8) -> _U8:
    """The inverse of `_scales_ref`: (..., 16) -> (..., 12)."""
    scales, mins = pairs[..., 0::2], pairs[..., 1::2]
    low = scales[..., :4] | (scales[..., 4:] >> 4 << 6)
    high = mins[..., :4] | (mins[..., 4:] >> 4 << 6)
    mixed = (scales[..., 4:] & 15) | (mins[..., 4:] << 4)
    return np.concatenate([low, high, mixed], axis=-1)
