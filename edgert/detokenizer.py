"""Ids to text, one at a time: whole characters only.

Owns: holding back the bytes of an unfinished character, and SentencePiece's prefix space.
Must not know the vocabulary: it is given the bytes of each token.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable

__all__ = ["StreamDecoder"]

_Utf8 = codecs.getincrementaldecoder("utf-8")


class StreamDecoder:
    """Text of a growing list of ids; all `push` results and `flush` joined equal `decode(ids)`.

    A push costs O(1): at most three bytes are held back. Invalid bytes become U+FFFD as soon as it
    is certain that they are invalid, as `bytes.decode(errors="replace")` does. Not thread-safe.
    """

    def __init__(self, piece: Callable[[int], bytes], strip_space: bool) -> None:
        """`piece` gives a token's bytes, empty for one not shown.

        `strip_space` leaves out one space at the very start.
        """
        self._piece = piece
        self._strip = strip_space
        self._decoder = _Utf8(errors="replace")

    def push(self, token: int) -> str:
        """The text that became complete with this token; often empty inside a character."""
        piece = self._piece(token)
        if self._strip and piece:
            self._strip = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is still held back: U+FFFD for a character cut off by the end, else nothing."""
        return self._decoder.decode(b"", final=True)
