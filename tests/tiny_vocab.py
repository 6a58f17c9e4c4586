"""Small vocabularies made from a seed, and slow obvious encoders to compare with.

Owns: metadata dictionaries as a GGUF reader returns them, and encoders that work on texts with a
list scan per merge. They share no code with `edgert`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np

SPACE = "\u2581"
CONTROL, USER = 3, 4


def spm_metadata(seed: int = 0, *, n_pieces: int = 150, **changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: 3 control tokens, 256 bytes, pieces, one user-defined token.

    Pieces are random words over few letters, so that merges compete, and scores often tie.
    """
    rng = random.Random(seed)
    words = {"a", "b", "c", "-", SPACE, "é", "日", SPACE * 2, SPACE * 4, "--", "----"}
    while len(words) < n_pieces:
        core = "".join(rng.choice("abc-é日") for _ in range(rng.randint(2, 5)))
        words.add(rng.choice(("", SPACE)) + core)
    listed = sorted(words)
    rng.shuffle(listed)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{v:02X}>" for v in range(256)), *listed, "<user>"]
    types = [2, CONTROL, CONTROL, *[6] * 256, *[1] * len(listed), USER]
    scores = [0.0] * 259 + [-float(rng.randint(1, 40)) for _ in listed] + [0.0]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def bpe_metadata(seed: int = 0, *, n_merges: int = 120, **changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary: 256 bytes, merges of a random text, 3 control and 1 user-defined."""
    rng = random.Random(seed)
    alphabet = byte_characters()
    text = "".join(rng.choice("  aabbcde'st12é日🦙\n") for _ in range(2000))
    symbols = [alphabet[value] for value in text.encode()]
    tokens, listed = list(alphabet), []
    for _ in range(n_merges):
        counts: dict[tuple[str, str], int] = {}
        for pair in zip(symbols, symbols[1:], strict=False):
            counts[pair] = counts.get(pair, 0) + 1
        pair = max(sorted(counts), key=counts.__getitem__)
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
        listed.append(" ".join(pair))
        symbols = merged(symbols, pair)
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    types = [1] * len(tokens) + [CONTROL] * 3 + [USER]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, *control, "<think>"],
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": listed,
        "tokenizer.ggml.eos_token_id": len(tokens),
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def byte_characters() -> list[str]:
    """The visible character for each byte, by counting up as GPT-2's encoder does."""
    characters, extra = [], 0
    for value in range(256):
        if 33 <= value <= 126 or 161 <= value <= 172 or value >= 174:
            characters.append(chr(value))
        else:
            characters.append(chr(256 + extra))
            extra += 1
    return characters


def merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """All occurrences of the pair joined, from the left."""
    out: list[str] = []
    i = 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            out.append("".join(pair))
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out


def spm_encode_ref(metadata: dict[str, Any], text: str) -> list[int]:
    """SentencePiece by the book: scan for the best neighbours, join them, start again."""
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    scores = metadata["tokenizer.ggml.scores"]
    pieces = {t: i for i, t in enumerate(tokens) if kinds[i] in (1, 4, 5)}
    symbols = list((" " + text).replace(" ", SPACE))
    while True:
        best = None
        for i in range(len(symbols) - 1):
            piece = pieces.get(symbols[i] + symbols[i + 1])
            if piece is not None and (best is None or scores[piece] > best[0]):
                best = (scores[piece], i)
        if best is None:
            break
        symbols[best[1] : best[1] + 2] = [symbols[best[1]] + symbols[best[1] + 1]]
    ids: list[int] = []
    for symbol in symbols:
        if symbol in pieces:
            ids.append(pieces[symbol])
        else:
            ids += [tokens.index(f"<0x{value:02X}>") for value in symbol.encode()]
    return ids


def bpe_encode_ref(metadata: dict[str, Any], words: list[str]) -> list[int]:
    """Byte-level BPE by the book: of the pairs present, join the first occurrence of the best."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ranks: dict[tuple[str, ...], int] = {}
    for rank, merge in enumerate(metadata["tokenizer.ggml.merges"]):
        ranks.setdefault(tuple(merge.split(" ")), rank)
    alphabet = byte_characters()
    ids: list[int] = []
    for word in words:
        symbols = [alphabet[value] for value in word.encode()]
        while True:
            known = [p for p in zip(symbols, symbols[1:], strict=False) if p in ranks]
            if not known:
                break
            best = min(known, key=ranks.__getitem__)
            i = next(i for i in range(len(symbols)) if tuple(symbols[i : i + 2]) == best)
            symbols[i : i + 2] = ["".join(best)]
        ids += [tokens.index(symbol) for symbol in symbols]
    return ids


def random_texts(seed: int, count: int) -> Iterator[str]:
    """Texts of runs, spaces, accents, emoji and any code point."""
    rng = random.Random(seed)
    parts = [
        "abc",
        "  ",
        "----",
        "é日",
        "🦙",
        "👨‍👩‍👧",
        "\n\n",
        "'s",
        "12345",
        "<user>",
        "</s>",
        "<think>",
    ]
    for _ in range(count):
        text = ""
        for _ in range(rng.randint(0, 10)):
            kind = rng.random()
            if kind < 0.4:
                text += rng.choice(parts) * rng.randint(1, 3)
            elif kind < 0.8:
                text += "".join(rng.choice("abc- é日") for _ in range(rng.randint(1, 8)))
            else:
                low, high = rng.choice(((32, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)))
                text += chr(rng.randint(low, high))
        yield text
