"""The activations of one forward pass: every buffer, computed before anything is allocated.

Owns: names, shapes and sizes of the buffers a graph reads and writes. Must not know where they
live. The word is llama2.c's: weights never change, `RunState` is all that does.

A row is one token (or one (token, choice) pair for experts). Rows are padded to 16 floats, the
width that kernels read and write, plus nothing else: pads hold garbage that never reaches a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgert.kernels_cpu.activations import activation_bytes
from edgert.kernels_cpu.rows import HINT_TOKENS
from edgert.models.spec import ModelSpec
from edgert.models.tensors import TensorRole
from edgert.quant.formats import QuantFormat
from edgert.units import align_up

__all__ = ["Buffer", "Inputs", "inputs_of", "run_state_buffers"]

LANES = 16


@dataclass(frozen=True, slots=True)
class Buffer:
    """`rows` rows of `stride` bytes."""

    name: str
    rows: int
    stride: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole buffer, in whole cache lines."""
        return align_up(self.rows * self.stride, 64)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Which form of its input each matrix product takes, over all layers.

    A quantised matrix reads int8 blocks, a float one float32; a model may hold both.
    """

    as_float: frozenset[TensorRole]
    as_quantized: frozenset[TensorRole]


def inputs_of(formats: Mapping[TensorRole, set[QuantFormat]], quantized: set[str]) -> Inputs:
    """The input forms for the formats found; `quantized` names those that read int8 blocks."""
    as_float: set[TensorRole] = set()
    as_quantized: set[TensorRole] = set()
    for role, found in formats.items():
        for fmt in found:
            (as_quantized if fmt.name in quantized else as_float).add(role)
    return Inputs(frozenset(as_float), frozenset(as_quantized))


def float_stride(columns: int) -> int:
    """Bytes of a float32 row of `columns`, padded to whole vectors."""
    return 4 * align_up(columns, LANES)


_ATTENTION_IN = frozenset({TensorRole.Q_PROJ, TensorRole.K_PROJ, TensorRole.V_PROJ})
_FEED_FORWARD_IN = frozenset({TensorRole.ROUTER, TensorRole.GATE_PROJ, TensorRole.UP_PROJ})


def run_state_buffers(
    spec: ModelSpec, inputs: Inputs, *, tokens: int, logit_rows: int, scratch_bytes: int
) -> tuple[Buffer, ...]:
    """All buffers for passes of up to `tokens` tokens, `logit_rows` of which want logits.

    `scratch_bytes` is what the attention kernel needs for all threads.
    """
    hidden, q_size, kv_size = spec.hidden_size, spec.q_size, spec.kv_size
    width = spec.moe_intermediate_size if spec.is_moe else spec.intermediate_size
    pairs = tokens * spec.num_experts_per_tok if spec.is_moe else tokens
    down = {TensorRole.DOWN_PROJ}
    normed = _ATTENTION_IN | _FEED_FORWARD_IN | {TensorRole.LM_HEAD}
    heads_in = {TensorRole.O_PROJ}
    buffers = [
        Buffer("x", tokens, float_stride(hidden)),
        Buffer("q", tokens, float_stride(q_size)),
        Buffer("k", tokens, float_stride(kv_size)),
        Buffer("v", tokens, float_stride(kv_size)),
        Buffer("attention", tokens, float_stride(q_size)),
        Buffer("gate", pairs, float_stride(width)),
        Buffer("up", pairs, float_stride(width)),
        Buffer("logits", logit_rows, float_stride(spec.vocab_size)),
        Buffer("scratch", 1, align_up(max(scratch_bytes, 64), 64)),
        Buffer("index", 1, 8 * max(tokens, 8)),
    ]
    if inputs.as_float & normed:
        buffers.append(Buffer("normed", tokens, float_stride(hidden)))
    if inputs.as_quantized & normed:
        buffers.append(Buffer("normed_q8", tokens, activation_bytes(hidden)))
    if inputs.as_quantized & heads_in:
        buffers.append(Buffer("attention_q8", tokens, activation_bytes(q_size)))
    if inputs.as_float & down:
        buffers.append(Buffer("act", pairs, float_stride(width)))
    if inputs.as_quantized & down:
        buffers.append(Buffer("act_q8", pairs, activation_bytes(width)))
    if spec.is_moe:
        experts = spec.num_experts
        buffers += [
            Buffer("router", tokens, float_stride(experts)),
            Buffer("expert_weights", tokens, 4 * spec.num_experts_per_tok),
            Buffer("expert_out", pairs, float_stride(hidden)),
            Buffer("groups", 1, 16 * experts),
            Buffer("pair_token", 1, 8 * pairs),
            Buffer("pair_id", 1, 8 * pairs),
            Buffer("wave", 1, 16 + 8 * experts),
            Buffer("wave_pairs", 1, 8 * pairs),
        ]
        hinted = min(tokens, HINT_TOKENS)
        buffers += [
            Buffer("hint_router", hinted, float_stride(experts)),
            Buffer("hint_ids", hinted, 8 * spec.num_experts_per_tok),
            Buffer("hint_weights", hinted, 4 * spec.num_experts_per_tok),
        ]
        if TensorRole.ROUTER in inputs.as_float:
            buffers.append(Buffer("hint", hinted, float_stride(hidden)))
        if TensorRole.ROUTER in inputs.as_quantized:
            buffers.append(Buffer("hint_q8", hinted, activation_bytes(hidden)))
        # One for each layer: what was chosen can be read when the pass is over.
        chosen = 8 * spec.num_experts_per_tok
        buffers += [
            Buffer(f"expert_ids {layer}", tokens, chosen) for layer in range(spec.num_hidden_layers)
        ]
    return tuple(buffers)
