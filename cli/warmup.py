"""`edgert warmup`: compile the kernels now, so that the first run starts at once."""

from __future__ import annotations

import time
from pathlib import Path

import click

import edgert
from edgert.cli.options import debug_options, model_argument
from edgert.cli.progress import Progress
from edgert.cli.report import note

__all__ = ["compile_kernels", "warmup"]


@click.command()
@model_argument
@debug_options
def warmup(model: Path | None) -> None:
    """Compile the kernels ahead of the first run.

    Those that MODEL needs and that are not compiled yet. They are kept in the user's cache folder,
    or in NUMBA_CACHE_DIR when that is set, keyed by their sources and by the CPU: once is enough.
    Fails when that folder cannot be written.
    """
    if not compile_kernels(model):
        note("all kernels were ready")


def compile_kernels(model: Path | None) -> int:
    """Compile what the model needs and is not compiled, and say so on stderr; how many those were.

    Raises what `edgert.warmup` raises.
    """
    begin = time.perf_counter()
    ready = set()
    with Progress() as progress:
        for name, index, total in edgert.warmup(model):
            progress.update(index, total, f"compile {name}")
            ready.add(name)
    if ready:
        note(f"{len(ready)} kernels are ready after {time.perf_counter() - begin:.1f} s")
    return len(ready)
