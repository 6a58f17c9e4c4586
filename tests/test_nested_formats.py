"""Nested packs of all formats that have codes, of mixtures of them, and of 16-bit files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert.quant.bases import base_ref
from edgert.quant.formats import BASES, BY_NAME
from edgert.quant.metrics import relative_rms
from edgert.quant.quantize import quantize_ref
from edgert.quant.reference import dequantize_ref
from edgert.self_draft import NAME
from edgert.speculation import PassCosts
from edgert.units import KIB
from tests.command import inside
from tests.gguf_file import write_gguf
from tests.test_pack import fail_after, small_steps
from tests.tight import fixed_process, floor_of, plan_of, tight
from tests.tiny import build, prompt_of, tiny_model

__all__ = ["small_steps"]  # a fixture of some tests here too

SIZES: dict[str, Any] = {"context_length": 256, "prefill_tokens": 9}
PROMPT = prompt_of("llama", 20)
# Those whose kernels the other tests compile; each of the others takes half a minute more.
CASES = [
    ("Q6_K", "4+2"), ("Q5_0", "4+1"), ("Q4_0", "3+1"), ("Q4_K", "3+1"),
    *(pytest.param(fmt, split, marks=pytest.mark.stress) for fmt, split in (
        ("Q6_K", "3+1+2"), ("Q5_0", "3+1+1"), ("Q5_1", "4+1"), ("Q5_1", "3+2"), ("Q5_K", "4+1"),
        ("Q5_K", "3+2"), ("Q4_0", "2+2"), ("Q4_1", "3+1"), ("Q4_1", "2+1+1"), ("Q4_K", "2+2"),
    )),
]  # fmt: skip
by_case = pytest.mark.parametrize(("fmt", "split"), CASES)


@pytest.fixture(autouse=True)
def slow_flash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every draft is verified, and nothing is known of how often these models are right."""
    monkeypatch.setattr("edgert.acceptance_file.cache_root", lambda: tmp_path / "cache" / "k")
    monkeypatch.setattr(PassCosts, "table", lambda self, most: [1.0] * (most + 1))
    monkeypatch.setattr("edgert.speculation._WORTH_SECONDS", 0.0)


def write_deep(path: Path, **formats: str) -> Path:
    """The tiny model with its layers four times over, so that bases take less than a ring saves.

    Matrices are in `formats["rest"]`, or in that of a part of their name.
    """
    models = {fmt: build("llama", fmt) for fmt in formats.values()}
    tensors = {}
    for name in models[formats["rest"]].tensors:
        chosen = next((fmt for part, fmt in formats.items() if part in name), formats["rest"])
        for i in range(0, 8, 2) if name.startswith("blk.") else (0,):
            layer = int(name[4]) if name.startswith("blk.") else 0
            tensors[name.replace(f"blk.{layer}", f"blk.{layer + i}")] = models[chosen].tensors[name]
    metadata = models[formats["rest"]].metadata | {"llama.block_count": 8}
    write_gguf(path, metadata, tensors)
    return path


def logits(path: Path, spare: int | None, **options: Any) -> str:
    with tight(path, spare, **SIZES | options) as engine:
        return edgert.logits_hash(engine.logits(PROMPT))


def drafting_spare(path: Path) -> int:
    """Bytes beyond the floor with which the model drafts and streams some more."""
    floor, full = floor_of(path, **SIZES), plan_of(path, 2**62, **SIZES).full_bytes
    for budget in range(floor, full, 32 * KIB):
        if plan_of(path, budget, **SIZES).can_draft:
            return budget - floor + 16 * KIB
    raise AssertionError("no budget lets it draft")


