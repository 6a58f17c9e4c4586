"""`--trace FILE`: what the engine did and when, as a file for Perfetto and chrome://tracing.

Owns: the file around a run and the line that sums it up. Must not know what is in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgert.cli.report import atomic_file, note

if TYPE_CHECKING:
    from edgert import Timeline

__all__ = ["recorded", "shares_line"]


@contextmanager
def recorded(path: Path | None) -> Iterator[Timeline | None]:
    """A timeline for `load`, written to `path` at the end; None without a path.

    A run that fails leaves its timeline too. Raises `InputError` at once when the file cannot be
    written.
    """
    if path is None:
        yield None
        return
    from edgert import Timeline

    with atomic_file(path) as stream:
        timeline = Timeline()
        failure: BaseException | None = None
        try:
            yield timeline
        except BaseException as error:
            failure = error
        timeline.write(stream)
    note(f"# {path.name}: {shares_line(timeline.shares(), timeline.dropped)}")
    if failure is not None:
        raise failure


def shares_line(shares: dict[str, float], dropped: int) -> str:
    """`12 passes in 14.8 s: reading 99.9 %, computing 9.6 %, ...` and what was dropped."""
    if not shares:
        return "no pass was recorded"
    words = {
        "reading": "reading", "compute": "computing", "wait": "waiting for weights",
        "barrier": "for threads", "between": "between passes",
    }  # fmt: skip
    parts = [f"{word} {100 * shares[name]:.1f} %" for name, word in words.items()]
    text = f"{shares['passes']:.0f} passes in {shares['seconds']:.1f} s: {', '.join(parts)}"
    return f"{text}; the oldest {dropped:,} records were dropped" if dropped else text
