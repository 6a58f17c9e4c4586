"""The GGUF reader against files it must refuse: damaged, hostile, or merely not for it."""

from __future__ import annotations

import os
import random
import resource
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf_file import (
    SMALL_KEYS,
    SMALL_TENSORS,
    Raw,
    f32,
    gguf_bytes,
    text,
    write_gguf,
    write_split,
)

from edgert.errors import EdgertError, FormatError, ModelError, UnsupportedError
from edgert.storage.gguf import read_gguf
from edgert.storage.manifest import Manifest

REFUSALS = (ModelError, UnsupportedError)  # FormatError is a ModelError


def refuse(path: Path, *words: str, error: type[EdgertError] = FormatError) -> str:
    """Reading `path` raises `error`, whose message has the file and all the words."""
    with pytest.raises(error) as info:
        read_gguf(path)
    message = str(info.value)
    for word in (str(path), *words):
        assert word in message, (word, message)
    return message


# ---- refused: the file itself -------------------------------------------------------------


def test_missing_folder_empty_and_other_files(tmp_path):
    refuse(tmp_path / "no.gguf", "does not exist; check the name", error=ModelError)
    refuse(tmp_path, "is a folder; name the .gguf file", error=ModelError)
    path = tmp_path / "m.gguf"
    path.write_bytes(b"")
    refuse(path, "the file is empty; download")
    for raw in (b"\x7fELF" + bytes(100), b"G", b"<!DOCTYPE html>"):
        path.write_bytes(raw)
        refuse(path, "is not a GGUF model: it begins with")
    with pytest.raises(ModelError, match="cannot be read"):
        read_gguf("bad\0name")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    refuse(tmp_path / "pipe.gguf", "is not a regular file", error=ModelError)


@pytest.mark.parametrize(
    ("version", "endian", "word"),
    [
        (3, ">", "big-endian"),
        (2, ">", "big-endian"),
        (1, "<", "version 1, older"),
        (4, "<", "version 4, newer"),
        (70_000, "<", "version 70000, newer"),
    ],
)
def test_versions(tmp_path, version, endian, word):
    path = write_gguf(
        tmp_path / "m.gguf", SMALL_KEYS, SMALL_TENSORS, version=version, endian=endian
    )
    refuse(path, word, error=UnsupportedError)


def test_reversed_magic_and_version_0(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", magic=b"FUGG")
    refuse(path, "big-endian", error=UnsupportedError)
    refuse(write_gguf(path, version=0), "the version is 0", "byte 4")


# ---- refused: counts and values -----------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ({"n_tensors": 2**60}, "announces 1,152,921,504,606,846,976 tensors"),
        ({"n_tensors": 2**64 - 1}, "tensors, but there is room for"),
        ({"n_keys": 2**60}, "announces 1,152,921,504,606,846,976 metadata keys"),
        ({"n_keys": 2**64 - 1}, "metadata keys, but there is room for"),
        ({"n_tensors": 4}, "the name of tensor 4 of 4"),
        ({"n_tensors": 9, "with_data": False}, "announces 9 tensors, but there is room for"),
        ({"n_dims": {"c": 0}}, "tensor 'c' has 0 dimensions, not 1 to 4"),
        ({"n_dims": {"c": 5}}, "tensor 'c' has 5 dimensions"),
        ({"n_dims": {"c": 2**32 - 1}}, "tensor 'c' has 4,294,967,295 dimensions"),
        ({"dims": {"c": (0,)}}, "tensor 'c' has the impossible shape [0]"),
        ({"dims": {"c": (2**62, 2**62)}}, "impossible shape"),
        ({"dims": {"c": (2**64 - 1,)}}, "impossible shape"),
        ({"dims": {"c": (2**61,)}}, "impossible shape"),
        ({"dims": {"c": (2**40,)}}, "'c' ends at byte"),
        ({"dims": {"b.weight": (65, 3)}}, "rows of 65 weights, not a multiple of the 32"),
        ({"offsets": {"c": 2**63 + 32}}, "'c' ends at byte"),
        ({"offsets": {"c": 4096}}, "'c' ends at byte"),
        ({"offsets": {"c": 33}}, "tensor 'c' lies at 33, not a multiple of 32"),
        ({"offsets": {"c": 32}}, "tensors 'b.weight' and 'c' overlap"),
        ({"offsets": {"b.weight": 0}}, "overlap"),
    ],
    ids=str,
)
def test_wrong_counts_shapes_and_offsets(tmp_path, how, word):
    path = write_gguf(tmp_path / "m.gguf", SMALL_KEYS, SMALL_TENSORS, **how)
    refuse(path, word)


