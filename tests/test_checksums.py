"""Reads compared with the checksums of a pack: what is wrong is found where it is, and named."""

from __future__ import annotations

import re
import struct
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert import BudgetError, FormatError, InputError
from edgert.pack import _moved
from edgert.storage.backend import FileBackend
from edgert.storage.checksums import Checksums, checksum_bytes, damaged, read_checksums
from edgert.storage.gguf import metadata_bytes
from edgert.storage.manifest import Manifest
from edgert.storage.pack import HEADER, OLD_CHUNK_BYTES, PAGE, encode_header, encode_index
from edgert.units import KIB, align_up
from tests.command import assert_error, inside
from tests.command import edgert as command
from tests.tight import fixed_process, tight
from tests.tiny import prompt_of, tiny_model


class FlippedBackend(FileBackend):
    """A medium that gets a bit wrong: byte -> mask."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(paths)
        self.flips: dict[int, int] = {}

    def read_into(self, file_index: int, offset: int, view: memoryview) -> None:
        super().read_into(file_index, offset, view)
        for at, mask in self.flips.items():
            if offset <= at < offset + len(view):
                view[at - offset] ^= mask


def flipped(path: Path, at: int) -> FlippedBackend:
    backend = FlippedBackend([path])
    backend.flips[at] = 16
    return backend


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pack in tiles, one nested, one of experts."""
    folder = tmp_path_factory.mktemp("checksums")
    made = {}
    for kind, family, nested in (
        ("tiles", "llama", None), ("nested", "llama", "4+4"), ("experts", "olmoe", None),
    ):  # fmt: skip
        source = tiny_model(family, "Q8_0", path=folder / f"{kind}.gguf")
        made[kind] = folder / f"{kind}.edgert"
        edgert.pack_model(source, made[kind], nested=nested)
    return made


# ----------------------------------------------------------------------------- any run of pages


def test_any_run_of_pages_is_compared_alone() -> None:
    """With the checksum that the document asks for, and every page of a run that is wrong."""
    data = np.random.default_rng(0).integers(0, 256, 9 * PAGE, np.uint8)
    start = 3 * PAGE
    sums = Checksums(start, PAGE, True, np.zeros(9, np.uint32))
    for first, last in ((0, 2), (2, 7), (7, 9)):
        sums.fill(start + first * PAGE, data[first * PAGE : last * PAGE].data)
    assert sums.values.tolist() == [zlib.crc32(data[: i * PAGE].data) for i in range(1, 10)]
    for first in range(9):
        for last in range(first + 1, 10):
            run = data[first * PAGE : last * PAGE].copy()
            assert sums.first_wrong(start + first * PAGE, run.data) is None
            for page in range(last - first):
                run[page * PAGE + 17] ^= 1
                found = sums.first_wrong(start + first * PAGE, run.data)
                assert found == start + (first + page) * PAGE
                run[page * PAGE + 17] ^= 1


def test_what_lies_somewhere_has_a_name(packs: dict[str, Path]) -> None:
    def at(kind: str, byte: int) -> str:
        manifest = edgert.read_manifest(packs[kind])
        error = damaged(manifest, byte, byte + 1)
        assert error.offset == byte and f"(at byte {byte:,})" in str(error)
        found = re.search(r"checksum in (.*); copy or pack it again", str(error))
        assert found
        return found[1]

    manifest = edgert.read_manifest(packs["nested"])
    entry = manifest.tensors["blk.1.ffn_up.weight"]
    tile = entry.parts[1].nbytes // -(-entry.shape[0] // 16)
    where = entry.parts[1].offset + tile
    assert at("nested", where) == "rows 16 to 31 of part 1 of blk.1.ffn_up.weight"
    assert at("nested", where - 1) == "rows 0 to 15 of part 1 of blk.1.ffn_up.weight"
    vector = manifest.tensors["blk.0.attn_norm.weight"].extent
    assert at("nested", vector.offset) == "blk.0.attn_norm.weight"
    table = manifest.tensors["token_embd.weight"]
    assert at("nested", table.rows(5, 6).offset) == "row 5 of token_embd.weight"
    stack = edgert.read_manifest(packs["experts"]).tensors["blk.1.ffn_down_exps.weight"]
    inside_it = stack.matrix(3).extent.offset
    assert at("experts", inside_it) == "rows 0 to 15 of expert 3 of blk.1.ffn_down_exps.weight"
    assert at("experts", 64) == "padding"


# ----------------------------------------------------------------------------- the read path

SPARE = 800 * KIB  # with which the bases of the nested one fit, and some tiles whole
GREEDY: dict[str, Any] = dict(max_tokens=4, temperature=0)
KINDS = [("tiles", 0), ("nested", 0), ("nested", SPARE), ("experts", 0)]


