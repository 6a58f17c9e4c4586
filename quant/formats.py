"""What a block of each number format is: one frozen record per GGML type and per plane format.

Owns: type ids, block sizes and the arithmetic that ties them. Must not know files or kernels.
Source: ggml's `ggml-common.h` block structures, whose sizes are asserted here at import; the
plane formats and the bases are edgert's own and have no type id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from edgert.errors import UnsupportedError

__all__ = [
    "BASES", "BY_NAME", "BY_TYPE_ID", "CODE_BITS", "FORMATS", "PLANES", "BaseFormat",
    "PlaneFormat", "QuantFormat", "format_of", "part_block_bytes",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """A number format: `block_size` consecutive weights of a row are stored in `block_bytes`."""

    name: str  # GGML's name, upper case
    type_id: int  # GGML's number in a GGUF file; -1 for a format of edgert's own
    block_size: int  # weights
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for one weight, scales included."""
        return 8 * self.block_bytes / self.block_size

    @property
    def is_float(self) -> bool:
        """True for the unquantised formats, whose kernels take float32 activations."""
        return self.block_size == 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` weights. `columns` must be a multiple of the block."""
        assert columns % self.block_size == 0, (self.name, columns)
        return columns // self.block_size * self.block_bytes

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of `shape` (NumPy order: the last axis is a row)."""
        return prod(shape[:-1]) * self.row_bytes(shape[-1])


@dataclass(frozen=True, slots=True)
class PlaneFormat(QuantFormat):
    """Weights d * q + m of `bits` bits: one float16 scale and offset for a block."""

    bits: int  # 1 to 4


@dataclass(frozen=True, slots=True)
class BaseFormat(QuantFormat):
    """The top `bits` bits of a block's codes, and its scales: what a nested pack begins with.

    A code u = q >> (n - bits) of the n-bit code q of the format `of` stands for the middle of the
    2^(n - bits) codes that have these top bits, so it needs no offset of its own.
    """

    of: QuantFormat
    bits: int


def _record(name: str, type_id: int, block_size: int, *parts: int) -> QuantFormat:
    return QuantFormat(name, type_id, block_size, sum(parts))


# Bytes are written as the parts of ggml's struct: scales first, then packed weights.
_FORMATS = (
    _record("F32", 0, 1, 4),
    _record("F16", 1, 1, 2),
    _record("Q4_0", 2, 32, 2, 16),
    _record("Q4_1", 3, 32, 2, 2, 16),
    _record("Q5_0", 6, 32, 2, 4, 16),
    _record("Q5_1", 7, 32, 2, 2, 4, 16),
    _record("Q8_0", 8, 32, 2, 32),
    _record("Q2_K", 10, 256, 16, 64, 2, 2),
    _record("Q3_K", 11, 256, 32, 64, 12, 2),
    _record("Q4_K", 12, 256, 2, 2, 12, 128),
    _record("Q5_K", 13, 256, 2, 2, 12, 32, 128),
    _record("Q6_K", 14, 256, 128, 64, 16, 2),
    _record("IQ4_NL", 20, 32, 2, 16),
    _record("IQ4_XS", 23, 256, 2, 2, 4, 128),
    _record("BF16", 30, 1, 2),
    _record("MXFP4", 39, 32, 1, 16),
)

BY_TYPE_ID: dict[int, QuantFormat] = {f.type_id: f for f in _FORMATS}
BY_NAME: dict[str, QuantFormat] = {f.name: f for f in _FORMATS}

_BLOCK_BYTES = {
    "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q2_K": 84, "Q3_K": 110,
    "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "IQ4_NL": 18, "IQ4_XS": 136, "MXFP4": 17,
}  # fmt: skip
for _name, _size in _BLOCK_BYTES.items():
    assert BY_NAME[_name].block_bytes == _size, _name

# P3_128: 3 bits a weight, groups of 128. Scale, offset, then the planes: each is G / 8 bytes.
PLANES: dict[str, PlaneFormat] = {
    f"P{bits}_{group}": PlaneFormat(f"P{bits}_{group}", -1, group, 4 + bits * group // 8, bits)
    for bits in (1, 2, 3, 4)
    for group in (32, 128)
}
_PLANE_BYTES = {
    "P1_32": 8, "P1_128": 20, "P2_32": 12, "P2_128": 36,
    "P3_32": 16, "P3_128": 52, "P4_32": 20, "P4_128": 68,
}  # fmt: skip
assert {name: f.block_bytes for name, f in PLANES.items()} == _PLANE_BYTES

# Bits of a code of the formats that can be nested.
CODE_BITS = {
    "Q8_0": 8, "Q6_K": 6, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q4_0": 4, "Q4_1": 4, "Q4_K": 4,
}  # fmt: skip
# Widths with a kernel, by the bits of a whole code: fewer bits guess too few tokens, more leave too
# little to stream.
_BASE_BITS = {8: (3, 4, 5), 6: (3, 4), 5: (3, 4), 4: (2, 3)}


def part_block_bytes(fmt: QuantFormat, bits: int, is_first: bool) -> int:
    """Bytes of a block in a part that holds `bits` bits of its codes, and if it is first scales."""
    codes = fmt.block_size * CODE_BITS[fmt.name] // 8
    return fmt.block_size * bits // 8 + is_first * (fmt.block_bytes - codes)


def _base(of: QuantFormat, bits: int) -> BaseFormat:
    name = f"B{bits}" if of.name == "Q8_0" else f"B{bits}_{of.name}"
    return BaseFormat(name, -1, of.block_size, part_block_bytes(of, bits, True), of, bits)


# By the format they are taken from, and their bits.
BASES: dict[str, dict[int, BaseFormat]] = {
    name: {bits: _base(BY_NAME[name], bits) for bits in _BASE_BITS[n]}
    for name, n in CODE_BITS.items()
}
FORMATS: dict[str, QuantFormat] = {  # every format by its name
    **BY_NAME, **PLANES, **{f.name: f for bases in BASES.values() for f in bases.values()},
}  # fmt: skip

# Types GGML defines that edgert does not run, so that a refusal can name them.
_KNOWN_UNSUPPORTED = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip


def format_of(type_id: int) -> QuantFormat:
    """The format with GGML's `type_id`. Raises `UnsupportedError` that names the type."""
    found = BY_TYPE_ID.get(type_id)
    if found is None:
        name = _KNOWN_UNSUPPORTED.get(type_id, "unknown")
        supported = " ".join(BY_NAME)
        raise UnsupportedError(f"tensor type {type_id} ({name}) is not one of {supported}")
    return found
