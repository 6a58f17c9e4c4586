"""Nested packs: the logits of their source, fewer bits by name, interrupted, damaged, lying."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgert
from edgert.errors import EdgertError, FormatError, InputError
from edgert.quant.bases import base_ref
from edgert.quant.formats import BASES, BY_NAME
from edgert.quant.metrics import relative_rms
from edgert.quant.reference import dequantize_ref
from edgert.storage.manifest import Extent, TensorEntry
from tests.command import assert_error, environment, inside
from tests.gguf_file import write_gguf
from tests.test_pack import fail_after, small_steps
from tests.test_pack_refused import rewritten, sealed
from tests.tight import fixed_process, tight
from tests.tiny import build, prompt_of, tiny_model

__all__ = ["small_steps"]  # a fixture of some tests here too

Q8_0 = BY_NAME["Q8_0"]
HEAD = "output.weight"


# ----------------------------------------------------------------------------- packs


def logits(path: Path, family: str, spare: int | None, **options: int) -> str:
    with tight(path, spare, **options) as engine:
        return edgert.logits_hash(engine.logits(prompt_of(family, 12)))


@pytest.mark.parametrize(
    ("family", "split"),
    [("llama_narrow", "4+4"), ("llama", "3+1+1+3"), ("qwen2_tied", "5+3"), ("olmoe", "3+1+4")],
)
def test_a_nested_pack_gives_the_logits_of_its_source(
    tmp_path: Path, family: str, split: str
) -> None:
    source, out = tiny_model(family, "Q8_0", path=tmp_path / "m.gguf"), tmp_path / "m.edgert"
    manifest = edgert.pack_model(source, out, nested=split)
    nested = [t for t in manifest.tensors.values() if t.parts]
    assert nested and all("+".join(map(str, t.part_bits)) == split for t in nested)
    assert all(len(t.shape) == 2 and t.name != "token_embd.weight" for t in nested)
    wanted = logits(source, family, None)
    assert logits(out, family, None) == wanted
    assert logits(out, family, 0, threads=1, prefill_tokens=3) == wanted


def test_a_nested_pack_is_hardly_larger_than_its_weights(tmp_path: Path) -> None:
    source = tiny_model("llama", "Q8_0", path=tmp_path / "m.gguf")
    manifest = edgert.pack_model(source, tmp_path / "m.edgert", nested="4+4")
    plain = edgert.pack_model(source, tmp_path / "plain.edgert")
    pages = 2 * len(manifest.tensors)  # what filling up to pages may cost
    assert manifest.tensor_bytes == plain.tensor_bytes
    assert manifest.file_bytes[0] <= plain.file_bytes[0] + 4096 * pages


def test_formats_without_codes_are_never_nested(tmp_path: Path) -> None:
    source = tiny_model("llama", "IQ4_NL", path=tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"nested, only IQ4_NL \(never split\)"):
        edgert.pack_model(source, tmp_path / "m.edgert", nested="auto")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("nested", "type_name", "words"),
    [
        ("4+3", "keep", "is not 2 to 4 numbers whose sum is one of 4, 5, 6, 8"),
        ("8", "keep", "is not 2 to 4"),
        ("4+4+0", "keep", "is not 2 to 4"),
        ("2+2+2+1+1", "keep", "is not 2 to 4"),
        ("-4+12", "keep", "is not 2 to 4"),
        ("four", "keep", "'four' is not"),
        ("6+2", "keep", "make the 3 or 4 or 5 bits of a base"),
        ("4+4,1+1+4", "keep", "make the 3 or 4 bits of a base"),
        ("4+4,3+5", "keep", "says twice how codes of 8 bits are split"),
        ("4+4,", "keep", "'' is not 2 to 4"),
        ("4+2", "keep", "no matrix with codes of 6 bits that could be nested, only Q8_0"),
        ("4+4", "P3_32", "both nested and P3_32"),
    ],
)
def test_splits_that_cannot_be(tmp_path: Path, nested: str, type_name: str, words: str) -> None:
    source = tiny_model("llama", "Q8_0", path=tmp_path / "m.gguf")
    with pytest.raises(InputError, match=words):
        edgert.pack_model(source, tmp_path / "m.edgert", nested=nested, type_name=type_name)


def test_a_flip_in_any_part_is_found(tmp_path: Path) -> None:
    source, path = tiny_model("llama", "Q8_0", path=tmp_path / "m.gguf"), tmp_path / "m.edgert"
    manifest = edgert.pack_model(source, path, nested="3+1+4")
    whole = path.read_bytes()
    entry = manifest.tensors["output.weight"]
    for number, part in enumerate(entry.parts):
        for at in (part.offset, part.offset + part.nbytes - 1):
            data = bytearray(whole)
            data[at] ^= 16
            path.write_bytes(data)
            with pytest.raises(FormatError, match=rf"part {number} of output\.weight"):
                edgert.verify_pack(path)


# ----------------------------------------------------------------------------- fewer bits


def test_a_base_alone_is_a_model(tmp_path: Path) -> None:
    """The logits of a model whose weights are those of the base, whatever parts it lies in."""
    source = tiny_model("llama", "Q8_0", path=tmp_path / "m.gguf")
    tokens = prompt_of("llama", 12)
    found: dict[tuple[str, int], npt.NDArray[np.float32]] = {}
    for split in ("4+4", "3+1+4", "3+1+1+3"):
        out = tmp_path / f"{split}.edgert"
        for bits in edgert.pack_model(source, out, nested=split).base_bits:
            options: dict[str, Any] = {"quality_bits": bits, "threads": 2, "context_length": 256}
            with fixed_process():
                floor = edgert.plan_model(out, **options, memory_budget=2**62).floor_bytes
            for budget in (2**62, floor):
                with fixed_process(), edgert.load(out, **options, memory_budget=budget) as engine:
                    assert (engine.plan.streamed_bytes > 0) == (budget == floor)
                    found[split, bits] = now = engine.logits(tokens).copy()
                assert np.array_equal(now, next(v for (_, b), v in found.items() if b == bits))
    with tight(source, None) as engine:
        whole = engine.logits(tokens).copy()
    errors = {bits: relative_rms(now, whole) for (_, bits), now in found.items()}
    assert set(errors) == {3, 4, 5} and errors[3] > errors[4] > errors[5] > 0
    assert errors[4] < 0.5
    weights = tmp_path / "base.gguf"
    write_base(source, weights, 4)
    with tight(weights, None) as engine:  # what is left is the rounding of activations to int8
        assert relative_rms(found["4+4", 4], engine.logits(tokens)) < 0.03


def write_base(source: Path, out: Path, bits: int) -> None:
    """The model with the matrices that a pack would nest as float32 of their base."""
    manifest = edgert.read_manifest(source)
    data = source.read_bytes()
    tensors = {}
    for name, entry in manifest.tensors.items():
        at = entry.extent
        raw = np.frombuffer(data, np.uint8, at.nbytes, at.offset)
        values = dequantize_ref(entry.format, raw)
        if entry.format is Q8_0 and name != "token_embd.weight":
            base = BASES["Q8_0"][bits]
            values = dequantize_ref(base, base_ref(base, raw[None]))
        f32 = BY_NAME["F32"]
        tensors[name] = (f32, entry.shape, values.astype(np.float32).tobytes())
    write_gguf(out, build("llama", "F32").metadata, tensors)


def test_auto_takes_the_bits_that_fit(tmp_path: Path) -> None:
    source, out = tiny_model("llama", "Q8_0", path=tmp_path / "m.gguf"), tmp_path / "m.edgert"
    edgert.pack_model(source, out, nested="3+1+4")
    with fixed_process():
        plans = {b: edgert.plan_model(out, quality_bits=b) for b in (3, 4, 8)}
        weights = {b: plan.weight_bytes for b, plan in plans.items()}
        assert weights[3] < weights[4] < weights[8]
        found = []
        for budget in range(plans[3].floor_bytes, plans[8].full_bytes + 4096, 64 * 1024):
            plan = edgert.plan_model(out, quality_bits="auto", memory_budget=budget)
            bits = next(b for b, nbytes in weights.items() if nbytes == plan.weight_bytes)
            found.append(bits)
            if plan.streamed_bytes:
                assert bits == 3
            elif bits < 8:
                wider = {3: 4, 4: 8}[bits]
                more = edgert.plan_model(out, quality_bits=wider, memory_budget=budget)
                assert more.streamed_bytes
        assert found == sorted(found) and set(found) == {3, 4, 8}


def test_bits_that_a_model_does_not_have(tmp_path: Path, packed: bytes) -> None:
    source, out = tiny_model("llama", "Q8_0", path=tmp_path / "m.gguf"), tmp_path / "m.edgert"
    out.write_bytes(packed)
    with pytest.raises(InputError, match=r"m\.gguf is not nested, so it has no top 4 bits"):
        edgert.load(source, quality_bits=4)
    with pytest.raises(InputError, match=r"has 3, 4 top bits or all of them \(8\), not 5"):
        edgert.load(out, quality_bits=5)
    for bad in (0, 9, "some"):
        with pytest.raises(InputError, match="quality_bits is"):
            edgert.load(out, quality_bits=bad)
    assert_error(inside("run", out, "-p", "a", "--quality-bits", "9"), 2, "is not auto or 1 to 8")


# ----------------------------------------------------------------------------- damage


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_an_interrupted_run_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """With later parts kept, or made from the rows once more; stopped anywhere."""
    source = tiny_model("llama", "Q8_0", path=tmp_path / "m.gguf")
    edgert.pack_model(source, tmp_path / "whole", nested="3+1+4")
    monkeypatch.setattr("edgert.pack_pieces._KEPT_BYTES", kept)
    out = tmp_path / "m.edgert"
    for writes in (100, 100, 100):
        restore = fail_after(monkeypatch, writes, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            edgert.pack_model(source, out, nested="3+1+4")
        restore()
    edgert.pack_model(source, out, nested="3+1+4")
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


_PACK = """
import errno, os, signal, sys
import edgert.storage.pack_writer
real, left = os.pwrite, [5]
def pwrite(fd, data, offset):
    left[0] -= 1
    if left[0] < 0:
        if sys.argv[3] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, "No space left on device")
    return real(fd, data, offset)
