"""Compiled movers of weight bytes from GGUF rows to tiles; `layout` says what goes where.

    void(raw, out, rows, row_bytes, blocks, block_bytes, pieces, n_pieces)

`pieces` is the address of int64[n_pieces, 3]: offset in a block, bytes of a unit (1, 2, 4), units.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.kernels_cpu.jit import inline, kernel, void
from edgert.kernels_cpu.simd import (
    const_of,
    ld_i8,
    ld_i16,
    ld_i32,
    ld_i64,
    ld_u8,
    st_i8,
    st_i16,
    st_i32,
    storer,
    vec,
)

__all__ = ["expand_q4_k", "repack_blocks"]

_REPACK = void("iiiiiiii")
_Q4_K_BYTES, _Q4_K_GROUP = 2368, 576  # of a block of 16 rows, of one of its four groups
_zero_16_bytes = const_of(vec("i8", 16), [0])
_st_16_bytes = storer(vec("i8", 16))


@inline
def _clear(out: Any, nbytes: Any) -> None:
    """Zero `nbytes`, a multiple of 16."""
    for i in range(nbytes // 16):
        _st_16_bytes(out + 16 * i, _zero_16_bytes())


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


@kernel(_REPACK)
def repack_blocks(
    raw: int, out: int, rows: int, row_bytes: int, blocks: int, block_bytes: int,
    pieces: int, n_pieces: int,
) -> None:  # fmt: skip
    """All formats whose bytes only move."""
    for tile in range((rows + 15) // 16):
        source = raw + 16 * tile * row_bytes
        rows_here = min(16, rows - 16 * tile)
        if rows_here < 16:
            _clear(out, 16 * block_bytes * blocks)
        for _ in range(blocks):
            at = out
            for piece in range(n_pieces):
                offset = ld_i64(pieces + 24 * piece)
                unit = ld_i64(pieces + 24 * piece + 8)
                count = ld_i64(pieces + 24 * piece + 16)
                for r in range(rows_here):
                    _move(source + r * row_bytes + offset, at + r * unit, unit, count)
                at += 16 * unit * count
            source += block_bytes
            out += 16 * block_bytes


@inline
def _q4_k_row(raw: Any, out: Any, r: Any) -> None:
    """One block of 144 bytes to row `r` of the block at `out`; 6-bit scales and mins to bytes."""
    st_i16(out + 2 * r, ld_i16(raw))
    st_i16(out + 32 + 2 * r, ld_i16(raw + 2))
    for j in range(4):  # sub-blocks j and 4 + j
        low, high, mixed = ld_u8(raw + 4 + j), ld_u8(raw + 8 + j), ld_u8(raw + 12 + j)
        at = out + 64 + _Q4_K_GROUP * (j >> 1) + 32 * (j & 1) + r
        st_i8(at, np.int8(low & 63))
        st_i8(at + 16, np.int8(high & 63))
        st_i8(at + 2 * _Q4_K_GROUP, np.int8((mixed & 15) | ((low >> 6) << 4)))
        st_i8(at + 2 * _Q4_K_GROUP + 16, np.int8((mixed >> 4) | ((high >> 6) << 4)))
    for group in range(4):
        at = out + 128 + _Q4_K_GROUP * group + 4 * r
        for i in range(8):
            st_i32(at + 64 * i, ld_i32(raw + 16 + 32 * group + 4 * i))


@kernel(_REPACK)
def expand_q4_k(
    raw: int, out: int, rows: int, row_bytes: int, blocks: int, block_bytes: int,
    pieces: int, n_pieces: int,
) -> None:  # fmt: skip
    """Q4_K, its scales expanded; `block_bytes`, `pieces` and `n_pieces` are not needed."""
    for tile in range((rows + 15) // 16):
        source = raw + 16 * tile * row_bytes
        rows_here = min(16, rows - 16 * tile)
        if rows_here < 16:
            _clear(out, _Q4_K_BYTES * blocks)
        for _ in range(blocks):
            for r in range(rows_here):
                _q4_k_row(source + r * row_bytes, out, r)
            source += 144
            out += _Q4_K_BYTES
