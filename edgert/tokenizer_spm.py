"""SentencePiece vocabularies (`tokenizer.ggml.model` "llama"): characters merged by score.

Owns: which pieces may merge, the space mark U+2581, and falling back to bytes.
Must not know control tokens: text that reaches this file is only text.
Algorithm: SentencePiece's BPE (arXiv 1808.06226): of all neighbouring symbols whose joined text is
a piece, join those of the highest score, the leftmost of equals, until none is left.
"""

from __future__ import annotations

import re
from array import array
from itertools import count

import numpy as np

from edgert.errors import TokenizerError
from edgert.tokenizer_merges import PairTable
from edgert.tokenizer_vocab import BYTE, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, TokenTable

__all__ = ["SpmEncoder", "spm_pieces"]

_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MERGED = frozenset((NORMAL, USER_DEFINED, UNUSED))  # the kinds that text may turn into

# Words are cached because texts repeat them: 4,096 words are about 1 MB.
_CACHE_WORDS = 4096
_CACHED_LENGTH = 64


def spm_pieces(table: TokenTable) -> list[bytes]:
    """The bytes each token stands for: U+2581 is a space, <0x41> the byte 0x41."""
    pieces = []
    for token, (text, kind) in enumerate(zip(table.texts, table.kinds, strict=True)):
        if kind == BYTE:
            pieces.append(bytes([_byte_value(token, text)]))
        elif kind == UNKNOWN:
            pieces.append("\N{REPLACEMENT CHARACTER}".encode())
        elif kind in _MERGED:
            pieces.append(text.replace(_SPACE, " ").encode("utf-8", "surrogateescape"))
        else:
            pieces.append(text.encode("utf-8", "surrogateescape"))
    return pieces


def _byte_value(token: int, text: str) -> int:
    match = _BYTE_TOKEN.fullmatch(text)
    if not match:
        raise TokenizerError(f"token {token} is a byte token but its text is {text!r}, not <0xNN>")
    return int(match[1], 16)


class SpmEncoder:
    """Text to ids. Safe to share between threads: only its word cache changes."""

    def __init__(self, table: TokenTable, unknown: int | None, add_space_prefix: bool) -> None:
        """Raises `TokenizerError` when there are no scores, or no id for an unknown character."""
        if table.scores is None:
            raise TokenizerError(
                "the vocabulary has no tokenizer.ggml.scores, which decide how it merges"
            )
        self._prefix = _SPACE if add_space_prefix else ""
        self._tokens = len(table.texts)
        self._unknown = unknown
        self._bytes: dict[int, int] = {
            _byte_value(token, table.texts[token]): token
            for token in range(self._tokens)
            if table.kinds[token] == BYTE
        }
        if len(self._bytes) < 256 and unknown is None:
            raise TokenizerError(
                f"the vocabulary has {len(self._bytes)} of 256 byte tokens and no unknown token, "
                "so some texts have no ids"
            )
        self._characters, self._pairs, joined = _build(table)
        # Where no piece holds a space mark after another character, no merge crosses the start of
        # a word, and words can be merged, and remembered, one by one.
        whole = re.search(f"[^{_SPACE}\0]{_SPACE}", joined) is not None
        self._words = re.compile("(?s:.+)" if whole else f"{_SPACE}*[^{_SPACE}]+|{_SPACE}+")
        self._cache: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of one run of text; the space prefix is put before it if the file asks for one."""
        ids: list[int] = []
        cache = self._cache
        for word in self._words.findall(self._prefix + text.replace(" ", _SPACE)):
            found = cache.get(word)
            if found is None:
                found = tuple(self._encode_word(word))
                if len(word) <= _CACHED_LENGTH:
                    if len(cache) >= _CACHE_WORDS:
                        cache.clear()
                    cache[word] = found
            ids.extend(found)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        characters = self._characters
        ids: list[int] = []
        for at, symbol in self._pairs.merge([characters.get(c, -1) for c in word]):
            if 0 <= symbol < self._tokens:
                ids.append(symbol)
                continue
            for value in word[at].encode():  # a character that is no piece, nor part of one here
                token = self._bytes.get(value, self._unknown)
                assert token is not None
                if token != self._unknown or not ids or ids[-1] != token:
                    ids.append(token)  # one unknown token stands for a run of them
        return ids


def _build(table: TokenTable) -> tuple[dict[str, int], PairTable, str]:
    """Symbols of single characters, the pairs that join to a piece, and all pieces for searching.

    A character that only occurs inside pieces gets a symbol above the last token id. Equal scores
    must stay equal priorities, or ties would not go to the leftmost pair.
    """
    assert table.scores is not None
    pieces = {
        text: token
        for token, (text, kind) in enumerate(zip(table.texts, table.kinds, strict=True))
        if text and kind in _MERGED
    }
    joined = "\0".join(pieces)
    fresh = count(len(table.texts))
    symbols = dict(pieces)
    for character in sorted(set(joined)):
        if character not in symbols:
            symbols[character] = next(fresh)
    left, right, result = array("i"), array("i"), array("i")
    for text, token in pieces.items():
        for cut in range(1, len(text)):
            head = symbols.get(text[:cut])
            if head is not None:
                tail = symbols.get(text[cut:])
                if tail is not None:
                    left.append(head)
                    right.append(tail)
                    result.append(token)
    priority = np.unique(-table.scores, return_inverse=True)[1].reshape(-1)
    pairs = PairTable(left, right, priority[np.asarray(result)], result)
    return {c: s for c, s in symbols.items() if len(c) == 1}, pairs, joined