os.pwrite = pwrite
edgert.storage.pack_writer._BUFFER_BYTES = 1 << 18
try:
    edgert.pack_model(sys.argv[1], sys.argv[2], nested="3+1+4")
except edgert.EdgertError as error:
    sys.exit(str(error))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal")
@pytest.mark.parametrize("how", ["kill", "full"])
def test_no_file_is_left_that_opens(tmp_path: Path, packed: bytes, how: str) -> None:
    source, out = tiny_model("llama", "Q8_0", path=tmp_path / "m.gguf"), tmp_path / "m.edgert"
    run = subprocess.run(
        [sys.executable, "-c", _PACK, str(source), str(out), how],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    if how == "kill":
        assert run.returncode == -signal.SIGKILL, run.stderr
    else:
        assert run.returncode == 1 and "the disk is full" in run.stderr, run.stderr
    assert not out.exists()
    with pytest.raises(FormatError, match="partial"):
        edgert.read_manifest(tmp_path / "m.edgert.partial")
    edgert.pack_model(source, out, nested="3+1+4")
    assert out.read_bytes() == packed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.edgert", "m.gguf"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("nested")
    source = tiny_model("llama", "Q8_0", path=folder / "m.gguf")
    edgert.pack_model(source, folder / "m.edgert", nested="3+1+4")
    return (folder / "m.edgert").read_bytes()


def with_entry(tmp_path: Path, packed: bytes, change: Callable[[TensorEntry], TensorEntry]) -> Path:
    """The pack with the entry of the head changed, and checksums that match."""

    def changed(tensors: dict[str, TensorEntry]) -> None:
        tensors[HEAD] = change(tensors[HEAD])

    path = tmp_path / "bad.edgert"
    path.write_bytes(rewritten(tmp_path / "source", packed, changed))
    return path


def part_moved(number: int, by: int = 0, more: int = 0) -> Callable[[TensorEntry], TensorEntry]:
    def change(entry: TensorEntry) -> TensorEntry:
        parts = list(entry.parts)
        at = parts[number]
        parts[number] = Extent(0, at.offset + by, at.nbytes + more)
        return replace(entry, parts=tuple(parts))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (part_moved(1, by=4), "part 1 of tensor 'output.weight' has"),
        (part_moved(1, more=4096), "part 1 of tensor 'output.weight' has"),
        (part_moved(2, by=-4096), "overlap"),
        (part_moved(2, by=2**40), "reaches from byte"),
        (part_moved(2, by=2**63), "reaches from byte"),
        (part_moved(0, by=4096), "is not where its parts are"),
        (lambda e: replace(e, stride=4096), "is not where its parts are"),
        (lambda e: replace(e, part_bits=(3, 1, 3)), "parts of 3 + 1 + 3 bits"),
        (lambda e: replace(e, part_bits=(0, 4, 4)), "parts of 0 + 4 + 4 bits"),
        (lambda e: replace(e, part_bits=(1, 1, 6)), "parts of 1 + 1 + 6 bits"),
        (lambda e: replace(e, part_bits=(2**31, 4, 4)), "parts of 2147483648 + 4 + 4 bits"),
        (lambda e: replace(e, part_bits=(4, 1, 3)), "part 0 of tensor"),
        (lambda e: replace(e, format=BY_NAME["Q4_0"]), "parts of 3 + 1 + 4 bits"),
        (lambda e: replace(e, format=BY_NAME["IQ4_NL"]), "in IQ4_NL is nested"),
        (
            lambda e: replace(e, format=BY_NAME["Q6_K"], part_bits=(4, 1, 1)),
            "part 0 of tensor 'output.weight' has",
        ),
        (
            lambda e: replace(e, format=BY_NAME["Q5_1"], part_bits=(3, 1, 1)),
            "part 0 of tensor 'output.weight' has",
        ),
        (lambda e: replace(e, layout="tiles"), "has layout 1 in 3 parts"),
    ],
)
def test_lying_parts_are_refused(
    tmp_path: Path, packed: bytes, change: Callable[[TensorEntry], TensorEntry], words: str
) -> None:
    path = with_entry(tmp_path, packed, change)
    with pytest.raises(EdgertError, match=re.escape(words)) as caught:
        edgert.read_manifest(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [-4096, 5000])
