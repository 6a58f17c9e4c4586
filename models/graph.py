"""The forward pass of a decoder as a program: one block, driven by the flags of its spec.

    x = embedding(token)
    for each layer:  x += Wo attention(rope(norm_qk(Wqkv norm(x))))
                     x += W_down (silu(W_gate h) * W_up h),  h = norm(x)     or routed experts of it
    logits = W_head norm(x)

Owns: what follows what. Must not know where weights are, who runs the program, or budgets.
models/reference.py is the same in NumPy, written to be read; differences between the families
(llama, qwen2, qwen3, qwen3moe, olmoe) are flags of `ModelSpec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu.attention import (
    attention_kernel,
    attention_op,
    attention_scratch_bytes,
    context_parts,
    partials_bytes,
)
from edgert.kernels_cpu.elementwise import (
    quantize_kernel,
    quantize_op,
    rmsnorm_kernel,
    rmsnorm_op,
    swiglu_kernel,
    swiglu_op,
    units_per_row,
)
from edgert.kernels_cpu.kv_cache import KvLayout
from edgert.kernels_cpu.matmul import takes_quantized_input
from edgert.kernels_cpu.moe import (
    moe_combine_kernel,
    moe_combine_op,
    moe_route_kernel,
    moe_route_op,
)
from edgert.kernels_cpu.program import Experts, Matrix, Program, ProgramBuilder, Rows
from edgert.kernels_cpu.rope import rope_and_store_kernel, rope_and_store_op
from edgert.kernels_cpu.rows import OP_FIELDS
from edgert.models.spec import ModelSpec
from edgert.quant.formats import QuantFormat

__all__ = ["Graph", "WeightSource", "build_program"]


class WeightSource(Protocol):
    """Where the graph gets its weights: resident, streamed or made up for a test."""

    def vector(self, name: str) -> int:
        """Address of a float32 vector, padded to whole groups of 16."""

    def matrix(self, name: str) -> Matrix:
        """A matrix as its segments."""

    def experts_of(self, layer: int) -> Experts:
        """Formats and offsets of a layer's experts."""


@dataclass(frozen=True, slots=True)
class Graph:
    """What a program is built over, besides the weights: buffers, KV cache, rotary table."""

    spec: ModelSpec
    buffers: Mapping[str, Rows]
    kv_layout: KvLayout
    kv_address: int  # of layer 0
    rope_address: int  # float32 [context, rope_dim / 2, 2]
    threads: int  # decides into how many parts attention cuts a context, never a result


def build_program(graph: Graph, weights: WeightSource) -> tuple[Program, npt.NDArray[np.int64]]:
    """The program of one pass, and op rows it refers to, which must live as long."""
    wiring = _Wiring(graph, weights)
    wiring.hint(0)
    for layer in range(graph.spec.num_hidden_layers):
        wiring.builder.section = f"blk.{layer}."
        wiring.attention_block(layer)
        if graph.spec.is_moe:
            wiring.expert_block(layer)
        else:
            wiring.dense_block(layer)
    wiring.builder.section = "output."
    wiring.head()
    return wiring.builder.finish(), wiring.swiglu_rows


