"""What a model is: one frozen record of its shape and flags, read from GGUF metadata.

Owns: the families edgert runs, what each fixes without a key, and the checks of every number.
Must not know files, offsets or kernels. Source: the key list of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, defaults as llama.cpp reads them; field
names are those of Hugging Face's `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, Protocol

from edgert.errors import ModelError, UnsupportedError
from edgert.models.metadata import REQUIRED, brief, read, read_per_layer, refuse_unknown_keys
from edgert.quant.formats import QuantFormat

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "ModelSpec",
    "TensorLike",
    "spec_from_manifest",
]


class TensorLike(Protocol):
    """What this package needs to know of a tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """NumPy order, outermost axis first: (M, K) or (E, M, K)."""

    @property
    def format(self) -> QuantFormat:
        """How its numbers are stored."""


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture fixes without saying so in any key."""

    rope_style: Literal["norm", "neox"]
    qk_norm: Literal["head", "full"] | None
    experts: Literal["never", "maybe", "always"]
    norm_topk_prob: bool
    needs_bias: bool = False  # the Q, K and V projections always carry a bias


_FAMILIES = {
    "llama": _Family("norm", None, "maybe", norm_topk_prob=True),  # with Mistral and Mixtral
    "qwen2": _Family("neox", None, "never", norm_topk_prob=False, needs_bias=True),
    "qwen3": _Family("neox", "head", "never", norm_topk_prob=False),
    "qwen3moe": _Family("neox", "head", "always", norm_topk_prob=True),
    "olmoe": _Family("neox", "full", "always", norm_topk_prob=False),
}
SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)

# Bounds far above any published model: a damaged count is refused before it sizes anything.
_MAX = {
    "hidden_size": 2**18, "num_hidden_layers": 2**12, "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14, "head_dim": 2**14, "intermediate_size": 2**22,
    "vocab_size": 2**24, "max_position_embeddings": 2**31, "rope_dim": 2**14,
}  # fmt: skip
_MAX_EXPERTS = 2**14


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shape and flags of a decoder: all a forward pass must know besides the weights.

    Raises `ModelError` with the numbers when they contradict each other.
    """

    architecture: str  # as in `general.architecture`
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # divides num_attention_heads
    head_dim: int  # heads x head_dim may differ from hidden_size
    intermediate_size: int  # of the dense feed-forward block
    vocab_size: int
    max_position_embeddings: int  # tokens
    rms_norm_eps: float
    rope_theta: float = 10000.0
    rope_dim: int  # the first rope_dim numbers of a head are rotated, the rest pass through
    rope_style: Literal["norm", "neox"]  # pairs (2i, 2i+1), or (i, i + rope_dim/2)
    rope_scale: float = 1.0  # linear: positions are divided by it
    attention_bias: bool = False  # Q, K and V projections add a bias
    qk_norm: Literal["head", "full"] | None = None  # RMSNorm of Q and K: each head, or all as one
    num_experts: int = 0  # 0: dense
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0  # of one expert
    norm_topk_prob: bool = False  # router weights of the chosen experts are scaled to sum 1
    expert_weights_scale: float = 1.0  # then multiplied by this
    tie_word_embeddings: bool = False  # the output head is the embedding
    has_rope_freqs: bool = False  # `rope_freqs.weight` divides the rotary frequencies

    def __post_init__(self) -> None:
        for name, bound in _MAX.items():
            _check_range(name, getattr(self, name), 1, bound)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ModelError(f"{heads} attention heads cannot share {kv_heads} key/value heads")
        if self.rope_dim % 2 or self.rope_dim > self.head_dim:
            raise ModelError(
                f"rotary dimension {self.rope_dim} must be even and at most "
                f"the head size of {self.head_dim}"
            )
        _check_range("num_experts", self.num_experts, 0, _MAX_EXPERTS)
        if self.num_experts:
            _check_range("num_experts_per_tok", self.num_experts_per_tok, 1, self.num_experts)
            _check_range(
                "moe_intermediate_size", self.moe_intermediate_size, 1, _MAX["intermediate_size"]
            )
        for name in ("rms_norm_eps", "rope_theta", "rope_scale", "expert_weights_scale"):
            number = getattr(self, name)
            if not (isfinite(number) and number > 0):
                raise ModelError(f"{name} is {number}, expected a finite number above 0")

    @property
    def q_size(self) -> int:
        """Width of the query projection: heads x head_dim."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the key and of the value projection: key/value heads x head_dim."""
        return self.num_key_value_heads * self.head_dim

    @property
    def is_moe(self) -> bool:
        """True when the feed-forward blocks are routed experts."""
        return self.num_experts > 0


