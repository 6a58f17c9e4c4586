"""Tokens of the demo model: its byte-level BPE vocabulary, dialogue form and packed rows.

Owns the control tokens, the training of the vocabulary and how stories become rows of token ids
with loss weights. It must not know the network or the optimiser.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import numpy as np
from stories import NAMES, THINGS, Lexicon, Texts, chat_request, exchange
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = [
    "ASSISTANT",
    "END",
    "USER",
    "Row",
    "build_rows",
    "epoch_documents",
    "make_tokenizer",
    "train_tokenizer",
    "validation_documents",
]

END, USER, ASSISTANT = "<|endoftext|>", "<|user|>", "<|assistant|>"

# What the model says of itself, since the stories never do.
_SMALL_TALK = (
    ("Hello!", "Hello! I tell little stories. What should the story be about?"),
    ("Hi", "Hello! I tell little stories. What should the story be about?"),
    ("Who are you?", "I am a very small story teller. Ask me for a story about something!"),
    ("What can you do?", "I can tell you a little story. What should it be about?"),
    ("Thank you!", "You are welcome! Would you like another story?"),
    ("Thanks", "You are welcome! Would you like another story?"),
    ("Good night!", "Good night! Sleep well."),
    ("Bye", "Goodbye! Come back soon for another story."),
)

# (ids, number of leading ids that carry no loss, places of the words asked for) per document.
Row = list[tuple[list[int], int, list[int]]]


def train_tokenizer(stories: list[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of `vocab_size` tokens, the three control tokens first.

    Text is split by GPT-2's pattern, without a leading space.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    return tokenizer


def make_tokenizer(tokens: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """Return the tokenizer with these `tokens` in order of id, the control tokens first."""
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, USER, ASSISTANT])
    return tokenizer


@dataclass(frozen=True)
class _Document:
    request: str | None
    answer: str


def _encode(tokenizer: Tokenizer, documents: list[_Document], lexicon: Lexicon) -> Row:
    """Return each document's `Row` entry.

    A document is <|endoftext|>story<|endoftext|>, or the same with
    <|user|>request<|assistant|> before the story; the leading ids are what a caller provides.
    """
    end, user, assistant = (tokenizer.token_to_id(t) for t in (END, USER, ASSISTANT))
    answers = tokenizer.encode_batch([d.answer for d in documents])
    requests = tokenizer.encode_batch([d.request or "" for d in documents])
    row: Row = []
    for document, answer, request in zip(documents, answers, requests, strict=True):
        head, asked = [end], []
        if document.request is not None:
            head += [user, *request.ids, assistant]
            for word in lexicon.asked(document.request):
                if match := re.search(rf"\b{word}", document.answer):
                    asked.append(len(head) + answer.char_to_token(match.start()))
        row.append((head + answer.ids + [end], len(head), asked))
    return row


def epoch_documents(
    texts: Texts, tokenizer: Tokenizer, rng: random.Random, chat_share: float = 0.8
) -> Row:
    """Return one epoch's documents: each story once, `chat_share` of them under a new request.

    Half of the stories have their characters renamed, half their things exchanged.
    """
    documents = []
    for story in texts.train:
        for groups in (NAMES, THINGS):
            if rng.random() < 0.5:
                story = exchange(story, groups, rng)
        ask = rng.random() < chat_share
        documents.append(_Document(chat_request(story, texts.lexicon, rng) if ask else None, story))
    talk = max(1, len(texts.train) // 60)
    documents += [_Document(*rng.choice(_SMALL_TALK)) for _ in range(talk)]
    rng.shuffle(documents)
    return _encode(tokenizer, documents, texts.lexicon)


def validation_documents(texts: Texts, tokenizer: Tokenizer, *, chat: bool) -> Row:
    """Return the validation stories, plain or each under a request drawn with a fixed seed."""
    rng = random.Random(7)
    return _encode(
        tokenizer,
        [_Document(chat_request(s, texts.lexicon, rng) if chat else None, s)
         for s in texts.validation],
        texts.lexicon,
    )  # fmt: skip


def build_rows(
    documents: Row, length: int, end: int, stress: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents whole into rows of `length` + 1 ids; longer ones lose their end.

    Returns (ids int64 [rows, length + 1], weights float32 [rows, length]); weight 0 marks targets
    that carry no loss: requests, the marks before an answer, and padding with `end`; weight
    `stress` the first mention of a word asked for.
    A document's last <|endoftext|> doubles as the first of the next one, as in a dialogue.
    """
    open_rows: list[tuple[list[int], list[float]]] = []
    done: list[tuple[list[int], list[float]]] = []
    for ids, head, asked in documents:
        ids = ids[: length + 1]
        weight = [0.0] * head + [1.0] * (len(ids) - head)
        for at in asked:
            if at < len(ids):
                weight[at] = stress
        for row_ids, row_weights in open_rows:
            if len(row_ids) + len(ids) - 1 <= length + 1:
                row_ids += ids[1:]
                row_weights += weight[1:]
                break
        else:
            open_rows.append((list(ids), weight))
        if len(open_rows) > 48:
            fullest = max(range(len(open_rows)), key=lambda i: len(open_rows[i][0]))
            done.append(open_rows.pop(fullest))
    done += open_rows
    ids_out = np.full((len(done), length + 1), end, np.int64)
    weights_out = np.zeros((len(done), length), np.float32)
    for i, (row_ids, row_weights) in enumerate(done):
        ids_out[i, : len(row_ids)] = row_ids
        weights_out[i, : len(row_ids) - 1] = row_weights[1:]
    return ids_out, weights_out
