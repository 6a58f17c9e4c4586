"""What `edgert stress` tries: the product of models, budgets, contexts, prompts and threads.

Owns: the list of cases and their order. Pure but for reading headers. Must not know how a case is
run or judged.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import edgert
from edgert import InputError
from edgert.cli.options import Budget, ModelOptions

__all__ = ["Case", "Sweep", "all_cases", "choose", "with_references"]

_CONTEXT_STEP = 256


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to combine, and what is the same in all runs."""

    models: tuple[Path, ...]
    budgets: tuple[Budget, ...]
    contexts: tuple[int, ...]  # 0: what prompt and answer need
    prompts: tuple[int, ...]  # tokens
    threads: tuple[int, ...]  # 0: one a core
    kv_cache_types: tuple[str, ...]
    faults: tuple[str, ...] = ("",)
    temperatures: tuple[float, ...] = (0.0,)
    max_tokens: int = 16
    disk_rate: int = 0  # bytes/s; 0: as fast as it is
    live: bool = False
    engines: int = 1
    seed: int = 0
    speculate: bool = False
    verify_checksums: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """One run to be made. Sizes in bytes, rates in bytes/s."""

    model: Path
    asked: str  # the budget as it was given
    budget_bytes: int
    raised: bool  # the share asked for was below what works
    resident: bool  # the budget holds all weights
    context_length: int
    prompt_tokens: int
    threads: int | None
    kv_cache_type: str
    max_tokens: int
    disk_rate: int = 0
    fault: str = ""
    fault_number: int = 1  # of the read that fails
    live: tuple[int, ...] = ()  # budgets to change to while generating
    engines: int = 1
    temperature: float = 0.0
    seed: int = 0
    speculate: bool = False  # guess tokens; what it is compared with never does
    verify_checksums: bool = False

    @property
    def text(self) -> tuple[object, ...]:
        """Equal for cases that must give equal tokens and logits."""
        rounds = self.prompt_tokens + self.max_tokens > self.context_length
        same = (self.model, self.prompt_tokens, self.max_tokens, self.kv_cache_type)
        drawn = (self.temperature, self.seed if self.temperature else 0)
        return (*same, *drawn, self.context_length if rounds else 0)

    @property
    def plain(self) -> bool:
        """True without faults, live changes and company."""
        return not self.fault and not self.live and self.engines == 1

    @property
    def fit(self) -> bool:
        """True where others may be compared with it: nothing special, and no guesses."""
        return self.plain and not self.speculate

    @property
    def name(self) -> str:
        """The case in a few words."""
        parts = [f"{self.model.stem} {self.asked} c{self.context_length} p{self.prompt_tokens}"]
        parts += [f"t{self.threads}"] if self.threads else []
        parts += [self.kv_cache_type] if self.kv_cache_type != "f16" else []
        parts += [f"temp {self.temperature:g}"] if self.temperature else []
        parts += ["guessing"] if self.speculate else []
        parts += ["verified"] if self.verify_checksums else []
        if self.fault:
            parts.append(self.fault + (f"@{self.fault_number}" if "eio" in self.fault else ""))
        parts += ["live"] if self.live else []
        parts += [f"{self.engines} engines"] if self.engines > 1 else []
        return " ".join(parts)


def all_cases(sweep: Sweep) -> list[Case]:
    """The product, in order; combinations whose prompt does not fit the context are left out.

    Raises what planning a model raises, and `InputError` when nothing is left.
    """
    found = []
    for number, (model, kv_type, prompt, context, threads, heat, budget, fault) in enumerate(
        itertools.product(
            sweep.models, sweep.kv_cache_types, sweep.prompts, sweep.contexts, sweep.threads,
            sweep.temperatures, sweep.budgets, sweep.faults,
        )
    ):  # fmt: skip
        length = min(context or _enough(prompt + sweep.max_tokens), _trained_context(model))
        if prompt >= length:
            continue
        full, floor = _full_and_floor(
            model, length, threads or None, kv_type, sweep.verify_checksums
        )
        floor *= sweep.engines
        nbytes = budget.resolve(full)
        raised = budget.percent is not None and nbytes < floor
        nbytes = floor if raised else nbytes
        found.append(
            Case(
                model, budget.text, nbytes, raised, nbytes >= full, length, prompt,
                threads or None, kv_type, sweep.max_tokens, sweep.disk_rate, fault,
                _failing_read(number), tuple(int(nbytes * share) for share in _LIVE)
                if sweep.live else (), sweep.engines, heat, sweep.seed, sweep.speculate,
                sweep.verify_checksums,
            )
        )  # fmt: skip
    if not found:
        raise InputError("no prompt fits any context; shorten --prompt-tokens or raise --ctx-size")
    return list(dict.fromkeys(found))  # contexts cut to what a model knows may fall together


_LIVE = (0.5, 1.0, 0.75, 1.0)  # shares of the budget


def choose(cases: Sequence[Case], count: int, seed: int = 0) -> list[Case]:
    """`count` cases in the order they are drawn, so that the first few are a fair sample too.

    Each comes once before any comes twice.
    """
    drawn: list[Case] = []
    generator = random.Random(seed)
    while len(drawn) < count:
        drawn += generator.sample(cases, min(len(cases), count - len(drawn)))
    return drawn


def with_references(cases: Sequence[Case]) -> list[Case]:
    """The cases with, before the first of each text, a resident run that it is compared with."""
    found: list[Case] = []
    left = list(cases)
    known: set[tuple[object, ...]] = set()
    for case in cases:
        if case.text not in known:
            known.add(case.text)
            same = [c for c in left if c.text == case.text and c.resident and c.fit]
            if same:
                left.remove(same[0])
            found.append(same[0] if same else _resident(case))
        if case in left:
            left.remove(case)
            found.append(case)
    return found


def _resident(case: Case) -> Case:
    full, _ = _full_and_floor(
        case.model, case.context_length, case.threads, case.kv_cache_type, False
    )
    return replace(
        case, asked="100%", budget_bytes=full, raised=False, resident=True, disk_rate=0, fault="",
        live=(), engines=1, speculate=False, verify_checksums=False,
    )  # fmt: skip


def _enough(tokens: int) -> int:
    return min(-(-tokens // _CONTEXT_STEP) * _CONTEXT_STEP, 4096)


def _failing_read(number: int) -> int:
    """Which read fails: 1, 2, 3, 5, 8, ... and round again, so that every phase has its turn."""
    numbers = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610)
    return numbers[number % len(numbers)]


@cache
def _trained_context(model: Path) -> int:
    metadata = edgert.read_manifest(model).metadata
    value = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return value if isinstance(value, int) else 4096


@cache
def _full_and_floor(
    model: Path, context: int, threads: int | None, kv_cache_type: str, verify_checksums: bool
) -> tuple[int, int]:
    options = ModelOptions(
        model, None, context, threads, kv_cache_type, verify_checksums=verify_checksums
    )
    return options.full_and_floor()
