"""Text to ids and back, from the vocabulary inside a model file.

Owns: which text is a control or user-defined token, BOS, and the choice of the family.
Must not know the model or the chat template's language.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from edgert.detokenizer import StreamDecoder
from edgert.errors import InputError, TokenizerError, UnsupportedError
from edgert.pretokenizers import pretokenizer_for
from edgert.tokenizer_bpe import BpeEncoder, bpe_pieces
from edgert.tokenizer_spm import SpmEncoder, spm_pieces
from edgert.tokenizer_vocab import (
    CONTROL,
    USER_DEFINED,
    SpecialIds,
    TokenTable,
    Vocabulary,
    read_flag,
    tokens_of_kind,
)

__all__ = ["Tokenizer"]

# A code point that Unicode reserves for use inside a program: no text to be exchanged holds it.
_GUARD = "\ufdd0"


class _Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...


class Tokenizer:
    """The tokenizer of one model. Immutable and safe to share between threads.

    Two families: SentencePiece ("llama") and byte-level BPE ("gpt2"). The ids are those of
    llama.cpp for the same file. It keeps no reference to the metadata it was made from.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        special: SpecialIds,
        encoder: _Encoder,
        *,
        add_bos: bool,
        space_prefix: bool,
        chat_template: str | None,
    ) -> None:
        """Use `from_manifest` or `from_gguf`."""
        self._vocabulary = vocabulary
        self._special = special
        self._encoder = encoder
        self._space_prefix = space_prefix
        self.add_bos = add_bos
        self.chat_template = chat_template
        user = tokens_of_kind(vocabulary.kinds, USER_DEFINED)
        control = tokens_of_kind(vocabulary.kinds, CONTROL)
        self._ids_by_text = {self.token_text(t): t for t in user + control}
        self._ids_by_text.pop("", None)
        self._user = _matcher(self.token_text(t) for t in user)
        self._control = _matcher(self.token_text(t) for t in control)
        self._user_or_control = _matcher(self.token_text(t) for t in user + control)

    @classmethod
    def from_manifest(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from GGUF metadata (`Manifest.metadata`).

        Raises `UnsupportedError` for a family or pre-tokenizer that is not known, and
        `TokenizerError` when the metadata contradicts itself.
        """
        model = metadata.get("tokenizer.ggml.model")
        if model is None:
            raise TokenizerError("the file has no tokenizer.ggml.model; it holds no vocabulary")
        if model not in ("llama", "gpt2"):
            raise UnsupportedError(
                f"tokenizer.ggml.model is {model!r}; supported: 'llama' (SentencePiece) and "
                "'gpt2' (byte-level BPE)"
            )
        template = metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise TokenizerError("tokenizer.chat_template is not a text")
        encoder: _Encoder
        if model == "llama":
            table = TokenTable.from_metadata(metadata)
            special = SpecialIds.from_metadata(metadata, table, {"bos": 1, "eos": 2, "unknown": 0})
            space_prefix = read_flag(metadata, "add_space_prefix", True)
            vocabulary = Vocabulary(spm_pieces(table), bytes(table.kinds))
            encoder = SpmEncoder(table, special.unknown, space_prefix)
            add_bos_default = True
        else:
            pre = pretokenizer_for(metadata.get("tokenizer.ggml.pre"))
            table = TokenTable.from_metadata(metadata)
            special = SpecialIds.from_metadata(metadata, table, {})
            space_prefix = False
            vocabulary = Vocabulary(bpe_pieces(table), bytes(table.kinds))
            encoder = BpeEncoder(table, vocabulary, pre)
            add_bos_default = pre.add_bos
        has_bos = special.bos is not None
        add_bos = read_flag(metadata, "add_bos_token", add_bos_default and has_bos)
        if add_bos and not has_bos:
            raise TokenizerError("the file asks for a BOS token (add_bos_token) but names none")
        return cls(
            vocabulary,
            special,
            encoder,
            add_bos=add_bos,
            space_prefix=space_prefix,
            chat_template=template,
        )

    @classmethod
    def from_gguf(cls, path: str | Path) -> Tokenizer:
        """Build from a GGUF file; its tensors are not read."""
        from edgert.storage.gguf import read_gguf

        return cls.from_manifest(read_gguf(path).metadata)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self._vocabulary)

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, or None."""
        return self._special.bos

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, or None."""
        return self._special.eos

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a generation."""
        return self._special.ends

    def token_text(self, token: int) -> str:
        """The text a token stands for; a control token's name. Invalid bytes are U+FFFD."""
        return self._vocabulary.piece(self._checked(token)).decode("utf-8", "replace")

    def is_control(self, token: int) -> bool:
        """Whether a token is a mark for the model rather than text."""
        return self._vocabulary.kinds[self._checked(token)] == CONTROL

    def encode(self, text: str, *, add_bos: bool | None = None, special: bool = False) -> list[int]:
        """The ids of `text`.

        `add_bos`: put BOS before it; None does what the file says (`Tokenizer.add_bos`).
        `special`: also turn the names of control tokens into these tokens. Only for text that the
        program itself made, such as a rendered chat template: never for what a user typed, who
        could then end or forge a turn (see `guard`). User-defined tokens are always recognised.
        Raises `InputError` for a lone surrogate, which no UTF-8 text holds, and where BOS is
        asked for and the vocabulary has none.
        """
        ids: list[int] = []
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise InputError("add_bos: this vocabulary has no BOS token")
            ids.append(self.bos_id)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"character {error.start} of the text is the lone surrogate "
                f"U+{ord(text[error.start]):04X}; pass text that is valid Unicode"
            ) from None
        if not special:
            return ids + self._split(text, self._user, self._encoder.encode)
        if _GUARD in text:
            return ids + self._split(text, self._control, self._encode_guarded)
        return ids + self._split(text, self._user_or_control, self._encoder.encode)

    def guard(self, text: str) -> str:
        """`text` marked so that `encode(..., special=True)` takes all of it as text.

        For what people and tools say, before it goes into a chat template: the rendered prompt is
        encoded with its control tokens, and those that a message spells must not be among them.
        The marks (U+FDD0, inside names of control tokens only) leave no trace in the ids.
        """
        text = text.replace(_GUARD, "")
        if self._control is None:
            return text
        return self._control.sub(lambda match: _GUARD.join(match[0]) + _GUARD, text)

    def decode(self, ids: Iterable[int], *, special: bool = False, at_start: bool = True) -> str:
        """The text of `ids`, without control tokens unless `special`.

        `decode(encode(text))` is `text`, but for SentencePiece: U+2581 comes back as a space, and
        a user-defined token is followed by the space that encoding puts after it.
        `at_start`: the ids begin a text, so SentencePiece's prefix space is left out; pass False
        for ids that continue one. Bytes that are not UTF-8 become U+FFFD.
        Raises `InputError` for an id outside the vocabulary.
        """
        show = self._shown_special if special else self._shown
        joined = b"".join(map(show, ids))
        if at_start and self._space_prefix:
            joined = joined.removeprefix(b" ")
        return joined.decode("utf-8", "replace")

    def stream_decoder(self, *, special: bool = False, at_start: bool = True) -> StreamDecoder:
        """A decoder for ids that arrive one by one; the options are those of `decode`."""
        show = self._shown_special if special else self._shown
        return StreamDecoder(show, at_start and self._space_prefix)

    def _split(
        self,
        text: str,
        matcher: re.Pattern[str] | None,
        encode: Callable[[str], list[int]],
    ) -> list[int]:
        """Ids of the tokens that `matcher` finds, and of the text between them by `encode`."""
        ids: list[int] = []
        at = 0
        for match in matcher.finditer(text) if matcher else ():
            if match.start() > at:
                ids += encode(text[at : match.start()])
            ids.append(self._ids_by_text[match[0]])
            at = match.end()
        if at < len(text):
            ids += encode(text[at:])
        return ids

    def _encode_guarded(self, text: str) -> list[int]:
        return self._split(text.replace(_GUARD, ""), self._user, self._encoder.encode)

    def _checked(self, token: int) -> int:
        if not 0 <= token < len(self._vocabulary):
            raise InputError(f"token {token} is outside the vocabulary of {self.vocab_size:,}")
        return token

    def _shown(self, token: int) -> bytes:
        if self._vocabulary.kinds[self._checked(token)] == CONTROL:
            return b""
        return self._vocabulary.piece(token)

    def _shown_special(self, token: int) -> bytes:
        return self._vocabulary.piece(self._checked(token))


def _matcher(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Finds any of the texts, the longest where several start together; None for no texts."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
