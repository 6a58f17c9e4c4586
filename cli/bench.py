"""`edgert bench`: one row of figures, with the hash that says the numbers stayed the same."""

from __future__ import annotations

import math
import os
import platform
import statistics
from typing import TYPE_CHECKING, Any

import click

import edgert
from edgert import InputError, format_bytes
from edgert.cli.answer import Answer, answer
from edgert.cli.cgroup import drop_page_cache
from edgert.cli.options import ModelOptions, debug_options, json_option, load_options
from edgert.cli.progress import Progress
from edgert.cli.report import print_json, table

if TYPE_CHECKING:
    from edgert import Engine, RunStats

__all__ = ["bench"]

# Real sentences: experts are routed as they are in use, which random tokens would not do.
_TEXT = (
    "Once upon a time there was a little boy who lived near a big forest. Every day he went out "
    "to play with his dog. One morning they found a red ball under a tree, and the dog ran after "
    "it until the sun went down. "
)


@click.command()
@load_options
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True, metavar="N"
)
@click.option(
    "--gen-tokens", type=click.IntRange(min=1), default=32, show_default=True, metavar="M"
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Measured runs; the row gives their medians.",
)
@json_option
@debug_options
def bench(
    options: ModelOptions, prompt_tokens: int, gen_tokens: int, trials: int, as_json: bool
) -> None:
    """Measure prefill, decode and reading speed.

    Kernels are compiled while the model loads, outside of what is measured. Generation is greedy,
    so the hash of the logits is the same in every trial, for every budget and thread count.
    """
    cold = drop_page_cache(edgert.read_gguf(options.path).files)
    with Progress() as progress, options.load(progress) as engine:
        prompt = _prompt(engine, prompt_tokens)
        progress.close()
        runs = [_trial(engine, prompt, gen_tokens, progress) for _ in range(trials)]
        found = _result(options, engine, runs)
    found["file_cache"] = "cold" if cold else "warm"
    if any(run.finish_reason == "cancelled" for run in runs):
        raise click.Abort
    if as_json:
        print_json(found)
    else:
        click.echo(_row(found))


def _prompt(engine: Engine, count: int) -> list[int]:
    tokens = engine.tokenize(_TEXT)
    if not tokens:
        raise InputError("the model's tokenizer makes no tokens of English text")
    return (tokens * -(-count // len(tokens)))[:count]


def _trial(engine: Engine, prompt: list[int], gen_tokens: int, progress: Progress) -> Answer:
    """One run with an empty KV cache; tokens that would end the text are banned."""
    engine.logits([(prompt[0] + 1) % engine.vocab_size])  # so that nothing can be reused
    banned = {token: -math.inf for token in engine.tokenizer.eos_ids}
    sampling = {"max_tokens": gen_tokens, "temperature": 0.0, "seed": 0, "logit_bias": banned}
    return answer(engine, prompt, sampling, progress, silent=True)


def _result(options: ModelOptions, engine: Engine, runs: list[Answer]) -> dict[str, Any]:
    trials = [run.stats for run in runs if run.stats is not None]

    def median(name: str) -> float:
        return float(statistics.median(getattr(trial, name) for trial in trials))

    plan = engine.plan
    device = median("device_bytes_per_s")
    read = median("read_bytes_per_token")
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
        # What the device allows if nothing but reading took time; None when nothing is read.
        "predicted_decode_tok_s": device / read if device and read else None,
        "read_bytes_per_token": read,
        "read_bytes_per_s": median("read_bytes_per_s"),
        "device_bytes_per_s": device,
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


def _row(found: dict[str, Any]) -> str:
    device = found["device_bytes_per_s"]
    share = f"{100 * found['read_bytes_per_s'] / device:.0f} %" if device else "-"
    predicted = found["predicted_decode_tok_s"]
    columns = {
        "model": found["model"],
        "threads": str(found["threads"]),
        "budget": format_bytes(found["budget_bytes"]),
        "prefill tok/s": f"{found['prefill_tok_s']:.1f}",
        "decode tok/s": f"{found['decode_tok_s']:.2f}",
        "predicted": "-" if predicted is None else f"{predicted:.2f}",
        "MiB/tok": f"{found['read_bytes_per_token'] / 2**20:.1f}",
        "GB/s": f"{found['read_bytes_per_s'] / 1e9:.2f}",
        "of device": share,
        "stall": f"{100 * found['stall_share']:.0f} %",
        "peak": format_bytes(found["peak_bytes"]),
        "cache": found["file_cache"],
        "logits": f"#{found['logits_hash'][:8]}",
    }
    return table(list(columns), [list(columns.values())])
