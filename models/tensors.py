"""Which tensors a model has: the map from a spec to names, shapes and roles.

Owns: GGUF tensor names, the shape each must have, and the refusal of tensors that would change
what the model computes. Must not know files, offsets or how a tensor is stored beyond its format.
Source: the tensor names of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from edgert.errors import ModelError, UnsupportedError
from edgert.models.spec import ModelSpec, TensorLike

__all__ = ["Kind", "TensorNeed", "TensorRole", "check_tensors", "required_tensors"]

Kind = Literal["embedding", "matrix", "vector", "expert_matrix"]


class TensorRole(StrEnum):
    """What a tensor does, in Hugging Face's words. Experts share the words of the dense block."""

    EMBED_TOKENS = "embed_tokens"
    INPUT_NORM = "input_layernorm"  # before attention
    Q_PROJ = "q_proj"
    K_PROJ = "k_proj"
    V_PROJ = "v_proj"
    Q_BIAS = "q_bias"
    K_BIAS = "k_bias"
    V_BIAS = "v_bias"
    Q_NORM = "q_norm"
    K_NORM = "k_norm"
    O_PROJ = "o_proj"
    POST_ATTENTION_NORM = "post_attention_layernorm"  # before the feed-forward block
    ROUTER = "router"
    GATE_PROJ = "gate_proj"
    UP_PROJ = "up_proj"
    DOWN_PROJ = "down_proj"
    NORM = "norm"  # before the output head
    LM_HEAD = "lm_head"
    ROPE_FREQS = "rope_freqs"


@dataclass(frozen=True, slots=True)
class TensorNeed:
    """A tensor the model must have. Matrices are (rows out, columns in), experts (E, out, in)."""

    name: str  # in the GGUF file
    shape: tuple[int, ...]
    role: TensorRole
    layer: int | None  # None outside the layers
    kind: Kind


# Left in files by old converters; they repeat what the metadata says.
_IGNORED = re.compile(r"(blk\.\d+\.)?attn_rot_embd\.weight")
_SPLIT_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
_FUSED = re.compile(r"blk\.\d+\.ffn_(gate_up|up_gate)(_exps|_shexp)?\.weight")


def required_tensors(spec: ModelSpec) -> dict[str, TensorNeed]:
    """Every tensor of a model with this spec by GGUF name, in the order of the forward pass.

    Tied embeddings leave `output.weight` out: the head is then `token_embd.weight`.
    """
    return {need.name: need for need in _needs(spec)}


def check_tensors(spec: ModelSpec, tensors: Mapping[str, TensorLike]) -> dict[str, TensorNeed]:
    """Compare the tensors of a file with what the spec needs; the needs, when all is well.

    Raises `ModelError` for a missing tensor, a wrong shape, rows that are not whole blocks or a
    vector that is not floating point; `UnsupportedError` for a tensor the model would not use.
    """
    needs = required_tensors(spec)
    for name in tensors:
        if _SPLIT_EXPERT.fullmatch(name):
            raise UnsupportedError(
                f"tensor {name!r} holds one expert by itself, as Mixtral files of before April "
                "2024 do; convert the model again, or use a newer file with ffn_gate_exps"
            )
        if _FUSED.fullmatch(name):
            raise UnsupportedError(
                f"tensor {name!r} holds gate and up in one; convert the model again with ffn_gate "
                "and ffn_up apart"
            )
    for need in needs.values():
        _check_tensor(need, tensors)
    for name in tensors:
        if name not in needs and not _IGNORED.fullmatch(name):
            raise UnsupportedError(
                f"tensor {name!r} is not part of a {spec.architecture} model as edgert runs it; "
                "leaving it out would change the output"
            )
    return needs


