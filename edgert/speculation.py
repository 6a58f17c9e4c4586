"""Guessing tokens, so that one pass computes several: drafts, and how long they should be.

Owns: drafters, what they are worth, what passes cost, the length that gives most tokens a second.
Must not know models, sampling or text.

A draft is verified by a pass over all its tokens. Each token is then sampled from the logits it
would have had alone (one arithmetic), by the sampler as ever, and a drafted one is kept if it is
the one that was sampled. Drafts can therefore change the time and never a token, sampled or not.
Speculative decoding: Leviathan et al., arXiv 2211.17192. Prompt lookup: Saxena, 2023
(github.com/apoorvumang/prompt-lookup-decoding). Hash chains: RFC 1951, section 4.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["MOST_DRAFTED", "Draft", "Drafter", "PassCosts", "PromptLookup", "Speculator"]

MOST_DRAFTED = 63  # tokens of a draft, whatever is asked for: passes of up to 64 are timed
LONGEST = 16  # tokens of a match; longer ones count as this long
_SHORTEST = 2
_BUCKETS = 1 << 14
_WALK = 32  # matches looked at, the latest first: 10 us at worst

# A draft must promise this much more than none: estimates are a few percent off.
_MARGIN = 1.03
_WORTH_SECONDS = 5e-4  # of a pass: guessing takes 5 to 15 us


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens, and for each its kind: those of one kind are right about equally often.

    A kind is a number from 0 to `LONGEST`, the larger the surer.
    """

    tokens: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)


class Drafter(Protocol):
    """Something that guesses how a text goes on."""

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        """At most `most` tokens that may follow `tokens`, which only ever grow."""
        ...


