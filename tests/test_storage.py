"""Backends, device rate, arena and window."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from faults import FailingArena, FaultPlan, FaultyBackend, fill
from hypothesis import given
from hypothesis import strategies as st

from edgert.errors import EdgertError, ModelError, StorageError
from edgert.storage.arena import Arena
from edgert.storage.backend import ALIGNMENT, FileBackend, MemoryBackend, aligned_range
from edgert.storage.device import measure_read_rate
from edgert.storage.manifest import Extent
from edgert.storage.window import Window


def pages(nbytes: int) -> np.ndarray:
    """Page-aligned bytes."""
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8)[:nbytes]


@pytest.fixture
def blob(tmp_path: Path) -> tuple[Path, bytes]:
    """A file that ends in the middle of a block, and its bytes."""
    data = fill(10 * ALIGNMENT + 123, seed=1).tobytes()
    path = tmp_path / "blob.bin"
    path.write_bytes(data)
    return path, data


# ---- backends -----------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(0, 10**5), st.sampled_from([1, 512, 4096]))
def test_aligned_range_is_the_smallest_that_holds_the_extent(offset, nbytes, alignment):
    first, size, skip = aligned_range(Extent(0, offset, nbytes), alignment)
    assert first % alignment == 0 and size % alignment == 0
    assert first + skip == offset and skip < alignment
    assert first + size >= offset + nbytes
    assert size - skip - nbytes < alignment


@pytest.mark.parametrize("direct", [True, False])
def test_file_reads_are_exact_at_every_block(blob, direct):
    path, data = blob
    backend = FileBackend([path], direct=direct)
    assert backend.paths == (path,) and backend.size(0) == len(data)
    for first in range(0, 11 * ALIGNMENT, ALIGNMENT):
        for n in (1, 3, 11):
            end = min(first + n * ALIGNMENT, 11 * ALIGNMENT)
            buffer = pages(end - first)
            backend.read_into(0, first, buffer.data)
            there = data[first:end]
            assert buffer[: len(there)].tobytes() == there
    backend.close()
    backend.close()
    with pytest.raises(AssertionError, match="closed"):
        backend.read_into(0, 0, pages(ALIGNMENT).data)


def test_memory_backend_reads_as_a_file_does():
    data = bytes(range(256)) * 40
    backend = MemoryBackend([b"", data], alignment=4096)
    buffer = pages(8192)
    backend.read_into(1, 4096, buffer.data)
    assert buffer[: len(data) - 4096].tobytes() == data[4096:]
    assert [backend.size(i) for i in (0, 1)] == [0, len(data)]
    assert len(backend.paths) == 2
    with pytest.raises(AssertionError):
        backend.read_into(1, 100, buffer.data)
    with pytest.raises(AssertionError):
        backend.read_into(1, 8192, buffer.data)
    backend.close()


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs positioned reads")
@pytest.mark.parametrize(
    ("direct", "most"),
    [(True, 4096), (True, 5000), (True, 8199), (False, 1), (False, 100), (False, 5000)],
)
def test_short_reads_are_continued(blob, monkeypatch, direct, most):
    path, data = blob
    backend = FileBackend([path], direct=direct)
    true = os.preadv

    def short(fd, buffers, offset):
        assert not backend.direct or offset % ALIGNMENT == 0
        return min(most, true(fd, buffers, offset))

    monkeypatch.setattr(os, "preadv", short)
    buffer = pages(8 * ALIGNMENT)
    backend.read_into(0, ALIGNMENT, buffer.data)
    assert buffer.tobytes() == data[ALIGNMENT : 9 * ALIGNMENT]
    backend.close()


def test_a_system_without_positioned_reads(blob, monkeypatch):
    path, data = blob
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    backend = FileBackend([path], direct=False)
    out = [pages(ALIGNMENT) for _ in range(10)]
    threads = [
        threading.Thread(target=backend.read_into, args=(0, i * ALIGNMENT, out[i].data))
        for i in range(10)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert b"".join(o.tobytes() for o in out) == data[: 10 * ALIGNMENT]
    backend.close()


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT on this system")
@pytest.mark.parametrize("where", ["open", "read"])
def test_a_file_system_without_direct_reads_falls_back(blob, monkeypatch, where):
    path, data = blob
    true_open, true_preadv = os.open, os.preadv

    def refuse_open(name, flags, *rest, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return true_open(name, flags, *rest, **named)

    def refuse_read(fd, buffers, offset):
        raise OSError(errno.EINVAL, "Invalid argument")

    if where == "open":
        monkeypatch.setattr(os, "open", refuse_open)
    else:
        monkeypatch.setattr(os, "preadv", refuse_read)
    backend = FileBackend([path])
    monkeypatch.setattr(os, "preadv", true_preadv)
    assert not backend.direct
    buffer = pages(2 * ALIGNMENT)
    backend.read_into(0, 0, buffer.data)
    assert buffer.tobytes() == data[: 2 * ALIGNMENT]
    backend.close()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [0, 100, 3 * ALIGNMENT, 5 * ALIGNMENT + 17])
def test_a_file_cut_while_open_is_reported(blob, direct, size):
    path, data = blob
    backend = FileBackend([path], direct=direct)
    os.truncate(path, size)
    with pytest.raises(StorageError, match="cut or replaced") as info:
        backend.read_into(0, ALIGNMENT, pages(8 * ALIGNMENT).data)
    assert (info.value.path, info.value.offset) == (path, ALIGNMENT)
    assert str(path) in str(info.value) and "4,096" in str(info.value)
    backend.close()


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_written_to_while_open_is_reported_and_a_renamed_one_is_not(blob, direct):
    path, data = blob
    backend = FileBackend([path], direct=direct)
    buffer = pages(2 * ALIGNMENT)
    backend.read_into(0, ALIGNMENT, buffer.data)
    path.rename(path.with_suffix(".old"))
    path.write_bytes(bytes(len(data)))  # another file of this name
    backend.read_into(0, ALIGNMENT, buffer.data)
    assert buffer.tobytes() == data[ALIGNMENT : 3 * ALIGNMENT]
    with open(path.with_suffix(".old"), "ab") as file:
        file.write(b"x")
    with pytest.raises(StorageError, match="written to while in use and is 41,084 bytes long"):
        backend.read_into(0, ALIGNMENT, buffer.data)
    backend.close()


def test_a_failing_device_names_file_and_offset(blob, monkeypatch):
    path, _ = blob
    backend = FileBackend([path], direct=False)

    def broken(fd, buffers, offset):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StorageError) as info:
        backend.read_into(0, ALIGNMENT, pages(ALIGNMENT).data)
    assert str(info.value) == (
        f"{path}: reading 4,096 bytes at byte 4,096 failed: Input/output error"
    )
    backend.close()


def test_a_missing_file_is_a_model_error_and_leaks_nothing(blob, tmp_path):
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    with pytest.raises(ModelError, match="cannot be opened: No such file"):
        FileBackend([blob[0], tmp_path / "none"])
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_changed_since_its_header_was_read(blob):
    path, data = blob
    FileBackend([path], file_bytes=[len(data)]).close()
    with pytest.raises(ModelError) as info:
        FileBackend([path], file_bytes=[len(data) + 1])
    assert str(info.value) == (
        f"{path} is 41,083 bytes long, but was 41,084 when its header was read; "
        "it is being written, so wait and open it again"
    )


def cached_pages(path: Path) -> int:
    """Pages of the file that the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), size) as view:
        held = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        anchor = ctypes.c_char.from_buffer(view)
        code = libc.mincore(
            ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), ctypes.byref(held)
        )
        del anchor
    assert code == 0, os.strerror(ctypes.get_errno())
    return sum(b & 1 for b in held)


