"""Reading GGUF metadata: typed values, and which `<architecture>.*` keys may be there.

Owns: `read`, the list of keys that change nothing, and the refusal of all others by name.
Must not know what a spec is made of. Source: the key list of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; neutral values as llama.cpp reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from edgert.errors import ModelError, UnsupportedError

__all__ = ["REQUIRED", "brief", "read", "read_per_layer", "refuse_unknown_keys"]

T = TypeVar("T", str, int, float, bool)

REQUIRED: Any = object()  # the default of `read` that means: there is no default

# Keys that `spec.py` reads.
_READ = frozenset({
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.layer_norm_rms_epsilon", "attention.scale", "attention.sliding_window",
    "attention.value_length", "block_count", "context_length", "embedding_length", "expert_count",
    "expert_feed_forward_length", "expert_used_count", "expert_weights_norm",
    "expert_weights_scale", "feed_forward_length", "rope.dimension_count", "rope.freq_base",
    "rope.scale_linear", "rope.scaling.factor", "rope.scaling.type", "vocab_size",
})  # fmt: skip

# Keys that describe a file and change no number.
_HARMLESS = frozenset({
    "rope.scaling.finetuned",  # provenance
    # Read by yarn and longrope only, which run only where a factor of 1 makes them nothing.
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
})  # fmt: skip

# Keys that change the model, with the values at which they do not. 0 is how writers say "unset".
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "activation_sparsity_scale": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window_pattern": (0, 1),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_length_per_layer_input": (0,),
    "embedding_scale": (0, 1),
    "expert_gating_func": (0, 1),  # 1 is softmax; 2 sigmoid, 3 softmax over the chosen
    "expert_group_count": (0, 1),
    "expert_group_scale": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "final_logit_softcapping": (0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "moe_every_n_layers": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (0, -1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "router_logit_softcapping": (0,),
    "swin_norm": (False,),
    "tensor_data_layout": ("Meta AI original pth",),  # the row order every llama file has
    "use_parallel_residual": (False,),
}


def read(metadata: Mapping[str, Any], key: str, kind: type[T], default: T = REQUIRED) -> T:
    """`metadata[key]` as `kind`, or `default` when the key is absent.

    An integer is taken where a float is expected. Raises `ModelError` that names the key, the
    expected type and what was found.
    """
    if key not in metadata:
        if default is REQUIRED:
            raise ModelError(f"metadata key {key!r} is missing, expected {kind.__name__}")
        return default
    value = metadata[key]
    if isinstance(value, np.generic):
        value = value.item()
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ModelError(
            f"metadata key {key!r} is {brief(value)} ({type(value).__name__}), "
            f"expected {kind.__name__}"
        )
    return value


def read_per_layer(
    metadata: Mapping[str, Any], key: str, layers: int, default: int = REQUIRED
) -> int:
    """An integer that some files repeat for each layer. Layers that differ are refused."""
    value = metadata.get(key)
    if not isinstance(value, list | np.ndarray):
        return read(metadata, key, int, default)
    if len(value) != layers:
        raise ModelError(f"metadata key {key!r} has {len(value)} entries for {layers} layers")
    if any(item != value[0] for item in value):
        raise UnsupportedError(
            f"metadata key {key!r} = {brief(np.asarray(value).tolist())} differs between layers; "
            "edgert runs models whose layers have one shape"
        )
    return read({key: value[0]}, key, int)


def refuse_unknown_keys(metadata: Mapping[str, Any], arch: str) -> None:
    """Raise `UnsupportedError` for a key of `arch` that may change what the model computes."""
    for key, value in metadata.items():
        if not key.startswith(f"{arch}."):
            continue
        name = key.removeprefix(f"{arch}.")
        if name in _READ or name in _HARMLESS:
            continue
        if arch == "llama" and name == "attention.sliding_window_pattern":
            continue  # goes with the window that is not applied either
        if name not in _NEUTRAL:
            raise UnsupportedError(
                f"metadata key {key!r} = {brief(value)} is not one edgert knows and may change "
                "what the model computes; if it only describes the file, remove it "
                f"(gguf-new-metadata --remove-metadata {key})"
            )
        _refuse_unless_neutral(key, value, _NEUTRAL[name])


def brief(value: object) -> str:
    """`value` for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_unless_neutral(key: str, value: Any, neutral: tuple[object, ...]) -> None:
    found = np.asarray(value).ravel().tolist()  # some writers give one value for each layer
    if not all(item in neutral for item in found):
        runs = " or ".join(str(item) for item in neutral)
        raise UnsupportedError(
            f"metadata key {key!r} = {brief(value)} changes what the model computes in a way "
            f"edgert does not run; it runs {runs}, or the key left out"
        )
