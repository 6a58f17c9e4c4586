"""Bytes and alignment: the units edgert counts in.

Owns: KiB/MiB/GiB, reading and writing sizes for people, rounding to an alignment.
"""

from __future__ import annotations

import re

from edgert.errors import InputError

__all__ = ["GIB", "KIB", "MIB", "align_down", "align_up", "format_bytes", "parse_bytes"]

KIB = 2**10
MIB = 2**20
GIB = 2**30

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str) -> int:
    """Bytes in a size as people write it: "1.5GiB", "600M", "2gb", "4096".

    "KiB", "K" and "k" are 1024; only a decimal unit spelled out ("KB", "MB", "GB") is 1000.
    Raises `InputError` with the text when it is not a size.
    """
    match = _SIZE.fullmatch(text)
    if not match:
        raise InputError(f"{text!r} is not a size; write one like 1.5GiB, 600MiB or 800MB")
    number, power, binary, byte = match.groups()
    decimal = power and byte and not binary
    value = int(float(number) * (1000 if decimal else 1024) ** _POWER[power.lower()])
    if value >= 2**63:
        raise InputError(f"{text!r} is more bytes than any machine has")
    return value


def format_bytes(nbytes: float) -> str:
    """A size for people: 3 significant parts at most, binary units ("611.3 MiB")."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is at least `value`."""
    return -(-value // alignment) * alignment


def align_down(value: int, alignment: int) -> int:
    """The largest multiple of `alignment` that is at most `value`."""
    return value // alignment * alignment
