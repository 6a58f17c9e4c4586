"""`edgert perplexity`: how well models predict a text, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import edgert
from edgert import InputError, format_bytes
from edgert.cli.options import ModelOptions, debug_options, json_option, load_options
from edgert.cli.progress import Progress
from edgert.cli.report import note, print_json, table
from edgert.cli.text_file import read_text, without_last_newline

if TYPE_CHECKING:
    from edgert import Perplexity

__all__ = ["measure", "perplexity", "perplexity_text"]

_INTERRUPTED = 130


@dataclass(slots=True)
class _Row:
    """A model and its figure so far."""

    path: Path
    tokens: list[int]
    found: Perplexity | None = None
    finished: bool = False


@click.command()
@load_options
@click.argument("more", metavar="[MODEL]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path),
    metavar="TEXT",
    help="The text, UTF-8; - is stdin. By default stories that come with edgert.",
)
@click.option("--chunks", type=click.IntRange(min=1), help="Score this many chunks, not all.")
@json_option
@debug_options
def perplexity(
    options: ModelOptions, more: tuple[Path, ...], file: Path | None, chunks: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure how well models predict a text: perplexity, the lower the better.

    The protocol is llama.cpp's: chunks of --ctx-size tokens (512) that do not overlap, BOS at the
    start of each where the file wants it, the second half of each scored. +- is the standard
    error. Several models make a table; ratios are to the first, and only models with the same
    vocabulary compare. Ctrl-C gives the figures so far.

    \b
    edgert perplexity model.gguf -f wiki.test.raw -b 2GiB
    edgert perplexity q8_0.gguf p4_128.edgert p3_128.edgert -f wiki.test.raw
    """
    text = None if file is None else without_last_newline(read_text(file))
    if text == "":
        raise InputError(f"{file} is empty; a text of one chunk of tokens is needed")
    rows: list[_Row] = []
    stopped = False
    with Progress() as progress:
        try:
            for path in (options.path, *more):
                measure(dataclasses.replace(options, model=path), text, chunks, rows, progress)
        except KeyboardInterrupt:
            stopped = True
    if stopped and not any(row.found for row in rows):
        raise click.Abort
    figures = _figures(rows)
    if as_json:
        print_json({"finished": not stopped, "rows": figures})
    else:
        click.echo(perplexity_text(figures))
    if stopped:
        last = rows[-1].found
        if last is not None and not rows[-1].finished:
            note(f"stopped after {last.chunks} of {last.text_chunks} chunks of {rows[-1].path}")
        click.get_current_context().exit(_INTERRUPTED)


def measure(
    options: ModelOptions, text: str | None, chunks: int | None, rows: list[_Row],
    progress: Progress,
) -> None:  # fmt: skip
    """Append a row for one model and keep it up to date while the text is scored.

    The text is made tokens before the model is loaded: a long one takes memory for a moment, which
    the plan's regions need not have yet.
    """
    manifest = edgert.read_manifest(options.path)
    tokenizer = edgert.Tokenizer.from_manifest(manifest.metadata)
    row = _Row(options.path, tokenizer.encode(edgert.bundled_text() if text is None else text))
    rows.append(row)
    size = options.context_length
    if size is None:  # of the model alone: the figure must not depend on the budget
        family = manifest.metadata.get("general.architecture")
        longest = manifest.metadata.get(f"{family}.context_length")
        size = min(edgert.CHUNK_TOKENS, longest or edgert.CHUNK_TOKENS)
    del manifest, tokenizer

    def show(found: Perplexity) -> None:
        row.found = found
        what = f"{options.path.name}: {found.perplexity:.4f}"
        progress.update(found.chunks, found.text_chunks, what)

    wanted = dataclasses.replace(options, context_length=size)
    with wanted.load(progress) as engine:
        progress.close()
        edgert.perplexity(engine, row.tokens, chunk_tokens=size, chunks=chunks, on_chunk=show)
    progress.close()
    row.finished = True


def _figures(rows: Sequence[_Row]) -> list[dict[str, Any]]:
    """The object that --json prints for each model that has a figure."""
    first = rows[0]
    found = []
    for row in rows:
        if row.found is None:
            continue
        manifest = edgert.read_manifest(row.path)
        weights = sum(t.parameters for t in manifest.tensors.values())
        ratio = None
        if first.found and row.tokens == first.tokens and row.found.chunks == first.found.chunks:
            ratio = row.found.perplexity / first.found.perplexity
        found.append({
            "model": row.path.name,
            "file_bytes": sum(manifest.file_bytes),
            "bits_per_weight": 8 * manifest.tensor_bytes / weights,
            **dataclasses.asdict(row.found),
            "ratio": ratio,
        })  # fmt: skip
    return found


def perplexity_text(figures: Sequence[dict[str, Any]]) -> str:
    """The table for people."""
    header = ("model", "file", "bits/weight", "perplexity", "+-", "ratio", "scored")
    rows = [
        (
            row["model"], format_bytes(row["file_bytes"]), f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.4f}", f"{row['error']:.4f}",
            "-" if row["ratio"] is None else f"{row['ratio']:.4f}", f"{row['scored_tokens']:,}",
        )
        for row in figures
    ]  # fmt: skip
    return table(header, rows)