class _Wiring:
    """Appends the blocks of one model to a program, in order."""

    def __init__(self, graph: Graph, weights: WeightSource) -> None:
        self.graph = graph
        self.spec = graph.spec
        self.weights = weights
        self.builder = ProgramBuilder()
        self.index = graph.buffers["index"].address
        # The experts' activation of each layer, a row run wave by wave from inside another.
        self.swiglu_rows = np.zeros((graph.spec.num_hidden_layers, OP_FIELDS), np.int64)

    def rows(self, name: str) -> Rows:
        """A buffer, or no rows when this model never needs it."""
        return self.graph.buffers.get(name, Rows(0, 0))

    def input_of(self, name: str, fmt: QuantFormat) -> Rows:
        """The form of buffer `name` that a matrix of this format reads."""
        return self.rows(f"{name}_q8" if takes_quantized_input(fmt) else name)

    def normed(self, weight: str, *readers: QuantFormat, into: str = "normed") -> None:
        """normed = rmsnorm(x), in the forms its readers need."""
        y, q = Rows(0, 0), Rows(0, 0)
        if any(not takes_quantized_input(f) for f in readers):
            y = self.rows(into)
        if any(takes_quantized_input(f) for f in readers):
            q = self.rows(f"{into}_q8")
        x = self.rows("x")
        arguments = rmsnorm_op(
            x=x.address, x_stride=x.stride, weight=self.weights.vector(weight),
            eps=self.spec.rms_norm_eps, K=self.spec.hidden_size, y=y.address, y_stride=y.stride,
            q=q.address, q_stride=q.stride,
        )  # fmt: skip
        self.builder.call(rmsnorm_kernel, arguments, 1)
        self.builder.barrier()

    def attention_block(self, layer: int) -> None:
        """x += Wo attention(rope(norm_qk(Wqkv norm(x))))."""
        spec, at = self.spec, f"blk.{layer}."
        matrices = {n: self.weights.matrix(f"{at}attn_{n}.weight") for n in "qkv"}
        self.normed(f"{at}attn_norm.weight", *(m.format for m in matrices.values()))
        for name, matrix in matrices.items():
            bias = self.weights.vector(f"{at}attn_{name}.bias") if spec.attention_bias else 0
            x = self.input_of("normed", matrix.format)
            self.builder.matmul(matrix, x, self.rows(name), self.index, bias=bias)
        self.builder.barrier()
        self.rope_and_store(layer)
        self.attend(layer)
        output = self.weights.matrix(f"{at}attn_output.weight")
        if takes_quantized_input(output.format):
            x, q = self.rows("attention"), self.rows("attention_q8")
            arguments = quantize_op(
                x=x.address, x_stride=x.stride, K=spec.q_size, q=q.address, q_stride=q.stride
            )
            self.builder.call(quantize_kernel, arguments, units_per_row(spec.q_size))
            self.builder.barrier()
        x = self.input_of("attention", output.format)
        self.builder.matmul(output, x, self.rows("x"), self.index, add=True)
        self.builder.barrier()

    def rope_and_store(self, layer: int) -> None:
        """Norm and rotate q and k, and put k and v into the KV cache."""
        spec, at = self.spec, f"blk.{layer}."
        q, k, v = (self.rows(n) for n in "qkv")
        layout = self.graph.kv_layout
        keys = self.graph.kv_address + layer * layout.layer_bytes
        norms = [
            self.weights.vector(f"{at}attn_{n}_norm.weight") if spec.qk_norm else 0 for n in "qk"
        ]
        arguments = rope_and_store_op(
            q=q.address, q_stride=q.stride, k=k.address, k_stride=k.stride, v=v.address,
            v_stride=v.stride, n_heads=spec.num_attention_heads, layout=layout, keys=keys,
            values=keys + layout.key_bytes, table=self.graph.rope_address, rope_dim=spec.rope_dim,
            style=spec.rope_style, qk_norm=spec.qk_norm, q_weight=norms[0], k_weight=norms[1],
            eps=spec.rms_norm_eps,
        )  # fmt: skip
        self.builder.call(rope_and_store_kernel(layout.kv_type), arguments, 1)
        self.builder.barrier()

    def attend(self, layer: int) -> None:
        """attention = softmax(q k / sqrt(head_dim)) v over the KV cache."""
        spec, layout = self.spec, self.graph.kv_layout
        keys = self.graph.kv_address + layer * layout.layer_bytes
        q, out = self.rows("q"), self.rows("attention")
        heads, kv_heads, dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        parts = context_parts(kv_heads, self.graph.threads)
        partials = self.rows("scratch").address  # and then each thread's own
        arguments = attention_op(
            q=q.address, q_stride=q.stride, out=out.address, out_stride=out.stride, keys=keys,
            values=keys + layout.key_bytes, n_heads=heads, layout=layout, scale=dim**-0.5,
            scratch=partials + partials_bytes(heads, kv_heads, dim, layout.context, parts),
            scratch_stride=attention_scratch_bytes(heads, kv_heads, dim), parts=parts,
            partials=partials,
        )  # fmt: skip
        self.builder.call(attention_kernel(layout.kv_type), arguments, kv_heads * parts, chunk=1)
        self.builder.barrier()

    def activation(self, down: QuantFormat, width: int, rows: int = 0) -> list[int]:
        """Arguments of act = silu(gate) * up in the form that `down` reads."""
        gate, up = self.rows("gate"), self.rows("up")
        quantized = takes_quantized_input(down)
        y = Rows(0, 0) if quantized else self.rows("act")
        q = self.rows("act_q8") if quantized else Rows(0, 0)
        return swiglu_op(
            gate=gate.address, gate_stride=gate.stride, up=up.address, up_stride=up.stride,
            K=width, y=y.address, y_stride=y.stride, q=q.address, q_stride=q.stride, rows=rows,
        )  # fmt: skip

    def dense_block(self, layer: int) -> None:
        """x += W_down (silu(W_gate h) * W_up h), h = norm(x)."""
        at, width = f"blk.{layer}.", self.spec.intermediate_size
        gate, up, down = (
            self.weights.matrix(f"{at}ffn_{n}.weight") for n in ("gate", "up", "down")
        )
        self.normed(f"{at}ffn_norm.weight", gate.format, up.format)
        for matrix, name in ((gate, "gate"), (up, "up")):
            x = self.input_of("normed", matrix.format)
            self.builder.matmul(matrix, x, self.rows(name), self.index)
        self.builder.barrier()
        self.builder.call(swiglu_kernel, self.activation(down.format, width), units_per_row(width))
        self.builder.barrier()
        x = self.input_of("act", down.format)
        self.builder.matmul(down, x, self.rows("x"), self.index, add=True)
        self.builder.barrier()

    def expert_block(self, layer: int) -> None:
        """x += sum_j p_j * expert_j(h) over the experts the router chooses, h = norm(x)."""
        spec, at, builder = self.spec, f"blk.{layer}.", self.builder
        router = self.weights.matrix(f"{at}ffn_gate_inp.weight")
        experts = self.weights.experts_of(layer)
        shape = experts.shapes[0]  # all read alike
        self.normed(f"{at}ffn_norm.weight", router.format, shape.gate_format, shape.up_format)
        x = self.input_of("normed", router.format)
        builder.matmul(router, x, self.rows("router"), self.index)
        builder.barrier()
        ids = self.rows(f"expert_ids {layer}")
        scores, chosen = self.rows("router"), self.rows("expert_weights")
        arguments = moe_route_op(
            logits=scores.address, logits_stride=scores.stride, n_experts=spec.num_experts,
            top_k=spec.num_experts_per_tok, norm_topk=spec.norm_topk_prob,
            scale=spec.expert_weights_scale, ids=ids.address, ids_stride=ids.stride,
            weights=chosen.address, weights_stride=chosen.stride,
        )  # fmt: skip
        builder.call(moe_route_kernel, arguments, 1)
        builder.barrier()
        # No barrier: who groups the pairs also collects the first wave.
        builder.group(layer, ids.address, spec.num_experts_per_tok, spec.num_experts)
        self.hint(layer + 1)
        self.experts(layer, experts)
        builder.barrier()
        x, out = self.rows("x"), self.rows("expert_out")
        arguments = moe_combine_op(
            experts=out.address, experts_stride=out.stride, top_k=spec.num_experts_per_tok,
            weights=chosen.address, weights_stride=chosen.stride, K=spec.hidden_size,
            y=x.address, y_stride=x.stride,
        )  # fmt: skip
        builder.call(moe_combine_kernel, arguments, units_per_row(spec.hidden_size))
        builder.barrier()

    def hint(self, layer: int) -> None:
        """Tell which experts `layer` may want: its router, applied to x as it is now.

        After another layer's own requests, so that these never wait for it. Not for a router that
        is streamed: its tiles are used once a pass.
        """
        spec, at = self.spec, f"blk.{layer}."
        if not spec.is_moe or layer == spec.num_hidden_layers:
            return
        router = self.weights.matrix(f"{at}ffn_gate_inp.weight")
        if any(segment.stream_index >= 0 for segment in router.segments):
            return
        scores, ids, chosen = (self.rows(f"hint_{n}") for n in ("router", "ids", "weights"))
        arguments = moe_route_op(
            logits=scores.address, logits_stride=scores.stride, n_experts=spec.num_experts,
            top_k=spec.num_experts_per_tok, norm_topk=False, scale=1.0, ids=ids.address,
            ids_stride=ids.stride, weights=chosen.address, weights_stride=chosen.stride,
        )  # fmt: skip
        with self.builder.ahead():
            self.normed(f"{at}ffn_norm.weight", router.format, into="hint")
            x = self.input_of("hint", router.format)
            self.builder.matmul(router, x, scores, self.index)
            self.builder.barrier()
            self.builder.hint(
                moe_route_kernel, arguments, layer, ids.address, spec.num_experts_per_tok,
                spec.num_experts,
            )  # fmt: skip

    def experts(self, layer: int, experts: Experts) -> None:
        """expert_out[pair] = W_down (silu(W_gate h) * W_up h) for every routed pair."""
        width, shape = experts.intermediate_size, experts.shapes[0]
        pairs = self.rows("wave_pairs").address
        arguments = self.activation(shape.down_format, width, pairs)
        row = self.swiglu_rows[layer]
        row[8 : 8 + len(arguments)] = arguments
        inputs = (
            self.input_of("normed", shape.gate_format),
            self.input_of("normed", shape.up_format),
            self.input_of("act", shape.down_format),
        )
        outputs = (self.rows("gate"), self.rows("up"), self.rows("expert_out"))
        self.builder.experts(
            experts, self.spec.num_experts, inputs, outputs,
            (swiglu_kernel, int(row.ctypes.data), units_per_row(width)),
        )  # fmt: skip

    def head(self) -> None:
        """logits = W_head norm(x), for the rows that are asked for."""
        name = "token_embd.weight" if self.spec.tie_word_embeddings else "output.weight"
        matrix = self.weights.matrix(name)
        self.normed("output_norm.weight", matrix.format)
        x = self.input_of("normed", matrix.format)
        self.builder.matmul(matrix, x, self.rows("logits"), self.index, logits=True)
