"""Packs: the same weights to the bit, the document true, and writing that loses nothing."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert import EdgertError, FormatError, InputError, UnsupportedError
from edgert.kernels_cpu import layout
from edgert.kernels_cpu.places import FIELDS
from edgert.quant.formats import BASES, BY_NAME, CODE_BITS, PLANES, part_block_bytes
from edgert.quant.planes import quantize_planes_ref as quantize
from edgert.storage import pack, pack_verify, pack_writer
from edgert.storage.gguf import metadata_bytes
from edgert.storage.pack_writer import PackWriter
from tests.command import assert_error, inside
from tests.gguf_file import write_gguf
from tests.tight import tight
from tests.tiny import TinyModel, build, formats_of, prompt_of, tiny_model

FORMAT = (Path(__file__).parents[1] / "storage" / "FORMAT.md").read_text()


def logits(path: Path, family: str, spare: int | None, **options: int) -> str:
    with tight(path, spare, **options) as engine:
        return edgert.logits_hash(engine.logits(prompt_of(family, 12)))


# ----------------------------------------------------------------------------- the same model

# What differs in a file: odd sizes, a tied head, experts, and blocks that grow in tiles.
KEPT = [(family, "Q8_0") for family in ("llama_narrow", "qwen2_tied", "mixtral", "olmoe")]
KEPT += [("llama", name) for name in ("F16", "Q3_K", "Q4_K", "IQ4_XS")]


@pytest.mark.parametrize(("family", "format_name"), KEPT)
def test_the_weights_are_those_of_the_source(tmp_path: Path, family: str, format_name: str) -> None:
    assert format_name in formats_of(family)
    source = tiny_model(family, format_name, path=tmp_path / "m.gguf")
    out = tmp_path / "m.edgert"
    edgert.pack_model(source, out)
    wanted = logits(source, family, None)
    assert logits(out, family, None) == wanted
    # Streamed, or experts on demand.
    assert logits(out, family, 0, threads=1, prefill_tokens=3) == wanted
    theirs, ours = edgert.read_gguf(source).metadata, edgert.read_manifest(out).metadata
    assert list(theirs) == list(ours)
    assert metadata_bytes(source)[1] in out.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_the_same_input_makes_the_same_bytes(tmp_path: Path, tiny_moe_gguf: Path) -> None:
    for name in ("a", "b"):
        edgert.pack_model(tiny_moe_gguf, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_pack_of_q8_0_is_hardly_larger_than_its_weights(tmp_path: Path) -> None:
    source = edgert.bundled_model()
    manifest = edgert.pack_model(source, tmp_path / "m.edgert")
    assert manifest.file_bytes[0] <= 1.02 * source.stat().st_size


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_planes_compute_what_their_numbers_say(tmp_path: Path, family: str) -> None:
    """A pack in 3 bits gives the logits of a model whose weights are those 3-bit numbers."""
    fmt = PLANES["P3_32"]
    model = build(family, "F32")
    source, out = tmp_path / "m.gguf", tmp_path / "m.edgert"
    write_gguf(source, model.metadata, model.tensors)
    manifest = edgert.pack_model(source, out, type_name="P3_32")
    tensors = {}
    for name, (f32, shape, raw) in model.tensors.items():
        if manifest.tensors[name].format is fmt:
            values = np.frombuffer(raw, np.float32).reshape(shape)
            raw = edgert_weights(fmt, quantize(fmt, values)).tobytes()
        tensors[name] = (f32, shape, raw)
    changed = {t.name for t in manifest.tensors.values() if t.format is fmt}
    assert all(re.search(r"attn_(q|k|v|output)\.|ffn_(gate|up|down)(_exps)?\.", n) for n in changed)
    assert len(changed) == 14
    exact = tmp_path / "exact.gguf"
    write_gguf(exact, model.metadata, TinyModel(model.metadata, tensors).tensors)
    tokens = prompt_of(family, 12)
    with tight(exact, None) as engine:
        truth = engine.logits(tokens).copy()
    found = []
    for spare in (None, 0):
        with tight(out, spare) as engine:
            found.append(engine.logits(tokens).copy())
    assert np.array_equal(found[0], found[1])
    # What is left is the rounding of activations to int8; 3 bits themselves are 10 times as much.
    error = np.sqrt(np.mean((found[0] - truth) ** 2) / np.mean(truth**2))
    assert error < 0.03


def edgert_weights(fmt: object, raw: np.ndarray) -> np.ndarray:
    from edgert.quant.reference import dequantize_ref

    return dequantize_ref(fmt, raw).astype(np.float32)  # type: ignore[arg-type]


def test_rows_that_do_not_fit_a_plane_format_are_refused(tmp_path: Path) -> None:
    source = tiny_model("llama_narrow", "Q8_0", path=tmp_path / "m.gguf")
    with pytest.raises(UnsupportedError, match="not a multiple of the 128 of P2_128; P2_32"):
        edgert.pack_model(source, tmp_path / "m.edgert", type_name="P2_128")
    assert list(tmp_path.iterdir()) == [source]


# ----------------------------------------------------------------------------- the document


def test_the_document_has_the_constants() -> None:
    def says(*cells: object) -> bool:
        row = r"\s*\|\s*".join(re.escape(str(cell)) for cell in cells)
        return re.search(rf"^\|\s*{row}\s*\|", FORMAT, re.MULTILINE) is not None

    fields = ("magic", "byte order", "version", "file bytes", "index bytes", "data offset")
    fields += ("step of a checksum", "index checksum", "flags", "reserved", "header checksum")
    at = 0
    for name, size in zip(fields, (8, 4, 4, 8, 8, 8, 4, 4, 4, 8, 4), strict=True):
        assert says(at, size, name), name
        at += size
    assert at == pack.HEADER.size == 64
    assert says("magic", "`" + " ".join(f"{b:02X}" for b in pack.MAGIC) + "`")
    assert says("byte order", f"`0x{pack.BYTE_ORDER:08X}`")
    for name, value in (
        ("version", pack.VERSION), ("page", pack.PAGE), ("part of a record", pack.PART),
        ("tile", pack.TILE_ROWS), ("step of version 1", pack.OLD_CHUNK_BYTES),
    ):  # fmt: skip
        assert says(name, f"{value:,}"), name
    for number, name in enumerate(pack.LAYOUTS):
        assert says(number, name)
    for fmt in PLANES.values():
        assert says(fmt.name, pack.type_id_of(fmt), fmt.block_size, fmt.block_bytes)
    for bits, fields in FIELDS.items():
        spans = (str(low) if width == 1 else f"{low}-{low + width - 1}" for width, low in fields)
        assert says(bits, ", ".join(spans))
    assert f"2 to {pack.PARTS_MAX} of a nested matrix" in FORMAT
    for name, n in CODE_BITS.items():
        widths = " or ".join(", ".join(map(str, BASES[name])).rsplit(", ", 1))
        fmt = BY_NAME[name]
        assert says(name, n, widths, fmt.block_size, part_block_bytes(fmt, 0, True)), name
    for name, more in pack._GROWTH.items():
        assert says(name, BY_NAME[name].block_bytes, BY_NAME[name].block_bytes + more)


def test_tiles_have_the_size_that_kernels_expect() -> None:
    assert pack.TILE_ROWS == layout.TILE_ROWS
    for fmt in [*BY_NAME.values(), *PLANES.values()]:
        for rows, columns in ((1, 256), (16, 512), (37, 768)):
            wanted = layout.matrix_bytes(fmt, rows, columns)
            assert pack.tiles_bytes(fmt, rows, columns) == wanted, fmt.name


# ----------------------------------------------------------------------------- writing


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint every four pages."""
    monkeypatch.setattr(pack_writer, "_SYNC_BYTES", 4 * 4096)
    monkeypatch.setattr(pack_writer, "_BUFFER_BYTES", 4096)
    monkeypatch.setattr("edgert.pack_pieces._PIECE_BYTES", 10_000)


