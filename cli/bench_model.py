"""`edgert bench MODEL`: one row of figures, with the hash that says the numbers stayed the same.

Owns: the measured runs of a model and their medians. Must not know the command line.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

import edgert
from edgert import InputError, format_bytes
from edgert.cli.answer import Answer, answer
from edgert.cli.cgroup import drop_page_cache
from edgert.cli.options import ModelOptions
from edgert.cli.progress import Progress
from edgert.cli.report import table

if TYPE_CHECKING:
    from edgert import Engine, RunStats, Timeline, Tokenizer

__all__ = ["PAST", "Sizes", "bench_model", "model_text", "some_text"]

DEFAULT_PROMPT = 512
PAST = 16  # tokens in the KV cache before decode and batch rows
_REPEATS = 5  # of a batch in a trial: each is one short pass
# Real sentences: experts are routed as they are in use, which random tokens would not do.
_TEXT = (
    "Once upon a time there was a little boy who lived near a big forest. Every day he went out "
    "to play with his dog. One morning they found a red ball under a tree, and the dog ran after "
    "it until the sun went down. "
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens of each row, and how often all rows are measured. `prompt_tokens` None: 512, or what
    the context holds.
    """

    prompt_tokens: int | None
    gen_tokens: int
    batches: tuple[int, ...]
    trials: int

    def prompt(self, context_length: int) -> int:
        """Tokens of the prompt where the context has `context_length`."""
        if self.prompt_tokens is not None:
            return self.prompt_tokens
        return max(1, min(DEFAULT_PROMPT, context_length - self.gen_tokens - 1))


