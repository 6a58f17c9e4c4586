"""Where each number sits inside a block: bytes to integer fields and back, without arithmetic.

Owns: the byte map of every format as one table, `unpack` and its exact inverse `pack`.
Must not know: what the numbers mean (reference.py), how they are chosen (quantize.py), files.
Source: the block structures of ggml's `ggml-common.h` and the loops of `ggml-quants.c`.

Nearly every packed field of every format is the same pattern, here called *planes*: `width`
bytes hold `8 / bits` runs of `width` numbers, run i in bits `i*bits ..` of each byte. Only the
twelve bytes of six-bit scales that Q4_K and Q5_K share need a rule of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.quant.formats import BASES, FORMATS, PLANES, BaseFormat, QuantFormat

__all__ = ["Array", "Part", "layout", "pack", "pack_planes", "unpack", "unpack_planes"]

Array = NDArray[Any]


_NUMBERS: dict[str, np.dtype[Any]] = {
    "f16": np.dtype("<f2"),
    "u8": np.dtype(np.uint8),
    "i8": np.dtype(np.int8),
}


@dataclass(frozen=True, slots=True)
class Part:
    """One field of a block: `nbytes` bytes read as `kind`.

    kind: "f16", "u8", "i8", "k6" (see `_unpack_k6`) or "planes" of `bits` bits in runs of `width`.
    """

    name: str
    nbytes: int
    kind: str
    bits: int = 0
    width: int = 0


def _planes(name: str, nbytes: int, bits: int, width: int) -> Part:
    return Part(name, nbytes, "planes", bits, width)


_D = Part("d", 2, "f16")  # scale of the block
_M = Part("m", 2, "f16")  # offset of the block, or the scale of its sub-block offsets
_K6 = Part("scales_mins", 12, "k6")

_LAYOUT: dict[str, tuple[Part, ...]] = {
    "Q8_0": (_D, Part("codes", 32, "i8")),
    "Q4_0": (_D, _planes("codes", 16, 4, 16)),
    "Q4_1": (_D, _M, _planes("codes", 16, 4, 16)),
    "Q5_0": (_D, _planes("high", 4, 1, 1), _planes("low", 16, 4, 16)),
    "Q5_1": (_D, _M, _planes("high", 4, 1, 1), _planes("low", 16, 4, 16)),
    "Q2_K": (_planes("scales_mins", 16, 4, 16), _planes("codes", 64, 2, 32), _D, _M),
    "Q3_K": (
        _planes("high", 32, 1, 32),
        _planes("low", 64, 2, 32),
        _planes("scales_low", 8, 4, 8),
        _planes("scales_high", 4, 2, 4),
        _D,
    ),
    "Q4_K": (_D, _M, _K6, _planes("codes", 128, 4, 32)),
    "Q5_K": (_D, _M, _K6, _planes("high", 32, 1, 32), _planes("low", 128, 4, 32)),
    "Q6_K": (_planes("low", 128, 4, 64), _planes("high", 64, 2, 32), Part("scales", 16, "i8"), _D),
    "IQ4_NL": (_D, _planes("codes", 16, 4, 16)),
    "IQ4_XS": (
        _D,
        _planes("scales_high", 2, 2, 1),
        _planes("scales_low", 4, 4, 1),
        _planes("codes", 128, 4, 16),
    ),
    "MXFP4": (Part("exponent", 1, "u8"), _planes("codes", 16, 4, 16)),
}


def _plane_parts(bits: int, group: int) -> tuple[Part, ...]:
    """32 weights of 1, 2 or 4 bits are one run of 4 * bits bytes; 3 bits are 2 low and 1 high."""
    if bits == 3:
        low, high = _planes("low", group // 4, 2, 8), _planes("high", group // 8, 1, 4)
        return (_D, _M, low, high)
    return (_D, _M, _planes("codes", group * bits // 8, bits, 4 * bits))


def _base_parts(fmt: BaseFormat) -> tuple[Part, ...]:
    """Scales as in the format it is of, then codes as its kernel reads them: of each 32 weights."""
    scales = [part for part in _LAYOUT[fmt.of.name] if part.name not in ("codes", "low", "high")]
    scales.sort(key=lambda part: part is not _D)
    n, bits = fmt.block_size // 32, fmt.bits
    if bits == 5:  # the fifth bit comes before the nibbles
        return (*scales, _planes("high", 4 * n, 1, 4), _planes("low", 16 * n, 4, 16))
    if bits == 3:
        return (*scales, _planes("low", 8 * n, 2, 8), _planes("high", 4 * n, 1, 4))
    return (*scales, _planes("codes", 4 * bits * n, bits, 4 * bits))


_LAYOUT |= {name: _plane_parts(f.bits, f.block_size) for name, f in PLANES.items()}
_LAYOUT |= {f.name: _base_parts(f) for bases in BASES.values() for f in bases.values()}
for _name, _parts in _LAYOUT.items():
    assert sum(p.nbytes for p in _parts) == FORMATS[_name].block_bytes, _name


def layout(fmt: QuantFormat) -> tuple[Part, ...]:
    """The fields of a block of a quantised `fmt`, in file order."""
    return _LAYOUT[fmt.name]


def unpack(fmt: QuantFormat, raw: Array) -> dict[str, Array]:
    """The fields of the blocks in `raw`; a run of packed numbers comes out in weight order.

    Shapes: raw uint8 [..., blocks * block_bytes] -> each field [..., blocks, numbers], float16,
    uint8 or int8.
    """
    assert raw.dtype == np.uint8 and raw.shape[-1] % fmt.block_bytes == 0, (fmt.name, raw.shape)
    blocks = raw.reshape(*raw.shape[:-1], -1, fmt.block_bytes)
    fields, start = {}, 0
    for part in _LAYOUT[fmt.name]:
        fields[part.name] = _unpack_part(part, blocks[..., start : start + part.nbytes])
        start += part.nbytes
    return fields


def pack(fmt: QuantFormat, fields: dict[str, Array]) -> Array:
    """The inverse of `unpack`: fields [..., blocks, numbers] -> uint8 [..., blocks*block_bytes]."""
    parts = [_pack_part(part, fields[part.name]) for part in _LAYOUT[fmt.name]]
    blocks = np.concatenate(parts, axis=-1)
    assert blocks.shape[-1] == fmt.block_bytes, (fmt.name, blocks.shape)
    return blocks.reshape(*blocks.shape[:-2], -1)


def unpack_planes(raw: Array, bits: int, width: int) -> Array:
    """Numbers of `bits` bits: uint8 [..., n] -> uint8 [..., n * 8 / bits].

    Byte `g*width + j` holds numbers `(g*8/bits + i)*width + j`, i in its bits `i*bits ..`.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    groups = raw.reshape(*raw.shape[:-1], -1, 1, width)
    numbers = (groups >> shifts) & np.uint8(2**bits - 1)
    return numbers.reshape(*raw.shape[:-1], -1)


