"""Packs that are damaged or hostile: refused with file and numbers, or found sound; no crash."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgert
from edgert import EdgertError, FormatError, ModelError, UnsupportedError
from edgert.opening import open_model
from edgert.quant.formats import BY_NAME, PLANES
from edgert.storage import pack
from edgert.storage.manifest import Extent, Manifest, TensorEntry
from edgert.storage.pack import HEADER, encode_header, encode_index, read_pack
from tests.tiny import tiny_model

FIELDS = dict(order=8, version=12, file=16, index=24, data=32, chunk=40, flags=48, reserved=52)
WIDE = {"file", "index", "data", "reserved"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("pack")
    source = tiny_model("olmoe", "Q4_0", path=folder / "m.gguf")
    edgert.pack_model(source, folder / "m.edgert")
    return (folder / "m.edgert").read_bytes()


@pytest.fixture(scope="module")
def packed_mixed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """With experts of several formats in the first layer."""
    folder = tmp_path_factory.mktemp("mixed")
    source = tiny_model("olmoe", "Q4_0", path=folder / "m.gguf")
    fmt, two = BY_NAME["Q4_0"], PLANES["P2_32"]
    edgert.pack_model(source, folder / "m.edgert", formats={EXPERTS: [fmt, two, *[fmt] * 6]})
    return (folder / "m.edgert").read_bytes()


def sealed(data: bytearray) -> bytes:
    """The file with checksums of header and index that match whatever they say now."""
    index = HEADER.size + int.from_bytes(data[24:32], "little")
    if index <= len(data):
        data[44:48] = zlib.crc32(data[HEADER.size : index]).to_bytes(4, "little")
    data[60:64] = zlib.crc32(data[:60]).to_bytes(4, "little")
    return bytes(data)


def with_field(data: bytes, name: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into("<Q" if name in WIDE else "<I", changed, FIELDS[name], value)
    return sealed(changed)


def refused(tmp_path: Path, data: bytes, words: str, error: type[EdgertError]) -> None:
    path = tmp_path / "bad.edgert"
    path.write_bytes(data)
    with pytest.raises(error, match=words) as caught:
        open_model(path)
    assert str(path) in str(caught.value)


# ----------------------------------------------------------------------------- the header


@pytest.mark.parametrize(
    ("name", "value", "words", "error"),
    [
        ("order", 0x0D0C0B0A, "big-endian", UnsupportedError),
        ("order", 7, "byte order mark is 0x7", FormatError),
        ("version", 3, "is version 3 of the .edgert format", UnsupportedError),
        ("version", 0, "is version 0 of the .edgert format", UnsupportedError),
        ("version", 1, "cover 4,096 bytes each, not 1,048,576", FormatError),
        ("flags", 1, "with flags 0x1", UnsupportedError),
        ("reserved", 1, "update edgert", UnsupportedError),
        ("chunk", 1024, "cover 1,024 bytes each, not 4,096", FormatError),
        ("file", 2**62, r"bytes long, not 4,611,686,018,427,387,904", FormatError),
        ("index", 2**62, "an index up to byte 4,611,686,018,427,387,968", FormatError),
        ("index", 2**26, "an index up to byte 67,108,928", FormatError),
        ("data", 64, "data from 64 of", FormatError),
        ("data", 2**63, "data from 9,223,372,036,854,775,808", FormatError),
    ],
)
def test_headers(
    tmp_path: Path, packed: bytes, name: str, value: int, words: str, error: type[EdgertError]
) -> None:
    refused(tmp_path, with_field(packed, name, value), words, error)


@pytest.mark.parametrize("length", [1, 7, 8, 63, 64, 100, 5000, -4096, -1])
def test_cut_files(tmp_path: Path, packed: bytes, length: int) -> None:
    refused(tmp_path, packed[:length], "bad.edgert", FormatError)


def test_a_longer_file(tmp_path: Path, packed: bytes) -> None:
    refused(tmp_path, packed + bytes(4096), "copy or pack it again", FormatError)


def test_checksums_of_header_and_index(tmp_path: Path, packed: bytes) -> None:
    for at, words in ((20, "header does not match"), (200, "index does not match")):
        data = bytearray(packed)
        data[at] ^= 4
        refused(tmp_path, bytes(data), words, FormatError)


def test_any_flipped_bit_is_found(tmp_path: Path, packed: bytes) -> None:
    path = tmp_path / "m.edgert"
    path.write_bytes(packed)
    edgert.verify_pack(path)
    data_offset = int.from_bytes(packed[32:40], "little")
    places = [*range(0, 64, 5), data_offset - 1, data_offset, len(packed) - 1]
    places += range(1000, len(packed), len(packed) // 40)
    for at in places:
        data = bytearray(packed)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        with pytest.raises((FormatError, UnsupportedError), match=r"m\.edgert"):
            edgert.verify_pack(path)


# ----------------------------------------------------------------------------- the tensor table


def rewritten(path: Path, packed: bytes, change: Callable[[dict[str, TensorEntry]], None]) -> bytes:
    """The pack with another tensor table of the same length, its checksums right."""
    path.write_bytes(packed)
    manifest: Manifest = read_pack(path)
    index_bytes = int.from_bytes(packed[24:32], "little")
    data_offset = int.from_bytes(packed[32:40], "little")
    n_sums = (len(packed) - data_offset) // pack.PAGE
    old = encode_index(0, b"", manifest.tensors.values())[16:]
    n_keys = int.from_bytes(packed[64:72], "little")
    body = packed[64 : 64 + index_bytes]
    metadata = body[16 : len(body) - 4 * n_sums - len(old)]
    tensors = dict(manifest.tensors)
    change(tensors)
    index = encode_index(n_keys, metadata, tensors.values()) + body[len(body) - 4 * n_sums :]
    assert len(index) == index_bytes
    return encode_header(len(packed), index, data_offset) + index + packed[64 + index_bytes :]


def moved(tensor: str, /, **changes: object) -> Callable[[dict[str, TensorEntry]], None]:
    def change(tensors: dict[str, TensorEntry]) -> None:
        entry = tensors[tensor]
        more = dict(changes)
        if "offset" in more or "nbytes" in more:
            at = entry.extent
            offset, nbytes = more.pop("offset", at.offset), more.pop("nbytes", at.nbytes)
            more["extent"] = Extent(0, int(str(offset)), int(str(nbytes)))
        tensors[tensor] = replace(entry, **more)  # type: ignore[arg-type]

    return change


EXPERTS = "blk.0.ffn_up_exps.weight"
HEAD, EMBEDDING = "output.weight", "token_embd.weight"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (HEAD, {"offset": 4096 * 10**9}, "reaches from byte 4,096,000,000,000"),
        (HEAD, {"offset": 0}, "reaches from byte 0"),
        (HEAD, {"offset": 4097 * 50}, "lies at 204,850"),
        (HEAD, {"nbytes": 4096}, "has 4,096 bytes in tiles, not"),
        (HEAD, {"stride": 4096}, "with a stride of 4,096"),
        (EXPERTS, {"stride": 0}, "with a stride of 0"),
        (EXPERTS, {"stride": 2**60}, "reaches from byte"),
        (EXPERTS, {"stride": 2**63}, "reaches from byte"),
        (HEAD, {"shape": (2**40, 2**40)}, "impossible shape"),
        (HEAD, {"shape": (0, 256)}, "impossible shape"),
        (HEAD, {"shape": (288, 250)}, "not a multiple of the 32"),
        (HEAD, {"name": EMBEDDING[:13]}, "'token_embd.we' is not part of a"),
        (EMBEDDING, {"layout": "tiles"}, "is in tiles, but is read in rows"),
        ("blk.0.attn_norm.weight", {"layout": "tiles"}, "cannot be in tiles"),
    ],
)
def test_tensor_tables(
    tmp_path: Path, packed: bytes, name: str, changes: dict[str, object], words: str
) -> None:
    data = rewritten(tmp_path / "source", packed, moved(name, **changes))
    refused(tmp_path, data, words, EdgertError)


def test_two_tensors_over_the_same_bytes(tmp_path: Path, packed: bytes) -> None:
    def change(tensors: dict[str, TensorEntry]) -> None:
        at = tensors["blk.0.attn_q.weight"].extent
        moved("blk.1.attn_q.weight", offset=at.offset)(tensors)

    refused(tmp_path, rewritten(tmp_path / "s", packed, change), "overlap", FormatError)


def test_an_expert_over_another(tmp_path: Path, packed: bytes) -> None:
    change = moved("blk.0.ffn_gate_exps.weight", offset=0)

    def shift(tensors: dict[str, TensorEntry]) -> None:
        moved(EXPERTS, offset=tensors["blk.0.ffn_down_exps.weight"].extent.offset)(tensors)

    refused(tmp_path, rewritten(tmp_path / "s", packed, shift), "overlap", FormatError)
    refused(tmp_path, rewritten(tmp_path / "s", packed, change), "reaches from", FormatError)


@pytest.mark.parametrize(("which", "word"), [(0, "layout 9"), (1, "in 9 parts")])
def test_what_later_versions_may_add(tmp_path: Path, packed: bytes, which: int, word: str) -> None:
    at = packed.index(b"token_embd.weight", packed.index(b"token_embd.weight") - 8)
    data = bytearray(packed)
    field = at + len(b"token_embd.weight") + 4 + 16 + 4 + 4 * which
    data[field : field + 4] = (9).to_bytes(4, "little")
    refused(tmp_path, sealed(data), word, UnsupportedError)


# ----------------------------------------------------------------------------- mixed stacks


def matrix(index: int, **changes: object) -> Callable[[dict[str, TensorEntry]], None]:
    """Another format or place for one expert of EXPERTS, as if the whole were right."""

    def change(tensors: dict[str, TensorEntry]) -> None:
        entry = tensors[EXPERTS]
        places = dict(changes)
        new, (fmt, at) = [*entry.matrices], entry.matrices[index]
        new[index] = places.pop("format", fmt), replace(at, **places)  # type: ignore[arg-type]
        tensors[EXPERTS] = replace(
            entry, matrices=tuple(new), format=new[0][0],
            extent=Extent(0, new[0][1].offset, sum(m.nbytes for _, m in new)),
        )  # fmt: skip

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (matrix(3, offset=2**62), r"reaches from byte 4,611,686,018,427,387,904"),
        (matrix(3, offset=0), "reaches from byte 0"),
        (matrix(3, offset=2**63), "reaches from byte|not"),
        (matrix(3, offset=100_001), "matrix 3 of tensor .* at 100,001, not"),
        (matrix(2, nbytes=64), r"matrix 2 of tensor .* has 64 bytes of Q4_0 at .*, not 36,864"),
        (matrix(2, nbytes=2**62), r"has 4,611,686,018,427,387,904 bytes of Q4_0"),
        (matrix(1, format=BY_NAME["Q8_0"]), r"matrix 1 of .* bytes of Q8_0 at .*, not 69,632"),
        (matrix(0, format=PLANES["P4_128"]), "bytes of P4_128"),
        (moved(EXPERTS, offset=8192), "is not what its matrices are"),
        (moved(EXPERTS, nbytes=8192), "is not what its matrices are"),
        (moved(EXPERTS, stride=4096), "is not what its matrices are"),
        (moved(EXPERTS, format=BY_NAME["Q5_0"]), "is not what its matrices are"),
        (moved(EXPERTS, shape=(9, 256, 256)), "is mixed of 8 matrices"),
        (moved(EXPERTS, shape=(8, 256, 128)), "matrix 0 of tensor"),
    ],
)
def test_mixed_stacks(
    tmp_path: Path,
    packed_mixed: bytes,
    change: Callable[[dict[str, TensorEntry]], None],
    words: str,
) -> None:
    refused(tmp_path, rewritten(tmp_path / "s", packed_mixed, change), words, FormatError)


def test_an_expert_of_a_mixed_stack_over_another(tmp_path: Path, packed_mixed: bytes) -> None:
    def change(tensors: dict[str, TensorEntry]) -> None:
        matrix(3, offset=tensors[EXPERTS].matrices[4][1].offset)(tensors)

    refused(tmp_path, rewritten(tmp_path / "s", packed_mixed, change), "overlap", FormatError)


def test_formats_and_counts_of_mixed_stacks(tmp_path: Path, packed_mixed: bytes) -> None:
    at = packed_mixed.index(EXPERTS.encode()) + len(EXPERTS) + 4 + 24 + 4 + 4
    for place, value, words, error in (
        (at + 4 + 24, 77, r"tensor type 77 \(unknown\) is not one of", UnsupportedError),
        (at + 4 + 24, 22, r"tensor type 22 \(IQ2_S\)", UnsupportedError),
        (at, 7, "is mixed of 7 matrices", FormatError),
        (at, 0, "layout 3 in 0 parts", UnsupportedError),
        (at, 2**31, "layout 3 in 2147483648 parts", UnsupportedError),
    ):
        data = bytearray(packed_mixed)
        data[place : place + 4] = value.to_bytes(4, "little")
        refused(tmp_path, sealed(data), words, error)


def test_a_stack_of_more_matrices_than_the_file_has_bytes(
    tmp_path: Path, packed_mixed: bytes
) -> None:
    at = packed_mixed.index(EXPERTS.encode()) + len(EXPERTS) + 4
    data = bytearray(packed_mixed)
    data[at + 16 : at + 24] = (1 << 20).to_bytes(8, "little")
    data[at + 32 : at + 36] = (1 << 20).to_bytes(4, "little")
    refused(tmp_path, sealed(data), r"announces 1,048,576 matrices", FormatError)


# ----------------------------------------------------------------------------- anything at all


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damage_is_refused_or_harmless(
    tmp_path: Path, packed: bytes, packed_mixed: bytes, data: st.DataObject
) -> None:
    """Bytes changed in header or index, with checksums that match: an error or a sound manifest."""
    packed = data.draw(st.sampled_from([packed, packed_mixed]))
    changed = bytearray(packed)
    index_end = 64 + int.from_bytes(packed[24:32], "little")
    place = st.one_of(st.integers(8, 63), st.integers(64, index_end - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(place)
        size = data.draw(st.sampled_from([1, 4, 8]))
        value = data.draw(st.one_of(st.integers(0, 255), st.integers(0, 2**64 - 1)))
        changed[at : at + size] = (value % 256**size).to_bytes(size, "little")
    if data.draw(st.booleans()):
        del changed[data.draw(st.integers(64, len(changed) - 1)) :]
    path = tmp_path / "m.edgert"
    path.write_bytes(sealed(changed) if data.draw(st.integers(0, 9)) else changed)
    try:
        manifest = read_pack(path)
    except (ModelError, UnsupportedError) as error:
        assert str(path) in str(error)
        return
    for entry in manifest.tensors.values():
        count = entry.shape[0] if entry.stride else 1
        end = entry.extent.offset + (count - 1) * entry.stride + entry.extent.nbytes
        ends = [extent.offset + extent.nbytes for _, extent in entry.matrices] or [end]
        assert 0 < entry.extent.offset < max(ends) <= path.stat().st_size
