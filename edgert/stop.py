"""Stop strings that may run across the borders of tokens.

Owns: which text is safe to show. Must not know tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from edgert.errors import InputError

__all__ = ["StopMatcher"]


class StopMatcher:
    """Passes text through until the first stop string is complete.

    The stop string that is complete first counts, of several the one that began first; the text
    before it is emitted, nothing after it. How the text is cut into pushes makes no difference.
    Not thread-safe.
    """

    def __init__(self, stops: Iterable[str] | str = ()) -> None:
        """Raises `InputError` for a stop string that is empty or no text."""
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:
                raise InputError(f"stop string {stop!r}: it must be a text that is not empty")
        self._held = ""
        self.stop: str | None = None  # the one that was found

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.stop is not None

    def push(self, text: str) -> str:
        """The text that is now safe: no stop string can begin in it any more.

        Held back is only the longest end of the text that begins a stop string. After the stop
        the result is always empty.
        """
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            _, at, self.stop = min(found)
            self._held = ""
            return text[:at]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What is still held back, when no more text will come."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
