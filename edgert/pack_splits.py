"""In which parts the codes of nested matrices are kept: what users say, and what is usual.

Owns: reading it. Must not know files or where parts go (pack.py).

The bits of its codes decide how a matrix is split, so that files that mix formats need one choice.
Three bits of eight fit small budgets, and with the next one a base of 4 bits and the rest in one
read; of the others as few bits are streamed as leaves a base worth its memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

from edgert.errors import InputError
from edgert.quant.formats import BASES, CODE_BITS, PLANES, QuantFormat
from edgert.storage.pack import PARTS_MAX

__all__ = ["Splits", "nothing_nested", "read_splits", "split_of"]

Splits = Mapping[int, tuple[int, ...]]  # bits of a code -> bits of its parts
_USUAL = "3+1+4,4+2,4+1,3+1"


def split_of(fmt: QuantFormat, splits: Splits) -> tuple[int, ...]:
    """The bits of the parts of a matrix in `fmt`; empty where it stays whole."""
    return splits.get(CODE_BITS.get(fmt.name, 0), ())


def read_splits(nested: str | None, type_name: str) -> Splits:
    """What `nested` says, "4+4" or several with commas or "auto"; empty for None.

    Raises `InputError` for anything else, and for a `type_name` that leaves no codes to split.
    """
    if nested is None:
        return {}
    if type_name in PLANES:
        raise InputError(f"matrices cannot be both nested and {type_name}; choose one")
    found: dict[int, tuple[int, ...]] = {}
    for text in (_USUAL if nested == "auto" else nested).split(","):
        split = _split(text)
        if sum(split) in found:
            raise InputError(f"{nested!r} says twice how codes of {sum(split)} bits are split")
        found[sum(split)] = split
    return found


def _split(text: str) -> tuple[int, ...]:
    """The bits of each part."""
    parts = text.split("+")
    bits = tuple(int(part) for part in parts if part.isdecimal() and 0 < len(part) < 3)
    n = sum(bits)
    bases = {b for name, of in BASES.items() if CODE_BITS[name] == n for b in of}
    if len(bits) != len(parts) or 0 in bits or not bases or not 2 <= len(bits) <= PARTS_MAX:
        widths = ", ".join(map(str, sorted({*CODE_BITS.values()})))
        raise InputError(
            f"{text!r} is not 2 to {PARTS_MAX} numbers whose sum is one of {widths} (the bits of a "
            "code), as 4+4 or 3+1+4"
        )
    if not any(width in bases for width in accumulate(bits)):
        wanted = " or ".join(map(str, sorted(bases)))
        raise InputError(f"no first parts of {text!r} make the {wanted} bits of a base")
    return bits


def nothing_nested(matrices: Iterable[QuantFormat], splits: Splits) -> str:
    """Why no matrix could be nested, to follow the name of the model."""
    found = [
        f"{name} (codes of {CODE_BITS[name]} bits)"
        if name in CODE_BITS
        else f"{name} (never split)"
        for name in sorted({fmt.name for fmt in matrices})
    ]
    wanted = " or ".join(map(str, sorted(splits)))
    return (
        f"has no matrix with codes of {wanted} bits that could be nested, only {', '.join(found)}"
    )
