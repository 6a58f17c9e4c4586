"""`edgert bench --kernels` and `--attention`: how close kernels come to what the machine can do.

Owns: the tables. Must not know how kernels are measured.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import edgert
from edgert.cli.progress import Progress
from edgert.cli.report import table

if TYPE_CHECKING:
    from edgert import KernelFigures

__all__ = ["attention_text", "bench_attention", "bench_kernels", "kernels_text"]


def bench_kernels(
    formats: Sequence[str] | None, threads: int | None, trials: int, progress: Progress
) -> dict[str, Any]:
    """Measure; the object that --json prints. Raises `InputError`."""

    def show(what: str, done: int, total: int) -> None:
        progress.update(done, total, what)

    return _found(edgert.bench_kernels(formats, threads=threads, trials=trials, on_progress=show))


def bench_attention(
    kv_cache_type: str, threads: int | None, trials: int, progress: Progress
) -> dict[str, Any]:
    """As `bench_kernels` for attention."""

    def show(what: str, done: int, total: int) -> None:
        progress.update(done, total, what)

    return _found(
        edgert.bench_attention(
            threads=threads, trials=trials, kv_cache_type=kv_cache_type, on_progress=show
        )
    )


def _found(figures: Iterable[KernelFigures]) -> dict[str, Any]:
    return {
        "machine": f"{platform.machine()} {platform.system()}",
        "cores": os.cpu_count(),
        "kernels": [one.to_dict() for one in figures],
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
    return (
        f"{table(header, lines)}\n{_limits_text(limits)}; L2 and repack: 1 thread\n"
        "4 tokens, 8 tokens: time of one pass over the weights against that of one token"
    )


def attention_text(found: dict[str, Any]) -> str:
    """`bench_attention`'s object for people: a line for each shape, then the limits."""
    figures = found["kernels"]
    limits = {f["format"]: f for f in figures if f["what"] == "limit"}
    by_shape: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for f in figures:
        if f["what"] == "attention":
            by_shape.setdefault((f["kv_heads"], f["context"]), []).append(f)
    lines = [
        [
            str(kv_heads),
            str(context),
            f"{one['gb_s']:.1f}",
            f"{100 * one['of_read']:.0f} %",
            f"{one['gmac_s']:.1f}",
            f"{many['gmac_s']:.1f}",
            f"{100 * many['of_peak']:.0f} %",
            f"#{many['hash'][:8]}",
        ]
        for (kv_heads, context), (one, many) in by_shape.items()
    ]
    tokens = max(f["tokens"] for f in figures)
    header = ["KV heads", "context", "1 token GB/s", "of read", "GMAC/s",
              f"{tokens} tok GMAC/s", "of peak", "hash"]  # fmt: skip
    return f"{table(header, lines)}\n{_limits_text(limits)}"


def _limits_text(limits: dict[str, dict[str, Any]]) -> str:
    peaks = [f"read {limits['read']['gb_s']:.1f} GB/s"]
    peaks += [f"{name} {f['gmac_s']:.0f} GMAC/s" for name, f in limits.items() if f["gmac_s"]]
    return f"limits with {limits['read']['threads']} threads: {', '.join(peaks)}"


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
