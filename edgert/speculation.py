"""Guessing tokens, so that one pass computes several: drafters, and how long drafts should be.

Owns: what a drafter is, what its guesses are worth, what passes cost, the draft that gives most
tokens a second. Must not know models, sampling or text.

A draft is verified by a pass over all its tokens. Each token is then sampled from the logits it
would have had alone (one arithmetic), by the sampler as ever, and a drafted one is kept if it is
the one that was sampled. Drafts can therefore change the time and never a token, sampled or not.
Speculative decoding: Leviathan et al., arXiv 2211.17192.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from typing import Any, Protocol, cast

__all__ = ["MOST_DRAFTED", "Acceptance", "Drafter", "PassCosts", "Speculator"]

MOST_DRAFTED = 63  # tokens of a draft, whatever is asked for: passes of up to 64 are timed

# A draft must promise this much more than none: estimates are a few percent off.
_MARGIN = 1.03
_WORTH_SECONDS = 5e-4  # of a pass: guessing takes 5 to 15 us
_TO_TIME = 3  # guesses to learn what one costs
_FEW = 16  # tokens of a prompt whose pass says what one of 1 takes
_LITTLE = 0.05  # of a pass of one, that a token more adds: a disk sets the pace
_WORTH_CHANCE = 0.15  # of guesses beside a pass, which take memory's time from it
_FRESH = 128  # passes until a measurement is forgotten: disks, budgets and contexts change


class Drafter(Protocol):
    """Something that guesses how a text goes on, token by token."""

    name: str  # in statistics
    is_free: bool  # a guess takes next to no time: whole drafts are made, and learnt from
    acceptance: Acceptance  # may outlive the drafter: what one generation learnt helps the next

    def guesses(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Guess after guess of what follows `tokens`: a token and its kind, 0 to the number of
        kinds less one. Those of one kind are right about equally often.

        Each is made when it is asked for; the time that takes is measured and weighed. An iterator
        may be left at any point.
        """
        ...


class CostlyDrafter(Drafter, Protocol):
    """One whose guesses take time."""

    can_go_on: bool  # `ahead` may be called

    def ready(self, tokens: Sequence[int]) -> int:
        """How many guesses of what follows `tokens` were made already, and take no time."""
        ...

    def ahead(self, text: list[int], chance: float, most: int) -> Any:
        """What to guess beside the pass that verifies the end of `text`; None: nothing."""
        ...


