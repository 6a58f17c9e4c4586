"""The vocabulary of a model file: token texts, kinds and special ids, checked and packed.

Owns: reading `tokenizer.ggml.*` (GGUF specification, section "Tokenizer"), the checks that the
arrays agree with each other, and the bytes each token stands for.
Must not know how text is split or merged.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from edgert.errors import TokenizerError

__all__ = [
    "BYTE",
    "CONTROL",
    "NORMAL",
    "UNKNOWN",
    "UNUSED",
    "USER_DEFINED",
    "SpecialIds",
    "TokenTable",
    "Vocabulary",
    "read_flag",
    "tokens_of_kind",
]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# No vocabulary in use is near this (the largest have 262,144 tokens); ids must fit 31 bits.
_TOKENS_MAX = 2**24

# Control tokens that end a generation under these names in the models that have them.
_END_NAMES = frozenset(
    """
    <|eot_id|> <|eom_id|> <|end_of_text|> <|im_end|> <|endoftext|> <|end|> <|return|> <|call|>
    <|calls|> <|flush|> <end_of_turn> <eos> </s> <EOT> _<EOT> [EOT] [EOS] <end_of_utterance>
    <turn|> <｜end▁of▁sentence｜> <|fim_pad|> <|repo_name|> <|file_sep|> [e~[
    """.split()
)


def read_flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    """The flag under `tokenizer.ggml.<key>`. Raises `TokenizerError` when it is something else."""
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, int) or value not in (0, 1):
        raise TokenizerError(f"tokenizer.ggml.{key} is {value!r}, expected true or false")
    return bool(value)


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The arrays of the file after checking; lives only while a tokenizer is being built."""

    texts: Sequence[str]
    kinds: bytearray  # one of the six kinds per token
    scores: np.ndarray[Any, np.dtype[np.float32]] | None
    merges: Sequence[str] | None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> TokenTable:
        """Check `tokens`, `token_type`, `scores` and `merges`.

        Raises `TokenizerError` with the numbers when one is missing, shorter than the tokens, of
        another type, or when two tokens have one text.
        """
        texts = metadata.get("tokenizer.ggml.tokens")
        if texts is None or len(texts) == 0:
            raise TokenizerError("the file has no tokenizer.ggml.tokens; it holds no vocabulary")
        if not isinstance(texts, (list, tuple)) or set(map(type, texts)) != {str}:
            raise TokenizerError("tokenizer.ggml.tokens is not a list of texts")
        if len(texts) > _TOKENS_MAX:
            raise TokenizerError(f"{len(texts):,} tokens are more than the {_TOKENS_MAX:,} allowed")
        _refuse_duplicates(texts)
        kinds = _array(metadata, "token_type", len(texts))
        if kinds is None:
            packed = bytearray([NORMAL]) * len(texts)
        else:
            kinds = kinds.astype(np.int64)
            bad = np.flatnonzero((kinds < 0) | (kinds > BYTE))
            if len(bad):
                at = int(bad[0])
                raise TokenizerError(f"token {at} has the unknown type {int(kinds[at])}")
            packed = bytearray(np.where(kinds == 0, NORMAL, kinds).astype(np.uint8).tobytes())
        scores = _array(metadata, "scores", len(texts))
        if scores is not None:
            scores = scores.astype(np.float32)
            if np.isnan(scores).any():
                at = int(np.flatnonzero(np.isnan(scores))[0])
                raise TokenizerError(f"the score of token {at} is not a number")
        merges = metadata.get("tokenizer.ggml.merges")
        if merges is not None and not isinstance(merges, (list, tuple)):
            raise TokenizerError("tokenizer.ggml.merges is not a list of texts")
        return cls(texts, packed, scores, merges)


def _array(metadata: Mapping[str, Any], key: str, count: int) -> np.ndarray[Any, Any] | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return None
    values = np.asarray(value)
    if values.ndim != 1 or values.dtype.kind not in "iuf":
        raise TokenizerError(f"tokenizer.ggml.{key} is not a list of numbers")
    if len(values) < count:
        raise TokenizerError(
            f"tokenizer.ggml.{key} has {len(values):,} entries for {count:,} tokens"
        )
    return values[:count]


def _refuse_duplicates(texts: Sequence[str]) -> None:
    """Two ids for one text make encoding ambiguous; empty texts (padding) stand for nothing."""
    distinct = set(texts)
    distinct.discard("")
    if len(distinct) + texts.count("") == len(texts):
        return
    seen: dict[str, int] = {}
    for token, text in enumerate(texts):
        if text and seen.setdefault(text, token) != token:
            raise TokenizerError(
                f"tokens {seen[text]} and {token} both have the text {text!r} "
                f"({len(texts) - len(distinct) - texts.count('')} such repeats in the file)"
            )


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The ids the file names, and every id that ends a generation."""

    bos: int | None
    eos: int | None
    unknown: int | None
    ends: frozenset[int]

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], table: TokenTable, defaults: Mapping[str, int]
    ) -> SpecialIds:
        """Read the ids, make what they name control tokens, and collect the ends.

        A file may type its end-of-text token as an ordinary one; it is a control token all the
        same, or a text that spells it could end or forge a conversation: `table.kinds` is changed.
        Raises `TokenizerError` when an id is outside the vocabulary.
        """
        count = len(table.texts)
        ids: dict[str, int] = {}
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
            token = metadata.get(f"tokenizer.ggml.{name}_token_id")
            if token is None:
                default = defaults.get(name, count)
                if default < count and table.kinds[default] in (CONTROL, UNKNOWN):
                    ids[name] = default
                continue
            if token in (-1, 2**32 - 1):  # "none", the latter where -1 was stored unsigned
                continue
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < count:
                raise TokenizerError(
                    f"tokenizer.ggml.{name}_token_id is {token!r}, "
                    f"the vocabulary has {count:,} tokens"
                )
            ids[name] = token
        for name in ("bos", "eos", "eot", "eom"):
            if name in ids:
                table.kinds[ids[name]] = CONTROL
        ends = {ids[name] for name in ("eos", "eot", "eom") if name in ids}
        control = tokens_of_kind(table.kinds, CONTROL)
        named = {table.texts[t]: t for t in control if table.texts[t] in _END_NAMES}
        if {"<|end|>", "<|return|>", "<|call|>"} <= named.keys():
            ends.discard(named.pop("<|end|>"))  # harmony: <|end|> closes a message, not the answer
        ends.update(named.values())
        return cls(ids.get("bos"), ids.get("eos"), ids.get("unknown"), frozenset(ends))


def tokens_of_kind(kinds: bytes | bytearray, kind: int) -> list[int]:
    """Ids of all tokens of one kind."""
    return [int(t) for t in np.flatnonzero(np.frombuffer(kinds, np.uint8) == kind)]


class Vocabulary:
    """The bytes each token stands for, in one blob (a 152k vocabulary: 2.1 MB). Immutable."""

    def __init__(self, pieces: Sequence[bytes], kinds: bytes) -> None:
        assert len(pieces) == len(kinds)
        self.kinds = kinds
        self._blob = b"".join(pieces)
        self._starts = array("I", accumulate(map(len, pieces), initial=0))

    def __len__(self) -> int:
        return len(self.kinds)

    def piece(self, token: int) -> bytes:
        """The bytes of a token that is inside the vocabulary; not always whole characters."""
        return self._blob[self._starts[token] : self._starts[token + 1]]