def spec_from_manifest(metadata: Mapping[str, Any], tensors: Mapping[str, TensorLike]) -> ModelSpec:
    """The spec of a GGUF model, from its metadata and the shapes of its tensors.

    Raises `ModelError` for missing, mistyped or contradictory keys, `UnsupportedError` that names
    the architecture or key edgert does not run. Shapes are checked by `tensors.check_tensors`.
    """
    arch = _architecture(metadata)
    family = _FAMILIES[arch]
    refuse_unknown_keys(metadata, arch)

    layers = read(metadata, f"{arch}.block_count", int)
    _check_range(f"{arch}.block_count", layers, 1, _MAX["num_hidden_layers"])
    hidden = read(metadata, f"{arch}.embedding_length", int)
    context = read(metadata, f"{arch}.context_length", int)
    heads = read_per_layer(metadata, f"{arch}.attention.head_count", layers)
    _check_range(f"{arch}.attention.head_count", heads, 1, _MAX["num_attention_heads"])
    head_dim = _head_dim(metadata, arch, hidden, heads)
    _refuse_attention_variants(metadata, arch, context, head_dim)

    experts, per_token = _expert_counts(metadata, arch, family)
    dense = REQUIRED if not experts or arch != "qwen3moe" else 0
    ffn = read_per_layer(metadata, f"{arch}.feed_forward_length", layers, dense)
    expert_key = f"{arch}.expert_feed_forward_length"
    # Mixtral and OLMoE files give the size of an expert as feed_forward_length.
    expert_ffn = read(metadata, expert_key, int, ffn or REQUIRED) if experts else 0

    return ModelSpec(
        architecture=arch,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=read_per_layer(
            metadata, f"{arch}.attention.head_count_kv", layers, heads
        ),
        head_dim=head_dim,
        intermediate_size=ffn or expert_ffn,
        vocab_size=_vocab_size(metadata, arch, tensors),
        max_position_embeddings=context,
        rms_norm_eps=read(metadata, f"{arch}.attention.layer_norm_rms_epsilon", float),
        rope_theta=read(metadata, f"{arch}.rope.freq_base", float, 10000.0),
        rope_dim=read(metadata, f"{arch}.rope.dimension_count", int, head_dim),
        rope_style=family.rope_style,
        rope_scale=_rope_scale(metadata, arch),
        attention_bias=family.needs_bias or "blk.0.attn_q.bias" in tensors,
        qk_norm=family.qk_norm,
        num_experts=experts,
        num_experts_per_tok=per_token,
        moe_intermediate_size=expert_ffn,
        norm_topk_prob=bool(experts)
        and read(metadata, f"{arch}.expert_weights_norm", bool, family.norm_topk_prob),
        expert_weights_scale=read(metadata, f"{arch}.expert_weights_scale", float, 1.0) or 1.0,
        tie_word_embeddings="output.weight" not in tensors,
        has_rope_freqs=arch == "llama" and "rope_freqs.weight" in tensors,
    )


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ModelError(f"{name} is {value:,}, expected {low:,} to {high:,}")


def _architecture(metadata: Mapping[str, Any]) -> str:
    kind = read(metadata, "general.type", str, "model")
    if kind != "model":
        raise UnsupportedError(
            f"this file holds a {brief(kind)}, not a language model; open the model's own file"
        )
    arch = read(metadata, "general.architecture", str)
    if arch not in _FAMILIES:
        raise UnsupportedError(
            f"architecture {brief(arch)} is not one edgert runs: {', '.join(_FAMILIES)}"
        )
    return arch