def checked(path: Path, spare: int | None, backend: Any = None) -> edgert.Engine:
    """As `tight`, with what the checksums take beside."""
    more = None if spare is None else spare + checksum_bytes(edgert.read_manifest(path))
    return tight(path, more, backend=backend, verify_checksums=True)


def families(kind: str) -> list[int]:
    return prompt_of("olmoe" if kind == "experts" else "llama", 12)


def pieces_read(engine: edgert.Engine, manifest: Manifest, token: int) -> dict[str, int]:
    """What is read in every answer of an engine: how it is named -> a byte of it."""
    plan, found = engine.plan, {}
    table = manifest.tensors["token_embd.weight"]
    row = table.rows(token, token + 1)
    found["row"] = row.offset + row.nbytes // 2
    for tile in plan.tiles:
        if tile.stream_index == 0:
            entry = manifest.tensors[tile.tensor]
            for i, read in enumerate(tile.extents):
                if read in tile.reads:
                    name = f"part {i} of {tile.tensor}" if entry.parts else tile.tensor
                    found[name] = read.offset + read.nbytes - 1
    return found


@pytest.mark.parametrize(("kind", "spare"), KINDS)
def test_what_is_read_while_running_is_compared(
    packs: dict[str, Path], kind: str, spare: int
) -> None:
    """The pass ends with an error that says where; the next one is right once the byte is."""
    path, prompt = packs[kind], families(kind)
    manifest = edgert.read_manifest(path)
    with tight(path, spare) as engine:
        want = engine.generate(prompt, **GREEDY)
    backend = FlippedBackend([path])
    with checked(path, spare, lambda paths: backend) as engine:
        assert not engine.plan.embedding_resident
        assert engine.plan.can_draft == (kind == "nested" and spare > 0)
        assert engine.generate(prompt, **GREEDY).tokens == want.tokens
        pieces = pieces_read(engine, manifest, prompt[-1])
        assert len(pieces) == (3 if (kind, spare) == ("nested", 0) else 2)
        if kind == "experts":
            stack = manifest.tensors["blk.1.ffn_up_exps.weight"]
            for i in range(stack.shape[0]):
                backend.flips[stack.matrix(i).extent.offset + 99] = 1
            with pytest.raises(FormatError, match=r"expert \d+ of blk\.1\.ffn_up_exps"):
                engine.generate(prompt[::-1], **GREEDY)
            backend.flips.clear()
        for name, at in pieces.items():
            backend.flips = {at: 128}
            for _ in range(2):
                with pytest.raises(FormatError, match=re.escape(name)) as caught:
                    engine.generate(prompt[::-1], **GREEDY)
                assert caught.value.offset == at - at % PAGE and caught.value.path == path
            backend.flips = {}
            done = engine.generate(prompt, **GREEDY)
            assert (done.tokens, done.stats.logits_hash) == (want.tokens, want.stats.logits_hash)


@pytest.mark.parametrize("kind", ["tiles", "nested", "experts"])
def test_what_is_loaded_is_compared(packs: dict[str, Path], kind: str) -> None:
    path = packs[kind]
    tensors = edgert.read_manifest(path).tensors
    entry = tensors["blk.1.attn_output.weight"]
    places = {
        "blk.1.attn_norm.weight": tensors["blk.1.attn_norm.weight"].extent,
        "token_embd.weight": tensors["token_embd.weight"].extent,
    }
    for i, part in enumerate(entry.parts):
        places[f"part {i} of {entry.name}"] = part
    places.setdefault(entry.name, entry.extent)
    for name, extent in places.items():
        with pytest.raises(FormatError, match=re.escape(name)):
            checked(path, None, lambda _, at=extent.offset + 40: flipped(path, at))
        assert not [t.name for t in threading.enumerate() if t.name.startswith("edgert-")]
    with checked(path, None) as engine:
        held = engine.memory().held["checksums"]
        assert (
            held
            <= engine.plan.region("checksums").nbytes
            == checksum_bytes(edgert.read_manifest(path))
        )
        got = engine.generate(families(kind), **GREEDY)
    with tight(path, None) as engine:
        assert engine.generate(families(kind), **GREEDY).tokens == got.tokens
        assert engine.plan.region("checksums").nbytes == 0


def test_a_larger_budget_reads_what_it_compares(packs: dict[str, Path]) -> None:
    path = packs["tiles"]
    backend = FlippedBackend([path])
    with checked(path, 0, lambda paths: backend) as engine:
        want = engine.generate(families("tiles"), **GREEDY).tokens
        before = engine.plan.budget_bytes
        backend.flips = {t.extents[0].offset: 1 for t in engine.plan.tiles if t.stream_index >= 0}
        with pytest.raises(FormatError, match="checksum in rows"):
            engine.set_memory_budget(before + 8 * SPARE)
        assert engine.plan.budget_bytes == before
        backend.flips = {}
        engine.set_memory_budget(before + 8 * SPARE)
        assert engine.generate(families("tiles"), **GREEDY).tokens == want