@pytest.mark.parametrize(
    ("type_id", "word"), [(4, "(unknown)"), (16, "IQ2_XXS"), (28, "F64"), (2**32 - 1, "unknown")]
)
def test_tensor_types_it_does_not_run_are_named(tmp_path, type_id, word):
    path = write_gguf(
        tmp_path / "m.gguf", SMALL_KEYS, SMALL_TENSORS, type_ids={"a.weight": type_id}
    )
    refuse(path, "'a.weight'", str(type_id), word, error=UnsupportedError)


U64 = struct.Struct("<Q").pack


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (Raw(13, bytes(8)), "the value of 'k' has unknown type 13"),
        (Raw(2**32 - 1, bytes(8)), "has unknown type"),
        (Raw(8, U64(2**32)), "says it is 4,294,967,296 bytes long"),
        (Raw(8, U64(2**64 - 1)), "bytes long, more than"),
        (Raw(8, U64(1000)), "the file ends inside the value of 'k'"),
        (Raw(7, b"\x02"), "is a boolean other than 0 and 1"),
        (Raw(9, struct.pack("<IQ", 7, 3) + b"\1\0\3"), "is a boolean other than 0 and 1"),
        (Raw(9, struct.pack("<IQ", 9, 1)), "array of arrays"),
        (Raw(9, struct.pack("<IQ", 77, 1)), "elements of unknown type 77"),
        (Raw(9, struct.pack("<IQ", 4, 2**62)), "elements in the array 'k', but there is room"),
        (Raw(9, struct.pack("<IQ", 4, 2**64 - 1)), "elements in the array 'k'"),
        (Raw(9, struct.pack("<IQ", 8, 2**40)), "texts in the array 'k', but there is room"),
        (Raw(9, struct.pack("<IQ", 8, 2) + text("a") + U64(2**50)), "says it is"),
        (Raw(9, struct.pack("<IQ", 8, 2) + text("a") + U64(500)), "the file ends inside"),
    ],
    ids=str,
)
def test_wrong_values(tmp_path, value, word):
    refuse(write_gguf(tmp_path / "m.gguf", [("k", value)]), word)


@pytest.mark.parametrize("value", [0, 3, 48, 2**21, -32, 32.0, "32", True, [32]], ids=repr)
def test_alignment_must_be_a_power_of_two(tmp_path, value):
    path = write_gguf(tmp_path / "m.gguf", {"general.alignment": value}, SMALL_TENSORS)
    refuse(path, "general.alignment is", "not a power of two")


def test_names_must_be_new_and_readable(tmp_path):
    path = tmp_path / "m.gguf"
    refuse(write_gguf(path, [("k", 1), ("k", 2)]), "metadata key 'k' appears twice")
    refuse(write_gguf(path, {}, [("w", f32(8)), ("w", f32(8))]), "tensor 'w' appears twice")
    refuse(write_gguf(path, {"": 1}), "the name of metadata key 1 of 1 is empty")
    refuse(write_gguf(path, {}, {"": f32(8)}), "the name of tensor 1 of 1 is empty")
    refuse(write_gguf(path, {"k" * 70_000: 1}), "says it is 70,000 bytes long")
    refuse(write_gguf(path, {}, {"w" * 300: f32(8)}), "says it is 300 bytes long")
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    path.write_bytes(head + text(b"\xff\xfe") + struct.pack("<II", 4, 1))
    refuse(path, "is not valid UTF-8", "(at byte 24)")


@pytest.mark.skipif(sys.platform == "win32", reason="needs sparse files")
def test_absurd_counts_in_a_huge_file_allocate_nothing(tmp_path):
    """With a terabyte of (sparse) zeros behind the header, only the caps can refuse."""
    path = tmp_path / "m.gguf"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many = (2**18, 2**33)  # below what the header's cap of bytes would refuse, and above
    for how, word in (
        ("n_tensors", "tensors, but there is room for 131,072"),
        ("n_keys", "metadata keys, but there is room for 65,536"),
    ):
        for count in many:
            write_gguf(path, SMALL_KEYS, SMALL_TENSORS, **{how: count})
            os.truncate(path, 2**40)
            refuse(path, word)
    for payload, word in (
        (struct.pack("<IQ", 8, 2**23), "texts in the array 'k', but there is room for 4,194,304"),
        (struct.pack("<IQ", 8, 2**33), "texts in the array 'k', but there is room for 4,194,304"),
        (struct.pack("<IQ", 4, 2**23), "elements in the array 'k', but there is room for"),
        (struct.pack("<IQ", 12, 2**33), "elements in the array 'k', but there is room for"),
        (struct.pack("<IQ", 8, 2**20) + U64(2**32), "says it is 4,294,967,296 bytes long"),
    ):
        write_gguf(path, [("k", Raw(9, payload))])
        os.truncate(path, 2**40)
        refuse(path, word)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 8 * 1024  # KiB


