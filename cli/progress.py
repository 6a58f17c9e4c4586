"""A progress bar on stderr that is not there when stderr is not a terminal.

Owns: when a bar is shown and that it leaves no trace. Must not know what is counted.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["Progress"]


class Progress:
    """A bar that appears with the first `update` and is wiped at the end of the `with`.

    rich is loaded at construction, before any model, so that its few MiB are part of what the
    process holds when the memory plan is made.
    """

    def __init__(self) -> None:
        self._bar: RichProgress | None = None
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, done: int, total: int, what: str = "prefill") -> None:
        """Show `done` of `total`, and what is being done."""
        if self._bar is None:
            return
        if not self._bar.live.is_started:
            self._bar.start()
        if not self._bar.tasks:
            self._bar.add_task(what, total=total)
        self._bar.update(self._bar.tasks[0].id, completed=done, total=total, description=what)

    def close(self) -> None:
        """Wipe the bar; further updates bring it back from the start."""
        if self._bar is None or not self._bar.live.is_started:
            return
        self._bar.stop()
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