@by_case
def test_logits_and_tokens_are_those_of_the_source(tmp_path: Path, fmt: str, split: str) -> None:
    """Resident, streamed whole, streamed beside a base; drafts are accepted more than by chance."""
    source, out = write_deep(tmp_path / "m.gguf", rest=fmt), tmp_path / "m.edgert"
    manifest = edgert.pack_model(source, out, nested=split)
    nested = [t for t in manifest.tensors.values() if t.parts]
    assert len(nested) == 57 and all(t.nbytes == t.format.nbytes(t.shape) for t in nested)
    assert edgert.verify_pack(out).base_bits == manifest.base_bits != ()
    wanted, spare = logits(source, None), drafting_spare(out)
    assert logits(out, None) == logits(out, 0, threads=1) == logits(out, spare) == wanted
    for how in (dict(temperature=0), dict(temperature=0.8, seed=1)):
        with tight(source, None, **SIZES) as engine:
            want = engine.generate(PROMPT, max_tokens=24, speculate=False, **how)
        with tight(out, spare, **SIZES) as engine:
            assert engine.plan.streamed_bytes
            found = engine.generate(PROMPT, max_tokens=24, **how)
        assert found.tokens == want.tokens
        assert found.stats.logits_hash == want.stats.logits_hash
        own = next(d for d in found.stats.drafts if d.drafter == NAME)
        chances = 3 if manifest.base_bits[0] == 2 else 30  # times a guess of 288 tokens
        assert own.accepted_tokens > chances / 288 * own.drafted_tokens > 0


@by_case
def test_a_base_alone_is_the_model_of_its_weights(tmp_path: Path, fmt: str, split: str) -> None:
    source, out = tiny_model("llama", fmt, path=tmp_path / "m.gguf"), tmp_path / "m.edgert"
    bits = edgert.pack_model(source, out, nested=split).base_bits[0]
    base, model = BASES[fmt][bits], build("llama", fmt)
    tensors = {}
    for name, (kept, shape, raw) in model.tensors.items():
        data = np.frombuffer(raw, np.uint8)[None]
        if kept.name == fmt and name != "token_embd.weight":
            values = dequantize_ref(base, base_ref(base, data))
        else:
            values = dequantize_ref(kept, data)
        tensors[name] = (BY_NAME["F32"], shape, values.astype(np.float32).tobytes())
    write_gguf(tmp_path / "base.gguf", model.metadata, tensors)
    with tight(tmp_path / "base.gguf", None, **SIZES) as engine:
        wanted = engine.logits(PROMPT).copy()
    found = {}
    for budget in (2**62, 0):
        with fixed_process():
            options: dict[str, Any] = {"quality_bits": bits, "threads": 2, **SIZES}
            floor = edgert.plan_model(out, **options, memory_budget=2**62).floor_bytes
            with edgert.load(out, **options, memory_budget=max(budget, floor)) as engine:
                assert (engine.plan.streamed_bytes > 0) == (budget == 0)
                found[budget] = engine.logits(PROMPT).copy()
    assert np.array_equal(found[0], found[2**62])
    assert relative_rms(found[0], wanted) < 0.03  # the rounding of activations to int8