# ---- refused: damage anywhere -------------------------------------------------------------


def test_truncation_at_every_byte_is_refused(tmp_path):
    whole = gguf_bytes(SMALL_KEYS, SMALL_TENSORS)
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    last = max(t.extent.offset + t.extent.nbytes for t in read_gguf(path).tensors.values())
    for size in range(last):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError) as info:
            read_gguf(path)
        assert str(path) in str(info.value)
    for size in range(last, len(whole) + 1):
        path.write_bytes(whole[:size])
        read_gguf(path)


def check_manifest(manifest: Manifest) -> None:
    """What a manifest promises, whatever the bytes were."""
    ends: list[tuple[int, int]] = []
    for entry in manifest.tensors.values():
        at = entry.extent
        assert 0 <= at.offset and at.offset + at.nbytes <= manifest.file_bytes[at.file_index]
        assert at.nbytes == entry.format.nbytes(entry.shape) > 0
        ends.append((at.offset, at.offset + at.nbytes))
    ends.sort()
    assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:], strict=False))


def flip_bytes(path: Path, rounds: int, seed: int) -> int:
    """Read `rounds` damaged copies; returns how many were refused."""
    whole = gguf_bytes(SMALL_KEYS, SMALL_TENSORS)
    rng = random.Random(seed)
    refused = 0
    for _ in range(rounds):
        raw = bytearray(whole)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            at = rng.randrange(len(raw))
            raw[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        if rng.random() < 0.1:
            at = rng.randrange(len(raw))
            raw[at:at] = bytes(rng.randrange(64))
        path.write_bytes(raw)
        try:
            check_manifest(read_gguf(path))
        except REFUSALS as error:
            refused += 1
            assert str(path) in str(error)
    return refused


def test_random_damage_is_refused_or_harmless(tmp_path):
    assert 300 < flip_bytes(tmp_path / "m.gguf", 3000, seed=11) < 2900


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(20))
def test_random_damage_for_longer(tmp_path, seed):
    flip_bytes(tmp_path / "m.gguf", 10_000, seed=1000 + seed)


# ---- split models -------------------------------------------------------------------------

PARTS = [{"a": f32(2, 4)}, {"b": f32(3), "c": f32(5)}, {"d": f32(9)}]


def test_a_later_part_says_which_to_open(tmp_path):
    paths = write_split(tmp_path, "big", SMALL_KEYS, PARTS)
    refuse(
        paths[1], "is part 2 of 3", "open the first part: big-00001-of-00003.gguf", error=ModelError
    )


def test_a_missing_part_is_named(tmp_path):
    paths = write_split(tmp_path, "big", SMALL_KEYS, PARTS)
    paths[2].unlink()
    with pytest.raises(ModelError, match="is missing: part 3 of 3 of the model; put all") as info:
        read_gguf(paths[0])
    assert str(paths[2]) in str(info.value)


def test_a_part_under_another_name_cannot_find_the_others(tmp_path):
    paths = write_split(tmp_path, "big", SMALL_KEYS, PARTS)
    other = paths[0].rename(tmp_path / "model.gguf")
    refuse(other, "does not end in -NNNNN-of-00003.gguf", "rename", error=ModelError)


def test_parts_that_do_not_belong_together(tmp_path):
    paths = write_split(tmp_path, "big", SMALL_KEYS, PARTS)
    keep = paths[1].read_bytes()
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(FormatError, match="says it is part 3 of 3, its name says 2 of 3"):
        read_gguf(paths[0])
    write_gguf(paths[1], {}, {"b": f32(3), "c": f32(5)})
    with pytest.raises(FormatError, match="says it is part 1 of 1"):
        read_gguf(paths[0])
    paths[1].write_bytes(keep[:-30])
    with pytest.raises(FormatError, match="truncated") as info:
        read_gguf(paths[0])
    assert info.value.path == paths[1]
    write_split(tmp_path, "twice", {}, [{"a": f32(2)}, {"a": f32(2)}])
    with pytest.raises(FormatError, match="tensor 'a' is in an earlier part as well"):
        read_gguf(tmp_path / "twice-00001-of-00002.gguf")
    keys = {"split.no": np.uint16(1), "split.count": np.uint16(3)}
    write_gguf(paths[1], keys, {"b": f32(3)})
    refuse(paths[0], "the 3 parts hold 3 tensors, not 4")


@pytest.mark.parametrize("keys", [{"split.count": -1}, {"split.count": "3"}, {"split.no": 7}])
def test_split_keys_that_make_no_sense(tmp_path, keys):
    refuse(write_gguf(tmp_path / "m.gguf", keys, {"a": f32(2)}), "split.")
