"""Prompt lookup: the text goes on as it did where its end was seen before.

Owns: finding that place. Must not know what a guess is worth. Prompt lookup: Saxena, 2023
(github.com/apoorvumang/prompt-lookup-decoding). Hash chains: RFC 1951, section 4.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from edgert.speculation import Acceptance

__all__ = ["PromptLookup"]

LONGEST = 16  # tokens of a match; longer ones count as this long
_SHORTEST = 2
_BUCKETS = 1 << 14
_WALK = 32  # matches looked at, the latest first: 10 us at worst


class PromptLookup:
    """Guesses that the text goes on as it did where its end was seen before.

    Takes the longest match (up to `LONGEST` tokens, at least 2) of the latest `walk` places that
    end in the same two tokens, of equally long ones the latest. As in LZ77 the copy may run into
    itself. 4 bytes a token and 64 KiB of memory; 2 to 10 us a call.
    """

    name = "lookup"
    is_free = True

    def __init__(self, walk: int = _WALK) -> None:
        self._walk = walk
        self.acceptance = Acceptance([kind / (kind + 4) for kind in range(LONGEST + 1)])
        self._latest = array("i", [-1]) * _BUCKETS  # place where a pair with this hash was seen
        self._earlier = array("i")  # for each place the one before it in the same bucket

    def guesses(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        """As `Drafter.guesses`, without end where there is a match; `tokens` only ever grow.

        The kind of a token is the length of the match in front of it.
        """
        self._index(tokens)
        length, end = self._longest_match(tokens)
        n, copied = len(tokens), list[int]()
        while length:
            at = end + 1 + len(copied)
            copied.append(tokens[at] if at < n else copied[at - n])
            yield copied[-1], min(length + len(copied) - 1, LONGEST)

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
    """The first guesses of a `PromptLookup` that looks at every place."""
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
