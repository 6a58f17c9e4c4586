"""Compiled movers of weight bytes from GGUF rows to tiles; `layout` says what goes where.

    void(raw, out, rows, row_bytes, blocks, block_bytes, pieces, n_pieces)

`pieces` is the address of int64[n_pieces, 3]: offset in a block, bytes of a unit (1, 2, 4), units.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.kernels_cpu.jit import inline, kernel, void
from edgert.kernels_cpu.simd import (
    ld_i16, ld_i32, ld_i64, ld_i8, ld_u8, st_i16, st_i32, st_i8, stack_buffer,
)  # fmt: skip

__all__ = ["expand_q4_k", "repack_blocks"]

_REPACK = void("iiiiiiii")
_q4_k_buffer = stack_buffer(16 * 160)


@inline
def _move(source: Any, out: Any, unit: Any, count: Any) -> None:
    """`count` units of one row at `source` to every 16th place at `out`."""
    if unit == 4:
        for i in range(count):
            st_i32(out + 64 * i, ld_i32(source + 4 * i))
    elif unit == 2:
        for i in range(count):
            st_i16(out + 32 * i, ld_i16(source + 2 * i))
    else:
        for i in range(count):
            st_i8(out + 16 * i, ld_i8(source + i))


@inline
def _clear(out: Any, unit: Any, count: Any) -> None:
    for i in range(unit * count):  # a byte of each unit after another, of this row only
        st_i8(out + 16 * unit * (i // unit) + i % unit, np.int8(0))


@inline
def _move_block(
    raw: Any, out: Any, rows_here: Any, stride: Any, pieces: Any, n_pieces: Any
) -> None:
    """One block of 16 rows: row r is at raw + r * stride; rows from `rows_here` on are zeros."""
    at = out
    for piece in range(n_pieces):
        offset = ld_i64(pieces + 24 * piece)
        unit = ld_i64(pieces + 24 * piece + 8)
        count = ld_i64(pieces + 24 * piece + 16)
        for r in range(rows_here):
            _move(raw + r * stride + offset, at + r * unit, unit, count)
        for r in range(rows_here, 16):
            _clear(at + r * unit, unit, count)
        at += 16 * unit * count


@kernel(_REPACK)
def repack_blocks(
    raw: int, out: int, rows: int, row_bytes: int, blocks: int, block_bytes: int,
    pieces: int, n_pieces: int,
) -> None:  # fmt: skip
    """All formats whose bytes only move."""
    for tile in range((rows + 15) // 16):
        source = raw + 16 * tile * row_bytes
        rows_here = min(16, rows - 16 * tile)
        for block in range(blocks):
            _move_block(source, out, rows_here, row_bytes, pieces, n_pieces)
            source += block_bytes
            out += 16 * block_bytes


@inline
def _expand_row(raw: Any, out: Any) -> None:
    """One Q4_K block of 144 bytes -> 148: its 6-bit scales and mins as bytes."""
    st_i32(out, ld_i32(raw))
    for j in range(4):
        low, high = ld_u8(raw + 4 + j), ld_u8(raw + 8 + j)
        mixed = ld_u8(raw + 12 + j)
        st_i8(out + 4 + 2 * j, np.int8(low & 63))
        st_i8(out + 5 + 2 * j, np.int8(high & 63))
        st_i8(out + 12 + 2 * j, np.int8((mixed & 15) | ((low >> 6) << 4)))
        st_i8(out + 13 + 2 * j, np.int8((mixed >> 4) | ((high >> 6) << 4)))
    for i in range(32):
        st_i32(out + 20 + 4 * i, ld_i32(raw + 16 + 4 * i))


@kernel(_REPACK)
def expand_q4_k(
    raw: int, out: int, rows: int, row_bytes: int, blocks: int, block_bytes: int,
    pieces: int, n_pieces: int,
) -> None:  # fmt: skip
    """Q4_K: `block_bytes` counts the expanded block, built on the stack row by row."""
    buffer = _q4_k_buffer()
    for tile in range((rows + 15) // 16):
        source = raw + 16 * tile * row_bytes
        rows_here = min(16, rows - 16 * tile)
        for _ in range(blocks):
            for r in range(rows_here):
                _expand_row(source + r * row_bytes, buffer + 160 * r)
            _move_block(buffer, out, rows_here, 160, pieces, n_pieces)
            source += 144
            out += 16 * block_bytes
