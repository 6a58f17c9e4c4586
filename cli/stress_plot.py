"""Pictures of stress runs: points in SVG, written here, and a PNG where matplotlib is installed.

Owns: how figures look as a picture. Must not know what they mean.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edgert.cli.report import atomic_file
from edgert.cli.stress_runs import Run

__all__ = ["Picture", "pictures", "plot_budgets", "svg"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 300, 60, 40
_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf")


class Picture(NamedTuple):
    """Points by name, and what the axes are; `limit` draws the line y = x."""

    title: str
    x: str
    y: str
    points: dict[str, list[tuple[float, float]]]
    limit: bool = False


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """What there is to see in these runs."""
    peaks: dict[str, list[tuple[float, float]]] = {}
    speeds: dict[str, list[tuple[float, float]]] = {}
    growth: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        model, budget = run.case.model.stem, run.case.budget_bytes / 2**20
        peaks.setdefault(model, []).append((budget, run.peak_bytes / 2**20))
        if run.stats.get("decode_tok_s"):
            speeds.setdefault(model, []).append((budget, run.stats["decode_tok_s"]))
        if run.growth_bytes is not None:
            growth[run.case.name] = [(n, size / 2**20) for n, size in run.found["rss"]]
    shown = [
        Picture("Peak memory and the limit", "limit (MiB)", "peak (MiB)", peaks, True),
        Picture("Speed", "limit (MiB)", "decode (tokens/s)", speeds),
        Picture("Memory of long runs", "tokens", "resident (MiB)", growth),
    ]
    return [picture for picture in shown if picture.points]


def svg(picture: Picture) -> str:
    """The picture as an SVG element. Both axes begin at 0."""
    flat = [point for points in picture.points.values() for point in points]
    most_x, most_y = (max(point[axis] for point in flat) * 1.05 or 1.0 for axis in (0, 1))
    wide, high = _WIDTH - _LEFT - 20, _HEIGHT - _BOTTOM - 30

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + wide * x / most_x, 30 + high * (1 - y / most_y)

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(words)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" font-family="sans-serif" font-size="11">',
        text(_LEFT, 18, picture.title, 'font-weight="bold"'),
        f'<path d="M{_LEFT} 30V{30 + high}H{_LEFT + wide}" fill="none" stroke="black"/>',
        text(_LEFT + wide / 2, _HEIGHT - 6, picture.x, 'text-anchor="middle"'),
        text(0, 0, picture.y, f'transform="translate(12 {30 + high / 2}) rotate(-90)" '
             'text-anchor="middle"'),
    ]  # fmt: skip
    for share in (0.25, 0.5, 0.75, 1.0):
        x, y = place(most_x * share, most_y * share)
        parts.append(text(x, 44 + high, f"{most_x * share:.3g}", 'text-anchor="middle"'))
        parts.append(text(_LEFT - 4, y + 4, f"{most_y * share:.3g}", 'text-anchor="end"'))
    if picture.limit:
        (x0, y0), (x1, y1) = place(0, 0), place(min(most_x, most_y), min(most_x, most_y))
        line = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
        parts.append(f'<line {line} stroke="gray" stroke-dasharray="4"/>')
    for number, (name, points) in enumerate(picture.points.items()):
        color = _COLORS[number % len(_COLORS)]
        for point in points:
            x, y = place(*point)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
        parts.append(text(_LEFT + 8, 42 + 13 * number, name, f'fill="{color}"'))
    return "".join([*parts, "</svg>"])


def plot_budgets(path: Path, runs: Sequence[Run]) -> None:
    """A PNG of speed and peak memory by budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = sorted((run for run in runs if run.stats), key=lambda run: run.case.budget_bytes)
    budgets = [run.case.budget_bytes / 2**20 for run in done]
    figure, speed = pyplot.subplots(figsize=(7, 4), layout="constrained")
    speed.plot(budgets, [run.stats["decode_tok_s"] for run in done], "o", color="tab:blue")
    title = ", ".join(dict.fromkeys(run.case.model.name for run in runs))
    speed.set(xlabel="memory budget (MiB)", title=title, ylim=(0, None))
    speed.set_ylabel("decode (tokens/s)", color="tab:blue")
    memory = speed.twinx()
    memory.plot(budgets, [run.peak_bytes / 2**20 for run in done], "s", color="tab:red")
    memory.plot(budgets, budgets, ":", color="gray", label="the limit")
    memory.set(ylim=(0, None))
    memory.set_ylabel("peak memory (MiB)", color="tab:red")
    memory.legend(loc="lower right")
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=150)
    pyplot.close(figure)
