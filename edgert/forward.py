"""Forward passes over one KV cache: tokens in, logits out, nothing computed twice.

Owns: the KV cache's contents, prefix reuse, chunks, recovery after a stopped pass. Must not know
text or sampling.

There is one KV cache. A request names all its tokens; what the cache already holds of them is kept
and the rest is computed. Several sessions can therefore take turns in bounded memory, and by one
arithmetic a session that has to be computed again gets the same bits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from edgert.draft_walk import Ahead, DraftWalk
from edgert.errors import CancelledError, ContextError, EdgertError, InputError
from edgert.kernels_cpu import rows
from edgert.plan import Plan
from edgert.programs import Programs
from edgert.results import PassStats
from edgert.speculation import PassCosts
from edgert.storage.trial import Trial
from edgert.threads import ThreadTeam
from edgert.timeline import PASS, Span, no_span
from edgert.weights import Weights

__all__ = ["Forward", "Ticket"]

_F32 = npt.NDArray[np.float32]
# What one more token adds to a pass, as a share of a pass of one, until it has been measured: next
# to nothing where weights are streamed; of experts a pass reads the union.
_STREAMED_GROWTH, _RESIDENT_GROWTH, _EXPERTS_GROWTH = 0.02, 0.1, 0.5


class Ticket:
    """Names a request, or a row of them, so that it can be cancelled without the others."""

    __slots__ = ("cancelled",)

    def __init__(self) -> None:
        self.cancelled = False


class Forward:
    """Runs the program. Calls are serialised by `lock`; any thread may call `cancel`, `close`."""

    def __init__(
        self,
        plan: Plan,
        programs: Programs,
        team: ThreadTeam,
        weights: Weights,
        x: _F32,
        logits: _F32,
        span: Span = no_span,
        drafts: DraftWalk | None = None,
    ) -> None:
        self._plan = plan
        self._programs = programs
        self._drafts = drafts  # of a nested model
        self._team = team
        self._weights = weights
        self._x = x  # (prefill_tokens, hidden padded)
        self._span = span
        self._logits = logits  # (logit_rows, vocabulary padded)
        self.on_pass: Callable[[int], None] | None = None  # gets the number of tokens of a pass
        self._cached: list[int] = []  # tokens whose keys and values the KV cache holds
        self._drafted: list[int] = []  # tokens behind those, with keys and values of the base
        self._pass = 0  # of the dense stream
        self._broken = False
        self._closed = False
        self._ticket: Ticket | None = None  # of the request under way
        self.lock = threading.RLock()
        self._boundary = threading.Condition()  # held by a pass, and by a change between two
        self._change_waits = False
        self.stats = PassStats()
        self.costs = PassCosts(_growth(plan))
        # A core that computes nothing may be worth more to those who read and place experts.
        self.fewer_threads = Trial(turn=2)
        self._use(plan, programs)

    @property
    def plan(self) -> Plan:
        """What passes run under."""
        return self._plan

    @property
    def row_names(self) -> tuple[str, ...]:
        """The rows of the program, in order."""
        return self._programs.full.names

    def cancel(self, ticket: Ticket) -> None:
        """End the requests with this ticket, one under way within one op; no other is touched."""
        ticket.cancelled = True
        if self._ticket is ticket:
            self._team.stop()

    def close(self) -> None:
        """Stop the pass under way and wait for it; every later one is refused. Idempotent."""
        self._closed = True
        self._team.stop()
        with self.lock, self._boundary:
            pass

    def measure_device(self, seconds: float) -> float:
        """Bytes per second of the idle device: no pass runs meanwhile, and the streams begin again.

        Raises `StorageError`.
        """
        with self.lock, self._boundary:
            self.check_open()
            self._team.settle()
            self._broken = True
            rate = self._weights.measure_device(seconds)
            self._recover()
            return rate

    def check_open(self) -> None:
        """Raise `EdgertError` once `close` was called."""
        if self._closed:
            raise EdgertError("the engine is closed; load the model again")

    def change(self, make: Callable[[], tuple[Plan, Programs]], *, at_once: bool) -> None:
        """Between two passes, let `make` change what passes run on; then go on with what it gives.

        `at_once` ends the pass under way, which begins again after it, to the same bits; else its
        end is waited for. When `make` raises, all is as before. One change at a time.
        """
        self._change_waits = True
        if at_once:
            self._team.stop()
        with self._boundary:
            try:
                self.check_open()
                self._team.settle()
                self._broken = True  # the streams begin again, whatever comes of it
                self._use(*make())
                self.costs.forget(_growth(self._plan))
            finally:
                self._change_waits = False
                self._boundary.notify_all()

    def _use(self, plan: Plan, programs: Programs) -> None:
        self._plan, self._programs = plan, programs
        if self._drafts is not None:
            self._drafts.use(programs, plan.slots, plan.context_length)

    def reused(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` are in the KV cache already; the last one is always computed."""
        cached = self._cached
        most = min(len(cached), len(tokens) - 1)
        if cached[:most] == tokens[:most]:
            return most  # as for every token of an answer; a loop over 8000 takes 0.3 ms
        pairs = enumerate(zip(cached, tokens[:most], strict=False))
        return next((i for i, (have, want) in pairs if have != want), most)

    def evaluate(
        self,
        tokens: Sequence[int],
        vocabulary: int,
        *,
        last: int = 1,
        ticket: Ticket | None = None,
        progress: Callable[[int, int], object] | None = None,
        ahead: Ahead | None = None,
    ) -> _F32:
        """Logits after each of the `last` tokens, float32 (last, vocabulary), the caller's own.

        What the KV cache holds beyond `tokens` is forgotten, so drafts that failed need no undoing.
        `ahead`: what to draft behind `tokens` while the last pass waits for weights.
        Raises `ContextError`, `InputError` for a token outside the vocabulary, `StorageError` when
        a read failed, `CancelledError` after `cancel`.
        """
        with self.lock:
            self.check_open()
            first = len(tokens) - last  # of those whose logits are wanted
            start = max(min(self.reused(tokens), first), 0)
            self._check(tokens, start, vocabulary)
            self._ticket = ticket
            self._team.arm()
            del self._cached[start:]
            self._drafted = []
            out = np.empty((last, vocabulary), np.float32)
            while start < len(tokens):
                stop = min(start + self._plan.prefill_tokens, len(tokens))
                stop = min(stop, max(start, first) + self._plan.logit_rows)
                wanted = max(stop - max(start, first), 0)
                beside = ahead if stop == len(tokens) else None
                self._run_pass(tokens[start:stop], start, wanted, beside)
                self._cached += tokens[start:stop]
                if wanted:
                    out[stop - wanted - first :][:wanted] = self._logits[:wanted, :vocabulary]
                start = stop
                if progress:
                    progress(start, len(tokens))
            if ahead is not None:
                self._drafted = ahead.guessed[: ahead.walked]
            return out

    def draft(self, tokens: Sequence[int], ticket: Ticket | None = None) -> _F32 | None:
        """What the resident base of the weights says after the last token: float32 (vocabulary,).

        All tokens but the last must have been computed or drafted, else there is no answer: None.
        Its keys and values go behind those of computed tokens, where the next `evaluate` writes
        over them; none is ever taken for a computed one. Raises `StorageError`, `CancelledError`.
        """
        with self.lock, self._boundary:
            self.check_open()
            self._ticket = ticket
            self._team.arm()
            while self._change_waits:
                self._boundary.wait()
            start, last = self.reused(tokens), len(tokens) - 1
            behind = list(tokens[start:last])
            drafted = self._drafted if start == len(self._cached) else []
            if (
                self._drafts is None
                or not self._drafts.can_walk
                or last >= self._plan.context_length
                or behind != drafted[: len(behind)]
            ):
                return None
            del self._cached[start:]  # rejected ones, whose place is written to now
            self._drafted = behind
            logits = self._walk_draft(self._drafts, tokens[last], last)
            if logits is not None:
                self._drafted.append(tokens[last])
            return logits

    def _walk_draft(self, drafts: DraftWalk, token: int, position: int) -> _F32 | None:
        """Walk the draft program over one token; None when a change stopped it."""
        if self._broken:
            self._recover()
        self._broken = True
        self._raise_if_cancelled()
        if self._change_waits:
            return None
        logits = drafts.walk(token, position)
        if self._team.stopped:
            self._raise_if_cancelled()
            return None
        self._broken = False
        return logits

    def walk_in_parts(
        self,
        tokens: Sequence[int],
        vocabulary: int,
        ends: Sequence[int],
        look: Callable[[int, int], object],
    ) -> None:
        """Compute `tokens` in parts of the program, for those who look at what is between.

        Part i ends before row `ends[i]` of the program; then `look(i, n)` may read the buffers of a
        pass of n tokens. The sums are those of `evaluate`; no logits. Only for a plan that streams
        no matrices, whose tiles count whole passes. A pass that a change of the budget stops begins
        again, to the same bits, behind what was looked at. Raises as `evaluate` does.
        """
        with self.lock, self._boundary:
            self.check_open()
            self._check(tokens, 0, vocabulary)
            self._ticket = None
            self._team.arm()
            self._cached, self._drafted = [], []
            assert not self._plan.streamed_bytes
            for start in range(0, len(tokens), self._plan.prefill_tokens):
                now, seen = tokens[start : start + self._plan.prefill_tokens], 0
                while seen < len(ends):
                    seen = self._walk_parts(now, start, ends, look, seen)

    def _walk_parts(
        self,
        tokens: Sequence[int],
        position: int,
        ends: Sequence[int],
        look: Callable[[int, int], object],
        seen: int,
    ) -> int:
        """Try a pass in parts, `seen` of which were looked at; how many are now."""
        if self._broken:
            self._recover()
        self._broken = True
        self._set_tokens(tokens, position, 0)
        self._raise_if_cancelled()
        for part, (first, end) in enumerate(pairwise([0, *ends])):
            self._team.run(self._programs.full.part(first, end))
            self._weights.raise_if_failed()
            if self._team.stopped:
                self._raise_if_cancelled()
                return seen
            if part >= seen:
                look(part, len(tokens))
                seen = part + 1
        self._broken = False
        return seen

    def _check(self, tokens: Sequence[int], start: int, vocabulary: int) -> None:
        """Refuse what cannot be computed; the tokens before `start` were checked before."""
        if not tokens:
            raise InputError("there is no token to compute; give a prompt")
        if len(tokens) > self._plan.context_length:
            raise ContextError(len(tokens), self._plan.context_length)
        for token in tokens[start:]:
            if not 0 <= token < vocabulary:
                raise InputError(f"token {token} is outside the vocabulary of {vocabulary:,}")

    def _run_pass(
        self, tokens: Sequence[int], position: int, wanted: int, ahead: Ahead | None
    ) -> None:
        """One walk of the program over `tokens`; the last `wanted` of them leave logits."""
        with self._boundary:
            while not self._walk(tokens, position, wanted, ahead):
                ahead = None

    def _walk(self, tokens: Sequence[int], position: int, wanted: int, ahead: Ahead | None) -> bool:
        """Try a pass; False when it was stopped, but not by the one who wants it."""
        while self._change_waits:
            self._boundary.wait()
        if self._broken:
            self._recover()
        n = len(tokens)
        self._broken = True  # until the pass has ended well
        self._set_tokens(tokens, position, wanted)
        begin = time.perf_counter()
        self._raise_if_cancelled()
        if self._change_waits:  # its stop may have come before `_recover` took it back
            return False
        with self._span(PASS, n, position):
            if self._drafts is not None and self._drafts.can_walk:
                self._drafts.walk_full(ahead)
            else:
                self._team.run(self._programs.full)
        self._weights.raise_if_failed()
        if self._team.stopped:
            self._raise_if_cancelled()
            # Meant for the request before and came too late, or a change comes first: begin again.
            return False
        if self._weights.experts is not None:
            seconds = time.perf_counter() - begin
            self._weights.experts.note_pass(n, seconds)
            if n == 1:
                self.fewer_threads.add(seconds)
        if self.on_pass is not None:
            self.on_pass(n)
        self._pass += 1
        seconds = time.perf_counter() - begin
        self.stats.passes += 1
        self.stats.tokens += n
        self.stats.seconds += seconds
        self.stats.stall_seconds += self._team.take_stall_ns() / 1e9
        if wanted == n:
            self.costs.add(n, seconds)
        else:
            self.costs.expect(n, seconds)
        self._broken = False  # last: an interruption before here begins the streams again
        return True

    def _set_tokens(self, tokens: Sequence[int], position: int, wanted: int) -> None:
        """Write what the next walk is about: embeddings, and the frame."""
        n = len(tokens)
        with self._span("embed", n, position):
            self._weights.embed(tokens, self._x)
        frame = self._team.frame
        frame[rows.F_N_TOKENS] = n
        frame[rows.F_POSITION] = position
        frame[rows.F_PASS] = self._pass
        frame[rows.F_FIRST_LOGIT] = n - wanted
        frame[rows.F_N_LOGITS] = wanted
        frame[rows.F_HINTS] = frame[rows.F_THREADS] = 0
        experts = self._weights.experts
        if experts is not None and experts.may_miss and n <= rows.HINT_TOKENS:
            frame[rows.F_HINTS] = experts.prefetcher.on
            frame[rows.F_THREADS] = (self._team.threads - 1) * self.fewer_threads.on

    def _raise_if_cancelled(self) -> None:
        if self._closed or (self._ticket is not None and self._ticket.cancelled):
            raise CancelledError

    def _recover(self) -> None:
        """Make the engine whole after a pass that did not end: streams begin again."""
        self._team.settle()
        self._team.arm()  # before the ticket is looked at: a cancel meanwhile is seen there
        self._weights.reset()
        self._team.take_stall_ns()
        self._pass = 0
        self._broken = False


def _growth(plan: Plan) -> float:
    """What a token more may add to a pass under a plan."""
    dense = _STREAMED_GROWTH if plan.streamed_bytes else _RESIDENT_GROWTH
    return _EXPERTS_GROWTH if plan.expert_slots else dense
