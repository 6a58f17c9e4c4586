"""The reference model against equalities that must hold, and against llama.cpp's own logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgert.errors import InputError
from edgert.models.reference import ReferenceModel, load_reference_weights
from edgert.models.spec import ModelSpec, spec_from_manifest
from edgert.models.tensors import check_tensors
from edgert.quant.formats import BY_NAME
from edgert.storage.gguf import read_gguf
from edgert.storage.manifest import Extent, Manifest, TensorEntry
from tests.seeded import uniform
from tests.tiny_specs import FAMILIES, MIXTRAL, tiny, weights_of

STORIES = Path(__file__).parents[2] / "shared" / "data" / "stories260K"
needs_stories = pytest.mark.skipif(not STORIES.exists(), reason=f"no {STORIES}")

LONGEST_PROMPT = 17  # tokens of the longest prompt in golden_greedy.json, with BOS

TOKENS = [1, 17, 4, 39, 4, 0, 22, 22, 9, 30]

# Two float32 paths to the same logits round differently. Logits here reach 3.5 and the largest
# difference seen in these tests is 2.2e-6.
SAME = 2e-5
# Measured to llama.cpp's float32 logits, which reach 22: 1.9e-5 in float32, 4.6e-6 in float64.
GOLDEN_F32 = 1e-4
GOLDEN_F64 = 2e-5

Weights = dict[str, np.ndarray]


def logits(spec: ModelSpec, weights: Weights, tokens: list[int] = TOKENS) -> np.ndarray:
    return ReferenceModel(spec, weights).logits(tokens)


def assert_same(a: np.ndarray, b: np.ndarray) -> None:
    assert np.abs(a - b).max() < SAME
    assert np.abs(a).max() > 0.5  # not two arrays of zeros


def changed(weights: Weights, part: str, change: Any) -> Weights:
    """A copy with `change(array)` in every tensor whose name contains `part`."""
    assert any(part in name for name in weights)
    return {name: change(w) if part in name else w for name, w in weights.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_later_token_changes_no_earlier_logit(name: str) -> None:
    spec = FAMILIES[name]
    model = ReferenceModel(spec, weights_of(spec))
    whole = model.logits(TOKENS)
    assert whole.shape == (10, 40) and whole.dtype == np.float32 and np.isfinite(whole).all()
    other = model.logits([*TOKENS[:6], 5, 6, 7, 8])
    assert_same(whole[:6], other[:6])
    assert np.abs(whole[6:] - other[6:]).max() > 0.1
    for length in (1, 4, 9):
        assert_same(whole[:length], model.logits(TOKENS[:length]))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_and_every_earlier_token_matters(name: str) -> None:
    spec = FAMILIES[name]
    weights = weights_of(spec)
    whole = logits(spec, weights)
    for tensor in weights:
        # Not one factor for all: a norm that follows would take it out again.
        uneven = 1 + uniform("uneven", weights[tensor].shape, 0, 0.5)
        difference = np.abs(logits(spec, weights | {tensor: weights[tensor] * uneven}) - whole)
        assert difference.max() > 1e-3, tensor
    swapped = logits(spec, weights, [TOKENS[1], TOKENS[0], *TOKENS[2:]])
    assert np.abs(swapped[2:] - whole[2:]).max(axis=1).min() > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_float64_differs_by_rounding_only(name: str) -> None:
    spec = FAMILIES[name]
    weights = weights_of(spec)
    exact = ReferenceModel(spec, weights, np.float64).logits(TOKENS)
    assert exact.dtype == np.float32
    assert_same(logits(spec, weights), exact)


FLAGS = [
    ("llama", {"rope_theta": 500.0}), ("llama", {"rope_scale": 2.0}),
    ("llama", {"rope_style": "neox"}), ("llama", {"rope_dim": 4}),
    ("llama", {"rms_norm_eps": 0.1}), ("mixtral", {"norm_topk_prob": False}),
    ("mixtral", {"num_experts_per_tok": 1}), ("olmoe", {"expert_weights_scale": 2.0}),
    ("llama-bias", {"attention_bias": False}), ("llama", {"tie_word_embeddings": True}),
    ("qwen3", {"qk_norm": None}), ("llama3", {"has_rope_freqs": False}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_every_flag_matters(name: str, flag: dict[str, Any]) -> None:
    spec = FAMILIES[name]
    weights = weights_of(spec)
    without = logits(replace(spec, **flag), weights)
    assert np.abs(logits(spec, weights) - without).max() > 1e-3


@pytest.mark.parametrize("rope_dim", [16, 8])
def test_rope_styles_differ_by_an_order_of_rows(rope_dim: int) -> None:
    neox = tiny("qwen3", head_dim=16, rope_dim=rope_dim, qk_norm=None)
    weights = weights_of(neox)
    # Row 2i of a "norm" head is row i of a "neox" head, row 2i+1 is row i + rope_dim/2.
    order = np.arange(16)
    order[:rope_dim] = np.arange(rope_dim).reshape(2, -1).T.ravel()

    def reorder(w: np.ndarray) -> np.ndarray:
        return w.reshape(-1, 16, 32)[:, order].reshape(w.shape)

    permuted = changed(changed(weights, "attn_q.weight", reorder), "attn_k.weight", reorder)
    assert_same(logits(neox, weights), logits(replace(neox, rope_style="norm"), permuted))


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen3", "partial-rope", "linear-rope"])
def test_rotation_depends_on_distances_alone(name: str) -> None:
    spec = FAMILIES[name]
    model = ReferenceModel(spec, weights_of(spec), np.float64)
    query, key = uniform("query", (spec.head_dim,)), uniform("key", (spec.head_dim,))
    everywhere = np.ones((12, 1, 1))  # one head that holds the same vector at 12 positions
    scores = model._rotate(everywhere * query)[:, 0] @ model._rotate(everywhere * key)[:, 0].T
    assert np.allclose(scores[1:, 1:], scores[:-1, :-1])
    assert np.ptp(scores[0]) > 0.1
    assert np.allclose(scores[0, 0], query @ key)


def test_rope_freqs_that_divide_by_one_number_are_a_linear_scale() -> None:
    spec = FAMILIES["llama3"]
    weights = changed(weights_of(spec), "rope_freqs", lambda w: np.full_like(w, 8))
    linear = replace(spec, has_rope_freqs=False, rope_scale=8.0)
    assert_same(logits(spec, weights), logits(linear, weights))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_grouped_queries_are_repeated_heads(name: str) -> None:
    grouped = FAMILIES[name]
    full = replace(grouped, num_key_value_heads=grouped.num_attention_heads)

    def repeat(w: np.ndarray) -> np.ndarray:
        return w.reshape(2, grouped.head_dim, -1).repeat(2, axis=0).reshape(-1, *w.shape[1:])

    weights = repeated = weights_of(grouped)
    biases = ("attn_k.bias", "attn_v.bias") if grouped.attention_bias else ()
    for part in ("attn_k.weight", "attn_v.weight", *biases):
        repeated = changed(repeated, part, repeat)
    assert_same(logits(grouped, weights), logits(full, repeated))


@pytest.mark.parametrize(("norm", "chosen"), [(True, 1), (True, 2), (False, 6)])
def test_equal_experts_are_a_dense_block(norm: bool, chosen: int) -> None:
    """Weights that sum to 1 make equal experts one; so do all six without normalisation."""
    dense = tiny("llama")
    weights = weights_of(dense)
    moe = tiny("llama", **MIXTRAL | {"norm_topk_prob": norm, "num_experts_per_tok": chosen})
    stacked = weights_of(moe)
    for name, w in weights.items():
        if "ffn_gate" in name or "ffn_up" in name or "ffn_down" in name:
            stacked[name.replace(".weight", "_exps.weight")] = np.stack([w] * 6)
        else:
            stacked[name] = w
    assert_same(logits(dense, weights), logits(moe, stacked))


def test_the_router_takes_the_most_likely_experts() -> None:
    scores = np.log(np.array([[1, 4, 2, 1, 4, 8], [9, 1, 1, 1, 1, 7]], np.float32) / 20)
    spec = FAMILIES["olmoe"]

    def route(**flags: Any) -> tuple[Any, Any]:
        chosen, share = ReferenceModel(replace(spec, **flags), {})._route(scores)
        return chosen.tolist(), share

    chosen, share = route(num_experts_per_tok=3)
    assert chosen == [[5, 1, 4], [0, 5, 1]]  # the lower number of equals first
    assert np.allclose(share, [[0.4, 0.2, 0.2], [0.45, 0.35, 0.05]])
    chosen, share = route(norm_topk_prob=True, expert_weights_scale=3.0)
    assert chosen == [[5, 1], [0, 5]]
    assert np.allclose(share, [[2, 1], [3 * 9 / 16, 3 * 7 / 16]])


def test_of_many_equal_experts_the_first_are_taken() -> None:
    spec = tiny("olmoe", num_experts=128, num_experts_per_tok=8)
    chosen, _ = ReferenceModel(spec, {})._route(np.zeros((1, 128), np.float32))
    assert chosen.tolist() == [list(range(8))]


def test_an_expert_nobody_chooses_is_not_used() -> None:
    spec = FAMILIES["mixtral"]
    weights = changed(weights_of(spec), "ffn_gate_inp", np.zeros_like)
    # All six are equally likely, and the two with the lowest numbers win.
    broken = changed(weights, "_exps", lambda w: np.concatenate([w[:2], np.full_like(w[2:], 9)]))
    used = changed(weights, "_exps", lambda w: np.concatenate([w[:1], np.full_like(w[1:], 9)]))
    assert np.array_equal(logits(spec, weights), logits(spec, broken))
    assert np.abs(logits(spec, weights) - logits(spec, used)).max() > 0.1


def test_a_tied_head_is_the_embedding() -> None:
    tied = FAMILIES["qwen2"]
    weights = weights_of(tied)
    untied = replace(tied, tie_word_embeddings=False)
    copied = weights | {"output.weight": weights["token_embd.weight"]}
    assert np.array_equal(logits(tied, weights), logits(untied, copied))


@pytest.mark.parametrize("tokens", [[], [40], [-1], [3, 99]])
def test_tokens_outside_the_vocabulary_are_refused(tokens: list[int]) -> None:
    spec = tiny("llama")
    with pytest.raises(InputError, match="one or more of 0 to 39"):
        ReferenceModel(spec, weights_of(spec)).logits(tokens)


def test_weights_are_dequantised_by_name() -> None:
    blob = np.arange(8, dtype="<f4").tobytes() + np.arange(6, dtype="<f2").tobytes()
    tensors = {
        "a": TensorEntry("a", BY_NAME["F32"], (2, 4), Extent(0, 0, 32)),
        "b": TensorEntry("b", BY_NAME["F16"], (3, 1, 2), Extent(0, 32, 12)),
    }
    weights = load_reference_weights(
        Manifest((Path("x"),), (44,), {}, tensors), lambda e: blob[e.offset : e.offset + e.nbytes]
    )
    assert weights["a"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert weights["b"].tolist() == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert {w.dtype for w in weights.values()} == {np.dtype(np.float32)}


def load(name: str) -> tuple[ModelSpec, Weights]:
    manifest = read_gguf(STORIES / name)
    spec = spec_from_manifest(manifest.metadata, manifest.tensors)
    check_tensors(spec, manifest.tensors)
    blob = manifest.files[0].read_bytes()
    return spec, load_reference_weights(
        manifest, lambda extent: blob[extent.offset : extent.offset + extent.nbytes]
    )


@needs_stories
def test_logits_of_a_real_model_are_those_of_llama_cpp() -> None:
    spec, weights = load("stories260K-f32.gguf")
    with np.load(STORIES / "golden_logits.npz") as golden:
        tokens, expected = golden["tokens"].tolist(), golden["logits"]
    assert np.abs(logits(spec, weights, tokens) - expected).max() < GOLDEN_F32
    exact = ReferenceModel(spec, weights, np.float64).logits(tokens)
    assert np.abs(exact - expected).max() < GOLDEN_F64


@needs_stories
def test_greedy_tokens_of_a_real_model_are_those_of_llama_cpp() -> None:
    spec, weights = load("stories260K-f32.gguf")
    model = ReferenceModel(spec, weights)
    for run in json.loads((STORIES / "golden_greedy.json").read_text()):
        tokens = run["tokens"]
        best = model.logits(tokens).argmax(-1)
        assert len(tokens) > LONGEST_PROMPT + 100
        assert best[LONGEST_PROMPT - 1 : -1].tolist() == tokens[LONGEST_PROMPT:]
