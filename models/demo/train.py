"""Trains the demo model: a small mixture of experts that tells simple stories.

    python models/demo/train.py --text DIR --out DIR --minutes 60
    python models/demo/export.py --run DIR --out models/demo/stories-moe.gguf

Owns the schedule and the checkpoints. Needs PyTorch and the package tokenizers,
which edgert itself does not. The schedule follows the clock: the learning rate stays constant
and falls to zero over the last part of the given minutes. `--init` starts from the weights of a
GGUF file. `last.pt` holds everything to go on from, `best.pt` the weights of the lowest
validation loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from pathlib import Path

import torch
from export import load_gguf
from moe import Config, StoryNet
from optim import Team, optimisers
from stories import Texts, load_texts
from tokenizers import Tokenizer
from tokens import END, Row, build_rows, epoch_documents, train_tokenizer, validation_documents
from torch import Tensor

Rows = tuple[Tensor, Tensor]


class Epochs:
    """Endless batches of rows; each epoch draws its requests and names anew."""

    def __init__(self, texts: Texts, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
        self.texts, self.tokenizer, self.args = texts, tokenizer, args
        self.end = tokenizer.token_to_id(END)
        self.number, self.rows, self.at = args.first_epoch, (torch.empty(0), torch.empty(0)), 0

    def next(self) -> Rows:
        """Return the next (ids [batch, context + 1], weights [batch, context])."""
        if self.at + self.args.batch > len(self.rows[0]):
            rng = random.Random(self.args.seed + self.number)
            documents = epoch_documents(self.texts, self.tokenizer, rng)
            self.rows = to_rows(documents, self.args.context, self.end, self.args.stress)
            order = torch.tensor(rng.sample(range(len(self.rows[0])), len(self.rows[0])))
            self.rows = (self.rows[0][order], self.rows[1][order])
            self.number, self.at = self.number + 1, 0
        chosen = slice(self.at, self.at + self.args.batch)
        self.at += self.args.batch
        return self.rows[0][chosen], self.rows[1][chosen]


def to_rows(documents: Row, context: int, end: int, stress: float = 1.0) -> Rows:
    """Return packed rows as tensors."""
    ids, weights = build_rows(documents, context, end, stress)
    return torch.from_numpy(ids), torch.from_numpy(weights)


def validate(net: StoryNet, rows: Rows, device: str, team: Team) -> tuple[float, Tensor]:
    """Return (mean loss per scored token, expert usage [layers, experts]) over `rows`."""
    net.eval()
    sums, usage = torch.zeros(2, dtype=torch.float64), []
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        for at in range(4 * team.rank, len(rows[0]), 4 * team.size):
            ids, weights = (part[at : at + 4].to(device) for part in rows)
            sums += torch.tensor([float(net.losses(ids, weights)), float(weights.sum())])
            usage.append(net.usage().cpu())
    net.train()
    loss, count = team.sum(sums).tolist()
    return loss / count, torch.stack(usage).mean(0)


def step(
    net: StoryNet, batch: Rows, opts: list[torch.optim.Optimizer], team: Team,
    args: argparse.Namespace,
) -> float:  # fmt: skip
    """Do one update; return this worker's part of the batch's mean loss."""
    total, scored = 0.0, batch[1].sum()
    mine = [part[team.rank :: team.size] for part in batch]
    starts = range(0, len(mine[0]), args.slice)
    for at in starts:
        ids, weights = (part[at : at + args.slice].to(args.device) for part in mine)
        with torch.autocast(args.device, torch.bfloat16, enabled=not args.float32):
            loss = net.losses(ids, weights) / scored
        balance, z = net.router_losses()
        extra = (args.balance * balance + 1e-4 * z) / (len(starts) * team.size)
        (loss + extra).backward()
        total += float(loss.detach())
    team.add_gradients()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    for optimiser in opts:
        optimiser.step()
    team.flat.zero_()
    return total * team.size


def rate(done: float, steps: int, args: argparse.Namespace) -> float:
    """Return the share of the full learning rate after the share `done` of the time."""
    warm = min(1.0, (steps + 1) / args.warmup)
    fall = (1.0 - done) / args.decay_share if args.decay_share > 0 else 1.0
    return max(0.0, warm * min(1.0, fall))


def save(path: Path, net: StoryNet, **more: object) -> None:
    """Write a checkpoint, whole or not at all."""
    part = path.with_suffix(".part")
    state = {"config": dataclasses.asdict(net.config), "weights": net.state_dict(), **more}
    torch.save(state, part)
    part.replace(path)


def train(rank: int, args: argparse.Namespace) -> None:
    """Run worker `rank` of the training that `args` describe; see the module."""
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    team = Team(rank, args.workers, args.port)
    texts = load_texts(args.text, 200 if args.toy else None)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    sizes = {"num_hidden_layers": args.layers, "num_experts": args.experts,
             "moe_intermediate_size": args.expert_size, "dropout": args.dropout,
             "max_position_embeddings": args.context}  # fmt: skip
    net = StoryNet(Config(vocab_size=tokenizer.get_vocab_size(), **sizes)).to(args.device)
    team.adopt(net)
    opts = optimisers(net, args.optimiser, args.lr, args.weight_decay, team)
    state = {"steps": 0.0, "tokens": 0.0, "best": float("inf"), "epoch": 0.0, "minutes": 0.0}
    if args.resume:
        saved = torch.load(args.resume, map_location=args.device, weights_only=True)
        net.load_state_dict(saved["weights"])
        for optimiser, content in zip(opts, saved["optimisers"], strict=True):
            optimiser.load_state_dict(content)
        state = saved["state"] | {"best": float("inf")}
    elif args.init:
        net.load_state_dict(load_gguf(args.init)[0])
    # From here on the workers draw different dropout.
    torch.manual_seed(args.seed + 1000 * rank + int(state["steps"]))
    args.first_epoch = int(state["epoch"])
    end = tokenizer.token_to_id(END)
    held = [to_rows(validation_documents(texts, tokenizer, chat=c), args.context, end)
            for c in (False, True)]  # fmt: skip
    held = [(ids[: args.held], weights[: args.held]) for ids, weights in held]
    if rank == 0:
        count = sum(p.numel() for p in net.parameters())
        print(f"{count} parameters, {len(texts.train)} stories, {texts.notes}", flush=True)
    loop(net, opts, Epochs(texts, tokenizer, args), held, state, team, args)


def loop(
    net: StoryNet, opts: list[torch.optim.Optimizer], epochs: Epochs, held: list[Rows],
    state: dict[str, float], team: Team, args: argparse.Namespace,
) -> None:  # fmt: skip
    """Update until the time is over, validating and saving every `--every` minutes."""
    # All workers go by the first one's clock: they must validate and end at the same step.
    start = checked = team.agree(time.monotonic())
    before, losses, done, now = state["minutes"], [], 0.0, 0.0
    while done < 1.0:
        now = team.agree(time.monotonic())
        done = (now - start) / 60 / args.minutes
        for optimiser in opts:
            for group in optimiser.param_groups:
                group["lr"] = group["base"] * rate(done, int(state["steps"]), args)
        batch = epochs.next()
        losses.append(step(net, batch, opts, team, args))
        state["steps"] += 1
        state["tokens"] += float((batch[1] > 0).sum())
        if now - checked < 60 * args.every and done < 1.0:
            continue
        checked = now
        (plain, usage), (chat, _) = (validate(net, rows, args.device, team) for rows in held)
        state |= {"minutes": before + (now - start) / 60, "epoch": float(epochs.number)}
        line = state | {
            "train": sum(losses) / len(losses), "plain": plain, "chat": chat,
            "rate": rate(done, int(state["steps"]), args),
            "least_used": float(usage.min()), "most_used": float(usage.max()),
        }  # fmt: skip
        losses = []
        better = plain + chat < state["best"]
        state["best"] = min(state["best"], plain + chat)
        if team.rank == 0:
            print(json.dumps({k: round(float(v), 4) for k, v in line.items()}), flush=True)
            if better:
                save(args.out / "best.pt", net, state=state, usage=usage)
            save(args.out / "last.pt", net, state=state, usage=usage,
                 optimisers=[o.state_dict() for o in opts])  # fmt: skip


def main() -> None:
    """Make the vocabulary, then start the workers."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        tokenizer = Tokenizer.from_file(str(args.resume.parent / "tokenizer.json"))
    elif args.init:
        tokenizer = load_gguf(args.init)[1]
    else:
        tokenizer = train_tokenizer(load_texts(args.text).train, args.vocab)
    tokenizer.save(str(args.out / "tokenizer.json"))
    if args.workers == 1:
        train(0, args)
    else:
        # Forked workers keep this command line, by which the run can be found and paused.
        torch.multiprocessing.start_processes(train, (args,), args.workers, start_method="fork")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--text", type=Path, required=True, help="folder with the TinyStories files")
    add("--out", type=Path, required=True, help="folder for checkpoints and vocabulary")
    add("--minutes", type=float, default=60.0, help="length of the run")
    add("--resume", type=Path, help="a last.pt to go on from, vocabulary beside it")
    add("--init", type=Path, help="a GGUF file to train further, with a fresh optimiser")
    add("--toy", action="store_true", help="a small fast run, to see that everything works")
    add("--optimiser", choices=("muon", "adamw"), default="muon")
    add("--lr", type=float, default=3e-3)
    add("--weight-decay", type=float, default=0.3)
    add("--decay-share", type=float, default=0.5, help="last share of the time, rate falling to 0")
    add("--warmup", type=int, default=60, help="steps of rising rate")
    add("--dropout", type=float, default=0.15)
    add("--balance", type=float, default=0.04, help="weight of the load-balance loss")
    add("--stress", type=float, default=5.0, help="weight of a requested word's first mention")
    add("--layers", type=int, default=5)
    add("--experts", type=int, default=8)
    add("--expert-size", type=int, default=256)
    add("--vocab", type=int, default=2048)
    add("--context", type=int, default=512)
    add("--batch", type=int, default=12, help="rows per update")
    add("--slice", type=int, default=3, help="rows per pass; small ones stay in a CPU's caches")
    add("--float32", action="store_true", help="no bfloat16 in the matrix products")
    add("--held", type=int, default=64, help="validation rows per check, of each form")
    add("--every", type=float, default=4.0, help="minutes between validations")
    add("--seed", type=int, default=1)
    add("--workers", type=int, default=1, help="processes that share each update")
    add("--threads", type=int, default=0, help="CPU threads per worker; 0 leaves it to PyTorch")
    add("--port", type=int, default=29511, help="local port where the workers meet")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.toy and args.init:
        parser.error("--toy trains a smaller network than the file of --init holds")
    if args.toy:
        args.layers, args.batch, args.held, args.vocab = 2, 4, 8, 1024
        args.minutes, args.every = min(args.minutes, 0.5), 0.2
    return args


if __name__ == "__main__":
    main()