def _refuse_attention_variants(
    metadata: Mapping[str, Any], arch: str, context: int, head_dim: int
) -> None:
    scale = read(metadata, f"{arch}.attention.scale", float, 0.0)
    usual = head_dim**-0.5
    if scale and abs(scale - usual) > 1e-6 * usual:  # stored as float32
        raise UnsupportedError(
            f"metadata key '{arch}.attention.scale' = {scale} is not 1/sqrt({head_dim}) "
            f"= {usual:.6g}, the only attention scale edgert runs"
        )
    # Files of the first Mistral carry a window of 4096. llama.cpp attends to all tokens in every
    # `llama` file, and so does this; up to the window there is no difference.
    window = read(metadata, f"{arch}.attention.sliding_window", int, 0)
    if arch != "llama" and 0 < window < context:
        raise UnsupportedError(
            f"metadata key '{arch}.attention.sliding_window' = {window:,} is below the context of "
            f"{context:,} tokens: sliding-window attention is not run"
        )


def _head_dim(metadata: Mapping[str, Any], arch: str, hidden: int, heads: int) -> int:
    _check_range(f"{arch}.embedding_length", hidden, 1, _MAX["hidden_size"])
    key_length = read(metadata, f"{arch}.attention.key_length", int, 0)
    if not key_length and hidden % heads:
        raise ModelError(
            f"a hidden size of {hidden} is not a multiple of {heads} attention heads, "
            f"and '{arch}.attention.key_length' is missing"
        )
    head_dim = key_length or hidden // heads
    _check_range(f"{arch}.attention.key_length", head_dim, 1, _MAX["head_dim"])
    value_length = read(metadata, f"{arch}.attention.value_length", int, head_dim)
    if value_length != head_dim:
        raise UnsupportedError(
            f"metadata key '{arch}.attention.value_length' = {value_length} differs from the key "
            f"length {head_dim}; edgert runs heads with one size"
        )
    return head_dim


def _expert_counts(metadata: Mapping[str, Any], arch: str, family: _Family) -> tuple[int, int]:
    count = read(metadata, f"{arch}.expert_count", int, 0)
    if count and family.experts == "never":
        raise UnsupportedError(
            f"metadata key '{arch}.expert_count' = {count}: {arch} models are run dense only"
        )
    if not count and family.experts == "always":
        raise ModelError(f"metadata key '{arch}.expert_count' is missing or 0 in a {arch} model")
    return count, read(metadata, f"{arch}.expert_used_count", int) if count else 0


def _rope_scale(metadata: Mapping[str, Any], arch: str) -> float:
    """The linear factor; as in llama.cpp a factor without a type is linear, and 0 is unset."""
    old = read(metadata, f"{arch}.rope.scale_linear", float, 0.0)
    factor = read(metadata, f"{arch}.rope.scaling.factor", float, old) or 1.0
    kind = read(metadata, f"{arch}.rope.scaling.type", str, "linear")
    if kind == "none":
        return 1.0
    if kind == "linear" or (kind in ("yarn", "longrope") and factor == 1.0):
        return factor
    raise UnsupportedError(
        f"metadata key '{arch}.rope.scaling.type' = {brief(kind)} with factor {factor:g}: "
        "edgert runs none and linear; use the file of this model without the context extension"
    )


def _vocab_size(metadata: Mapping[str, Any], arch: str, tensors: Mapping[str, TensorLike]) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(
            "tensor 'token_embd.weight' is missing: the file holds a vocabulary or a part of a "
            "model, not a whole one"
        )
    if len(embedding.shape) != 2:
        raise ModelError(f"token_embd.weight has shape {embedding.shape}, expected two axes")
    rows = embedding.shape[0]
    sizes = {f"{arch}.vocab_size": read(metadata, f"{arch}.vocab_size", int, rows)}
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):  # anything else is the tokenizer's to refuse
        sizes["the length of tokenizer.ggml.tokens"] = len(tokens)
    for name, size in sizes.items():
        if size != rows:
            raise ModelError(f"token_embd.weight has {rows:,} rows, but {name} is {size:,}")
    return rows
