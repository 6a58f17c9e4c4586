"""Tiny model files of every family, the same to the bit wherever they are made.

Two layers, random weights from seeded.py, and a vocabulary that llama.cpp accepts. The weights
are scaled so that activations keep unit size and logits spread over about -10 .. 10. Experts are
chosen by margins that no rounding can cross: see `_routed`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from edgert.models.reference import ReferenceModel
from edgert.models.spec import ModelSpec, spec_from_manifest
from edgert.models.tensors import required_tensors
from edgert.quant.formats import BY_NAME, QuantFormat
from edgert.quant.packing import Array
from edgert.quant.quantize import quantize_ref
from edgert.quant.reference import dequantize_ref
from tests.gguf_file import write_gguf
from tests.seeded import bits64, uniform

F32 = BY_NAME["F32"]
LETTERS = " etaoinshrdlucmfwygpbvkqxjz"  # single pieces after the bytes; the space is a piece too


@dataclass(frozen=True)
class TinyFamily:
    """The shape of a tiny model; `ffn` is the width of one expert where there are experts."""

    architecture: str
    layers: int = 2
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 512
    vocab: int = 288
    experts: int = 0
    experts_per_token: int = 0
    tied: bool = False
    rope_freqs: bool = False


FAMILIES = {
    "llama": TinyFamily("llama"),
    "llama_rope_freqs": TinyFamily("llama", kv_heads=8, rope_freqs=True),
    # Widths that are no multiple of 256, row counts (24, 291) that are none of 16.
    "llama_narrow": TinyFamily(
        "llama", hidden=64, heads=4, kv_heads=1, head_dim=24, ffn=160, vocab=291
    ),
    "mixtral": TinyFamily("llama", ffn=256, experts=4, experts_per_token=2),
    "qwen2": TinyFamily("qwen2", kv_heads=4),
    "qwen2_tied": TinyFamily("qwen2", tied=True),
    "qwen3": TinyFamily("qwen3", head_dim=64),
    "qwen3moe": TinyFamily("qwen3moe", head_dim=64, ffn=256, experts=8, experts_per_token=4),
    "olmoe": TinyFamily("olmoe", kv_heads=8, ffn=256, experts=8, experts_per_token=3),
}


@dataclass(frozen=True)
class TinyModel:
    """A model as it goes into a file: tensors are (format, NumPy shape, bytes)."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[QuantFormat, tuple[int, ...], bytes]]

    @property
    def digest(self) -> str:
        """sha256 over the names, formats, shapes and bytes of all tensors."""
        total = hashlib.sha256()
        for name, (fmt, shape, raw) in self.tensors.items():
            total.update(f"{name} {fmt.name} {shape} {len(raw)}\n".encode())
            total.update(raw)
        return total.hexdigest()

    @property
    def weights(self) -> dict[str, Array]:
        """What the bytes mean, float32 by name."""
        return {
            name: dequantize_ref(fmt, np.frombuffer(raw, np.uint8)).reshape(shape)
            for name, (fmt, shape, raw) in self.tensors.items()
        }


def formats_of(family: str) -> list[str]:
    """The formats whose blocks fit the family's rows."""
    f = FAMILIES[family]
    return [name for name, fmt in BY_NAME.items() if not (f.hidden % fmt.block_size)]


def tiny_model(family: str, format_name: str, seed: int = 0, *, path: Path) -> Path:
    """Write the model as a GGUF file at `path` and return it."""
    model = build(family, format_name, seed)
    write_gguf(path, model.metadata, model.tensors)
    return path


def build(family: str, format_name: str, seed: int = 0) -> TinyModel:
    """The model with its matrices in `format_name`; vectors and routers are always F32."""
    fmt, tensors = BY_NAME[format_name], {}
    for name, values in float_weights(family, seed).items():
        keep = values.ndim == 1 or "ffn_gate_inp" in name
        chosen = F32 if keep else fmt
        tensors[name] = (chosen, values.shape, quantize_ref(chosen, values).tobytes())
    return TinyModel(metadata_of(family), tensors)


def spec_of(model: TinyModel) -> ModelSpec:
    """The spec that a reader of the file would find."""
    entries = {name: _Entry(shape, fmt) for name, (fmt, shape, _) in model.tensors.items()}
    return spec_from_manifest(model.metadata, entries)


def prompt_of(family: str, count: int) -> list[int]:
    """A fixed random prompt: the start token, then bytes and pieces, no control tokens."""
    vocab = FAMILIES[family].vocab
    drawn = bits64(f"prompt {family}", count - 1) % np.uint64(vocab - 3)
    return [1, *(3 + drawn.astype(int)).tolist()]


