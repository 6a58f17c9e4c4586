"""One answer from the model to stdout, as it is made.

Owns: writing tokens, the prefill bar, and what Ctrl-C does while an answer runs. Must not know
whether a person or a pipe asked.

The answer is computed in a second thread. Python hands a signal to the main thread only between
two of its instructions, and a pass over a large model is one instruction of many seconds; the
main thread waits here instead and can tell the engine to stop within the layer it is at.
"""

from __future__ import annotations

import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import click

from edgert.cli.progress import Progress

if TYPE_CHECKING:
    from edgert import Engine, RunStats, Session, TokenEvent

__all__ = ["Answer", "Prompt", "answer"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]  # a text, tokens, or chat messages
_WAIT_SECONDS = 0.2  # Windows delivers Ctrl-C only between two waits


@dataclass(slots=True)
class Answer:
    """What was said until it ended or was stopped."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "cancelled"
    stats: RunStats | None = None


def answer(
    engine: Engine,
    prompt: Prompt,
    sampling: Mapping[str, Any],
    progress: Progress,
    *,
    opening: str = "",
    silent: bool = False,
) -> Answer:
    """Continue a text or tokens, or answer chat messages, on stdout.

    `opening` is written before the first token and not sooner: the bar would wipe it.

    Ctrl-C ends the answer: what was written stays, the engine is ready for the next question,
    and the finish reason is "cancelled". A second Ctrl-C before it has ended is raised.
    """
    session = engine.session()
    options = engine.options(on_prefill=progress.update, **sampling)
    found = Answer()
    progress.close()
    for event in _events(session, session.generate(_tokens(engine, prompt), options)):
        progress.close()
        found.text += event.text
        if event.token is not None:
            found.tokens.append(event.token)
        if event.finish_reason is not None:
            found.finish_reason = event.finish_reason
        if not silent:
            sys.stdout.write(opening + event.text)
            sys.stdout.flush()
            opening = ""
    progress.close()
    found.stats = session.last_stats
    if not silent and not found.text.endswith("\n"):
        click.echo()
    if not silent and found.stats and engine.is_streamed and found.finish_reason != "cancelled":
        if not engine.device_bytes_per_s:
            engine.measure_device()  # once, and behind the text: nobody waits for it
        found.stats = replace(found.stats, device_bytes_per_s=engine.device_bytes_per_s)
    return found


def _tokens(engine: Engine, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return engine.tokenize(prompt)
    if prompt and isinstance(prompt[0], Mapping):
        return engine.chat_tokens(prompt)  # type: ignore[arg-type]
    return list(prompt)  # type: ignore[arg-type]


def _events(session: Session, events: Iterator[TokenEvent]) -> Iterator[TokenEvent]:
    """The events of a generation that runs in a thread of its own; Ctrl-C cancels it."""
    handed: queue.SimpleQueue[TokenEvent | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            for event in events:
                handed.put(event)
            handed.put(None)
        except BaseException as error:
            handed.put(error)

    worker = threading.Thread(target=work, name="edgert-answer", daemon=True)
    with _CtrlC(session.cancel) as ctrl_c:
        worker.start()
        try:
            while True:
                try:
                    item = handed.get(timeout=_WAIT_SECONDS)
                except queue.Empty:
                    continue
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
                if ctrl_c.pressed:  # it may have come before the generation had begun to listen
                    session.cancel()
        finally:
            if worker.is_alive():
                session.cancel()
            worker.join()


class _CtrlC:
    """Within the `with`, the first Ctrl-C calls `stop`; the next one is a KeyboardInterrupt."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self.pressed = False

    def __enter__(self) -> _CtrlC:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, _number: int, _frame: object) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
        self._stop()