# ----------------------------------------------------------------------------- mixtures


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Q4_K but for head, attention output and down in Q6_K, as in Q4_K_M, and some in F16."""
    formats = {"output.weight": "Q6_K", "ffn_down": "Q6_K", "attn_v": "F16", "rest": "Q4_K"}
    return write_deep(tmp_path / "mixed.gguf", **formats)


def splits(manifest: edgert.Manifest) -> set[tuple[str, str]]:
    return {
        (t.format.name, "+".join(map(str, t.part_bits)) or t.layout)
        for t in manifest.tensors.values()
        if len(t.shape) == 2
    }


def test_a_file_of_several_formats(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.edgert"
    run = inside("pack", mixed, "-o", out, "--nested")
    assert run.returncode == 0
    assert "32 matrices of Q4_K 3+1, 17 matrices of Q6_K 4+2" in run.stderr
    assert "8 matrices of F16 whole" in run.stderr
    manifest = edgert.read_manifest(out)
    kinds = {("Q4_K", "3+1"), ("Q6_K", "4+2"), ("F16", "tiles"), ("Q4_K", "rows")}
    assert splits(manifest) == kinds and manifest.base_bits == (3, 4)
    wanted, spare = logits(mixed, None), drafting_spare(out)
    assert logits(out, None) == logits(out, 0) == logits(out, spare) == wanted
    plan = plan_of(out, floor_of(out, **SIZES) + spare, **SIZES)
    assert {t.base.bits for t in plan.tiles if t.base} == {3, 4}
    found = {}
    for bits in (3, 4, 8):
        with fixed_process(), edgert.load(out, quality_bits=bits, **SIZES) as engine:
            found[bits] = engine.logits(PROMPT).copy(), engine.plan.weight_bytes
    assert edgert.logits_hash(found[8][0]) == wanted
    errors = [relative_rms(found[bits][0], found[8][0]) for bits in (3, 4)]
    assert errors[0] > errors[1] > 0, "with 4 bits those of Q4_K are whole"
    assert found[3][1] < found[4][1] < found[8][1]


def test_a_split_is_for_codes_of_its_bits(mixed: Path, tmp_path: Path) -> None:
    manifest = edgert.pack_model(mixed, tmp_path / "a", nested="4+2")
    kinds = {("Q4_K", "tiles"), ("Q6_K", "4+2"), ("F16", "tiles"), ("Q4_K", "rows")}
    assert splits(manifest) == kinds
    assert logits(tmp_path / "a", 0) == logits(mixed, None)
    manifest = edgert.pack_model(mixed, tmp_path / "b", nested="2+1+1,3+1+2")
    assert {("Q4_K", "2+1+1"), ("Q6_K", "3+1+2")} < splits(manifest)
    assert manifest.base_bits == (2, 3, 4)


@pytest.mark.usefixtures("small_steps")
def test_the_same_bytes_also_when_interrupted(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edgert.pack_model(mixed, tmp_path / "whole", nested="auto")
    out = tmp_path / "m.edgert"
    for writes in (60, 60):
        restore = fail_after(monkeypatch, writes, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            edgert.pack_model(mixed, out, nested="auto")
        restore()
    edgert.pack_model(mixed, out, nested="auto")
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


# ----------------------------------------------------------------------------- 16 bits


@pytest.mark.parametrize("fmt", ["F16", "BF16"])
def test_a_16_bit_file_in_8_bits_and_nested(tmp_path: Path, fmt: str) -> None:
    """Lossy by name: the logits of the same file with its matrices in Q8_0."""
    model, q8_0 = build("llama", fmt), BY_NAME["Q8_0"]
    write_gguf(tmp_path / "m.gguf", model.metadata, model.tensors)
    tensors = dict(model.tensors)
    for name, (kept, shape, raw) in model.tensors.items():
        if kept.name == fmt and name != "token_embd.weight":
            weights = dequantize_ref(kept, np.frombuffer(raw, np.uint8)).reshape(shape)
            tensors[name] = (q8_0, shape, quantize_ref(q8_0, weights).tobytes())
    write_gguf(tmp_path / "q8.gguf", model.metadata, tensors)
    out = tmp_path / "m.edgert"
    run = inside("pack", tmp_path / "m.gguf", "-o", out, "--type", "Q8_0", "--nested", "4+4")
    assert run.returncode == 0 and "15 matrices of Q8_0 4+4" in run.stderr
    assert splits(edgert.read_manifest(out)) == {("Q8_0", "4+4"), (fmt, "rows")}
    wanted = logits(tmp_path / "q8.gguf", None)
    assert logits(out, None) == logits(out, 0) == wanted != logits(tmp_path / "m.gguf", None)


def test_8_bits_where_rows_are_whole_blocks(tmp_path: Path) -> None:
    model = build("llama_narrow", "F16")
    tensors = {
        name: (fmt, (*shape[:-1], 150), raw[: len(raw) // 160 * 150]) if "ffn_down" in name
        else (fmt, (150, 64), raw[: len(raw) // 160 * 150]) if "ffn_" in name and len(shape) > 1
        else (fmt, shape, raw)
        for name, (fmt, shape, raw) in model.tensors.items()
    }  # fmt: skip
    write_gguf(tmp_path / "m.gguf", model.metadata | {"llama.feed_forward_length": 150}, tensors)
    manifest = edgert.pack_model(
        tmp_path / "m.gguf", tmp_path / "m", type_name="Q8_0", nested="auto"
    )
    assert splits(manifest) == {("Q8_0", "3+1+4"), ("F16", "tiles"), ("F16", "rows")}
    assert all(t.format.name == "F16" for t in manifest.tensors.values() if "ffn_down" in t.name)


def test_8_bits_leave_smaller_formats_alone(mixed: Path, tmp_path: Path) -> None:
    manifest = edgert.pack_model(mixed, tmp_path / "a", type_name="Q8_0")
    assert splits(manifest) == {
        ("Q4_K", "tiles"), ("Q6_K", "tiles"), ("Q8_0", "tiles"), ("Q4_K", "rows")
    }  # fmt: skip