class PromptLookup:
    """Guesses that the text goes on as it did where its end was seen before.

    Takes the longest match (up to `LONGEST` tokens, at least 2) of the latest `walk` places that
    end in the same two tokens, of equally long ones the latest. As in LZ77 the copy may run into
    itself. 4 bytes a token and 64 KiB of memory; 2 to 10 us a call.
    """

    def __init__(self, walk: int = _WALK) -> None:
        self._walk = walk
        self._latest = array("i", [-1]) * _BUCKETS  # place where a pair with this hash was seen
        self._earlier = array("i")  # for each place the one before it in the same bucket

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        """As `Drafter.draft`. The kind of a token is the length of the match in front of it."""
        self._index(tokens)
        length, end = self._longest_match(tokens)
        if not length:
            return Draft()
        n = len(tokens)
        copied = list(tokens[end + 1 : end + 1 + most])
        while len(copied) < most:
            copied.append(copied[end + 1 + len(copied) - n])
        return Draft(copied, [min(length + i, LONGEST) for i in range(most)])

    def _index(self, tokens: Sequence[int]) -> None:
        latest, earlier = self._latest, self._earlier
        for i in range(len(earlier), len(tokens)):
            bucket = (tokens[i - 1] * 40503 + tokens[i]) % _BUCKETS if i else 0
            earlier.append(latest[bucket])
            latest[bucket] = i

    def _longest_match(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Length of the best match and the place of its last token; 0 without one."""
        n = len(tokens)
        most = min(LONGEST, n - 1)
        best, found = _SHORTEST - 1, -1
        end = self._earlier[n - 1] if n else -1
        for _ in range(self._walk):
            if end < best:  # also the end of the chain
                break
            if tokens[end - best] == tokens[n - 1 - best]:  # else it cannot be longer
                length = 0
                while (
                    length < most
                    and end >= length
                    and tokens[end - length] == tokens[n - 1 - length]
                ):
                    length += 1
                if length > best:
                    best, found = length, end
                    if best >= most:
                        break
            end = self._earlier[end]
        return (best, found) if found >= 0 else (0, -1)


def lookup_ref(tokens: Sequence[int], most: int) -> list[int]:
    """The draft of `PromptLookup` that looks at every place."""
    n, best, found = len(tokens), _SHORTEST - 1, -1
    for end in range(n - 2, -1, -1):
        length = 0
        while length < min(LONGEST, end + 1) and tokens[end - length] == tokens[n - 1 - length]:
            length += 1
        if length > best:
            best, found = length, end
    text = list(tokens)
    for i in range(most if found >= 0 else 0):
        text.append(text[found + 1 + i])
    return text[n:]


class PassCosts:
    """Seconds of a pass of n tokens, from the last passes of each size. Any thread may add.

    A size that was not seen lately lies on the line between the next ones that were. Beyond them a
    token adds what it was seen to add, and at least `growth` of a pass of one.
    """

    _KEPT = 5  # the median of so many: a disk stutters
    _FRESH = 128  # passes until a measurement is forgotten: disks, budgets and contexts change

    def __init__(self, growth: float, most: int = MOST_DRAFTED + 1) -> None:
        self._growth = growth
        self._seconds = [deque[float](maxlen=self._KEPT) for _ in range(most + 1)]
        self._last = [0] * (most + 1)
        self._passes = 0
        self.latest = float("inf")  # seconds of the last pass

    def add(self, n: int, seconds: float) -> None:
        """A pass of `n` tokens took `seconds`. One of more than `most` tokens says nothing."""
        if 1 <= n < len(self._seconds):
            self._passes += 1
            self._last[n] = self._passes
            self._seconds[n].append(seconds)
            self.latest = seconds

    def forget(self, growth: float) -> None:
        """Passes cost something else from now on."""
        self._growth = growth
        for seconds in self._seconds:
            seconds.clear()

    def table(self, most: int) -> list[float]:
        """Seconds of passes of 0 (not used) to `most` tokens; empty if one of 1 is to be timed."""
        costs = [0.0, 0.0]  # as far as the largest size that was timed, then to the end
        for n in range(1, most + 1):
            if self._passes - self._last[n] > self._FRESH:
                self._seconds[n].clear()
            times = sorted(self._seconds[n])
            if not times and n == 1:
                return []
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


class Speculator:
    """Decides how many tokens to guess: as many as give most tokens a second, often none.

    How often guesses of each kind are right is learnt from every token, drafted or not. Of one
    generation; not thread-safe.
    """

    _MEMORY = 0.97  # what an observation counts after the next one of its kind
    _PRIOR = 2.0  # observations that the first estimate counts as

    def __init__(self, drafter: Drafter, costs: PassCosts, most: int) -> None:
        """`most` tokens of a draft; 0 turns guessing off."""
        self._drafter = drafter
        self._costs = costs
        self._most = most
        self._guess = Draft()
        self._tried = [self._PRIOR] * (LONGEST + 1)
        self._right = [self._PRIOR * kind / (kind + 4) for kind in range(LONGEST + 1)]

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """The tokens to verify with the next pass, at most `most`."""
        most = min(most, self._most)
        if most < 1 or self._costs.latest < _WORTH_SECONDS:
            self._guess = Draft()
            return []
        self._guess = self._drafter.draft(tokens, most)
        return self._guess.tokens[: self._length(most)]

    def _length(self, most: int) -> int:
        """The length that gives most tokens a second."""
        kinds = self._guess.kinds[:most]
        if not kinds:
            return 0
        costs = self._costs.table(len(kinds) + 1)
        if not costs:
            return 0
        length, rate = 0, _MARGIN / costs[1]
        expected = chance = 1.0
        for n, kind in enumerate(kinds, 1):
            chance *= self._right[kind] / self._tried[kind]
            expected += chance
            if expected > rate * costs[n + 1]:
                length, rate = n, expected / costs[n + 1]
        return length

    def learn(self, sampled: Sequence[int]) -> None:
        """`sampled` came out of the last pass: right guesses, then one that was none of them."""
        guess = self._guess
        for token, kind, found in zip(guess.tokens, guess.kinds, sampled, strict=False):
            self._tried[kind] = self._tried[kind] * self._MEMORY + 1
            self._right[kind] = self._right[kind] * self._MEMORY + (token == found)
            if token != found:
                break