def some_text(tokenizer: Tokenizer, count: int) -> list[int]:
    """`count` tokens of English. Raises `InputError`."""
    tokens = tokenizer.encode(_TEXT)
    if not tokens:
        raise InputError("the model's tokenizer makes no tokens of English text")
    return (tokens * -(-count // len(tokens)))[:count]


def bench_model(
    options: ModelOptions, sizes: Sizes, progress: Progress, timeline: Timeline | None = None
) -> dict[str, Any]:
    """Measure a model under its plan; the object that --json prints. Ctrl-C is `click.Abort`.

    Kernels are compiled while the model loads, outside of what is measured.
    """
    cold = drop_page_cache(edgert.read_manifest(options.path).files)
    with options.load(progress, timeline=timeline) as engine:
        prompt = some_text(engine.tokenizer, sizes.prompt(engine.context_length))
        progress.close()
        runs = []
        for _ in range(sizes.trials):
            runs.append(_trial(engine, prompt, sizes.gen_tokens, progress))
            if runs[-1].finish_reason == "cancelled":
                raise click.Abort
        found = _result(options, engine, runs)
        found |= _batches(engine, sizes, progress)
    found["file_cache"] = "cold" if cold else "warm"
    return found


def _trial(engine: Engine, prompt: list[int], gen_tokens: int, progress: Progress) -> Answer:
    """One run with an empty KV cache; tokens that would end the text are banned.

    The device is measured before and after it, because shared disks drift: the mean counts.
    """
    _forget(engine, prompt)
    before = engine.measure_device() if engine.is_streamed else 0.0
    banned = {token: -math.inf for token in engine.tokenizer.eos_ids}
    sampling = {"max_tokens": gen_tokens, "temperature": 0.0, "seed": 0, "logit_bias": banned}
    sampling |= {"speculate": False}  # the text repeats itself
    run = answer(engine, prompt, sampling, progress, silent=True)
    if engine.is_streamed and run.stats is not None:
        rate = (before + engine.measure_device()) / 2
        run.stats = replace(run.stats, device_bytes_per_s=rate)
    return run


def _forget(engine: Engine, prompt: list[int]) -> None:
    """Leave a KV cache in which nothing of `prompt` can be found."""
    engine.logits([(prompt[0] + 1) % engine.vocab_size])


def _batches(engine: Engine, sizes: Sizes, progress: Progress) -> dict[str, float]:
    """Tokens a second of one pass of n tokens behind a short context, as batch_n_tok_s."""
    most = engine.context_length - PAST
    counts = [n for n in sizes.batches if n <= most]
    text = some_text(engine.tokenizer, PAST + max(counts, default=0))
    seconds: dict[int, list[float]] = {n: [] for n in counts}
    _forget(engine, text)
    for repeat in range(_REPEATS):
        for n in counts:
            progress.update(repeat, _REPEATS, f"batch {n}")
            engine.forward.evaluate(text[:PAST], engine.vocab_size)  # computes the last one again
            begin = time.perf_counter()
            engine.forward.evaluate(text[: PAST + n], engine.vocab_size)
            seconds[n].append(time.perf_counter() - begin)
    progress.close()
    return {f"batch_{n}_tok_s": n / statistics.median(times) for n, times in seconds.items()}


def _result(options: ModelOptions, engine: Engine, runs: list[Answer]) -> dict[str, Any]:
    trials = [run.stats for run in runs if run.stats is not None]

    def median(name: str) -> float:
        return float(statistics.median(getattr(trial, name) for trial in trials))

    plan = engine.plan
    # What the device allows if nothing but reading took time; None when nothing is read.
    per_token = [plan.streamed_bytes or trial.read_bytes_per_token or 1 for trial in trials]
    roofs = [t.device_bytes_per_s / nbytes for t, nbytes in zip(trials, per_token, strict=True)]
    ratios = [t.decode_tok_s / roof for t, roof in zip(trials, roofs, strict=True) if roof]
    shares = [t.read_bytes_per_s / t.device_bytes_per_s for t in trials if t.device_bytes_per_s]
    return {
        "model": options.path.name,
        "machine": f"{platform.machine()} {platform.system()}",
        "cores": os.cpu_count(),
        "threads": plan.threads,
        "budget_bytes": plan.budget_bytes,
        "prompt_tokens": trials[0].prompt_tokens,
        "gen_tokens": trials[0].generated_tokens,
        "trials": len(trials),
        "prefill_tok_s": median("prefill_tok_s"),
        "decode_tok_s": median("decode_tok_s"),
        # None where `edgert plan` or `edgert doctor` never profiled this machine.
        "predicted_decode_tok_s": trials[0].predicted_tok_s or None,
        # What the device allows if nothing but reading took time; None when nothing is read.
        "roof_tok_s": statistics.median(roofs) if ratios else None,
        "share_of_roof": statistics.median(ratios) if ratios else None,
        "read_bytes_per_token": median("read_bytes_per_token"),
        "read_bytes_per_s": median("read_bytes_per_s"),
        "device_bytes_per_s": median("device_bytes_per_s"),
        "share_of_device": statistics.median(shares) if shares else None,
        "stall_share": median("stall_share"),
        "resident_bytes": max(trial.resident_bytes for trial in trials),
        "peak_bytes": max(trial.peak_bytes for trial in trials),
        "logits_hash": _one_hash(trials),
    }


def _one_hash(trials: list[RunStats]) -> str:
    hashes = {trial.logits_hash for trial in trials}
    if len(hashes) > 1:
        raise edgert.EdgertError(f"the trials gave different logits: {', '.join(sorted(hashes))}")
    return hashes.pop()


def model_text(found: dict[str, Any]) -> str:
    """`bench_model`'s object for people."""

    def percent(name: str) -> str:
        return "-" if found[name] is None else f"{100 * found[name]:.0f} %"

    roof, device = found["roof_tok_s"], found["device_bytes_per_s"]
    columns = {
        "model": found["model"],
        "threads": str(found["threads"]),
        "budget": format_bytes(found["budget_bytes"]),
        "prefill tok/s": f"{found['prefill_tok_s']:.1f}",
        "decode tok/s": f"{found['decode_tok_s']:.2f}",
        "roof": "-" if roof is None else f"{roof:.2f}",
        "of roof": percent("share_of_roof"),
        **{
            f"batch {key.split('_')[1]}": f"{value:.1f}"
            for key, value in found.items()
            if key.startswith("batch_")
        },
        "MiB/tok": f"{found['read_bytes_per_token'] / 2**20:.1f}",
        "GB/s": f"{found['read_bytes_per_s'] / 1e9:.2f}",
        "device": f"{device / 1e9:.2f}" if device else "-",
        "of device": percent("share_of_device"),
        "stall": f"{100 * found['stall_share']:.0f} %",
        "peak": format_bytes(found["peak_bytes"]),
        "cache": found["file_cache"],
        "logits": f"#{found['logits_hash'][:8]}",
    }
    return table(list(columns), [list(columns.values())])