def fail_after(
    monkeypatch: pytest.MonkeyPatch, writes: int, error: BaseException
) -> Callable[[], None]:
    """From that many writes on, every write raises; returns what ends this."""
    real, count = os.pwrite, 0

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        nonlocal count
        count += 1
        if count > writes:
            raise error
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return lambda: monkeypatch.setattr(os, "pwrite", real)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("damage", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_an_interrupted_run_is_continued(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException,
    damage: bool,
) -> None:  # fmt: skip
    whole, out = tmp_path / "whole.edgert", tmp_path / "m.edgert"
    partial = tmp_path / "m.edgert.partial"
    edgert.pack_model(tiny_gguf, whole)
    restore = fail_after(monkeypatch, 60, error)
    kind = EdgertError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind) as caught:
        edgert.pack_model(tiny_gguf, out)
    if isinstance(error, OSError):
        assert "the disk is full; what is there is kept, and the same" in str(caught.value)
    restore()
    assert not out.exists()
    with pytest.raises(FormatError):
        edgert.read_manifest(partial)
    if damage:
        data = bytearray(partial.read_bytes())
        data[-50_000] ^= 1
        partial.write_bytes(data)
    writes: list[int] = []
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, d, at: writes.append(at) or real(fd, d, at))
    edgert.pack_model(tiny_gguf, out)
    start = pack_writer.data_offset_of(0, 0)
    assert min(at for at in writes if at > 4 * start) > 60_000, "nothing was continued"
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()


