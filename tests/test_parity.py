"""The same numbers as llama.cpp: every family in every format, from files the tests make.

tests/parity holds what llama.cpp made of each tiny model (see generate.py there). Three parties
are compared: llama.cpp, the engine, and the truth, which is the reference model in float64 on the
dequantised weights. No party has to equal another; the engine has to be as close to the truth as
llama.cpp is, which tells errors of rounding from errors of meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

import edgert
from edgert.models.reference import ReferenceModel
from edgert.quant.formats import BY_NAME
from edgert.quant.metrics import rms_error
from edgert.quant.packing import Array
from tests.gguf_file import write_gguf
from tests.parity.generate import KEPT, POSITIONS, PROMPT, rms_rows
from tests.tiny import FAMILIES, TinyModel, build, formats_of, prompt_of, router_margins, spec_of

FOLDER = Path(__file__).parent / "parity"
# By format, so that an engine finds the kernels that the one before it has loaded.
CASES = [
    f"{family}-{name}" for name in BY_NAME for family in FAMILIES if name in formats_of(family)
]

# The engine's distance to the truth may be llama.cpp's times this: both round, not the same way.
ALLOWED_SHARE = 1.1
# Where no weight and no activation is rounded (F32), both distances are float32 noise, about
# 6 x 2^-24 of the logits' RMS; a ratio of the two says nothing. So much is always allowed.
FLOAT32_FLOOR = 16 * 2.0**-24  # relative to the RMS of the logits
# Greedy tokens must agree where llama.cpp's best logit leads by so many of its distances.
CLEAR_MARGIN = 4.0

# llama.cpp's RMS distance to the truth over the logits' RMS, at most. The weights are the same on
# both sides, so this is the rounding of activations: none in F32, to 11 bits in F16 and 8 in BF16,
# to int8 with one scale for 32 numbers or, with super-blocks, for 256. A number uniform in its
# block has an int8 error of 0.4 % and 1 % at the tails; seven matrices a layer add up to the rest.
LLAMACPP_BOUND = {"F32": 6e-7, "F16": 8e-4, "BF16": 6e-3}
LLAMACPP_BOUND_32 = 0.02
LLAMACPP_BOUND_256 = 0.033
# The smallest lead of a chosen expert in router logits (found: 0.49 in qwen3moe Q2_K, mostly 0.9):
# far above what rounding moves, which is some 2 % of logits between -3 and 3.
ROUTER_MARGIN = 0.4


@dataclass(frozen=True)
class Case:
    """A tiny model, what llama.cpp made of it, and the truth."""

    model: TinyModel
    tokens: list[int]  # the prompt and llama.cpp's greedy tokens but the last
    truth: Array  # float32 [POSITIONS, vocab]
    greedy: Array  # int32: llama.cpp's tokens
    margins: Array  # its best logit less the second, at each
    logits: Array  # its logits at the positions KEPT
    distance: Array  # its RMS distance to the truth at every position

    @property
    def llamacpp_rms(self) -> float:
        return float(np.sqrt(np.mean(self.distance.astype(np.float64) ** 2)))

    @property
    def size(self) -> float:
        """RMS of the logits."""
        return float(np.sqrt(np.mean(self.truth.astype(np.float64) ** 2)))


@lru_cache
def archive(family: str) -> dict[str, Array]:
    with np.load(FOLDER / f"{family}.npz") as arrays:
        return dict(arrays)


@lru_cache(maxsize=1)
def case_of(which: str) -> Case:
    family, name = which.split("-")
    stored = {key: archive(family)[f"{name}/{key}"] for key in
              ("digest", "greedy", "margins", "logits", "distance")}  # fmt: skip
    model = build(family, name)
    assert model.digest == str(stored.pop("digest")), (
        f"the tiny model {which} is no longer the one llama.cpp was run on: weights or "
        "quantisers have changed. If that is intended: python -m tests.parity.generate"
    )
    tokens = [*prompt_of(family, PROMPT), *stored["greedy"][:-1].tolist()]
    truth = ReferenceModel(spec_of(model), model.weights, np.float64).logits(tokens)
    return Case(model, tokens, truth, **stored)


@pytest.mark.parametrize("which", CASES, scope="class")
class TestParity:
    """A class, so that the tests of one model follow each other and share its truth."""

    def test_llamacpp_and_the_reference_agree(self, which: str) -> None:
        case = case_of(which)
        assert case.truth.shape == (POSITIONS, FAMILIES[which.split("-")[0]].vocab)
        # The stored distances are those of the stored logits to today's reference.
        found = rms_rows(case.logits, case.truth[list(KEPT)])
        np.testing.assert_allclose(case.distance[list(KEPT)], found, rtol=1e-3, atol=1e-6)
        coarse = LLAMACPP_BOUND_256 if which.endswith(("_K", "_XS")) else LLAMACPP_BOUND_32
        assert case.llamacpp_rms <= LLAMACPP_BOUND.get(which.split("-")[1], coarse) * case.size

    def test_llamacpp_chose_what_the_reference_would(self, which: str) -> None:
        case = case_of(which)
        best = case.truth[PROMPT - 1 :].argmax(axis=1)
        clear = case.margins > CLEAR_MARGIN * case.llamacpp_rms
        assert clear.sum() >= len(clear) // 2, "the margins of this model are too small to tell"
        assert np.array_equal(best[clear], case.greedy[clear])

    def test_engine_is_as_close_as_llamacpp(self, which: str, tmp_path: Path) -> None:
        case = case_of(which)
        path = write_gguf(tmp_path / "tiny.gguf", case.model.metadata, case.model.tensors)
        with edgert.load(path, kv_cache_type="f32") as engine:
            logits = engine.logits(case.tokens)
        assert logits.shape == case.truth.shape and logits.dtype == np.float32
        allowed = max(ALLOWED_SHARE * case.llamacpp_rms, FLOAT32_FLOOR * case.size)
        assert rms_error(logits, case.truth) <= allowed
        clear = case.margins > CLEAR_MARGIN * case.llamacpp_rms
        assert np.array_equal(logits[PROMPT - 1 :].argmax(axis=1)[clear], case.greedy[clear])


@pytest.mark.parametrize("family", [name for name, f in FAMILIES.items() if f.experts])
@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q2_K"])
def test_routers_leave_no_doubt(family: str, name: str) -> None:
    case = case_of(f"{family}-{name}")
    assert min(router_margins(case.model, case.tokens)) >= ROUTER_MARGIN


def test_every_family_uses_every_expert() -> None:
    """Margins by design must not mean that a few experts do all the work."""
    for family, f in FAMILIES.items():
        if f.experts:
            places = np.arange(f.experts) * 16
            embedding = build(family, "F32").weights["token_embd.weight"]
            chosen = embedding[prompt_of(family, PROMPT)][:, places] > 0
            assert (chosen.sum(axis=1) == f.experts_per_token).all()
            assert chosen.any(axis=0).all()


def test_archives_hold_every_case_and_nothing_else() -> None:
    found = {
        f"{path.stem}-{key.split('/')[0]}"
        for path in FOLDER.glob("*.npz")
        for key in np.load(path).files
    }
    assert found == set(CASES)
    total = sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file())
    assert total <= 1_500_000


def test_a_changed_model_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = dict(archive("llama_narrow"))
    stored["Q8_0/digest"] = np.array("0" * 64)
    monkeypatch.setitem(globals(), "archive", lambda family: stored)
    case_of.cache_clear()
    with pytest.raises(AssertionError, match="no longer the one llama.cpp was run on"):
        case_of("llama_narrow-Q8_0")
    case_of.cache_clear()