def test_checksums_count_in_the_budget(packs: dict[str, Path]) -> None:
    path = packs["tiles"]
    sums = checksum_bytes(edgert.read_manifest(path))
    assert sums == 4 * (path.stat().st_size - read_checksums(path).start) // PAGE
    with checked(path, 0) as engine:
        assert engine.plan.total_bytes == engine.plan.floor_bytes == engine.plan.budget_bytes
        without = engine.plan.floor_bytes - sums
    with fixed_process():
        options: dict[str, Any] = dict(threads=2, context_length=256, verify_checksums=True)
        with pytest.raises(BudgetError):
            edgert.load(path, memory_budget=without + sums - 1, **options)
        assert edgert.plan_model(path, memory_budget=2**40, **options).floor_bytes == without + sums


def test_a_flipped_bit_and_the_command(tmp_path: Path, packs: dict[str, Path]) -> None:
    path = tmp_path / "m.edgert"
    data = bytearray(packs["tiles"].read_bytes())
    entry = edgert.read_manifest(packs["tiles"]).tensors["blk.0.attn_q.weight"]
    data[entry.extent.offset + 4096] ^= 2
    path.write_bytes(data)
    run = ("run", path, "-p", "a", "-n", 1, "--verify-checksums")
    words = f"(at byte {entry.extent.offset + 4096:,})"
    assert_error(command(*run), 3, "do not match their checksum in rows ", words, "attn_q.weight")
    assert command("run", path, "-p", "a", "-n", 1).returncode == 0


# ----------------------------------------------------------------------------- where there are none


def as_version_1(path: Path, source: Path, out: Path) -> None:
    """The pack as version 1 has it: one checksum for each MiB."""
    manifest, start = edgert.read_manifest(path), read_checksums(path).start
    data = path.read_bytes()[start:]
    sums = [
        zlib.crc32(data[at : at + OLD_CHUNK_BYTES]) for at in range(0, len(data), OLD_CHUNK_BYTES)
    ]
    entries = list(manifest.tensors.values())
    n_keys, metadata = metadata_bytes(source)
    table = struct.pack(f"<{len(sums)}I", *sums)
    new = align_up(HEADER.size + len(encode_index(n_keys, metadata, entries)) + len(table), PAGE)
    index = encode_index(n_keys, metadata, [_moved(e, new - start) for e in entries]) + table
    raw = bytearray(encode_header(new + len(data), index, new))
    struct.pack_into("<I", raw, 12, 1)
    struct.pack_into("<I", raw, 40, OLD_CHUNK_BYTES)
    struct.pack_into("<I", raw, 60, zlib.crc32(raw[:60]))
    out.write_bytes((raw + index).ljust(new, b"\0") + data)


def test_packs_of_version_1_open_and_say_what_they_lack(
    tmp_path: Path, packs: dict[str, Path]
) -> None:
    old, prompt = tmp_path / "old.edgert", families("nested")
    as_version_1(packs["nested"], packs["nested"].with_suffix(".gguf"), old)
    edgert.verify_pack(old)
    found = []
    for path in (old, packs["nested"]):
        with tight(path, SPARE) as engine:
            found.append(engine.generate(prompt, **GREEDY).stats.logits_hash)
    assert found[0] == found[1]
    words = "is version 1 of the .edgert format, with one checksum for each MiB"
    for refused in (edgert.load, edgert.plan_model):
        with pytest.raises(InputError, match=words):
            refused(old, verify_checksums=True)
    data = bytearray(old.read_bytes())
    last = edgert.read_manifest(old).tensors["output.weight"].parts[1]
    data[last.offset + 5] ^= 1
    old.write_bytes(data)
    with pytest.raises(FormatError, match=r"part 1 of .*copy or pack it again") as caught:
        edgert.verify_pack(old)
    assert caught.value.offset is not None and last.offset - caught.value.offset < OLD_CHUNK_BYTES


def test_a_gguf_has_no_checksums(tiny_gguf: Path) -> None:
    for refused in (edgert.load, edgert.plan_model):
        with pytest.raises(InputError, match="is no .edgert file, and has no checksums"):
            refused(tiny_gguf, verify_checksums=True)
    for name, *more in (("run", "-p", "a"), ("plan",)):
        assert_error(inside(name, tiny_gguf, "--verify-checksums", *more), 2, "has no checksums")