@pytest.mark.skipif(sys.platform != "linux", reason="counts cached pages with mincore")
@pytest.mark.parametrize("direct", [True, False])
def test_reading_leaves_no_page_in_the_cache(tmp_path, direct):
    path = tmp_path / "big.bin"
    data = fill(8 << 20, seed=3)
    path.write_bytes(data.tobytes())
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(path) > 0:
        pytest.skip("this file system keeps pages (tmpfs)")
    path.read_bytes()
    assert cached_pages(path) == (8 << 20) // mmap.PAGESIZE  # the count can tell
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    backend = FileBackend([path], direct=direct)
    if backend.direct != direct:
        pytest.skip("this file system takes no direct reads")
    buffer = pages(1 << 20)
    most = 0
    for i in range(8):
        backend.read_into(0, i << 20, buffer.data)
        assert buffer.tobytes() == data[i << 20 : (i + 1) << 20].tobytes()
        most = max(most, cached_pages(path))
    backend.close()
    assert most == 0


def test_measured_rate_reads_within_its_limit(blob):
    backend = FaultyBackend(FileBackend([blob[0]]))
    rate = measure_read_rate(backend, request_bytes=8192, threads=3, seconds=5.0, limit_bytes=65536)
    assert rate > 0
    assert 8 <= backend.reads <= 8 + 3
    backend.plan = FaultPlan(fail_from=1)
    with pytest.raises(StorageError, match="Input/output error"):
        measure_read_rate(backend, request_bytes=8192, threads=2, seconds=5.0)
    backend.close()


