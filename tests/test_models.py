"""Specs and tensor maps: every family is read, every refusal names what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgert.errors import EdgertError, ModelError, UnsupportedError
from edgert.models import metadata as metadata_keys
from edgert.models.spec import SUPPORTED_ARCHITECTURES, ModelSpec, spec_from_manifest
from edgert.models.tensors import TensorRole, check_tensors, required_tensors
from edgert.quant.formats import BY_NAME
from tests.tiny_specs import FAMILIES, Tensor, metadata_of, tensors_of, tiny


def read_spec(arch: str, tensors: Mapping[str, Tensor] | None = None, **keys: Any) -> ModelSpec:
    """The spec after changing keys under `<arch>.`; dots are written `__`, None removes a key."""
    spec = tiny(arch)
    metadata = metadata_of(spec)
    for name, value in keys.items():
        metadata[f"{arch}.{name.replace('__', '.')}"] = value
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return spec_from_manifest(metadata, tensors_of(spec) if tensors is None else tensors)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_spec_of_every_family_is_read_back(name: str) -> None:
    spec = FAMILIES[name]
    assert spec_from_manifest(metadata_of(spec), tensors_of(spec)) == spec
    assert spec.architecture in SUPPORTED_ARCHITECTURES


def test_keys_left_out_have_the_defaults_of_the_format() -> None:
    absent = dict.fromkeys(
        ["attention__head_count_kv", "attention__key_length", "attention__value_length",
         "rope__freq_base", "rope__dimension_count", "vocab_size"]
    )  # fmt: skip
    spec = read_spec("llama", **absent)
    assert (spec.num_key_value_heads, spec.head_dim, spec.rope_dim) == (4, 8, 8)
    assert (spec.rope_theta, spec.vocab_size) == (10000.0, 40)
    moe = read_spec("olmoe", expert_feed_forward_length=None, feed_forward_length=24)
    assert moe.moe_intermediate_size == 24
    assert read_spec("qwen3moe", feed_forward_length=None).intermediate_size == 48


def test_values_in_other_guises_are_taken() -> None:
    layered = read_spec("llama", attention__head_count_kv=np.array([2, 2], np.int32))
    assert layered == tiny("llama")
    assert read_spec("llama", rope__freq_base=np.int64(500000)).rope_theta == 500000.0
    assert read_spec("qwen3moe", expert_weights_norm=False).norm_topk_prob is False
    assert read_spec("olmoe", expert_weights_scale=0.0).expert_weights_scale == 1.0


def test_rope_scaling_as_far_as_it_is_linear() -> None:
    def scale(**keys: Any) -> float:
        return read_spec("llama", **{f"rope__scaling__{k}": v for k, v in keys.items()}).rope_scale

    assert scale(factor=4.0) == 4.0
    assert scale(type="linear", factor=4.0) == 4.0
    assert scale(type="linear") == 1.0
    assert scale(type="none", factor=4.0) == 1.0
    assert scale(type="yarn", factor=1.0, original_context_length=64) == 1.0
    assert scale(factor=0.0) == 1.0
    assert read_spec("llama", rope__scale_linear=2.0).rope_scale == 2.0


NEUTRAL = [
    ("llama", "attention__sliding_window", 16),  # not applied to these files by anyone
    ("llama", "attention__sliding_window_pattern", 4),
    ("qwen2", "attention__sliding_window", 64),  # as long as the context
    ("qwen2", "attention__sliding_window", 0),
    ("qwen3", "attention__scale", float(np.float32(8**-0.5))),
    ("llama", "attention__causal", True),
    ("llama", "logit_scale", 1.0),
    ("llama", "tensor_data_layout", "Meta AI original pth"),
    ("olmoe", "attention__clamp_kqv", 0.0),
    ("olmoe", "expert_gating_func", 1),
    ("qwen3moe", "expert_shared_count", 0),
    ("llama", "expert_count", 0),
    ("llama", "rope__scaling__finetuned", True),
]


@pytest.mark.parametrize(("arch", "key", "value"), NEUTRAL)
def test_keys_at_their_neutral_value_change_nothing(arch: str, key: str, value: Any) -> None:
    assert read_spec(arch, **{key: value}) == tiny(arch)


UNSUPPORTED = [
    ("qwen2", "attention__sliding_window", 32), ("olmoe", "attention__clamp_kqv", 8.0),
    ("llama", "attention__scale", 0.015625), ("llama", "logit_scale", 0.125),
    ("llama", "residual_scale", 0.22), ("llama", "embedding_scale", 12.0),
    ("llama", "attention__causal", False), ("qwen3", "pooling_type", 3),
    ("qwen3moe", "expert_shared_count", 1), ("qwen3moe", "expert_gating_func", 2),
    ("qwen3moe", "leading_dense_block_count", 1), ("llama", "use_parallel_residual", True),
    ("llama", "tensor_data_layout", "transposed"), ("qwen2", "expert_count", 4),
    ("llama", "final_logit_softcapping", 30.0), ("llama", "attention__value_length", 16),
    ("llama", "feed_forward_length", np.array([48, 64])), ("llama", "rope__scaling__type", "ntk"),
    ("llama", "attention__head_count_kv", [1, 2]), ("qwen3", "dance", "polka"),
    ("llama", "rope__scaling__yarn_ext_factor", 1.0), ("llama", "logit_scale", [1.0, 0.5]),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "key", "value"), UNSUPPORTED)
def test_keys_that_change_the_model_are_refused_by_name(arch: str, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"{arch}.{key.replace('__', '.')}"):
        read_spec(arch, **{key: value})


@pytest.mark.parametrize("name", metadata_keys._NEUTRAL)
def test_every_listed_key_is_refused_away_from_its_neutral_values(name: str) -> None:
    key = name.replace(".", "__")
    for neutral in metadata_keys._NEUTRAL[name]:
        assert read_spec("qwen3", **{key: neutral}) == tiny("qwen3")
    with pytest.raises(UnsupportedError, match=f"'qwen3.{name}' = 77 changes what .* it runs"):
        read_spec("qwen3", **{key: 77})


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_context_extensions_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=f"'{kind}' with factor 4"):
        read_spec("qwen3", rope__scaling__type=kind, rope__scaling__factor=4.0)


WRONG = [
    ("llama", "block_count", None, "'llama.block_count' is missing, expected int"),
    ("llama", "block_count", 2.0, r"'llama.block_count' is 2.0 \(float\), expected int"),
    ("llama", "block_count", True, r"is True \(bool\), expected int"),
    ("llama", "block_count", 2**60, "is 1,152,921,504,606,846,976, expected 1 to 4,096"),
    ("llama", "context_length", 0, "max_position_embeddings is 0"),
    ("llama", "embedding_length", 0, "'?llama.embedding_length'? is 0"),
    ("llama", "attention__head_count", 0, "llama.attention.head_count is 0"),
    ("llama", "attention__head_count", 3, "3 attention heads cannot share 2"),
    ("llama", "attention__head_count_kv", 0, "num_key_value_heads is 0"),
    ("llama", "attention__head_count_kv", [2], "has 1 entries for 2 layers"),
    ("llama", "attention__key_length", -8, "llama.attention.key_length is -8"),
    ("llama", "rope__dimension_count", 7, "rotary dimension 7 must be even and at most the head"),
    ("llama", "rope__dimension_count", 16, "rotary dimension 16 .* head size of 8"),
    ("llama", "rope__freq_base", float("nan"), "rope_theta is nan"),
    ("llama", "rope__scaling__factor", -2.0, "rope_scale is -2.0"),
    ("llama", "attention__layer_norm_rms_epsilon", 0.0, "rms_norm_eps is 0.0"),
    ("llama", "vocab_size", 41, "has 40 rows, but llama.vocab_size is 41"),
    ("olmoe", "expert_count", 0, "'olmoe.expert_count' is missing or 0"),
    ("olmoe", "expert_used_count", 7, "num_experts_per_tok is 7, expected 1 to 6"),
    ("olmoe", "expert_used_count", None, "'olmoe.expert_used_count' is missing"),
]


@pytest.mark.parametrize(("arch", "key", "value", "message"), WRONG)
def test_wrong_numbers_are_named(arch: str, key: str, value: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_spec(arch, **{key: value})


def test_head_size_that_does_not_follow() -> None:
    with pytest.raises(ModelError, match="32 is not a multiple of 5 attention heads"):
        read_spec("llama", attention__head_count=5, attention__key_length=None)


def test_the_file_as_a_whole() -> None:
    spec = tiny("llama")
    metadata, tensors = metadata_of(spec), tensors_of(spec)
    with pytest.raises(UnsupportedError, match="'mamba' is not one edgert runs: llama, qwen2"):
        spec_from_manifest(metadata | {"general.architecture": "mamba"}, tensors)
    with pytest.raises(UnsupportedError, match="holds a 'mmproj', not a language model"):
        spec_from_manifest(metadata | {"general.type": "mmproj"}, tensors)
    with pytest.raises(ModelError, match=r"'general.architecture' is missing"):
        spec_from_manifest({}, tensors)
    with pytest.raises(ModelError, match="'token_embd.weight' is missing: .* not a whole one"):
        spec_from_manifest(metadata, {})
    with pytest.raises(ModelError, match="has 40 rows, but the length of tokenizer.* is 2"):
        spec_from_manifest(metadata | {"tokenizer.ggml.tokens": ["a", "b"]}, tensors)
    with pytest.raises(ModelError, match="expected two axes"):
        spec_from_manifest(metadata, tensors | {"token_embd.weight": Tensor((40,))})


JUNK = (
    None, -1, 0, 2**63, 1e308, float("nan"), "", "x", True, [], [1, 2], ["a", "b"],
    np.array([], np.int32), np.array([1.5, 1.5]), np.array([2, 3], np.uint8), np.float32("inf"),
)  # fmt: skip


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe", "linear-rope"])
def test_no_value_of_any_key_gets_past_as_another_exception(name: str) -> None:
    metadata, tensors = metadata_of(FAMILIES[name]), tensors_of(FAMILIES[name])
    refused = 0
    for key in metadata:
        for junk in JUNK:
            try:
                assert isinstance(spec_from_manifest(metadata | {key: junk}, tensors), ModelSpec)
            except EdgertError as error:
                assert isinstance(error, ModelError | UnsupportedError)
                refused += 1
    assert refused > 10 * len(metadata)


def test_tensor_names_roles_and_shapes() -> None:
    needs = required_tensors(replace(FAMILIES["mixtral"], num_hidden_layers=1))
    assert {need.name: need.shape for need in needs.values()} == {
        "token_embd.weight": (40, 32), "blk.0.attn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32), "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32), "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_norm.weight": (32,), "blk.0.ffn_gate_inp.weight": (6, 32),
        "blk.0.ffn_gate_exps.weight": (6, 48, 32), "blk.0.ffn_up_exps.weight": (6, 48, 32),
        "blk.0.ffn_down_exps.weight": (6, 32, 48), "output_norm.weight": (32,),
        "output.weight": (40, 32),
    }  # fmt: skip
    down = needs["blk.0.ffn_down_exps.weight"]
    assert (down.role, down.layer, down.kind) == (TensorRole.DOWN_PROJ, 0, "expert_matrix")
    assert needs["token_embd.weight"].kind == "embedding"
    qwen = required_tensors(FAMILIES["qwen3"])
    assert qwen["blk.1.attn_q_norm.weight"].shape == (16,)
    assert qwen["blk.1.attn_output.weight"].shape == (32, 64)
    assert required_tensors(FAMILIES["olmoe"])["blk.1.attn_k_norm.weight"].shape == (32,)
    assert required_tensors(FAMILIES["qwen2"])["blk.0.attn_v.bias"].shape == (16,)
    assert required_tensors(FAMILIES["llama3"])["rope_freqs.weight"].shape == (4,)
    assert "output.weight" not in required_tensors(FAMILIES["qwen2"])


@pytest.mark.parametrize("name", FAMILIES)
def test_no_tensor_may_be_missing_or_misshapen(name: str) -> None:
    spec, tensors = FAMILIES[name], tensors_of(FAMILIES[name])
    assert check_tensors(spec, tensors) == required_tensors(spec)
    for gone, tensor in tensors.items():
        rest = {key: value for key, value in tensors.items() if key != gone}
        with pytest.raises(ModelError, match=f"tensor '{gone}' .* is missing"):
            check_tensors(spec, rest)
        longer = (*tensor.shape[:-1], tensor.shape[-1] + 1)
        with pytest.raises(ModelError, match=f"tensor '{gone}' has shape .* expected"):
            check_tensors(spec, tensors | {gone: Tensor(longer)})


def test_formats_of_tensors() -> None:
    spec = tiny("llama")
    tensors = tensors_of(spec)
    fine = {"token_embd.weight": Tensor((40, 32), BY_NAME["Q8_0"])}
    fine["output_norm.weight"] = Tensor((32,), BY_NAME["BF16"])
    check_tensors(spec, tensors | fine)
    with pytest.raises(ModelError, match="'output_norm.weight' is Q8_0, expected F32, F16 or BF"):
        check_tensors(spec, tensors | {"output_norm.weight": Tensor((32,), BY_NAME["Q8_0"])})
    with pytest.raises(ModelError, match="rows of 32, not a multiple of the 256 .* Q4_K block"):
        check_tensors(spec, tensors | {"output.weight": Tensor((40, 32), BY_NAME["Q4_K"])})


FOREIGN = [
    "blk.0.attn_output.bias", "blk.0.attn_q.scale", "blk.0.attn_qkv.weight", "output.bias",
    "rope_freqs.weight", "rope_factors_long.weight", "blk.2.attn_q.weight", "cls.output.weight",
    "blk.0.ffn_gate_shexp.weight", "blk.0.exp_probs_b.bias", "blk.0.attn_q.bias",
]  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_tensors_the_model_would_not_use_are_refused(name: str) -> None:
    spec = tiny("qwen3")
    tensors = tensors_of(spec) | {name: Tensor((32,))}
    with pytest.raises(UnsupportedError, match=f"tensor '{name}' is not part of a qwen3 model"):
        check_tensors(spec, tensors)


def test_tensors_of_old_converters() -> None:
    spec = FAMILIES["mixtral"]
    tensors = tensors_of(spec)
    check_tensors(spec, tensors | {"blk.0.attn_rot_embd.weight": Tensor((4,))})
    with pytest.raises(UnsupportedError, match="'blk.1.ffn_up.3.weight' holds one expert"):
        check_tensors(spec, tensors | {"blk.1.ffn_up.3.weight": Tensor((48, 32))})
