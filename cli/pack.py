"""`edgert pack`: a model file made ready for streaming."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import click

import edgert
from edgert import Manifest, format_bytes
from edgert.cli.options import ModelOptions, debug_options, model_argument
from edgert.cli.progress import Progress
from edgert.cli.report import note

__all__ = ["pack"]

_TYPES = ("keep", "Q8_0", *(f"P{bits}_{group}" for bits in (1, 2, 3, 4) for group in (32, 128)))


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
    "bits with a scale for 128 weights, and so on: smaller, and lossy. Q8_0: matrices of F32, F16 "
    "and BF16 in 8 bits, others as they are: lossy, but can be nested.",
)
@click.option(
    "--nested",
    is_flag=False,
    flag_value="auto",
    metavar="BITS",
    help="Keep the codes of matrices in parts of these bits, top ones first: the same weights to "
    "the bit, whose first parts can stay in memory and guess tokens while the rest is streamed. "
    "Each of BITS is for codes of so many bits on the whole: 8 in Q8_0, 6 in Q6_K, 5 in Q5_0, Q5_1 "
    "and Q5_K, 4 in Q4_0, Q4_1 and Q4_K; others stay whole. Without BITS 3+1+4,4+2,4+1,3+1.",
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
    if nested:
        note(nested_text(manifest))
    seconds = time.perf_counter() - begin
    note(
        f"{out}: {format_bytes(nbytes)}, {100 * share:.0f} % of the source, written and verified "
        f"in {seconds:.1f} s ({nbytes / seconds / 1e6:.0f} MB/s)"
    )


def nested_text(manifest: Manifest) -> str:
    """Which matrices are in parts, and which are whole, by format."""
    found = Counter(
        (t.format.name, "+".join(map(str, t.part_bits)) or "whole")
        for t in manifest.tensors.values()
        if len(t.shape) == 2 and t.layout != "rows"
    )
    return ", ".join(f"{n} matrices of {name} {how}" for (name, how), n in sorted(found.items()))
