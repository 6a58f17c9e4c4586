"""What the commands print: the stats line, JSON objects, aligned tables.

Owns: the form of every figure. Data goes to stdout, everything else to stderr. Must not know
where a figure comes from.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from edgert import InputError, format_bytes

if TYPE_CHECKING:
    from edgert import MemoryReport, RunStats

__all__ = [
    "atomic_file",
    "memory_text",
    "note",
    "print_csv",
    "print_json",
    "require_matplotlib",
    "stats_line",
    "table",
]


def stats_line(stats: RunStats) -> str:
    """One line for people: speed, reading, memory, and the hash that pins the numbers.

    `# 128 tok  prefill 41.2  decode 7.9 tok/s  read 312.0 MiB/tok  2.41 GB/s (86 % of device)
    stall 18 %  guessed 61 of 80  peak 498.0 MiB  seed 7  #5c1e09af` (on one line). What was not
    read, guessed or measured is left out. Of a model with experts also those found in memory, and
    those read ahead of their layer: `experts 74 %  ahead 60 + 310 late, 70 wasted`.
    """
    parts = [
        f"# {stats.generated_tokens} tok",
        f"prefill {stats.prefill_tok_s:.1f}  decode {stats.decode_tok_s:.1f} tok/s",
    ]
    if stats.read_bytes:
        speed = f"{stats.read_bytes_per_s / 1e9:.2f} GB/s"
        if stats.device_bytes_per_s:
            share = stats.read_bytes_per_s / stats.device_bytes_per_s
            speed += f" ({100 * share:.0f} % of device)"
        parts += [
            f"read {stats.read_bytes_per_token / 2**20:.1f} MiB/tok",
            speed,
            f"stall {100 * stats.stall_share:.0f} %",
        ]
    if stats.read_bytes and stats.experts:
        found = stats.experts
        parts.append(f"experts {100 * found.hits / max(found.hits + found.misses, 1):.0f} %")
        ahead = found.ahead_useful, found.ahead_late, found.ahead_wasted
        if any(ahead):
            parts.append("ahead {} + {} late, {} wasted".format(*ahead))
    if stats.drafted_tokens:
        parts.append(f"guessed {stats.accepted_tokens} of {stats.drafted_tokens}")
    parts += [
        f"peak {format_bytes(stats.peak_bytes)}",
        f"seed {stats.seed}",
        f"#{stats.logits_hash[:8]}",
    ]
    return "  ".join(parts)


def memory_text(memory: MemoryReport) -> str:
    """A table of the regions, planned and held, and a line of what the system counts."""
    rows = [
        (name, format_bytes(planned), format_bytes(memory.held[name]))
        for name, planned in memory.planned.items()
        if planned
    ]
    planned, held = sum(memory.planned.values()), sum(memory.held.values())
    rows.append(("sum", format_bytes(planned), format_bytes(held)))
    group = memory.cgroup
    counted = {
        "budget": memory.budget_bytes, "resident": memory.resident_bytes,
        "peak": memory.peak_bytes, "anonymous": memory.anonymous_bytes,
        "mapped files": memory.file_bytes, "page cache of the model": memory.page_cache_bytes,
    }  # fmt: skip
    if group is not None:
        counted |= {
            "cgroup": group.usage_bytes, "its anonymous": group.anonymous_bytes,
            "its page cache": group.file_bytes, "its kernel memory": group.kernel_bytes,
        }  # fmt: skip
    words = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in counted.items())
    return f"{table(('region', 'planned', 'held'), rows)}\n{words}"


def note(text: str) -> None:
    """A line beside the answer: to stderr, dimmed on a terminal."""
    click.secho(text, err=True, dim=True)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout, indented for people, readable by programs."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=_plain))


def print_csv(rows: Sequence[dict[str, Any]]) -> None:
    """Comma-separated values on stdout, a header first; all rows have the keys of the first."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    click.echo(out.getvalue(), nl=False)


def _plain(value: Any) -> Any:
    """NumPy scalars and paths as JSON values."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


_MODELS = (b"GGUF", b"\x89EDGERT\n")  # what their files begin with


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its name only when complete: nothing half-written is left.

    Raises `InputError` when the folder does not exist or cannot be written to, and when the file
    is there and a model: one name too many on a command line must not cost gigabytes.
    """
    if path.is_file():
        with suppress(OSError), path.open("rb") as file:
            if file.read(8).startswith(_MODELS):
                raise InputError(f"{path} is a model; name another file to write to")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        stream = partial.open("wb")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with stream:
            yield stream
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def require_matplotlib() -> None:
    """Raise `InputError` where --plot cannot work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'edgert[plot]'") from None
