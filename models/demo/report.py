"""Measures the demo model for its card: perplexity, routing, agreement with llama.cpp, samples.

    python models/demo/report.py --run DIR --text DIR --gguf models/demo/stories-moe.gguf

Needs PyTorch, tokenizers and llama-cpp-python. Prints Markdown; with --card it also puts that
text in place of everything after the card's line "## Measured".
"""

from __future__ import annotations

import argparse
import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from export import load_run
from llama_cpp import Llama
from moe import StoryNet
from stories import Lexicon, Texts, load_texts
from tokenizers import Tokenizer
from tokens import ASSISTANT, END, USER, validation_documents
from torch.nn import functional as F

__all__: list[str] = []

HEADING = "## Measured"
BEGINNINGS = ("Once upon a time", "One day, a little bird", "Tom and his sister")
REQUESTS = (
    "tell me a story about a dog and a red ball",
    "Tell me a story about a rabbit and a big tree.",
    "Can you tell me a story about a boat and a fish?",
)


def windows(net: StoryNet, tokenizer: Tokenizer, text: str) -> str:
    """Return a table line: `text` in 40 windows of <|endoftext|> and 511 tokens."""
    ids = tokenizer.encode(text[:200_000]).ids
    end = tokenizer.token_to_id(END)
    loss, scored = 0.0, []
    with torch.no_grad():
        for at in range(0, 40 * 511, 511):
            row = torch.tensor([[end, *ids[at : at + 511]]])
            loss += float(F.cross_entropy(net(row[:, :-1])[0], row[0, 1:], reduction="sum"))
            scored += ids[at : at + 511]
    nbytes = len(tokenizer.decode(scored).encode())
    return _line("running text, 40 windows", loss, len(scored), nbytes)


def _line(what: str, loss: float, count: int, nbytes: int) -> str:
    bits = loss / math.log(2) / nbytes
    return f"| {what} | {count} | {math.exp(loss / count):.3f} | {bits:.4f} |"


def documents(
    net: StoryNet, tokenizer: Tokenizer, texts: Texts, *, chat: bool
) -> tuple[str, torch.Tensor]:
    """Return (a table line, the experts' shares) of 300 validation stories, each alone."""
    loss, count, nbytes, usage = 0.0, 0, 0, []
    with torch.no_grad():
        for ids, head, _ in validation_documents(texts, tokenizer, chat=chat)[:300]:
            row = torch.tensor([ids[:513]])
            logits = net(row[:, :-1])[0, head - 1 :]
            loss += float(F.cross_entropy(logits, row[0, head:], reduction="sum"))
            count += len(logits)
            nbytes += len(tokenizer.decode(row[0, head:].tolist()).encode())
            usage.append(net.usage() * row.shape[1])
    shares = torch.stack(usage).sum(0)
    what = "300 stories after a request" if chat else "300 stories"
    return _line(what, loss, count, nbytes), shares / shares.sum(-1, keepdim=True)


def agreement(net: StoryNet, llama: Llama, tokenizer: Tokenizer, text: str) -> str:
    """Return how far llama.cpp's logits on the file are from the network's, over 256 tokens."""
    ids = [tokenizer.token_to_id(END), *tokenizer.encode(text).ids[:255]]
    theirs_ids = llama.tokenize(tokenizer.decode(ids[1:]).encode(), add_bos=True, special=False)
    llama.reset()
    llama.eval(ids)
    theirs = np.array(llama.scores[: len(ids)])
    with torch.no_grad():
        ours = net(torch.tensor([ids]))[0].numpy()
    same = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    away = np.abs(ours - theirs)
    return (
        f"This file in llama.cpp against the network in float32, over 256 tokens: token ids "
        f"{'equal' if theirs_ids == ids else 'NOT equal'}, logits {np.sqrt((away**2).mean()):.4f} "
        f"RMS apart (their spread is {ours.std():.2f}), at most {away.max():.3f}; the best token "
        f"is the same at {same:.1%} of the places."
    )