def pack_planes(numbers: Array, bits: int, width: int) -> Array:
    """The inverse of `unpack_planes`: uint8 [..., n] -> uint8 [..., n * bits / 8]."""
    assert numbers.size == 0 or numbers.max() < 2**bits, (bits, numbers.max())
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    groups = numbers.astype(np.uint8).reshape(*numbers.shape[:-1], -1, 8 // bits, width)
    packed: Array = np.bitwise_or.reduce(groups << shifts, axis=-2)
    return packed.reshape(*numbers.shape[:-1], -1)


def _unpack_part(part: Part, raw: Array) -> Array:
    if part.kind == "planes":
        return unpack_planes(raw, part.bits, part.width)
    if part.kind == "k6":
        return _unpack_k6(raw)
    numbers: Array = np.ascontiguousarray(raw).view(_NUMBERS[part.kind])
    return numbers


def _pack_part(part: Part, numbers: Array) -> Array:
    if part.kind == "planes":
        return pack_planes(numbers, part.bits, part.width)
    if part.kind == "k6":
        return _pack_k6(numbers)
    return np.ascontiguousarray(numbers.astype(_NUMBERS[part.kind])).view(np.uint8)


def _unpack_k6(raw: Array) -> Array:
    """Eight six-bit scales, then eight six-bit offsets: uint8 [..., 12] -> uint8 [..., 16].

    Bytes 0-3: scales 0-3, and in bits 6-7 the top of scales 4-7; bytes 4-7: the same of the
    offsets; bytes 8-11: the low four bits of scales 4-7 (low nibble) and offsets 4-7 (high).
    """
    a, b, c = raw[..., 0:4], raw[..., 4:8], raw[..., 8:12]
    scales = (a & 63, (c & 15) | (a >> 6 << 4))
    mins = (b & 63, (c >> 4) | (b >> 6 << 4))
    return np.concatenate([*scales, *mins], axis=-1)


def _pack_k6(numbers: Array) -> Array:
    """The inverse of `_unpack_k6`: uint8 [..., 16] -> uint8 [..., 12]."""
    assert numbers.max() < 64, numbers.max()
    s0, s1, m0, m1 = np.split(numbers.astype(np.uint8), 4, axis=-1)
    return np.concatenate(
        [s0 | (s1 >> 4 << 6), m0 | (m1 >> 4 << 6), (s1 & 15) | (m1 & 15) << 4], axis=-1
    )
