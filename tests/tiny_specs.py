"""Tiny models of every family: specs, the metadata and tensors of their files, seeded weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgert.models.spec import ModelSpec
from edgert.models.tensors import required_tensors
from edgert.quant.formats import BY_NAME, QuantFormat
from tests.seeded import uniform


@dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]
    format: QuantFormat = BY_NAME["F32"]


def tiny(architecture: str, **changes: Any) -> ModelSpec:
    """A small spec of an architecture, as its files are: MoE where it always is."""
    moe = architecture in ("qwen3moe", "olmoe")
    fields: dict[str, Any] = dict(
        architecture=architecture, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=48, vocab_size=40,
        max_position_embeddings=64, rms_norm_eps=1e-5, rope_dim=8,
        rope_style="norm" if architecture == "llama" else "neox",
        attention_bias=architecture == "qwen2",
        qk_norm={"qwen3": "head", "qwen3moe": "head", "olmoe": "full"}.get(architecture),
        num_experts=6 if moe else 0, num_experts_per_tok=2 if moe else 0,
        moe_intermediate_size=48 if moe else 0, norm_topk_prob=architecture == "qwen3moe",
    )  # fmt: skip
    return ModelSpec(**(fields | changes))


MIXTRAL = dict(
    num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True
)  # fmt: skip

FAMILIES = {
    "llama": tiny("llama"),
    "llama3": tiny("llama", has_rope_freqs=True, rope_theta=500000.0, tie_word_embeddings=True),
    "llama-bias": tiny("llama", attention_bias=True),
    "mixtral": tiny("llama", **MIXTRAL),
    "qwen2": tiny("qwen2", tie_word_embeddings=True),
    "qwen3": tiny("qwen3", head_dim=16, rope_dim=16),
    "qwen3moe": tiny("qwen3moe", moe_intermediate_size=24),
    "olmoe": tiny("olmoe", num_key_value_heads=4),
    "linear-rope": tiny("qwen2", rope_scale=4.0),
    "partial-rope": tiny("qwen3", head_dim=16, rope_dim=8),
    "scaled-experts": tiny("olmoe", expert_weights_scale=2.5),
}


def metadata_of(spec: ModelSpec) -> dict[str, Any]:
    """The GGUF keys a converter writes for `spec`."""
    keys: dict[str, Any] = {
        "block_count": spec.num_hidden_layers, "context_length": spec.max_position_embeddings,
        "embedding_length": spec.hidden_size, "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_attention_heads,
        "attention.head_count_kv": spec.num_key_value_heads,
        "attention.key_length": spec.head_dim, "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": spec.rms_norm_eps,
        "rope.freq_base": spec.rope_theta, "rope.dimension_count": spec.rope_dim,
        "vocab_size": spec.vocab_size,
    }  # fmt: skip
    if spec.rope_scale != 1:
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": spec.rope_scale}
    if spec.is_moe:
        keys |= {"expert_count": spec.num_experts, "expert_used_count": spec.num_experts_per_tok}
        keys["expert_feed_forward_length"] = spec.moe_intermediate_size
        keys["expert_weights_scale"] = spec.expert_weights_scale
    named = {f"{spec.architecture}.{key}": value for key, value in keys.items()}
    tokens = [f"<{i}>" for i in range(spec.vocab_size)]
    return named | {
        "general.architecture": spec.architecture, "general.type": "model",
        "general.unheard_of": 7, "tokenizer.ggml.tokens": tokens,
    }  # fmt: skip


def tensors_of(spec: ModelSpec) -> dict[str, Tensor]:
    return {need.name: Tensor(need.shape) for need in required_tensors(spec).values()}


def weights_of(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Seeded weights: norms near 1, matrices of a size that keeps activations near 1."""
    weights = {}
    for need in required_tensors(spec).values():
        if need.kind == "vector":
            middle = 0.0 if need.name.endswith("bias") else 1.0
            weights[need.name] = middle + uniform(need.name, need.shape, -0.5, 0.5)
        else:
            weights[need.name] = uniform(need.name, need.shape) * (3 / need.shape[-1]) ** 0.5
    return weights