def tell(llama: Llama, prompt: str, *, greedy: bool, seed: int = 1) -> tuple[str, bool]:
    """Return (the file's continuation of a beginning or a rendered request, whether it ended)."""
    ids = llama.tokenize(prompt.encode(), add_bos=True, special=True)
    heat = {"temperature": 0.0} if greedy else {"temperature": 0.7, "top_p": 0.9, "top_k": 0}
    out = llama.create_completion(ids, max_tokens=400, seed=seed, repeat_penalty=1.0, **heat)
    return out["choices"][0]["text"], out["choices"][0]["finish_reason"] == "stop"


def loops(story: str) -> bool:
    """Return whether some eight words come three times or more."""
    words = re.findall(r"[a-z']+", story.lower())
    return max(Counter(zip(*(words[i:] for i in range(8)), strict=False)).values(), default=0) > 2


def obedience(llama: Llama, lexicon: Lexicon, number: int) -> str:
    """Return how often the words of made-up requests come back, and how the stories run."""
    rng = random.Random(11)
    common = sorted(lexicon.nouns, key=lambda w: (-lexicon.stories[w], w))[:250]
    things = [w for w in common if not w.endswith("s")]
    found = whole = looped = ended = 0
    for i in range(number):
        pair = rng.sample(things, 2)
        line = f"Tell me a story about a {pair[0]} and a {pair[1]}."
        story, end = tell(llama, USER + line + ASSISTANT, greedy=False, seed=i)
        hits = [bool(re.search(rf"\b{w}", story.lower())) for w in pair]
        found, whole = found + sum(hits), whole + all(hits)
        looped, ended = looped + loops(story), ended + end
    return (
        f"{number} requests, each of two things drawn by chance from the 250 commonest nouns: "
        f"{found} of {2 * number} things appear in the story told, both in {whole} of {number} "
        f"(temperature 0.7, top-p 0.9). In {looped} of the stories some eight words come three "
        f"times or more; {ended} end by themselves within 400 tokens."
    )


def samples(llama: Llama) -> list[str]:
    """Return sample outputs as Markdown."""
    out = []
    for greedy in (True, False):
        out.append(f"### Samples, {'greedy' if greedy else 'temperature 0.7, top-p 0.9, seed 1'}")
        for start in BEGINNINGS:
            out.append(f"Plain, from **{start}**")
            out.append(_quote(start + tell(llama, start, greedy=greedy)[0]))
        for request in REQUESTS:
            out.append(f"Chat: **{request}**")
            out.append(_quote(tell(llama, USER + request + ASSISTANT, greedy=greedy)[0]))
    return out


def _quote(text: str) -> str:
    return "\n".join(("> " + line).rstrip() for line in text.strip().split("\n"))


def measure(args: argparse.Namespace) -> str:
    """Return the report as Markdown."""
    net, tokenizer, saved = load_run(args.run)
    texts, state = load_texts(args.text), saved["state"]
    first, shares = documents(net, tokenizer, texts, chat=False)
    second, _ = documents(net, tokenizer, texts, chat=True)
    llama = Llama(str(args.gguf), n_ctx=512, n_threads=args.threads, logits_all=True, verbose=False)
    table = [
        "| text | tokens | perplexity per token | bits per byte |",
        "| --- | --- | --- | --- |",
        windows(net, tokenizer, texts.validation_text),
        first,
        second,
    ]
    rows = ["| layer | share of the router's choices, per expert |", "| --- | --- |"]
    rows += [f"| {i} | {' '.join(f'{float(s):.3f}' for s in r)} |" for i, r in enumerate(shares)]
    parts = [
        f"{state['steps']:.0f} updates over {state['tokens'] / 1e6:.2f} million scored tokens, "
        f"{state['epoch']:.0f} passes over the stories begun.",
        "\n".join(table),
        agreement(net, llama, tokenizer, texts.validation_text),
        "\n".join(rows),
        obedience(llama, texts.lexicon, args.requests),
        *samples(llama),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--text", type=Path, required=True, help="folder with the texts")
    parser.add_argument("--gguf", type=Path, required=True, help="the exported file")
    parser.add_argument("--card", type=Path, help="model card to bring up to date")
    parser.add_argument("--requests", type=int, default=50, help="stories told to count words")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = measure(args)
    print(text)
    if args.card:
        head = args.card.read_text("utf-8").split(HEADING)[0]
        args.card.write_text(f"{head}{HEADING}\n\n{text}", "utf-8")


if __name__ == "__main__":
    main()
