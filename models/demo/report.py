"""Measures the demo model for its card: perplexity, routing, agreement with llama.cpp, samples.

    python models/demo/report.py --run DIR --text DIR --gguf models/demo/stories-moe.gguf

Needs PyTorch, tokenizers and llama-cpp-python. Prints everything; writes nothing.
"""

from __future__ import annotations

import argparse
import math
import random
import re
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

BEGINNINGS = ("Once upon a time", "One day, a little bird", "Tom and his sister")
REQUESTS = (
    "tell me a story about a dog and a red ball",
    "Tell me a story about a rabbit and a big tree.",
    "Can you tell me a story about a boat and a fish?",
)


def windows(net: StoryNet, tokenizer: Tokenizer, text: str) -> None:
    """Print the perplexity of `text` in 40 windows of <|endoftext|> and 511 tokens."""
    ids = tokenizer.encode(text[:200_000]).ids
    end = tokenizer.token_to_id(END)
    loss, scored = 0.0, []
    with torch.no_grad():
        for at in range(0, 40 * 511, 511):
            row = torch.tensor([[end, *ids[at : at + 511]]])
            loss += float(F.cross_entropy(net(row[:, :-1])[0], row[0, 1:], reduction="sum"))
            scored += ids[at : at + 511]
    nbytes = len(tokenizer.decode(scored).encode())
    print(f"running text: perplexity {math.exp(loss / len(scored)):.3f} over {len(scored)} tokens, "
          f"{loss / math.log(2) / nbytes:.4f} bits per byte")  # fmt: skip


def documents(net: StoryNet, tokenizer: Tokenizer, texts: Texts, *, chat: bool) -> torch.Tensor:
    """Print the perplexity of 300 validation stories, each alone; return the experts' shares."""
    loss, count, nbytes, usage = 0.0, 0, 0, []
    with torch.no_grad():
        for ids, head in validation_documents(texts, tokenizer, chat=chat)[:300]:
            row = torch.tensor([ids[:513]])
            logits = net(row[:, :-1])[0, head - 1 :]
            loss += float(F.cross_entropy(logits, row[0, head:], reduction="sum"))
            count += len(logits)
            nbytes += len(tokenizer.decode(row[0, head:].tolist()).encode())
            usage.append(net.usage() * row.shape[1])
    shares = torch.stack(usage).sum(0)
    shares = shares / shares.sum(-1, keepdim=True)
    print(f"{'requested' if chat else 'plain'} stories: perplexity {math.exp(loss / count):.3f} over "
          f"{count} tokens, {loss / math.log(2) / nbytes:.4f} bits per byte")  # fmt: skip
    return shares


def agreement(net: StoryNet, llama: Llama, tokenizer: Tokenizer, text: str) -> None:
    """Print how far llama.cpp's logits on the file are from the network's, over 256 tokens."""
    ids = [tokenizer.token_to_id(END), *tokenizer.encode(text).ids[:255]]
    theirs_ids = llama.tokenize(tokenizer.decode(ids[1:]).encode(), add_bos=True, special=False)
    llama.reset()
    llama.eval(ids)
    theirs = np.array(llama.scores[: len(ids)])
    with torch.no_grad():
        ours = net(torch.tensor([ids]))[0].numpy()
    same = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    print(f"llama.cpp: same tokens {theirs_ids == ids}; logits differ by "
          f"{np.abs(ours - theirs).max():.2e} at most, {np.sqrt(((ours - theirs) ** 2).mean()):.2e} "
          f"RMS of {ours.std():.2f}; same best token {same:.4f}")  # fmt: skip


def tell(llama: Llama, prompt: str, *, greedy: bool, seed: int = 1) -> str:
    """Return the file's continuation of a plain beginning or of a rendered request."""
    ids = llama.tokenize(prompt.encode(), add_bos=True, special=True)
    heat = {"temperature": 0.0} if greedy else {"temperature": 0.7, "top_p": 0.9, "top_k": 0}
    out = llama.create_completion(ids, max_tokens=400, seed=seed, repeat_penalty=1.0, **heat)
    return out["choices"][0]["text"]


def obedience(llama: Llama, lexicon: Lexicon, number: int) -> None:
    """Print how often the words of made-up requests come back in the stories told."""
    rng = random.Random(11)
    common = sorted(lexicon.nouns, key=lambda w: -lexicon.stories[w])[:250]
    things = [w for w in common if not w.endswith("s")]
    found = asked = whole = 0
    for i in range(number):
        pair = rng.sample(things, 2)
        story = tell(llama, f"{USER}Tell me a story about a {pair[0]} and a {pair[1]}.{ASSISTANT}",
                     greedy=False, seed=i)  # fmt: skip
        hits = [bool(re.search(rf"\b{w}", story.lower())) for w in pair]
        found, asked, whole = found + sum(hits), asked + 2, whole + all(hits)
    print(f"requests of two things drawn together by chance: {found}/{asked} things appear, "
          f"both in {whole}/{number}")  # fmt: skip


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--text", type=Path, required=True, help="folder with the texts")
    parser.add_argument("--gguf", type=Path, required=True, help="the exported file")
    parser.add_argument("--requests", type=int, default=50, help="stories told to count words")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    net, tokenizer, saved = load_run(args.run)
    texts = load_texts(args.text)
    print(saved["state"], texts.notes)
    windows(net, tokenizer, texts.validation_text)
    shares = documents(net, tokenizer, texts, chat=False)
    documents(net, tokenizer, texts, chat=True)
    for layer, row in enumerate(shares):
        print(f"layer {layer}: share of choices " + " ".join(f"{float(s):.3f}" for s in row))
    llama = Llama(str(args.gguf), n_ctx=512, n_threads=args.threads, logits_all=True, verbose=False)
    agreement(net, llama, tokenizer, texts.validation_text)
    for greedy in (True, False):
        print(f"\n=== {'greedy' if greedy else 'temperature 0.7, top-p 0.9'}")
        for start in BEGINNINGS:
            print(f"\n> {start}{tell(llama, start, greedy=greedy)}")
        for request in REQUESTS:
            print(f"\n[{request}]\n{tell(llama, USER + request + ASSISTANT, greedy=greedy)}")
    obedience(llama, texts.lexicon, args.requests)


if __name__ == "__main__":
    main()