def _check_tensor(need: TensorNeed, tensors: Mapping[str, TensorLike]) -> None:
    found = tensors.get(need.name)
    if found is None:
        raise ModelError(f"tensor {need.name!r} {need.shape} is missing")
    if tuple(found.shape) != need.shape:
        raise ModelError(
            f"tensor {need.name!r} has shape {tuple(found.shape)}, expected {need.shape}"
        )
    if need.kind == "vector" and not found.format.is_float:
        raise ModelError(f"tensor {need.name!r} is {found.format.name}, expected F32, F16 or BF16")
    if need.shape[-1] % found.format.block_size:
        raise ModelError(
            f"tensor {need.name!r} has rows of {need.shape[-1]}, not a multiple of the "
            f"{found.format.block_size} weights in a {found.format.name} block"
        )


def _needs(spec: ModelSpec) -> Iterator[TensorNeed]:
    role = TensorRole
    hidden, vocab = spec.hidden_size, spec.vocab_size
    yield TensorNeed("token_embd.weight", (vocab, hidden), role.EMBED_TOKENS, None, "embedding")
    if spec.has_rope_freqs:
        yield TensorNeed(
            "rope_freqs.weight", (spec.rope_dim // 2,), role.ROPE_FREQS, None, "vector"
        )
    for layer in range(spec.num_hidden_layers):
        yield from _attention_needs(spec, layer)
        yield from _feed_forward_needs(spec, layer)
    yield TensorNeed("output_norm.weight", (hidden,), role.NORM, None, "vector")
    if not spec.tie_word_embeddings:
        yield TensorNeed("output.weight", (vocab, hidden), role.LM_HEAD, None, "matrix")


def _attention_needs(spec: ModelSpec, layer: int) -> Iterator[TensorNeed]:
    role, at = TensorRole, f"blk.{layer}."
    hidden, q_size, kv_size = spec.hidden_size, spec.q_size, spec.kv_size
    yield TensorNeed(f"{at}attn_norm.weight", (hidden,), role.INPUT_NORM, layer, "vector")
    projections = (
        ("q", q_size, role.Q_PROJ, role.Q_BIAS),
        ("k", kv_size, role.K_PROJ, role.K_BIAS),
        ("v", kv_size, role.V_PROJ, role.V_BIAS),
    )
    for letter, rows, weight, bias in projections:
        yield TensorNeed(f"{at}attn_{letter}.weight", (rows, hidden), weight, layer, "matrix")
        if spec.attention_bias:
            yield TensorNeed(f"{at}attn_{letter}.bias", (rows,), bias, layer, "vector")
    if spec.qk_norm:
        q_norm, k_norm = (q_size, kv_size) if spec.qk_norm == "full" else (spec.head_dim,) * 2
        yield TensorNeed(f"{at}attn_q_norm.weight", (q_norm,), role.Q_NORM, layer, "vector")
        yield TensorNeed(f"{at}attn_k_norm.weight", (k_norm,), role.K_NORM, layer, "vector")
    yield TensorNeed(f"{at}attn_output.weight", (hidden, q_size), role.O_PROJ, layer, "matrix")


def _feed_forward_needs(spec: ModelSpec, layer: int) -> Iterator[TensorNeed]:
    role, at, hidden = TensorRole, f"blk.{layer}.", spec.hidden_size
    yield TensorNeed(f"{at}ffn_norm.weight", (hidden,), role.POST_ATTENTION_NORM, layer, "vector")
    kind: Kind = "expert_matrix" if spec.is_moe else "matrix"
    width = spec.moe_intermediate_size if spec.is_moe else spec.intermediate_size
    lead = (spec.num_experts,) if spec.is_moe else ()
    end = "_exps.weight" if spec.is_moe else ".weight"
    if spec.is_moe:
        router = (spec.num_experts, hidden)
        yield TensorNeed(f"{at}ffn_gate_inp.weight", router, role.ROUTER, layer, "matrix")
    yield TensorNeed(f"{at}ffn_gate{end}", (*lead, width, hidden), role.GATE_PROJ, layer, kind)
    yield TensorNeed(f"{at}ffn_up{end}", (*lead, width, hidden), role.UP_PROJ, layer, kind)
    yield TensorNeed(f"{at}ffn_down{end}", (*lead, hidden, width), role.DOWN_PROJ, layer, kind)
