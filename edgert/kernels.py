"""Which kernels a model needs, and compiling them, also as the whole work of a child process.

Owns: the list. Must not know budgets.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgert.compiling import KernelSet
from edgert.kernels_cpu import elementwise, moe, rope
from edgert.kernels_cpu.attention import attention_kernel
from edgert.kernels_cpu.compiler import target_key
from edgert.kernels_cpu.jit import Kernel, cache_folder
from edgert.kernels_cpu.matmul import matmul_kernel, takes_parts
from edgert.kernels_cpu.nested import move_bits_kernel
from edgert.kernels_cpu.repack import repack_blocks
from edgert.kernels_cpu.team import begin_walk_kernel, serve_kernel
from edgert.quant.formats import FORMATS, BaseFormat

__all__ = ["compile_here", "kernels_of", "main"]


def kernels_of(wanted: KernelSet) -> list[Kernel]:
    """Every kernel of the set, in a fixed order."""
    kv = wanted.kv_cache_type
    found = [
        serve_kernel, begin_walk_kernel, elementwise.rmsnorm_kernel, elementwise.swiglu_kernel,
        elementwise.quantize_kernel, rope.rope_and_store_kernel(kv), attention_kernel(kv),
        repack_blocks,
    ]  # fmt: skip
    if wanted.experts:
        found += [moe.moe_route_kernel, moe.moe_combine_kernel]
    for name in wanted.formats:
        found.append(matmul_kernel(FORMATS[name]))
        if isinstance(FORMATS[name], BaseFormat):
            found.append(move_bits_kernel)
    for split in wanted.splits:
        name, bits = split.split(":")
        parts = [int(b) for b in bits.split("+")]
        if takes_parts(FORMATS[name], parts):
            found.append(matmul_kernel(FORMATS[name], parts))
    return list(dict.fromkeys(found))


def compile_here(
    wanted: KernelSet, first: int = 0, stop: int | None = None, step: int = 1
) -> Iterator[tuple[str, int, int]]:
    """Compile in this process, or load from the cache: (name, number done, number) before each."""
    kernels = kernels_of(wanted)
    for i in range(len(kernels))[first:stop:step]:
        yield kernels[i].name, i, len(kernels)
        kernels[i].compile()


def main(arguments: list[str]) -> None:
    """Compile part of a set into the user's cache for a parent process, which reads the lines.

    `arguments`: SET FIRST STOP STEP, for every STEP-th kernel from FIRST to STOP of a `KernelSet`.
    """
    wanted = KernelSet.parse(arguments[0])
    first, stop, step = (int(a) for a in arguments[1:4])
    for name, done, total in compile_here(wanted, first, stop, step):
        print(f"{name} {done} {total}", flush=True)
    note, count = "\t".join([str(cache_folder()), *target_key()]), len(kernels_of(wanted))
    print(f"= {note} {count} {count}", flush=True)
