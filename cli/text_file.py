"""Text from a file or a pipe.

Owns: what is said when it cannot be read or is not UTF-8. Must not know what the text is for.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edgert import InputError

__all__ = ["read_text", "valid_text", "without_last_newline"]


def read_text(file: Path) -> str:
    """The text of a file, or of stdin for "-", as it is. Raises `InputError`."""
    if str(file) == "-":
        return valid_text(sys.stdin.buffer.read(), "stdin")
    try:
        return valid_text(file.read_bytes(), str(file))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None


def valid_text(data: bytes, name: str) -> str:
    """The bytes as text. Raises `InputError` with the place of the first byte that is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start:,}"
        ) from None


def without_last_newline(text: str) -> str:
    """The text without the newline that editors and `echo` add at the end."""
    return text.removesuffix("\n").removesuffix("\r")
