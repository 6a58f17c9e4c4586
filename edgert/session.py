"""Text in, text out: one timeline of tokens on an engine.

Owns: the loop of prefill, sampling, decoding and stopping, and its figures. Must not know where
weights are. A `Session` is what the user talks to again and again: its tokens stay, so each turn
computes only what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgert.config import SamplingParams
from edgert.drafters import drafters_of
from edgert.errors import CancelledError, ContextError, InputError
from edgert.forward import Ticket
from edgert.prompt_lookup import PromptLookup
from edgert.results import Completion, FinishReason, RunStats, TokenEvent, logits_hash
from edgert.run_meter import RunMeter
from edgert.sampler import Sampler
from edgert.speculation import MOST_DRAFTED, Speculator
from edgert.stop import StopMatcher

if TYPE_CHECKING:
    from edgert.engine import Engine

__all__ = ["Completion", "GenerationOptions", "RunStats", "Session", "TokenEvent", "logits_hash"]

Progress = Callable[[int, int], object]  # tokens done, tokens to do


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """What one generation was asked for."""

    sampling: SamplingParams
    max_tokens: int | None = None  # None: until the text ends or the context is full
    seed: int | None = None  # None: drawn, and reported in the statistics
    stop: tuple[str, ...] = ()
    on_prefill: Progress | None = None
    speculate: bool = True  # guess tokens where that is faster; the same tokens either way
    draft_max: int = 15  # tokens guessed at once, at most: a pass of 16 fills a tile of the kernels

    def __post_init__(self) -> None:
        limit, most = self.max_tokens, self.draft_max
        if limit is not None and (not isinstance(limit, int) or limit < 0):
            raise InputError(f"max_tokens is {limit!r}; it must be a whole number of 0 or more")
        if isinstance(most, bool) or not isinstance(most, int) or not 0 <= most <= MOST_DRAFTED:
            raise InputError(f"draft_max is {most!r}; it must be a number from 0 to {MOST_DRAFTED}")
        if not isinstance(self.speculate, bool):
            raise InputError(f"speculate is {self.speculate!r}; it must be True or False")


class Session:
    """One mutable timeline of tokens: prompt and answers so far, and where they end.

    Any number of sessions share an engine and its one KV cache: what the cache holds of this
    session's tokens is kept, the rest computed again, to the same bits. Not for several threads at
    once, except `cancel`. Made by `Engine.session`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ticket = Ticket()
        self._meter: RunMeter | None = None
        self.tokens: list[int] = []

    @property
    def last_stats(self) -> RunStats | None:
        """The figures of the last generation, or of the one under way so far."""
        return None if self._meter is None else self._meter.stats()

    @property
    def position(self) -> int:
        """Number of tokens so far."""
        return len(self.tokens)

    def reset(self) -> None:
        """Forget all tokens."""
        self.tokens = []

    def cancel(self) -> None:
        """Stop the generation under way within one op of one layer; from any thread."""
        self._engine.forward.cancel(self._ticket)

    def generate(self, prompt: Sequence[int], options: GenerationOptions) -> Iterator[TokenEvent]:
        """Append `prompt` to the session and stream what follows.

        The last event carries the finish reason. Closing the iterator ends the generation and
        keeps the tokens so far. Raises `ContextError` when the prompt leaves no room, `InputError`
        for an empty session.
        """
        engine, self._ticket = self._engine, Ticket()
        room = engine.plan.context_length - len(self.tokens) - len(prompt)
        if room < 1:
            raise ContextError(len(self.tokens) + len(prompt) + 1, engine.plan.context_length)
        before, tokens = self.tokens, [*self.tokens, *prompt]
        if not tokens:
            raise InputError("the prompt is empty and the model has no BOS token to begin with")
        self.tokens = tokens
        sampler = Sampler(options.sampling, options.seed)
        meter = RunMeter(engine, len(tokens), engine.forward.reused(tokens), sampler.seed)
        self._meter = meter
        limit = room if options.max_tokens is None else min(room, options.max_tokens)
        try:
            sampled = self._sampled(sampler, meter, limit, options)
            yield from self._events(sampled, meter, limit, StopMatcher(options.stop))
        finally:
            if not meter.prefilled:  # as if nothing had been asked
                self.tokens = before

    def _sampled(
        self, sampler: Sampler, meter: RunMeter, limit: int, options: GenerationOptions
    ) -> Iterator[int]:
        """The tokens as they are sampled; the caller appends each to `tokens` before the next.

        A pass gives logits after the last token and after each one that was guessed to follow. They
        count for as long as the guesses are what is sampled.
        """
        engine, tokens, plan = self._engine, self.tokens, self._engine.plan
        most = min(options.draft_max, plan.prefill_tokens - 1, plan.logit_rows - 1)
        drafters = [PromptLookup(), *drafters_of(engine, sampler, self._ticket)]
        speculator = Speculator(drafters, engine.forward.costs, most if options.speculate else 0)
        progress, drafted = options.on_prefill, list[int]()
        while True:
            logits = engine.forward.evaluate(
                [*tokens, *drafted], engine.vocab_size, last=1 + len(drafted),
                ticket=self._ticket, progress=progress,
                ahead=speculator.ahead([*tokens, *drafted], limit - meter.generated - len(drafted)),
            )  # fmt: skip
            meter.pass_done(logits, speculator.drafter, len(drafted))
            if not limit:
                return
            sampled: list[int] = []
            for row, guess in zip(logits, [*drafted, None], strict=True):
                with engine.span("sample"):
                    token = sampler.sample(row, tokens)
                sampled.append(token)
                meter.token_sampled(row, token == guess)
                yield token
                if token != guess:
                    break
            speculator.learn(sampled)
            with meter.drafting(speculator):
                drafted = speculator.draft(tokens, limit - meter.generated - 1)
            progress = None

    def _events(
        self, sampled: Iterator[int], meter: RunMeter, limit: int, matcher: StopMatcher
    ) -> Iterator[TokenEvent]:
        engine = self._engine
        decoder = engine.tokenizer.stream_decoder(at_start=False)
        finish: FinishReason = "length"
        before = len(self.tokens)
        try:
            for token in sampled:
                if token in engine.tokenizer.eos_ids:
                    finish = "stop"
                    break
                self.tokens.append(token)
                with engine.span("detokenize"):
                    text = matcher.push(decoder.push(token))
                if matcher.stopped or meter.generated >= limit:
                    finish = "stop" if matcher.stopped else "length"
                    text += "" if matcher.stopped else matcher.push(decoder.flush())
                    text += "" if matcher.stopped else matcher.flush()
                    yield TokenEvent(text, token, meter.generated - 1, finish)
                    return
                yield TokenEvent(text, token, meter.generated - 1)
                if self._ticket.cancelled:
                    raise CancelledError
            # The end without a token to show: its text is what was still held back.
            text = matcher.push(decoder.flush()) + matcher.flush()
            yield TokenEvent(text, None, len(self.tokens) - before, finish)
        except CancelledError:
            text = matcher.push(decoder.flush()) + matcher.flush()
            yield TokenEvent(text, None, len(self.tokens) - before, "cancelled")
        finally:
            engine.last_stats = meter.end()


def complete(events: Iterator[TokenEvent], session: Session) -> Completion:
    """All events of a generation as one completion."""
    text = ""
    tokens: list[int] = []
    reason: FinishReason = "cancelled"
    for event in events:
        text += event.text
        if event.token is not None:
            tokens.append(event.token)
        if event.finish_reason is not None:
            reason = event.finish_reason
    assert session.last_stats is not None
    return Completion(text, tuple(tokens), reason, session.last_stats)