@lru_cache  # 60 MB when every family has been asked for
def float_weights(family: str, seed: int) -> dict[str, Array]:
    """The weights before they are stored: float32 by GGUF name."""
    f = FAMILIES[family]
    present = ["output.weight"] * (not f.tied) + ["rope_freqs.weight"] * f.rope_freqs
    entries = {name: _Entry((1,), F32) for name in present}
    entries["token_embd.weight"] = _Entry((f.vocab, f.hidden), F32)
    spec = spec_from_manifest(metadata_of(family), entries)
    return {
        need.name: _weight(f, need.name, need.shape, f"{family} {seed} {need.name}")
        for need in required_tensors(spec).values()
    }


def metadata_of(family: str) -> dict[str, Any]:
    """GGUF metadata; an int is to be uint32 and a float float32, as llama.cpp expects them."""
    f = FAMILIES[family]
    arch = f.architecture
    found: dict[str, Any] = {
        "general.architecture": arch,
        "general.name": f"tiny {family}",
        f"{arch}.vocab_size": f.vocab,
        f"{arch}.context_length": 256,
        f"{arch}.embedding_length": f.hidden,
        f"{arch}.block_count": f.layers,
        f"{arch}.feed_forward_length": f.ffn,
        f"{arch}.attention.head_count": f.heads,
        f"{arch}.attention.head_count_kv": f.kv_heads,
        f"{arch}.attention.key_length": f.head_dim,
        f"{arch}.attention.value_length": f.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.dimension_count": f.head_dim,
        f"{arch}.rope.freq_base": 10000.0,
    }
    if f.experts:
        found[f"{arch}.expert_count"] = f.experts
        found[f"{arch}.expert_used_count"] = f.experts_per_token
    if arch == "qwen3moe":
        found[f"{arch}.expert_feed_forward_length"] = f.ffn
    return found | _vocabulary(f.vocab)


def router_margins(model: TinyModel, tokens: list[int]) -> Iterator[float]:
    """For each layer and position: the chosen experts' smallest router logit less the next.

    Found by running the reference model and listening to its routers.
    """
    heard: list[Array] = []

    class Listener(ReferenceModel):
        def _experts(self, at: str, x: Array) -> Array:
            heard.append(x @ self.weights[f"{at}ffn_gate_inp.weight"].T)
            return super()._experts(at, x)

    spec = spec_of(model)
    Listener(spec, model.weights).logits(tokens)
    assert len(heard) == spec.num_hidden_layers
    k = spec.num_experts_per_tok
    for logits in heard:
        ranked = -np.sort(-logits, axis=-1)
        yield from (ranked[:, k - 1] - ranked[:, k]).tolist()


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    format: QuantFormat


def _vocabulary(size: int) -> dict[str, Any]:
    """A SentencePiece vocabulary: three control tokens, 256 bytes, letters, pairs of letters."""
    pieces = [letter.replace(" ", "\u2581") for letter in LETTERS]
    pieces += [f"\u2581{letter}" for letter in LETTERS[1:]]
    pieces = pieces[: size - 259]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    assert len(tokens) == size, (len(tokens), size)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }


def _weight(f: TinyFamily, name: str, shape: tuple[int, ...], key: str) -> Array:
    if name.endswith("norm.weight"):
        return uniform(key, shape, 0.5, 1.5)
    if name.endswith(".bias"):
        return uniform(key, shape, -0.5, 0.5)
    if name == "rope_freqs.weight":
        return uniform(key, shape, 1, 8)
    # Uniform in -a .. a has a variance of a^2 / 3: rows of K such numbers keep unit size.
    unit = (3 / shape[-1]) ** 0.5
    if name == "token_embd.weight":
        size = 4 * unit if f.tied else 1
    else:
        size = 4 * unit if name == "output.weight" else unit
    return _routed(f, name, uniform(key, shape) * np.float32(size))


def _routed(f: TinyFamily, name: str, values: Array) -> Array:
    """`values`, changed in a mixture of experts so that a token's experts are beyond doubt.

    With random weights the k-th and the next expert come arbitrarily close, and two sound programs
    then choose differently. So every 16th number of the hidden state, one for each expert, is
    the router's: nothing writes to it after the embedding, which holds 0.5 to 1 there for the
    token's k experts and -1 to -0.5 for the others; a router row reads its own number, of another
    expert in the second layer, and a little of everything else.
    """
    if not f.experts:
        return values
    places = np.arange(f.experts) * 16
    if name == "token_embd.weight":
        order = np.argsort(bits64("experts", f.vocab * f.experts).reshape(f.vocab, -1), axis=1)
        size = np.float32(0.75) + np.float32(0.25) * values[:, places]
        values[:, places] = np.where(order < f.experts_per_token, size, -size)
    elif name.endswith(("attn_output.weight", "ffn_down_exps.weight")):
        values[..., places, :] = 0
    elif name.endswith("ffn_gate_inp.weight"):
        values *= np.float32(0.1)
        shift = 3 if name.startswith("blk.1.") else 0
        values[np.arange(f.experts), np.roll(places, shift)] = 2
    return values
