"""The linker of kernels: the same code as LLVM's, and object files that are not what they say."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import numpy as np
import pytest

from edgert.kernels_cpu import activations, jit, linking
from edgert.kernels_cpu.cache import read_code
from edgert.kernels_cpu.linking import LinkError, link

pytestmark = pytest.mark.skipif(not linking.CAN_LINK, reason="this system lets LLVM link")


@pytest.fixture(scope="module")
def kept() -> tuple[str, bytes]:
    """Symbol and object code of a kernel with constants, common symbols and calls."""
    kernel = activations.quantize_rows
    kernel.compile()
    found = read_code(jit.cache_folder() / kernel._file_name())
    assert found is not None
    return found


def quantized(address: int) -> bytes:
    kernel = activations.quantize_rows
    call = ctypes.CFUNCTYPE(None, *[jit._C_TYPES[letter] for letter in kernel.signature])(address)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    kernel.compile()
    before, kernel._call = kernel._call, call
    try:
        return activations.quantize(x).tobytes()
    finally:
        kernel._call = before


def test_it_does_what_llvm_does(kept: tuple[str, bytes]) -> None:
    symbol, code = kept
    engine = jit._engine()
    engine.add_object_file(jit.llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    own = link(code, symbol)
    assert own != (llvm := engine.get_function_address(symbol))
    assert quantized(own) == quantized(llvm)


def test_every_kernel_that_is_kept_can_be_linked() -> None:
    files = sorted(Path(jit.cache_folder()).glob("*.code"))
    assert files
    for path in files:
        found = read_code(path)
        assert found is None or link(found[1], found[0])


def test_code_may_be_run_and_not_changed(kept: tuple[str, bytes]) -> None:
    address = link(kept[1], kept[0])
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(first, 16) <= address < int(last, 16):
            assert line.split()[1].startswith("r-x")
            return
    raise AssertionError("not in memory")


def sections(code: bytes) -> list[tuple[int, linking._Section]]:
    at, _, count, _ = struct.unpack_from("<Q10xHHH", code, 40)
    size = linking._SECTION.size
    return [
        (at + i * size, linking._Section(*linking._SECTION.unpack_from(code, at + i * size)))
        for i in range(count)
    ]


def relocations(code: bytes) -> linking._Section:
    placed = {i for i, (_, s) in enumerate(sections(code)) if s.flags & 2 and s.flags & 4}
    return next(s for _, s in sections(code) if s.type == 4 and s.info in placed and s.size)


def test_an_unknown_kind_of_reference_is_refused(kept: tuple[str, bytes]) -> None:
    symbol, code = kept
    bad = bytearray(code)
    struct.pack_into("<I", bad, relocations(code).offset + 8, 2)  # relative to the instruction
    with pytest.raises(LinkError, match="a reference of type 2 at"):
        link(bytes(bad), symbol)


def test_a_reference_outside_its_section_is_refused(kept: tuple[str, bytes]) -> None:
    symbol, code = kept
    bad = bytearray(code)
    struct.pack_into("<Q", bad, relocations(code).offset, 2**40)
    with pytest.raises(LinkError, match="at 1099511627776 of"):
        link(bytes(bad), symbol)


def test_data_that_code_may_change_is_refused(kept: tuple[str, bytes]) -> None:
    symbol, code = kept
    bad = bytearray(code)
    at, found = next((at, s) for at, s in sections(code) if s.flags & 2 and s.size)
    struct.pack_into("<Q", bad, at + 8, found.flags | 1)
    with pytest.raises(LinkError, match="may change"):
        link(bytes(bad), symbol)


def test_a_name_that_nothing_has_is_told(kept: tuple[str, bytes]) -> None:
    with pytest.raises(LinkError, match="no_such_function is damaged|StopIteration"):
        link(kept[1], "no_such_function")
    with pytest.raises(LinkError, match="this process has no edgert_nothing"):
        linking._outside("edgert_nothing")


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"\x00" * 4096, b"MZ" * 99])
def test_another_kind_of_file_is_refused(content: bytes) -> None:
    with pytest.raises(LinkError):
        link(content, "anything")


def test_cut_files_are_refused_or_whole(kept: tuple[str, bytes]) -> None:
    """At every 97th length: an error of ours, never a crash."""
    symbol, code = kept
    for length in range(0, len(code) - 1, 97):
        with pytest.raises(LinkError):
            link(code[:length], symbol)
