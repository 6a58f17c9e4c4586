"""Machine code of a kernel, from an object file into memory: a small linker.

Owns: ELF for x86-64 as LLVM writes it for Numba (large code model: every reference is one address
of 64 bits). Must not know what kernels are. Other systems let LLVM link (jit.py), which holds
some 45 MiB for it.
ELF: System V ABI, generic (chapters 4 and 5) and for x86-64 (section 4.4, relocation types).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

__all__ = ["CAN_LINK", "LinkError", "link"]

CAN_LINK = sys.platform == "linux" and platform.machine() == "x86_64"

_HEADER = struct.Struct("<7s9xHH20xQ10xHHH")  # identity, type, machine; the section table
_OBJECT_FILE = (b"\x7fELF\x02\x01\x01", 1, 62)  # 64 bits, little-endian; relocatable; x86-64
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QIIq")
_SYMBOLS, _RELOCATIONS, _EMPTY = 2, 4, 8  # section types
_WRITABLE, _IN_MEMORY = 1, 2  # section flags
_UNDEFINED, _COMMON = 0, 0xFFF2  # in place of a symbol's section
_ADDRESS64 = 1  # R_X86_64_64: symbol + addend
_FRAMES = ".eh_frame"  # for exceptions, which kernels do not raise
# Numba's wrapper names these for exceptions. They are not in a process without Numba.
_NEVER_CALLED = ("numba_gil_ensure", "numba_gil_release")

_linked: list[mmap.mmap] = []  # all code in memory, for the life of the process


class LinkError(Exception):
    """An object file that this linker is not made for, or that needs what the process lacks."""


class _Section(NamedTuple):
    name: int  # where it begins in the table of names
    type: int
    flags: int
    address: int
    offset: int  # in the file
    size: int
    link: int  # of a symbol table: the section of its names
    info: int  # of relocations: the section they are for
    alignment: int
    entry_size: int


class _Symbol(NamedTuple):
    name: str
    section: int
    value: int  # its place in the section; of a common symbol the alignment
    size: int


def link(code: bytes, symbol: str) -> int:
    """The address of the function `symbol` of an object file, in memory and executable.

    Raises `LinkError`, and `OSError` where the system allows no executable memory.
    """
    try:
        return _link(code, symbol)
    except (struct.error, ValueError, IndexError, KeyError, StopIteration) as error:
        raise LinkError(f"the object code of {symbol} is damaged: {error!r}") from None


def _link(code: bytes, symbol: str) -> int:
    sections, symbols = _read(code)
    places, size = _lay_out(sections)
    commons: dict[str, int] = {}
    for common in (s for s in symbols if s.section == _COMMON):
        commons[common.name] = _aligned(size, common.value)
        size = commons[common.name] + common.size
    memory = mmap.mmap(-1, max(size, 1))  # of zeros, which is what common symbols begin as
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def address(number: int) -> int:
        found = symbols[number]
        if found.section == _UNDEFINED:
            return _outside(found.name)
        if found.section == _COMMON:
            return base + commons[found.name]
        return base + places[found.section] + found.value

    for number, place in places.items():
        if sections[number].type != _EMPTY:
            memory[place : place + sections[number].size] = _content(code, sections[number])
    for section in sections:
        if section.type == _RELOCATIONS and section.info in places:
            target = places[section.info], sections[section.info].size
            _relocate(memory, target, _content(code, section), address)
    entry = address(next(i for i, s in enumerate(symbols) if s.name == symbol))
    _make_executable(base, len(memory))
    _linked.append(memory)
    return entry


def _read(code: bytes) -> tuple[list[_Section], list[_Symbol]]:
    """The tables of sections that matter (the others are made empty) and of symbols."""
    *kind, at, size, count, names_at = _HEADER.unpack_from(code)
    if tuple(kind) != _OBJECT_FILE or size != _SECTION.size:
        raise LinkError("not an object file for x86-64")
    found = [_Section(*_SECTION.unpack_from(code, at + i * size)) for i in range(count)]
    names = _content(code, found[names_at])
    frames = [s for s in found if _text(names, s.name) == _FRAMES]
    found = [s._replace(flags=0) if s in frames else s for s in found]
    table = next(s for s in found if s.type == _SYMBOLS)
    names = _content(code, found[table.link])
    return found, [
        _Symbol(_text(names, name), section, value, length)
        for name, _, _, section, value, length in _SYMBOL.iter_unpack(_content(code, table))
    ]


def _content(code: bytes, section: _Section) -> bytes:
    content = code[section.offset : section.offset + section.size]
    if len(content) != section.size:
        raise LinkError(f"{section.size} bytes wanted, {len(content)} there")
    return content


def _text(names: bytes, at: int) -> str:
    return names[at : names.index(b"\0", at)].decode()


def _aligned(size: int, alignment: int) -> int:
    return -(-size // max(alignment, 1)) * max(alignment, 1)


def _lay_out(sections: Sequence[_Section]) -> tuple[dict[int, int], int]:
    """Where each section that code needs begins in memory, and the bytes of all."""
    places, size = {}, 0
    for number, section in enumerate(sections):
        if section.flags & _IN_MEMORY:
            if section.flags & _WRITABLE and section.size:
                raise LinkError("code with data that it may change")
            places[number] = _aligned(size, section.alignment)
            size = places[number] + section.size
    return places, size


def _relocate(
    memory: mmap.mmap, target: tuple[int, int], table: bytes, address: Callable[[int], int]
) -> None:
    """Write the addresses that a section, placed at `target` (begin, size), refers to."""
    begin, size = target
    for offset, kind, symbol, addend in _RELOCATION.iter_unpack(table):
        if kind != _ADDRESS64 or offset > size - 8:
            raise LinkError(f"a reference of type {kind} at {offset} of {size} bytes")
        struct.pack_into("<Q", memory, begin + offset, address(symbol) + addend)


@cache
def _libraries() -> list[ctypes.CDLL]:
    """Where names are looked up: all of the process, and the C library's mathematics."""
    found = [ctypes.CDLL(None, use_errno=True)]
    try:
        found.append(ctypes.CDLL("libm.so.6"))
    except OSError:  # another C library, which has it in one piece
        pass
    return found


@cache
def _outside(name: str) -> int:
    """The address of a function or value of the process."""
    name = "abort" if name in _NEVER_CALLED else name
    for library in _libraries():
        if hasattr(library, name):
            return int(ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0)
    raise LinkError(f"this process has no {name}")


def _make_executable(address: int, size: int) -> None:
    protect = _libraries()[0].mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if protect(address, size, mmap.PROT_READ | mmap.PROT_EXEC) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"no executable memory: {os.strerror(number)}")
