"""The GGUF reader on sound files: golden bytes, round trips, split models, real files."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf_file import SMALL_KEYS, SMALL_TENSORS, Raw, f32, text, write_gguf, write_split
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.quant.formats import BY_NAME
from edgert.storage.gguf import read_gguf
from edgert.storage.manifest import Extent

SHARED = Path(__file__).parents[2] / "shared"
F32 = BY_NAME["F32"]


# ---- sound files --------------------------------------------------------------------------


def test_golden_bytes(tmp_path):
    """A file written by hand, from the specification."""
    raw = b"".join(
        [
            b"GGUF" + bytes.fromhex("03000000"),
            bytes.fromhex("0100000000000000 0200000000000000"),
            bytes.fromhex("0100000000000000") + b"n",
            bytes.fromhex("04000000 2a000000"),  # n: uint32 42
            bytes.fromhex("0200000000000000") + b"xs",
            bytes.fromhex("09000000 03000000 0200000000000000 feff 0500"),  # xs: int16 [-2, 5]
            bytes.fromhex("0100000000000000") + b"w",
            bytes.fromhex("02000000 0200000000000000 0300000000000000"),  # 2 fastest, then 3
            bytes.fromhex("01000000 2000000000000000"),  # F16, at 32
        ]
    )
    raw += bytes(-len(raw) % 32) + bytes(32) + bytes(range(12))
    path = tmp_path / "golden.gguf"
    path.write_bytes(raw)
    manifest = read_gguf(path)
    assert manifest.files == (path,)
    assert manifest.file_bytes == (len(raw),)
    assert manifest.metadata["n"] == 42
    assert manifest.metadata["xs"].tolist() == [-2, 5]
    assert manifest.metadata["xs"].dtype == np.int16
    (entry,) = manifest.tensors.values()
    assert (entry.name, entry.format.name, entry.shape) == ("w", "F16", (3, 2))
    assert entry.extent == Extent(0, len(raw) - 12, 12)


def test_values_keep_their_types(tmp_path):
    manifest = read_gguf(write_gguf(tmp_path / "m.gguf", SMALL_KEYS, SMALL_TENSORS))
    got = manifest.metadata
    assert list(got) == list(SMALL_KEYS)
    assert type(got["general.architecture"]) is str and type(got["llama.block_count"]) is int
    assert got["flag"] is True and type(got["eps"]) is float
    assert got["eps"] == float(np.float32(1e-5))
    assert got["tokens"] == ["a", "é", "", "▁story"]
    assert got["scores"].dtype == np.float32 and got["scores"].tolist() == [0.5, -1.0, 0.0, 2.0]
    assert list(manifest.tensors) == ["a.weight", "b.weight", "c"]
    assert manifest.tensors["b.weight"].shape == (3, 64)
    assert manifest.tensor_bytes == 32 + 204 + 20
    with pytest.raises(TypeError):
        manifest.metadata["new"] = 1  # type: ignore[index]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_data_lies_where_the_manifest_says(tmp_path, version, alignment):
    data = {f"t{i}": np.arange(7 * i + 1, dtype=np.float32) for i in range(6)}
    tensors = {name: (F32, x.shape, x) for name, x in data.items()}
    path = write_gguf(tmp_path / "m.gguf", {}, tensors, version=version, alignment=alignment)
    manifest, raw = read_gguf(path), path.read_bytes()
    for name, x in data.items():
        at = manifest.tensors[name].extent
        assert raw[at.offset : at.offset + at.nbytes] == x.tobytes()
        assert at.offset % alignment == 0


def test_no_tensors_and_no_padding_after_the_last_one(tmp_path):
    assert not read_gguf(write_gguf(tmp_path / "v.gguf", {"k": [1, 2]})).tensors
    path = write_gguf(tmp_path / "m.gguf", {}, {"w": f32(3)})
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) - 20])  # 12 bytes of data, 20 of padding
    assert read_gguf(path).tensors["w"].extent.nbytes == 12


def test_texts_that_are_not_utf8_are_replaced_not_lost(tmp_path):
    payload = struct.pack("<IQ", 8, 3) + text("a") + text(b"\xff\xfe") + text("b")
    keys = [("tokens", Raw(9, payload)), ("template", Raw(8, text(b"x\xe2\x82y")))]
    got = read_gguf(write_gguf(tmp_path / "m.gguf", keys)).metadata
    assert got["tokens"] == ["a", "��", "b"]
    assert got["template"] == "x�y"


def test_texts_across_the_edges_of_chunks(tmp_path):
    """Lengths and texts cut by the reader's chunk at every position, and texts larger than it."""
    rng = random.Random(3)
    tokens = ["é" * rng.randint(0, 40) + str(i) for i in range(30_000)] + ["x" * 600_000, "", "y"]
    got = read_gguf(write_gguf(tmp_path / "m.gguf", {"t": tokens, "u": 7})).metadata
    assert got["t"] == tokens and got["u"] == 7


SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(width=32, allow_nan=False),
    st.text(max_size=20),
)
ARRAYS = st.one_of(
    st.lists(st.text(max_size=8), min_size=1, max_size=6),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=6),
    st.lists(st.booleans(), min_size=1, max_size=6),
)
NAMES = st.text(min_size=1, max_size=12).filter(lambda n: not n.startswith(("split.", "general.")))


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(NAMES, st.one_of(SCALARS, ARRAYS), max_size=8),
    st.dictionaries(NAMES, st.lists(st.integers(1, 4), min_size=1, max_size=4), max_size=6),
    st.sampled_from([1, 8, 32, 64]),
)
def test_round_trip(tmp_path_factory, metadata, shapes, alignment):
    path = tmp_path_factory.mktemp("trip") / "m.gguf"
    tensors = {n: f32(*shape) for n, shape in shapes.items()}
    manifest = read_gguf(write_gguf(path, metadata, tensors, alignment=alignment))
    assert {n: t.shape for n, t in manifest.tensors.items()} == {
        n: tuple(shape) for n, shape in shapes.items()
    }
    for key, value in metadata.items():
        got = manifest.metadata[key]
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == value


# ---- split models -------------------------------------------------------------------------

PARTS = [{"a": f32(2, 4)}, {"b": f32(3), "c": f32(5)}, {"d": f32(9)}]


def test_a_split_model_is_one_manifest(tmp_path):
    paths = write_split(tmp_path, "big", SMALL_KEYS, PARTS)
    manifest = read_gguf(paths[0])
    assert manifest.files == tuple(paths)
    assert manifest.file_bytes == tuple(p.stat().st_size for p in paths)
    assert {n: t.extent.file_index for n, t in manifest.tensors.items()} == {
        "a": 0,
        "b": 1,
        "c": 1,
        "d": 2,
    }
    assert manifest.metadata["tokens"] == SMALL_KEYS["tokens"]


# ---- real files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size_max", [400_000, pytest.param(2**30, marks=pytest.mark.fuzz)], ids=["small", "all"]
)
def test_agrees_with_the_gguf_package_on_real_files(size_max):
    """All of them take the package a minute: it makes objects of every token."""
    gguf = pytest.importorskip("gguf")
    files = sorted(f for f in SHARED.rglob("*.gguf") if f.stat().st_size < size_max)
    if not files:
        pytest.skip("no shared model files here")
    for path in files:
        ours, theirs = read_gguf(path), gguf.GGUFReader(path)
        fields = {n: f for n, f in theirs.fields.items() if not n.startswith("GGUF.")}
        assert list(ours.metadata) == list(fields)
        for key, field in fields.items():
            got = ours.metadata[key]
            assert (got.tolist() if isinstance(got, np.ndarray) else got) == field.contents()
        assert list(ours.tensors) == [t.name for t in theirs.tensors]
        for tensor in theirs.tensors:
            entry = ours.tensors[tensor.name]
            assert entry.format.type_id == tensor.tensor_type
            assert list(entry.shape) == list(reversed(tensor.shape.tolist()))
            assert entry.extent == Extent(0, tensor.data_offset, tensor.n_bytes)


def test_a_large_vocabulary_stays_small_in_memory(tmp_path):
    """300 k texts: peak growth measured in a process of its own."""
    tokens = [f"token{i}" for i in range(150_000)]
    merges = [f"left{i} right{i}" for i in range(150_000)]
    path = write_gguf(tmp_path / "v.gguf", {"tokens": tokens, "merges": merges})
    program = (
        "import sys, resource\n"
        "from edgert.storage.gguf import read_gguf\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "m = read_gguf(sys.argv[1])\n"
        "assert len(m.metadata['merges']) == 150_000\n"
        "print(peak() - before)\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 60 << 20
