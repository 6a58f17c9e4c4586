"""The whole model in plain NumPy: the slow truth that everything fast is compared with.

Read it from top to bottom: `logits` is the network, the functions below it are its parts in the
order of use. Nothing is cached, fused or clever; every call computes all positions anew.
Owns: the meaning of every `ModelSpec` flag. Must not know files, budgets or quantised kernels.
Sources: Llama 2 (arXiv 2307.09288), rotary embedding (arXiv 2104.09864), grouped queries (arXiv
2305.13245), Mixtral (arXiv 2401.04088), OLMoE (arXiv 2409.02060), Qwen3 (arXiv 2505.09388).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgert.errors import InputError
from edgert.models.spec import ModelSpec, TensorLike
from edgert.quant.reference import dequantize_ref

__all__ = ["ReferenceModel", "StoredModel", "StoredTensor", "load_reference_weights"]

Floats = NDArray[Any]

# The router's sum is clamped to the smallest normal half float, as in llama.cpp.
SMALLEST_WEIGHT_SUM = 2.0**-14


class StoredTensor(TensorLike, Protocol):
    """A tensor in a file."""

    @property
    def extent(self) -> Any:
        """Where it is: whatever the caller's `read_bytes` understands."""


class StoredModel(Protocol):
    """The tensors of a file by name."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """By name, in any order."""


def load_reference_weights(
    model: StoredModel, read_bytes: Callable[[Any], bytes | bytearray | memoryview]
) -> dict[str, NDArray[np.float32]]:
    """Every tensor of the model as float32, by name.

    `read_bytes(extent)` gives a tensor's bytes as stored. Takes 4 bytes of memory per weight.
    """
    weights = {}
    for name, tensor in model.tensors.items():
        raw = np.frombuffer(read_bytes(tensor.extent), np.uint8)
        weights[name] = dequantize_ref(tensor.format, raw).reshape(tensor.shape)
    return weights


class ReferenceModel:
    """A decoder of any supported family.

    `weights` maps GGUF tensor names to arrays, matrices as (out, in). `dtype` is the type of every
    intermediate result: float32, or float64 for a truth to measure float32 against.
    """

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, Floats], dtype: DTypeLike = np.float32
    ) -> None:
        self.spec = spec
        self.weights = {name: np.asarray(w, dtype) for name, w in weights.items()}

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits of the token after each position: tokens (T,) -> (T, vocab_size) float32.

        Raises `InputError` when there is no token or one is outside the vocabulary.
        """
        spec, w = self.spec, self.weights
        ids = np.asarray(tokens, np.int64)
        if not ids.size or ids.min() < 0 or ids.max() >= spec.vocab_size:
            raise InputError(f"tokens must be one or more of 0 to {spec.vocab_size - 1:,}")
        x = w["token_embd.weight"][ids]  # (T, hidden)
        for layer in range(spec.num_hidden_layers):
            at = f"blk.{layer}."
            x = x + self._attention(at, self._norm(x, f"{at}attn_norm.weight"))
            feed_forward = self._experts if spec.is_moe else self._mlp
            x = x + feed_forward(at, self._norm(x, f"{at}ffn_norm.weight"))
        x = self._norm(x, "output_norm.weight")
        head = "token_embd.weight" if spec.tie_word_embeddings else "output.weight"
        return np.asarray(x @ w[head].T, np.float32)  # (T, hidden) @ (hidden, V) -> (T, V)

    def _norm(self, x: Floats, name: str) -> Floats:
        """RMSNorm over the last axis: (..., n) -> (..., n)."""
        mean_square = (x * x).mean(-1, keepdims=True)
        return np.asarray(x / np.sqrt(mean_square + self.spec.rms_norm_eps) * self.weights[name])

    def _attention(self, at: str, x: Floats) -> Floats:
        """Causal self-attention with grouped queries: x (T, hidden) -> (T, hidden).

        H query heads share G key/value heads, D numbers each.
        """
        spec = self.spec
        T, D = len(x), spec.head_dim
        H, G = spec.num_attention_heads, spec.num_key_value_heads
        q = self._project(at, "attn_q", x)  # (T, H*D)
        k = self._project(at, "attn_k", x)  # (T, G*D)
        v = self._project(at, "attn_v", x)
        if spec.qk_norm == "full":
            q = self._norm(q, f"{at}attn_q_norm.weight")
            k = self._norm(k, f"{at}attn_k_norm.weight")
        q, k, v = q.reshape(T, H, D), k.reshape(T, G, D), v.reshape(T, G, D)
        if spec.qk_norm == "head":
            q = self._norm(q, f"{at}attn_q_norm.weight")
            k = self._norm(k, f"{at}attn_k_norm.weight")
        q, k = self._rotate(q), self._rotate(k)
        k, v = k.repeat(H // G, axis=1), v.repeat(H // G, axis=1)  # (T, H, D): one for each query

        q, k, v = (a.transpose(1, 0, 2) for a in (q, k, v))  # (H, T, D)
        scores = q @ k.transpose(0, 2, 1) * x.dtype.type(D**-0.5)  # (H, T query, T key)
        future = np.triu(np.ones((T, T), bool), 1)
        scores[:, future] = -np.inf
        out = (_softmax(scores) @ v).transpose(1, 0, 2).reshape(T, H * D)
        return np.asarray(out @ self.weights[f"{at}attn_output.weight"].T)

    def _project(self, at: str, name: str, x: Floats) -> Floats:
        """x (T, hidden) -> (T, out), with the bias where the model has one."""
        out = x @ self.weights[f"{at}{name}.weight"].T
        if self.spec.attention_bias:
            out = out + self.weights[f"{at}{name}.bias"]
        return np.asarray(out)

    def _rotate(self, x: Floats) -> Floats:
        """Rotary position embedding: x (T, heads, D) -> the same, positions being 0 to T-1.

        Pair i of a head turns by position * theta^(-2i/R), R = rope_dim. Style "norm" pairs the
        neighbours 2i and 2i+1, style "neox" pairs i and i + R/2; what lies beyond R stays.
        """
        spec = self.spec
        R = spec.rope_dim
        frequency = spec.rope_theta ** (-np.arange(0, R, 2) / R) / spec.rope_scale  # (R/2,)
        if spec.has_rope_freqs:
            frequency = frequency / self.weights["rope_freqs.weight"]
        # Angles in float64: rounding one below position 8,192 to float32 moves it by up to 2.4e-4.
        angle = np.arange(len(x))[:, None] * frequency  # (T, R/2)
        cos = np.cos(angle).astype(x.dtype)[:, None]  # (T, 1, R/2)
        sin = np.sin(angle).astype(x.dtype)[:, None]
        numbers = np.arange(R)
        pairs = numbers.reshape(-1, 2).T if spec.rope_style == "norm" else numbers.reshape(2, -1)
        first, second = x[..., pairs[0]], x[..., pairs[1]]  # (T, heads, R/2)
        out = x.copy()
        out[..., pairs[0]] = first * cos - second * sin
        out[..., pairs[1]] = first * sin + second * cos
        return out

    def _mlp(self, at: str, x: Floats) -> Floats:
        """The dense feed-forward block: x (T, hidden) -> (T, hidden)."""
        w = self.weights
        return _swiglu(
            x, w[f"{at}ffn_gate.weight"], w[f"{at}ffn_up.weight"], w[f"{at}ffn_down.weight"]
        )

    def _experts(self, at: str, x: Floats) -> Floats:
        """Routed experts: x (T, hidden) -> (T, hidden), each token through its best few."""
        w = self.weights
        chosen, share = self._route(x @ w[f"{at}ffn_gate_inp.weight"].T)
        gate, up, down = (w[f"{at}ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        out = np.zeros_like(x)
        for t in range(len(x)):
            for e, s in zip(chosen[t], share[t], strict=True):  # best first
                out[t] += s * _swiglu(x[t], gate[e], up[e], down[e])
        return out

    def _route(self, logits: Floats) -> tuple[NDArray[np.intp], Floats]:
        """Router logits (T, E) -> experts (T, k), best first, and their weights (T, k).

        Of experts with equal probability the one with the lower number wins.
        """
        spec = self.spec
        probability = _softmax(logits)
        order = np.argsort(-probability, axis=-1, kind="stable")
        chosen = order[:, : spec.num_experts_per_tok]
        share = np.take_along_axis(probability, chosen, -1)
        if spec.norm_topk_prob:
            share = share / np.maximum(share.sum(-1, keepdims=True), SMALLEST_WEIGHT_SUM)
        return chosen, share * logits.dtype.type(spec.expert_weights_scale)


def _softmax(x: Floats) -> Floats:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def _swiglu(x: Floats, gate: Floats, up: Floats, down: Floats) -> Floats:
    """down(silu(gate(x)) * up(x)): x (..., hidden), gate and up (F, hidden), down (hidden, F)."""
    g = x @ gate.T
    with np.errstate(over="ignore"):  # exp(-g) may be infinite, and silu is then -0, as it should
        silu = g / (1 + np.exp(-g))
    return np.asarray((silu * (x @ up.T)) @ down.T)
