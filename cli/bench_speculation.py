"""`edgert bench MODEL --speculate`: the same texts with guessed tokens and without, by turns.

Owns: the prompts, the turns, and the check that the tokens are the same. Must not know the command
line.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import edgert
from edgert import InputError, format_bytes
from edgert.cli.answer import Answer, answer
from edgert.cli.bench_model import Sizes, some_text
from edgert.cli.options import ModelOptions
from edgert.cli.progress import Progress
from edgert.cli.report import table

if TYPE_CHECKING:
    from edgert import Engine

__all__ = ["bench_speculation", "speculation_text"]

_OPENING = 16  # tokens of a prompt in which nothing repeats
_OWN = 256  # tokens of a text of the model's own: the likeliest words again and again
_TEMPERATURES = (0.0, 0.8)


@dataclass(frozen=True, slots=True)
class _Case:
    """A prompt, and how it is continued."""

    name: str
    prompt: list[int]
    sampling: dict[str, Any]


def bench_speculation(
    options: ModelOptions, sizes: Sizes, file: Path | None, progress: Progress
) -> dict[str, Any]:
    """Measure each prompt with and without guessing; the object that --json prints.

    The prompts: `file`, or a long text of the model's own, and an opening ("new"). Each prompt is
    computed once: what is measured is decoding. Raises `EdgertError` if guessing changed a token.
    """
    with options.load(progress) as engine:
        progress.close()
        rows = []
        for case in _cases(engine, sizes, file, progress):
            pairs = [
                tuple(_run(engine, case, speculate, progress) for speculate in (False, True))
                for _ in range(sizes.trials)
            ]
            rows.append({"model": options.path.name, **_row(engine, case, pairs)})
    return {"rows": rows}


def _cases(engine: Engine, sizes: Sizes, file: Path | None, progress: Progress) -> list[_Case]:
    opening = some_text(engine.tokenizer, _OPENING)
    if file is not None:
        prompts = {file.name: engine.tokenize(_text_of(file))}
    else:
        room = engine.context_length - sizes.gen_tokens - 1
        length = max(min(sizes.prompt_tokens or _OWN, room) - _OPENING, 1)
        own = _Case("", opening, {"max_tokens": length, "temperature": 0.0})
        prompts = {"own text": opening + _run(engine, own, True, progress).tokens, "new": opening}
    banned = {token: -math.inf for token in engine.tokenizer.eos_ids}
    common = {"max_tokens": sizes.gen_tokens, "seed": 0, "logit_bias": banned}
    return [
        _Case(name, prompt, common | {"temperature": temperature})
        for name, prompt in prompts.items()
        for temperature in _TEMPERATURES
    ]


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text") from None


def _run(engine: Engine, case: _Case, speculate: bool, progress: Progress) -> Answer:
    sampling = case.sampling | {"speculate": speculate}
    found = answer(engine, case.prompt, sampling, progress, silent=True)
    if found.finish_reason == "cancelled":
        raise click.Abort
    return found


def _row(engine: Engine, case: _Case, pairs: list[tuple[Answer, ...]]) -> dict[str, Any]:
    if len({tuple(run.tokens) for pair in pairs for run in pair}) > 1:
        raise edgert.EdgertError(f"{case.name}: guessing changed the tokens; this is a bug")
    speeds = [[run.stats.decode_tok_s for run in pair if run.stats] for pair in pairs]
    last = pairs[-1][1].stats
    assert last is not None
    passes = last.generated_tokens - last.accepted_tokens
    return {
        "budget_bytes": engine.plan.budget_bytes,
        "threads": engine.plan.threads,
        "prompt": case.name,
        "prompt_tokens": len(case.prompt),
        "temperature": case.sampling["temperature"],
        "gen_tokens": last.generated_tokens,
        "plain_tok_s": statistics.median(plain for plain, _ in speeds),
        "speculate_tok_s": statistics.median(fast for _, fast in speeds),
        "ratio": statistics.median(fast / plain for plain, fast in speeds),
        "drafted_tokens": last.drafted_tokens,
        "accepted_tokens": last.accepted_tokens,
        "tokens_per_pass": last.generated_tokens / passes,
        "tokens_hash": hashlib.sha256(repr(pairs[-1][1].tokens).encode()).hexdigest()[:16],
    }


def speculation_text(found: dict[str, Any]) -> str:
    """`bench_speculation`'s object for people."""
    header = (
        "model", "budget", "prompt", "temp", "plain tok/s", "speculate tok/s", "ratio",
        "tok/pass", "accepted", "tokens",
    )  # fmt: skip
    rows = [
        (
            row["model"], format_bytes(row["budget_bytes"]), row["prompt"],
            f"{row['temperature']:g}", f"{row['plain_tok_s']:.2f}",
            f"{row['speculate_tok_s']:.2f}", f"{row['ratio']:.2f}", f"{row['tokens_per_pass']:.1f}",
            f"{row['accepted_tokens']} of {row['drafted_tokens']}", f"#{row['tokens_hash'][:8]}",
        )
        for row in found["rows"]
    ]  # fmt: skip
    return table(header, rows)
