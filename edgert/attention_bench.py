"""Speed of attention by context length, against what the machine can do at most.

Owns: which programs are run, on what data. Must not know how figures are taken (bench_harness.py)
or printed. One token walks as many layers as fill memory, each with a KV cache of its own, as in
decode; a chunk of a prompt walks one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from edgert.bench_harness import Case, Harness, KernelFigures, result_hash
from edgert.kernels_cpu.attention import (
    attention_kernel,
    attention_op,
    attention_scratch_bytes,
    context_parts,
    partials_bytes,
)
from edgert.kernels_cpu.kv_cache import KvLayout
from edgert.kernels_cpu.program import Program, ProgramBuilder
from edgert.machine import default_threads
from edgert.units import MIB

__all__ = ["bench_attention"]

SHARED, HEAD_DIM = 4, 128  # query heads of a KV head, as in models of 8 billion parameters
KV_HEADS = (8, 1)  # of a layer: theirs, and one that threads must share
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
        shapes = [(kv_heads, context) for kv_heads in KV_HEADS for context in contexts]
        for number, (kv_heads, context) in enumerate(shapes):
            if on_progress:
                on_progress(f"{kv_heads} KV heads, context {context}", number, len(shapes))
            cases = [bench.case(kv_heads, context, n) for n in (1, PROMPT_TOKENS)]
            for figures in harness.measure(kv_cache_type, "attention", cases, bench.result, trials):
                yield replace(figures, kv_heads=kv_heads)
        yield from harness.limit_figures()
    finally:
        harness.close()


class _Layers:
    """KV caches in the arena of a harness, and queries for them."""

    def __init__(self, harness: Harness, kv_cache_type: str) -> None:
        self._harness = harness
        self._kv_type = kv_cache_type
        rng = np.random.default_rng(0)
        shape = (PROMPT_TOKENS, SHARED * max(KV_HEADS) * HEAD_DIM)
        self._q = rng.standard_normal(shape).astype(np.float32)
        self._out = np.zeros(shape, np.float32)
        self._each = max(attention_scratch_bytes(SHARED * n, n, HEAD_DIM) for n in KV_HEADS)
        self._scratch = np.zeros(self._each * harness.team.threads + 64, np.uint8)
        self._partials: list[npt.NDArray[np.uint8]] = []  # of programs that are still walked
        dtype = np.float16 if kv_cache_type == "f16" else np.float32
        values = rng.standard_normal(65536).astype(dtype).view(np.uint8)
        arena = harness.arena[: len(harness.arena) // len(values) * len(values)]
        arena.reshape(-1, len(values))[:] = values

    def case(self, kv_heads: int, context: int, tokens: int) -> Case:
        """`tokens` tokens, the last of them at position `context` - 1."""
        layout = KvLayout(kv_heads, HEAD_DIM, context, self._kv_type)
        layers = -(-CHAIN_BYTES // layout.layer_bytes) if tokens == 1 else 1
        position = context - tokens
        seen = sum(range(position + 1, context + 1))  # by all tokens together
        macs = 2 * SHARED * kv_heads * HEAD_DIM * seen * layers
        nbytes = layout.layer_bytes * layers
        self._out[:] = 0
        program = self._program(layout, layers)
        return Case(
            program, self._harness.team, tokens, nbytes, macs, peak="fma", position=position
        )

    def _program(self, layout: KvLayout, layers: int) -> Program:
        scratch = self._scratch.ctypes.data
        n_kv = layout.num_key_value_heads
        parts = context_parts(n_kv, self._harness.team.threads)
        size = partials_bytes(SHARED * n_kv, n_kv, HEAD_DIM, layout.context, parts)
        self._partials.append(np.zeros(size + 64, np.uint8))
        partials = self._partials[-1].ctypes.data
        builder = ProgramBuilder()
        for layer in range(layers):
            keys = self._harness.arena.ctypes.data + layer * layout.layer_bytes
            arguments = attention_op(
                q=self._q.ctypes.data, q_stride=self._q.strides[0], out=self._out.ctypes.data,
                out_stride=self._out.strides[0], keys=keys, values=keys + layout.key_bytes,
                n_heads=SHARED * n_kv, layout=layout, scale=HEAD_DIM**-0.5,
                scratch=scratch + -scratch % 64, scratch_stride=self._each, parts=parts,
                partials=partials + -partials % 64,
            )  # fmt: skip
            builder.call(attention_kernel(self._kv_type), arguments, n_kv * parts, chunk=1)
            builder.barrier()
        return builder.finish()

    def result(self, case: Case) -> str:
        """The hash of what a walk has just computed."""
        return result_hash(self._out[: case.tokens])
