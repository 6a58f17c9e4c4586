"""Speed of attention by context length, against what the machine can do at most.

Owns: which programs are run, on what data. Must not know how figures are taken (bench_harness.py)
or printed. One token walks as many layers as fill memory, each with a KV cache of its own, as in
decode; a chunk of a prompt walks one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from edgert.bench_harness import Case, Harness, KernelFigures, result_hash
from edgert.kernels_cpu.attention import attention_kernel, attention_op, attention_scratch_bytes
from edgert.kernels_cpu.kv_cache import KvLayout
from edgert.kernels_cpu.program import Program, ProgramBuilder
from edgert.machine import default_threads
from edgert.units import MIB

__all__ = ["bench_attention"]

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # of a layer, as in models of 8 billion parameters
CONTEXTS = (64, 256, 1024, 4096, 8192)
PROMPT_TOKENS = 64
CHAIN_BYTES = 256 * MIB  # of the KV caches of one walk


def bench_attention(
    contexts: Sequence[int] = CONTEXTS,
    *,
    threads: int | None = None,
    trials: int = 5,
    kv_cache_type: str = "f16",
    on_progress: Callable[[str, int, int], object] | None = None,
) -> Iterator[KernelFigures]:
    """Measure one token and `PROMPT_TOKENS` at the end of each context.

    `contexts`: positions, at least `PROMPT_TOKENS`. Needs some 600 MiB of memory.
    """
    harness = Harness(default_threads() if threads is None else threads)
    try:
        bench = _Layers(harness, kv_cache_type)
        for number, context in enumerate(contexts):
            if on_progress:
                on_progress(f"context {context}", number, len(contexts))
            cases = [bench.case(context, 1), bench.case(context, PROMPT_TOKENS)]
            yield from harness.measure(kv_cache_type, "attention", cases, bench.result, trials)
        yield from harness.limit_figures()
    finally:
        harness.close()


class _Layers:
    """KV caches in the arena of a harness, and queries for them."""

    def __init__(self, harness: Harness, kv_cache_type: str) -> None:
        self._harness = harness
        self._kv_type = kv_cache_type
        rng = np.random.default_rng(0)
        shape = (PROMPT_TOKENS, HEADS * HEAD_DIM)
        self._q = rng.standard_normal(shape).astype(np.float32)
        self._out = np.zeros(shape, np.float32)
        self._scratch_bytes = attention_scratch_bytes(HEADS, KV_HEADS, HEAD_DIM)
        self._scratch = np.zeros(self._scratch_bytes * harness.team.threads + 64, np.uint8)
        dtype = np.float16 if kv_cache_type == "f16" else np.float32
        values = rng.standard_normal(65536).astype(dtype).view(np.uint8)
        arena = harness.arena[: len(harness.arena) // len(values) * len(values)]
        arena.reshape(-1, len(values))[:] = values

    def case(self, context: int, tokens: int) -> Case:
        """`tokens` tokens, the last of them at position `context` - 1."""
        layout = KvLayout(KV_HEADS, HEAD_DIM, context, self._kv_type)
        layers = -(-CHAIN_BYTES // layout.layer_bytes) if tokens == 1 else 1
        position = context - tokens
        seen = sum(range(position + 1, context + 1))  # by all tokens together
        macs = 2 * HEADS * HEAD_DIM * seen * layers
        nbytes = layout.layer_bytes * layers
        program = self._program(layout, layers)
        return Case(
            program, self._harness.team, tokens, nbytes, macs, peak="fma", position=position
        )

    def _program(self, layout: KvLayout, layers: int) -> Program:
        scratch = self._scratch.ctypes.data
        builder = ProgramBuilder()
        for layer in range(layers):
            keys = self._harness.arena.ctypes.data + layer * layout.layer_bytes
            arguments = attention_op(
                q=self._q.ctypes.data, q_stride=self._q.strides[0], out=self._out.ctypes.data,
                out_stride=self._out.strides[0], keys=keys, values=keys + layout.key_bytes,
                n_heads=HEADS, layout=layout, scale=HEAD_DIM**-0.5,
                scratch=scratch + -scratch % 64, scratch_stride=self._scratch_bytes,
            )  # fmt: skip
            builder.call(attention_kernel(self._kv_type), arguments, KV_HEADS, chunk=1)
            builder.barrier()
        return builder.finish()

    def result(self, case: Case) -> str:
        """The hash of what a walk has just computed."""
        return result_hash(self._out[: case.tokens])