# ---- arena and window ---------------------------------------------------------------------


def test_arena_goes_from_open_to_sealed_to_closed():
    arena = Arena(100_000)
    assert arena.state == "open" and arena.address % mmap.PAGESIZE == 0
    first = arena.take("first", 100)
    second = arena.take("second", 5000, alignment=4096)
    assert first.ctypes.data == arena.address
    assert second.ctypes.data == arena.address + 4096
    assert [(r.name, r.offset, r.nbytes) for r in arena.regions] == [
        ("first", 0, 100),
        ("second", 4096, 5000),
    ]
    assert arena.used_bytes == 9096
    assert not first.any() and not second.any()
    first[:], second[:] = 1, 2
    assert (first == 1).all()
    with pytest.raises(AssertionError, match="beyond the 100000 planned"):
        arena.take("third", 100_000)
    with pytest.raises(AssertionError, match="taken already"):
        arena.take("first", 1)
    arena.seal()
    assert arena.state == "sealed"
    with pytest.raises(AssertionError, match="the arena is sealed"):
        arena.take("late", 1)
    arena.close()
    arena.close()
    assert arena.state == "closed"
    for use in (lambda: arena.take("late", 1), arena.seal, lambda: arena.address):
        with pytest.raises(AssertionError, match="the arena is closed"):
            use()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident size from /proc")
def test_closing_gives_the_memory_back_while_views_live():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    arena = Arena(64 << 20)
    view = arena.take("all", 64 << 20)
    view[:] = 1
    full = resident()
    arena.close()
    assert full - resident() > 60 << 20
    assert not view[:100].any()  # still mapped


def test_memory_the_system_does_not_have_is_a_clear_error():
    with pytest.raises(EdgertError, match="does not grant 4194304.0 TiB of memory"):
        Arena(2**62)
    arena = FailingArena(8192, fail_at=2)
    arena.take("a", 10)
    with pytest.raises(EdgertError, match="'b'"):
        arena.take("b", 10)
    assert len(arena.take("c", 10)) == 10


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.sampled_from([1, 8, 64, 512, 4096])), max_size=12)
)
def test_arena_regions_are_aligned_and_apart(wanted):
    arena = Arena(200_000)
    views = [arena.take(str(i), n, a) for i, (n, a) in enumerate(wanted)]
    for i, ((nbytes, alignment), view) in enumerate(zip(wanted, views, strict=True)):
        assert view.nbytes == nbytes
        assert nbytes == 0 or view.ctypes.data % alignment == 0
        view[:] = i + 1
    for i, view in enumerate(views):
        assert (view == i + 1).all()
    arena.close()


def test_window_slots_are_aligned_and_apart():
    region = pages(5 * 8192 + 100)
    window = Window(region, 8192)
    assert (window.n_slots, window.slot_bytes) == (5, 8192)
    for slot in range(5):
        assert window.address(slot) % ALIGNMENT == 0
        assert window.view(slot).ctypes.data == window.address(slot)
        assert window.view(slot).nbytes == 8192
        window.view(slot)[:] = slot + 1
    assert [int(window.view(s).min()) for s in range(5)] == [1, 2, 3, 4, 5]
    for bad in (-1, 5):
        with pytest.raises(AssertionError):
            window.view(bad)
        with pytest.raises(AssertionError):
            window.address(bad)
    for slot_bytes in (0, 100, 6 * 8192):
        with pytest.raises(AssertionError):
            Window(region, slot_bytes)
    with pytest.raises(AssertionError, match="not aligned"):
        Window(region[64:], 4096)
