"""Byte-level BPE vocabularies (`tokenizer.ggml.model` "gpt2"): bytes merged by rank.

Owns: the byte alphabet (GPT-2 writes each byte as one visible character, Radford et al. 2019), the
merge list, and encoding the words that the pre-tokenizer cuts.
Must not know control tokens: text that reaches this file is only text.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from itertools import compress

import numpy as np

from edgert.errors import TokenizerError
from edgert.pretokenizers import PreTokenizer
from edgert.tokenizer_merges import PairTable
from edgert.tokenizer_vocab import CONTROL, NORMAL, UNKNOWN, UNUSED, TokenTable, Vocabulary

__all__ = ["BpeEncoder", "bpe_pieces", "byte_alphabet"]

_CACHE_WORDS = 8192  # about 2 MB
_CACHED_LENGTH = 64


def byte_alphabet() -> list[str]:
    """The character that stands for each byte value: itself if visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [value for value in range(256) if value not in visible]
    stand_in = {value: chr(0x100 + i) for i, value in enumerate(hidden)}
    return [stand_in.get(value, chr(value)) for value in range(256)]


def bpe_pieces(table: TokenTable) -> list[bytes]:
    """The bytes each token stands for. A text outside the byte alphabet stands for itself."""
    values = {ord(c): chr(value) for value, c in enumerate(byte_alphabet())}
    # Characters that could be mistaken for a byte after translation, yet are none of the alphabet.
    values.update({v: "\uffff" for v in range(256) if v not in values})
    coded = [kind in (NORMAL, UNUSED) for kind in table.kinds]
    texts = table.texts
    try:
        # All at once: one character is one byte, so lengths tell where each token ends.
        joined = "".join(compress(texts, coded)).translate(values).encode("latin-1")
    except UnicodeEncodeError:
        return [_piece(text, values, code) for text, code in zip(texts, coded, strict=True)]
    pieces = []
    at = 0
    for text, code in zip(texts, coded, strict=True):
        if code:
            pieces.append(joined[at : at + len(text)])
            at += len(text)
        else:
            pieces.append(text.encode("utf-8", "surrogateescape"))
    return pieces


def _piece(text: str, values: dict[int, str], coded: bool) -> bytes:
    if coded:
        try:
            return text.translate(values).encode("latin-1")
        except UnicodeEncodeError:
            pass
    return text.encode("utf-8", "surrogateescape")


class BpeEncoder:
    """Text to ids. Safe to share between threads: only its word cache changes.

    A byte that is no token of the vocabulary is left out, as everywhere in the field.
    """

    def __init__(self, table: TokenTable, vocabulary: Vocabulary, pre: PreTokenizer) -> None:
        """Raises `TokenizerError` when merges are missing or name tokens that do not exist."""
        if table.merges is None:
            raise TokenizerError(
                "a byte-level vocabulary needs tokenizer.ggml.merges; there is none"
            )
        pre.split("")  # loads its library now, 5 MiB, so that the memory plan counts it
        ids = {text: token for token, text in enumerate(table.texts)}
        self._bytes = [ids.get(c, -1) for c in byte_alphabet()]
        self._pairs = _pairs(table, ids)
        self._pre = pre
        self._vocabulary = vocabulary
        # Sorted ids instead of a dictionary of 128k words: 0.5 MB instead of 18 MB.
        self._sorted = array("I", _by_piece(table, vocabulary) if pre.ignore_merges else ())
        self._cache: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of one run of text."""
        ids: list[int] = []
        cache = self._cache
        for word in self._pre.split(text):
            found = cache.get(word)
            if found is None:
                found = tuple(self._encode_word(word.encode()))
                if len(word) <= _CACHED_LENGTH:
                    if len(cache) >= _CACHE_WORDS:
                        cache.clear()
                    cache[word] = found
            ids.extend(found)
        return ids

    def _encode_word(self, word: bytes) -> list[int]:
        if self._sorted:
            piece = self._vocabulary.piece
            at = bisect_left(self._sorted, word, key=piece)
            if at < len(self._sorted) and piece(self._sorted[at]) == word:
                return [self._sorted[at]]
        known = [token for value in word if (token := self._bytes[value]) >= 0]
        return [token for _, token in self._pairs.merge(known)]


def _by_piece(table: TokenTable, vocabulary: Vocabulary) -> list[int]:
    """Ids that text may turn into, sorted by their bytes."""
    ordinary = (t for t, kind in enumerate(table.kinds) if kind not in (CONTROL, UNKNOWN))
    return sorted(ordinary, key=vocabulary.piece)


def _pairs(table: TokenTable, ids: dict[str, int]) -> PairTable:
    """The merge list as pairs of ids, ranked by their place in it.

    Merges that make a control token are left out: no text may turn into one.
    """
    merges = table.merges
    assert merges is not None
    try:
        # Three passes, 0.24 s for 151k merges; one loop with four appends takes 0.32 s.
        left = array("i", [ids[merge[: merge.index(" ")]] for merge in merges])
        right = array("i", [ids[merge[merge.index(" ") + 1 :]] for merge in merges])
        result = array("i", [ids[merge.replace(" ", "", 1)] for merge in merges])
    except (KeyError, ValueError, AttributeError):
        raise _bad_merge(merges, ids) from None
    results = np.asarray(result)
    rank = np.flatnonzero(np.frombuffer(table.kinds, np.uint8)[results] != CONTROL)
    return PairTable(np.asarray(left)[rank], np.asarray(right)[rank], rank, results[rank])


def _bad_merge(merges: Sequence[object], ids: dict[str, int]) -> TokenizerError:
    """The error for the first merge that cannot be made."""
    for i, merge in enumerate(merges):
        where = f"merge {i} of {len(merges):,} ({merge!r})"
        if not isinstance(merge, str) or " " not in merge:
            return TokenizerError(f"{where} is not two tokens with a space between them")
        head, _, tail = merge.partition(" ")
        for name in (head, tail, head + tail):
            if name not in ids:
                return TokenizerError(
                    f"{where} names the token {name!r}, which is not among the {len(ids):,} tokens"
                )
    raise AssertionError("every merge is sound")