class Acceptance:
    """How often guesses of each kind are right, and what one costs: learnt as they are verified."""

    _MEMORY = 0.97  # what an observation counts after the next one of its kind
    _PRIOR = 2.0  # observations that the first estimate counts as
    _KEPT = 9  # guesses whose median time is what one costs

    def __init__(self, priors: Sequence[float]) -> None:
        """`priors`: for each kind, how often its guesses are right to begin with."""
        self._tried = [self._PRIOR] * len(priors)
        self._right = [self._PRIOR * prior for prior in priors]
        self._seen = [self._PRIOR, self._PRIOR * sum(priors) / len(priors)]  # of all kinds
        self._seconds = deque[float](maxlen=self._KEPT)
        self._idle = 0
        self.learnt = 0  # guesses that were verified, ever

    def chance(self, kind: int) -> float:
        """Of a guess of this kind behind right ones."""
        return self._right[kind] / self._tried[kind]

    @property
    def mean(self) -> float:
        """Of a guess whose kind is not known yet."""
        return self._seen[1] / self._seen[0]

    @property
    def seconds(self) -> float | None:
        """What a guess costs; None until one was timed, or long after."""
        times = sorted(self._seconds)
        return times[len(times) // 2] if times else None

    def timed(self, seconds: float) -> None:
        """A guess took so long."""
        self._seconds.append(seconds)
        self._idle = 0

    def unused(self) -> None:
        """A pass without guesses. After many, costs and hopes are old: one guess is due."""
        self._idle += 1
        if self._idle >= _FRESH:
            self._seconds.clear()

    def learn(self, kind: int, right: bool) -> None:
        """A guess of this kind was verified."""
        self.learnt += 1
        self._tried[kind] = self._tried[kind] * self._MEMORY + 1
        self._right[kind] = self._right[kind] * self._MEMORY + right
        self._seen = [self._seen[0] * self._MEMORY + 1, self._seen[1] * self._MEMORY + right]

    def state(self) -> dict[str, Any]:
        """What was learnt, as plain values."""
        plain = {"tried": self._tried, "right": self._right, "seen": self._seen}
        return plain | {"learnt": self.learnt}

    def restore(self, plain: dict[str, Any]) -> None:
        """Know what another one knew. Raises KeyError, TypeError or ValueError for nonsense."""
        tried, right, seen = plain["tried"], plain["right"], plain["seen"]
        pairs = [*zip(tried, right, strict=True), tuple(seen)]
        if len(tried) != len(self._tried) or not all(0 < t < 1e3 and 0 <= r <= t for t, r in pairs):
            raise ValueError("no acceptance of these kinds")
        self._tried, self._right, self._seen = list(tried), list(right), list(seen)
        self.learnt = int(plain["learnt"])


class PassCosts:
    """Seconds of a pass of n tokens, from the last passes of each size. Any thread may add.

    A size that was not seen lately lies on the line between the next ones that were. Beyond them a
    token adds what it was seen to add, and at least `growth` of a pass of one.
    """

    _KEPT = 5  # the median of so many: a disk stutters

    def __init__(self, growth: float, most: int = MOST_DRAFTED + 1) -> None:
        self._growth = growth
        self._seconds = [deque[float](maxlen=self._KEPT) for _ in range(most + 1)]
        self._last = [0] * (most + 1)
        self._expected: float | None = None  # of a pass of 1, until one was timed
        self._passes = 0
        self.latest = float("inf")  # seconds of the last pass

    def add(self, n: int, seconds: float) -> None:
        """A pass of `n` tokens took `seconds`. One of more than `most` tokens says nothing."""
        if 1 <= n < len(self._seconds):
            self._passes += 1
            self._last[n] = self._passes
            self._seconds[n].append(seconds)
            self.latest = seconds

    def expect(self, n: int, seconds: float) -> None:
        """A pass over `n` tokens of a prompt took so long: the first idea of what one of 1 takes.

        Only of few tokens, and where one more adds next to nothing. The smallest size that is timed
        says more, and `line` does not take this for a measurement.
        """
        if 1 <= n <= _FEW and self._growth <= _LITTLE and not self._passes:
            self._expected = seconds / (1 + self._growth * (n - 1))

    def forget(self, growth: float) -> None:
        """Passes cost something else from now on."""
        self._growth, self._expected = growth, None
        for seconds in self._seconds:
            seconds.clear()

    def table(self, most: int) -> list[float]:
        """Seconds of passes of 0 (not used) to `most` tokens; empty if one of 1 is to be timed."""
        costs = [0.0, 0.0]  # as far as the largest size that was timed, then to the end
        for n in range(1, most + 1):
            if self._passes - self._last[n] > _FRESH:
                self._seconds[n].clear()
                self._expected = None
            times = sorted(self._seconds[n])
            if not times and n == 1:
                if self._expected is None:
                    return []
                times = [self._expected]
            if not times:
                continue
            value, at = times[len(times) // 2], len(costs) - 1
            step = (value - costs[at]) / max(n - at, 1)
            costs += [costs[at] + step * (i - at) for i in range(at + 1, n + 1)]
            costs[n] = value
        at = len(costs) - 1
        step = max(self._growth * costs[1], (costs[at] - costs[1]) / max(at - 1, 1))
        costs += [costs[at] + step * (i - at) for i in range(at + 1, most + 1)]
        for n in range(most - 1, 0, -1):  # a shorter pass never costs more
            costs[n] = min(costs[n], costs[n + 1])
        return costs

    def line(self, most: int) -> list[float]:
        """As `table`, smoothed: the line that most pairs of measured sizes agree on (Theil, Sen).

        What one more token costs is the difference of two figures that are alike: with passes that
        vary by a tenth, drafts weighed by the table give 0.85 to 0.97 of the tokens a second
        (replayed drafts of stories260K).
        """
        costs = self.table(most)
        seen = [(n, median(self._seconds[n])) for n in range(1, most + 1) if self._seconds[n]]
        if len(seen) < 2 or not costs:
            return costs
        pairs = [(b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(seen) for b in seen[i + 1 :]]
        step = max(median(pairs), 0.0)
        first = median(seconds - step * (n - 1) for n, seconds in seen)
        first = max(first, 0.1 * costs[1])
        return [0.0, *(first + step * i for i in range(most))]


@dataclass(slots=True)
class _Draft:
    """Guesses of one drafter before one pass."""

    drafter: Drafter
    tokens: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)


class Speculator:
    """Decides who guesses and how many tokens: those that give most tokens a second, often none.

    How often guesses of each kind are right is learnt from every token; of free drafters also
    while nothing of theirs is verified. Of one generation; not thread-safe.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        costs: PassCosts,
        most: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`most` tokens of a draft; 0 turns guessing off."""
        self._drafters = drafters
        self._costs = costs
        self._most = most
        self._clock = clock
        self._made: list[_Draft] = []
        self._verified: _Draft | None = None  # whose tokens are verified next
        self._beside = 0  # guesses that were ready when a draft was right as a whole
        self.drafter = ""  # name of the one whose guesses are verified next

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """The tokens to verify with the next pass, at most `most`."""
        most = min(most, self._most)
        self._made, self._verified, self.drafter = [], None, ""
        if most < 1 or self._costs.latest < _WORTH_SECONDS:
            return []
        for drafter in self._drafters:
            if drafter.is_free:
                pairs = list(islice(drafter.guesses(tokens), most))
                self._made.append(_Draft(drafter, [t for t, _ in pairs], [k for _, k in pairs]))
        costs = self._costs.table(most + 1)
        if not costs:
            return []
        rate, draft, length = _MARGIN / costs[1], None, 0
        for made in self._made:
            better = _best_length(made, costs, rate)
            if better is not None:
                (rate, length), draft = better, made
        line = self._costs.line(most + 1)
        costly = self._costly(line, most, rate if draft else _MARGIN / line[1])
        if costly is not None and (made := self._guess(costly, tokens, line, most)).tokens:
            draft, length = made, len(made.tokens)
        for drafter in self._drafters:
            if not drafter.is_free and (draft is None or drafter is not draft.drafter):
                drafter.acceptance.unused()
        if draft is None or not length:
            return []
        self._verified, self.drafter = draft, draft.drafter.name
        return draft.tokens[:length]

    def ahead(self, text: list[int], most: int) -> Any:
        """What may be guessed while the end of `text`, the last draft, is verified; else None."""
        draft = self._verified
        if draft is None or draft.drafter.is_free or most < 1:
            return None
        drafter, chance = cast(CostlyDrafter, draft.drafter), 1.0
        for kind in draft.kinds:
            chance *= drafter.acceptance.chance(kind)
        worth = drafter.can_go_on and chance * drafter.acceptance.mean > _WORTH_CHANCE
        return drafter.ahead(text, chance, min(most, self._most + 1)) if worth else None

    def _costly(self, costs: Sequence[float], most: int, rate: float) -> Drafter | None:
        """The drafter that takes time and promises more than `rate`, or is to be timed."""
        best = None
        for drafter in self._drafters:
            if drafter.is_free:
                continue
            if drafter.acceptance.seconds is None:
                return drafter
            promised = _promise(drafter.acceptance, costs, most)
            if promised > rate:
                rate, best = promised, drafter
        return best

    def _guess(
        self, drafter: Drafter, tokens: Sequence[int], costs: Sequence[float], most: int
    ) -> _Draft:
        """Guesses until the expected gain of one more is below what it costs.

        A second is worth what the drafter gives a second on the whole (renewal reward): a draft
        that began badly is left sooner than its own rate would say. What is guessed beside the pass
        saves time if all of the draft is right, and the next token: one guess more puts it at risk.
        """
        learnt, made = drafter.acceptance, _Draft(drafter)
        self._made.append(made)
        each = learnt.seconds
        rate = 0.0 if each is None else _promise(learnt, costs, most)
        ready = cast(CostlyDrafter, drafter).ready(tokens)
        self._beside = ready or self._beside
        risk = learnt.mean * (1 - learnt.mean) * self._beside * (each or 0.0)
        guesses, chance = drafter.guesses(tokens), 1.0
        for n in range(most if each is not None else min(most, _TO_TIME)):
            more = costs[n + 1] - costs[max(n, 1)]
            if n >= ready:
                more += (each or 0.0) + chance * risk
            if n and chance * learnt.mean <= rate * more:
                break
            begin = self._clock()
            found = next(guesses, None)
            if found is None:
                break
            if n >= ready:
                learnt.timed(self._clock() - begin)
            made.tokens.append(found[0])
            made.kinds.append(found[1])
            chance *= learnt.chance(found[1])
        return made

    def learn(self, sampled: Sequence[int]) -> None:
        """`sampled` came out of the last pass: right guesses, then one that was none of them."""
        for made in self._made:
            for token, kind, found in zip(made.tokens, made.kinds, sampled, strict=False):
                made.drafter.acceptance.learn(kind, token == found)
                if token != found:
                    break


def _best_length(made: _Draft, costs: Sequence[float], rate: float) -> tuple[float, int] | None:
    """Tokens a second and length of the best part of a draft, if it gives more than `rate`."""
    best = None
    expected = chance = 1.0
    for n, kind in enumerate(made.kinds, 1):
        chance *= made.drafter.acceptance.chance(kind)
        expected += chance
        if expected > rate * costs[n + 1]:
            rate = expected / costs[n + 1]
            best = rate, n
    return best


def _promise(learnt: Acceptance, costs: Sequence[float], most: int) -> float:
    """Tokens a second with the best number of guesses of unknown kinds."""
    best, expected, chance = 0.0, 1.0, 1.0
    for n in range(1, most + 1):
        chance *= learnt.mean
        expected += chance
        best = max(best, expected / (n * (learnt.seconds or 0.0) + costs[n + 1]))
    return best