@pytest.mark.usefixtures("small_steps")
def test_an_interrupted_check_is_continued(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "m.edgert", tmp_path / "m.edgert.partial"

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pack_writer, "verify_pack", interrupt)
        edgert.pack_model(tiny_gguf, out)
    assert not out.exists()
    with pytest.raises(FormatError):
        edgert.read_manifest(partial)
    monkeypatch.setattr("edgert.pack_pieces._made", None)  # nothing is made again
    edgert.pack_model(tiny_gguf, out)
    edgert.verify_pack(out)


@pytest.mark.usefixtures("small_steps")
def test_a_partial_file_of_something_else_is_begun_again(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "m.edgert", tmp_path / "other.gguf"
    tiny_model("llama", "Q8_0", seed=1, path=other)
    restore = fail_after(monkeypatch, 60, OSError(errno.ENOSPC, "No space left"))
    with pytest.raises(EdgertError, match="full"):
        edgert.pack_model(tiny_gguf, out)
    restore()
    edgert.pack_model(other, out)
    edgert.pack_model(other, tmp_path / "again")
    assert out.read_bytes() == (tmp_path / "again").read_bytes()


def test_what_was_written_is_read_back(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that stores something else leaves no file that opens."""
    out, real = tmp_path / "m.edgert", os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if len(data) > 100_000:
            data = memoryview(bytes(data[:-1]) + bytes([data[-1] ^ 1]))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(pack_writer, "_BUFFER_BYTES", 1 << 20)
    with pytest.raises(FormatError, match="what was read back is not what was written"):
        edgert.pack_model(tiny_gguf, out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_steps")
def test_every_page_is_read_back_once_and_most_while_others_are_written(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written, compared = tmp_path / "m.edgert", 0, list[tuple[int, int, int]]()
    append, first_wrong = PackWriter.append, pack_verify.first_wrong

    def appended(self: PackWriter, data: memoryview) -> None:
        nonlocal written
        append(self, data)
        written = self.position

    def compare(backend: Any, sums: Any, start: int, stop: int, progress: Any) -> int | None:
        compared.append((start, stop - start, written))
        return first_wrong(backend, sums, start, stop, progress)

    monkeypatch.setattr(PackWriter, "append", appended)
    for module in (pack_writer, pack_verify):
        monkeypatch.setattr(module, "first_wrong", compare)
    edgert.pack_model(tiny_gguf, out)
    size = out.stat().st_size
    compared = sorted(run for run in compared if run[1])
    starts = [at for at, _, _ in compared]
    assert [at + nbytes for at, nbytes, _ in compared] == [*starts[1:], size]
    assert sum(nbytes for _, nbytes, when in compared if when < written) > 0.9 * written


def test_outputs_that_cannot_be(tmp_path: Path, tiny_gguf: Path) -> None:
    copy = tmp_path / "m.gguf"
    copy.write_bytes(tiny_gguf.read_bytes())
    old = tmp_path / "old.edgert"
    old.write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(copy)
    made = tmp_path / "made.edgert"
    assert inside("pack", copy, "-o", made).returncode == 0
    for out, model, words in (
        (old, copy, "exists; --force replaces it"),
        (tmp_path, copy, "is a folder"),
        (copy, copy, "is the model itself"),
        (link, copy, "is the model itself"),
        (tmp_path / "no" / "m", copy, "cannot be written: No such file or directory"),
        (tmp_path / "m" / "", made, "is an .edgert file already"),
    ):
        assert_error(inside("pack", model, "-o", out), 2, words)
    assert_error(inside("pack", copy, "-o", copy, "--force"), 2, "is the model itself")
    assert old.read_text() == "mine" and copy.read_bytes() == tiny_gguf.read_bytes()
    assert inside("pack", copy, "-o", old, "--force").returncode == 0
    assert old.read_bytes() == made.read_bytes()


def test_an_unwritable_folder(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: str, flags: int, *more: int) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        edgert.pack_model(tiny_gguf, tmp_path / "m.edgert")


def test_a_disk_without_room_is_noticed_before_writing(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = pack_writer.shutil._ntuple_diskusage(1 << 30, 1 << 30, 1 << 20)
    monkeypatch.setattr(pack_writer.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(EdgertError, match=r"needs .* more, but its disk has 1.0 MiB free"):
        edgert.pack_model(tiny_gguf, tmp_path / "m.edgert")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file(tmp_path: Path, tiny_gguf: Path) -> None:
    pytest.importorskip("fcntl")
    writer = pack_writer.PackWriter(tmp_path / "m", b"index", 4096, b"")
    with writer, pytest.raises(InputError, match="is being written by another edgert"):
        edgert.pack_model(tiny_gguf, tmp_path / "m")


# ----------------------------------------------------------------------------- the commands


def test_pack_and_show(tmp_path: Path, tiny_moe_gguf: Path) -> None:
    out = tmp_path / "m.edgert"
    run = inside("pack", tiny_moe_gguf, "-o", out, "--type", "p4_32", "--nearest")
    assert run.returncode == 0 and run.stdout == "", run.stderr
    assert re.search(r"m\.edgert: .* MiB, \d+ % of the source", run.stderr)
    shown = inside("show", out, "--verify")
    assert shown.returncode == 0 and re.search(r"^P4_32 +14 ", shown.stdout, re.MULTILINE)
    assert re.search(r"^verified +yes$", shown.stdout, re.MULTILINE)
    data = bytearray(out.read_bytes())
    data[len(data) // 2] ^= 1
    out.write_bytes(data)
    assert inside("show", out).returncode == 0
    assert_error(inside("show", out, "--verify"), 3, "do not match their checksum in rows ")
    assert_error(inside("show", tiny_moe_gguf, "--verify"), 2, "has no checksums")


def test_llamacpp_needs_a_file_it_can_read(tmp_path: Path, tiny_gguf: Path) -> None:
    out = tmp_path / "m.edgert"
    edgert.pack_model(tiny_gguf, out)
    run = inside("bench", out, "--baseline", "llamacpp")
    assert_error(run, 2, "llama.cpp cannot read", "name a GGUF with --baseline-model")
    run = inside("bench", out, "--baseline-model", tiny_gguf)
    assert_error(run, 2, "--baseline-model needs --baseline llamacpp")
