"""`edgert warmup`: compile the kernels now, so that the first run starts at once."""

from __future__ import annotations

from pathlib import Path

import click

import edgert
from edgert.cli.options import debug_options, model_argument
from edgert.cli.progress import Progress
from edgert.cli.report import note

__all__ = ["warmup"]


@click.command()
@model_argument
@debug_options
def warmup(model: Path | None) -> None:
    """Compile the kernels ahead of the first run.

    Those that MODEL needs. They are kept in the user's cache folder, or in NUMBA_CACHE_DIR when
    that is set, keyed by their sources and by the CPU: once is enough.
    """
    count = 0
    with Progress() as progress:
        for name, index, total in edgert.warmup(model):
            progress.update(index, total, name)
            count = total
    note(f"{count} kernels are ready")
