"""`edgert bench --kernels`: how close the matrix kernels come to what the machine can do.

Owns: the table. Must not know how kernels are measured (edgert/kernel_bench.py).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

import edgert
from edgert.cli.progress import Progress
from edgert.cli.report import table

__all__ = ["bench_kernels", "kernels_text"]


def bench_kernels(
    formats: Sequence[str] | None, threads: int | None, trials: int, progress: Progress
) -> dict[str, Any]:
    """Measure; the object that --json prints. Raises `InputError`."""

    def show(what: str, done: int, total: int) -> None:
        progress.update(done, total, what)

    found = list(edgert.bench_kernels(formats, threads=threads, trials=trials, on_progress=show))
    progress.close()
    return {
        "machine": f"{platform.machine()} {platform.system()}",
        "cores": os.cpu_count(),
        "kernels": [figures.to_dict() for figures in found],
    }


def kernels_text(found: dict[str, Any]) -> str:
    """`bench_kernels`' object for people: a line for each format, then the limits."""
    figures = found["kernels"]
    by_format: dict[str, dict[tuple[str, int, str], dict[str, Any]]] = {}
    limits = {f["format"]: f for f in figures if f["what"] == "limit"}
    for f in figures:
        if f["what"] != "limit":
            by_format.setdefault(f["format"], {})[f["what"], f["tokens"], f["source"]] = f
    lines = [_line(name, measured) for name, measured in by_format.items()]
    header = [
        "format", "GEMV GB/s", "of read", "GEMV in L2", "4 tokens", "8 tokens",
        "512 tok GMAC/s", "of peak", "repack GB/s", "hash",
    ]  # fmt: skip
    threads = limits["read"]["threads"]
    peaks = [f"read {limits['read']['gb_s']:.1f} GB/s"]
    peaks += [f"{name} {f['gmac_s']:.0f} GMAC/s" for name, f in limits.items() if f["gmac_s"]]
    return (
        f"{table(header, lines)}\n"
        f"limits with {threads} threads: {', '.join(peaks)}; L2 and repack: 1 thread\n"
        "4 tokens, 8 tokens: time of one pass over the weights against that of one token"
    )


def _line(name: str, found: dict[tuple[str, int, str], dict[str, Any]]) -> list[str]:
    one = found["matmul", 1, "DRAM"]
    many = max((f for f in found.values() if f["source"] == "DRAM"), key=lambda f: f["tokens"])
    costs = [f"{found['matmul', n, 'DRAM']['seconds'] / one['seconds']:.2f} x" for n in (4, 8)]
    return [
        name,
        f"{one['gb_s']:.1f}",
        f"{100 * one['of_read']:.0f} %",
        f"{found['matmul', 1, 'L2']['gb_s']:.1f}",
        *costs,
        f"{many['gmac_s']:.1f}",
        f"{100 * many['of_peak']:.0f} %" if many["of_peak"] else "-",
        f"{found['repack', 0, 'DRAM']['gb_s']:.2f}",
        f"#{one['hash'][:8]}",
    ]