def test_a_cut_nested_pack_is_refused(tmp_path: Path, packed: bytes, length: int) -> None:
    path = tmp_path / "cut.edgert"
    path.write_bytes(packed[:length])
    with pytest.raises(FormatError, match=r"cut\.edgert"):
        edgert.read_manifest(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damage_is_refused_or_harmless(tmp_path: Path, packed: bytes, data: st.DataObject) -> None:
    """Bytes of the tensor table changed, with checksums that match: every part inside the file."""
    changed = bytearray(packed)
    index_end = 64 + int.from_bytes(packed[24:32], "little")
    table = packed.index(b"blk.0.attn_norm.weight", packed.rindex(b"token_embd.weight"))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(table, index_end - 1))
        size = data.draw(st.sampled_from([1, 4, 8]))
        value = data.draw(st.one_of(st.integers(0, 255), st.integers(0, 2**64 - 1)))
        changed[at : at + size] = (value % 256**size).to_bytes(size, "little")
    path = tmp_path / "m.edgert"
    path.write_bytes(sealed(changed))
    try:
        manifest = edgert.read_manifest(path)
    except EdgertError as error:
        assert str(path) in str(error)
        return
    for entry in manifest.tensors.values():
        for part in entry.parts:
            assert 0 < part.offset < part.offset + part.nbytes <= path.stat().st_size


def test_a_nested_pack_from_the_command_line(tmp_path: Path) -> None:
    source, out = tiny_model("llama", "Q8_0", path=tmp_path / "m.gguf"), tmp_path / "m.edgert"
    run = inside("pack", source, "-o", out, "--nested")
    assert run.returncode == 0 and "% of the source" in run.stderr
    assert edgert.read_manifest(out).tensors[HEAD].part_bits == (3, 1, 4)
    assert inside("show", out, "--verify").returncode == 0
    assert_error(inside("pack", source, "-o", out, "--nested", "7+1", "--force"), 2, "of a base")
