"""`edgert pack`: a model file made ready for streaming."""

from __future__ import annotations

import time
from pathlib import Path

import click

import edgert
from edgert import format_bytes
from edgert.cli.options import ModelOptions, debug_options, model_argument
from edgert.cli.progress import Progress
from edgert.cli.report import note

__all__ = ["pack"]

_TYPES = ("keep", *(f"P{bits}_{group}" for bits in (1, 2, 3, 4) for group in (32, 128)))


@click.command()
@model_argument
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="The file to write."
)
@click.option(
    "--type",
    "type_name",
    type=click.Choice(_TYPES, case_sensitive=False),
    default="keep",
    show_default=True,
    help="keep: the same weights to the bit. P3_128: attention and feed-forward matrices in 3 "
    "bits with a scale for 128 weights, and so on: smaller, and lossy.",
)
@click.option(
    "--nested",
    is_flag=False,
    flag_value="3+1+4",
    metavar="BITS",
    help="Keep matrices of Q8_0 in parts of these bits, top ones first: the same weights to the "
    "bit, whose first 3 to 5 bits can stay in memory and guess tokens while the rest is "
    "streamed. Without BITS 3+1+4: 3 or 4 bits, as the budget allows, and the rest in one read.",
)
@click.option("--nearest", is_flag=True, help="Round to nearest: half the time, less exact.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@debug_options
def pack(
    model: Path | None, out: Path, type_name: str, nested: str | None, nearest: bool, force: bool
) -> None:
    """Turn a GGUF model into an .edgert file.

    Every command takes it in place of the model. Its weights lie as they are used, so that
    streaming reads them straight ahead and places them without work, and it carries checksums
    (edgert show --verify). What was written is read back and compared. A run that was stopped is
    continued by the same command; until the file is whole it is called OUT.partial.
    """
    source = ModelOptions(model).path
    begin = time.perf_counter()
    with Progress() as progress:
        manifest = edgert.pack_model(
            source, out, type_name=type_name, nested=nested, refine=not nearest, force=force,
            on_progress=lambda what, done, total: progress.update(done, total, what),
        )  # fmt: skip
    nbytes = manifest.file_bytes[0]
    share = nbytes / sum(edgert.read_manifest(source).file_bytes)
    note(
        f"{out}: {format_bytes(nbytes)}, {100 * share:.0f} % of the source, written and verified "
        f"in {time.perf_counter() - begin:.1f} s"
    )
