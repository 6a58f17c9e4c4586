"""Cutting text into words before byte-level BPE: one record per `tokenizer.ggml.pre`.

Owns: the table of pre-tokenizer names, their regular expressions (as the models' own
tokenizer.json files give them) and the two habits that go with a name: whether a whole word that is
a token is taken without merging, and whether a text starts with BOS by default.
Must not know ids or merges. The regular expressions run in the `tokenizers` package (Oniguruma,
with Unicode classes), imported on first use: 17 ms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from edgert.errors import UnsupportedError

__all__ = ["PRETOKENIZERS", "PreTokenizer", "pretokenizer_for"]

_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_SUFFIXES}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_QWEN2 = rf"{_SUFFIXES}|{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"
_QWEN35 = (
    rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}|{_SLASHED}|{_SPACES}"
_GPT4O = rf"{_CASED % (_SUFFIXES + '?', _SUFFIXES + '?')}|\p{{N}}{{1,3}}|{_SLASHED}|{_SPACES}"
_CJK = r"[一-龥\u3040-ゟ゠-ヿ]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How one family cuts text: each pattern cuts what the one before it left."""

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is taken whole, whatever the merges say
    add_bos: bool = False  # when the file does not say

    def split(self, text: str) -> list[str]:
        """The words of `text`; joined they are `text` again."""
        return [word for word, _ in _splitter(self.patterns).pre_tokenize_str(text)]


@cache
def _splitter(patterns: tuple[str, ...]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in patterns]
    )


def _family(
    names: str, *patterns: str, ignore_merges: bool = False, add_bos: bool = False
) -> dict[str, PreTokenizer]:
    return {n: PreTokenizer(n, patterns, ignore_merges, add_bos) for n in names.split()}


# The ids of all of these were compared with llama.cpp's on 1,000 random texts each.
PRETOKENIZERS = {
    **_family("gpt-2 phi-2 mpt olmo jais exaone4 trillion granite-docling", _GPT2),
    **_family("starcoder refact command-r smollm codeshell exaone minerva-7b", r"\p{N}", _GPT2),
    **_family(
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        _LLAMA3,
        ignore_merges=True,
        add_bos=True,
    ),
    **_family("dbrx smaug-bpe glm4 chatglm-bpe", _LLAMA3),
    **_family("qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan solar-open", _QWEN2),
    **_family("qwen35", _QWEN35),
    **_family("tekken", _TEKKEN, ignore_merges=True, add_bos=True),
    **_family("gpt-4o llama4 kanana2", _GPT4O),
    **_family("deepseek-v3 hunyuan-dense", r"\p{N}{1,3}", _CJK, _DEEPSEEK3),
}


def pretokenizer_for(name: str | None) -> PreTokenizer:
    """The record of that name. Raises `UnsupportedError` that names it and lists the known ones.

    A file without a name was made before names existed; its splitting is unknown, so it is refused.
    """
    found = PRETOKENIZERS.get(name or "")
    if found is None:
        what = f"names the unknown pre-tokenizer {name!r}" if name else "names no pre-tokenizer"
        raise UnsupportedError(
            f"the file {what} (tokenizer.ggml.pre); supported: {', '.join(sorted(PRETOKENIZERS))}"
        )
    return found
