"""How surprised a model is by a text: perplexity, by llama.cpp's protocol.

Owns: cutting the text, scoring it, the figure and its error. Must not know files or options.

The text is cut into chunks of n tokens that do not overlap; what is left over is not used. The
first token of a chunk is replaced by BOS where the file wants one. Of each chunk the tokens
n // 2 + 1 to n - 1 are scored, so that every one has a context of half a chunk or more:

    perplexity = exp(m),   m and s the mean and deviation of -ln p(token) over N scored tokens
    error      = perplexity * s / sqrt(N - 1)

Source: llama.cpp, tools/perplexity, without a stride. It wants a text of two chunks; one does here.
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgert.errors import ContextError, InputError

if TYPE_CHECKING:
    from edgert.engine import Engine

__all__ = [
    "CHUNK_TOKENS",
    "Perplexity",
    "bundled_text",
    "perplexity",
    "perplexity_ref",
    "text_chunks",
]

CHUNK_TOKENS = 512  # llama.cpp's
SHORTEST = 8  # tokens of a chunk: three are scored, and an error needs two

_Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The figure after some chunks of a text, or all."""

    perplexity: float
    error: float  # standard error of `perplexity`
    nll: float  # mean of -ln p, in nats a token
    scored_tokens: int
    chunks: int  # scored
    text_chunks: int  # in the text
    chunk_tokens: int

    @classmethod
    def of(cls, nll: Sequence[float], chunks: int, text_chunks: int, size: int) -> Perplexity:
        """The figure of the -ln p of all scored tokens; infinite where p was 0."""
        values = np.array(nll, np.float64)
        mean = float(values.mean())
        variance = max(float(np.square(values).mean()) - mean * mean, 0.0)
        figure = math.exp(mean) if mean < 700 else math.inf
        error = figure * math.sqrt(variance / (len(nll) - 1))
        return cls(figure, error, mean, len(nll), chunks, text_chunks, size)


def perplexity(
    engine: Engine,
    text: str | Sequence[int] | None = None,
    *,
    chunk_tokens: int | None = None,
    chunks: int | None = None,
    on_chunk: Callable[[Perplexity], object] | None = None,
) -> Perplexity:
    """The perplexity of a text, or of its tokens, and its standard error.

    `text`: None is the stories that come with edgert. `chunk_tokens`: 512 by default, or the
    engine's context where that is shorter; `chunks`: of the text, at most. `on_chunk` gets the
    figure so far after each chunk. The same figure at any budget. Beside the engine it holds 12
    bytes a token, and the logits of as many tokens as the plan has rows for.

    Raises `InputError` for a text shorter than a chunk, `ContextError` for a chunk longer than the
    engine's context, and as `Engine.logits` does.
    """
    context = engine.plan.context_length
    size = min(CHUNK_TOKENS, context) if chunk_tokens is None else chunk_tokens
    if size > context:
        raise ContextError(size, context)
    if text is None:
        text = bundled_text()
    tokens = engine.tokenize(text) if isinstance(text, str) else text
    bos = engine.tokenizer.bos_id if engine.tokenizer.add_bos else None
    cut = text_chunks(tokens, size, bos)[:chunks]
    nll: list[float] = []
    for done, chunk in enumerate(cut, 1):
        nll += _surprises(engine, chunk)
        if on_chunk:
            on_chunk(Perplexity.of(nll, done, len(cut), size))
    return Perplexity.of(nll, len(cut), len(cut), size)


def bundled_text() -> str:
    """Short stories, written for edgert: some 2,600 tokens of the bundled model's vocabulary."""
    file = importlib.resources.files("edgert.models") / "demo" / "stories.txt"
    return file.read_text(encoding="utf-8")


def text_chunks(tokens: Sequence[int], size: int, bos: int | None) -> list[list[int]]:
    """The chunks of `size` tokens that are scored. Raises `InputError` when there is none."""
    if size < SHORTEST:
        raise InputError(f"a chunk of {size} tokens is too short; it takes {SHORTEST} or more")
    if len(tokens) < size:
        raise InputError(
            f"the text has {len(tokens):,} tokens, less than one chunk of {size}; give a longer "
            f"text, or shorter chunks with --ctx-size"
        )
    starts = range(0, len(tokens) - size + 1, size)
    chunks = [list(tokens[at : at + size]) for at in starts]
    if bos is not None:
        for chunk in chunks:
            chunk[0] = bos
    return chunks


def _surprises(engine: Engine, chunk: list[int]) -> list[float]:
    """-ln p of the scored tokens of a chunk, with no more logits at a time than are planned for."""
    found: list[float] = []
    rows, last = engine.plan.logit_rows, len(chunk) - 1
    for start in range(len(chunk) // 2, last, rows):
        stop = min(start + rows, last)
        logits = engine.forward.evaluate(chunk[:stop], engine.vocab_size, last=stop - start)
        found += map(_surprise, logits, chunk[start + 1 : stop + 1])
    return found


def _surprise(logits: _Logits, token: int) -> float:
    """-ln softmax(logits)[token] of one row, without overflow."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return float(np.log(np.exp(shifted).sum()) - shifted[token])


def perplexity_ref(
    logits_of: Callable[[list[int]], _Logits], tokens: Sequence[int], size: int, bos: int | None
) -> tuple[float, float]:
    """The twin: whole chunks, and the definition as it reads. Perplexity and its error.

    `logits_of(tokens)` gives logits after each of them, [n_tokens, n_vocab].
    """
    nll = []
    for at in range(0, len(tokens) - size + 1, size):
        chunk = list(tokens[at : at + size])
        if bos is not None:
            chunk[0] = bos
        logits = logits_of(chunk).astype(np.float64)
        for i in range(size // 2, size - 1):
            p = np.exp(logits[i]) / np.exp(logits[i]).sum()
            nll.append(-np.log(p[chunk[i + 1]]))
    mean = np.mean(nll)
    return float(np.exp(mean)), float(np.exp(mean) * np.std(nll) / np.sqrt(len(nll) - 1))
