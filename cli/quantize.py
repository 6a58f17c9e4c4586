"""`edgert quantize`: the experts of a model in fewer bits, to a size."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

import edgert
from edgert import format_bytes
from edgert.cli.options import ModelOptions, debug_options, json_option, load_options
from edgert.cli.progress import Progress
from edgert.cli.report import note, print_json, table
from edgert.cli.text_file import read_text

if TYPE_CHECKING:
    from edgert import QuantizedExperts

__all__ = ["quantize"]


@click.command()
@load_options
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="The .edgert to write."
)
@click.option(
    "--experts-budget",
    required=True,
    metavar="SIZE",
    help="Bits for each weight of an expert on the whole, 3.2bpw, or their size, 1.5GiB.",
)
@click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path),
    metavar="TEXT",
    help="The text that calibrates and measures; by default stories that come with edgert.",
)
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@json_option
@debug_options
def quantize(
    options: ModelOptions, out: Path, experts_budget: str, file: Path | None, force: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Give the experts of a model fewer bits, where it costs least. Lossy.

    A text is run through the model: every second chunk of it shows which experts are used and what
    their inputs are. Gate, up and down of each expert then get 1 to 4 bits, or keep their own, so
    that the weighted error is least at the size that is given. Everything else keeps its bits.
    Perplexity before and after is measured on the other chunks.

    \b
    edgert quantize moe.gguf -o moe-3.2.edgert --experts-budget 3.2bpw -f text.txt
    """
    text = None if file is None else read_text(file)
    loading = options.for_plan()
    with Progress() as progress:
        found = edgert.quantize_experts(
            options.path, out, experts_budget, text=text, force=force,
            on_progress=lambda what, done, total: progress.update(done, total, what), **loading,
        )  # fmt: skip
    if as_json:
        print_json({"out": str(out), **dataclasses.asdict(found)})
        return
    click.echo(widths_text(found))
    before, after = found.before, found.after
    click.echo(
        f"\nperplexity {before.perplexity:.4f} +- {before.error:.4f} before, {after.perplexity:.4f}"
        f" +- {after.error:.4f} after ({after.perplexity / before.perplexity:.4f}), on "
        f"{after.scored_tokens:,} tokens"
    )
    note(
        f"{out}: {format_bytes(out.stat().st_size)}, experts {format_bytes(found.experts_bytes)}, "
        f"{found.bits_per_weight:.2f} bits a weight; {found.calibration_tokens:,} tokens used "
        f"{found.used_experts} experts"
    )


def widths_text(found: QuantizedExperts) -> str:
    """A line for each layer."""
    layers: dict[int, dict[str, str]] = {}
    for name, formats in found.formats.items():
        layer, part = re.findall(r"blk\.(\d+)\.ffn_(\w+)_exps", name)[0]
        counts = sorted(Counter(formats).items())
        said = ", ".join(f"{fmt} x {n}" for fmt, n in counts) if len(counts) > 1 else formats[0]
        layers.setdefault(int(layer), {})[part] = said
    rows = [(str(at), *(parts[p] for p in ("gate", "up", "down"))) for at, parts in layers.items()]
    return table(("layer", "gate", "up", "down"), rows)
