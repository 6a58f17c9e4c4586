"""Which of the plans that fit is fastest: tokens of a pass, and requests of the ring.

Owns: what a longer pass is worth. Pure. Must not know how memory is laid out (plan.py).

A streamed model reads everything that is not resident once a pass. A longer pass reads it less
often for a prompt, but its activations push weights out of memory, which every later token pays.
What counts is the time of a typical turn: a prompt of `PROMPT` tokens and an answer of `ANSWER`.

Of experts a pass reads those that its tokens choose and memory lacks, each once: one that a token
uses with chance p is chosen by n tokens with 1 - (1 - p)^n. The chances are those of the model's
profile, else all are k / E. A longer pass shares experts among more tokens; its activations take
slots from experts, which every later token misses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgert.device_profile import DeviceProfile
from edgert.units import MIB

__all__ = [
    "PASSES", "ExpertLoad", "Rates", "expert_turn_seconds", "fastest_expert_pass", "fastest_pass",
    "rates_of", "requests_for", "turn_seconds",
]  # fmt: skip

PASSES = (512, 256, 128, 64, 32, 16, 8)  # tokens of a pass to choose from, best first where equal
PROMPT, ANSWER = 384, 256
# Size and number of requests: small ones need the least memory, and do as well on a slow disk.
SMALL, USUAL, LARGE = (MIB, 6), (3 * MIB // 2, 6), (2 * MIB, 6)
SLOW = 1.5e9  # bytes per second up to which small requests do
CLEARLY = 1.5  # faster than noise: one short measurement of a rate is off by up to a fifth
CAUTION = 0.5  # of the disk's rate: too long a pass costs memory for 1 % of a model, too short a
# one on a disk that is throttled or shared costs the prompt twice its time


@dataclass(frozen=True, slots=True)
class Rates:
    """A device in three figures."""

    disk_bytes_per_s: float
    memory_bytes_per_s: float
    macs_per_s: float


def rates_of(profile: DeviceProfile | None, threads: int) -> Rates:
    """The rates to plan with: the profile's, or those of a usual small machine."""
    if profile is None or not profile.kernels:
        return Rates(1e9, 20e9, 100e9 * threads)
    macs = min(rate.batch_macs_per_s for rate in profile.kernels.values())
    return Rates(CAUTION * profile.disk_bytes_per_s, profile.memory_bytes_per_s, macs)


def turn_seconds(
    streamed: float, nbytes: float, weights: float, tokens: int, rates: Rates
) -> float:
    """A typical turn with `streamed` of `nbytes` read in every pass of at most `tokens` tokens."""
    flash = streamed / rates.disk_bytes_per_s

    def one(n: int) -> float:
        return max(flash, nbytes / rates.memory_bytes_per_s, n * weights / rates.macs_per_s)

    whole, rest = divmod(PROMPT, tokens)
    return whole * one(tokens) + (one(rest) if rest else 0.0) + ANSWER * one(1)


def fastest_pass(
    streamed: Callable[[int], float | None], nbytes: float, weights: float, rates: Rates
) -> int | None:
    """The pass with the shortest turn; `streamed(tokens)` is None where it does not fit."""
    best: tuple[float, int] | None = None
    for tokens in PASSES:
        left = streamed(tokens)
        if left is not None:
            found = turn_seconds(left, nbytes, weights, tokens, rates), tokens
            best = found if best is None or found[0] < best[0] else best
    return None if best is None else best[1]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLoad:
    """The routed experts of a model, and how likely a token uses each."""

    record_bytes: int
    chances: npt.NDArray[np.float64]  # of all layers, descending

    @classmethod
    def of(
        cls,
        layers: int,
        experts: int,
        k: int,
        record_bytes: int,
        chances: npt.NDArray[np.float64] | None = None,
    ) -> ExpertLoad:
        """With the `chances` of a profile, (layers, experts), else with all as likely."""
        found = np.full(layers * experts, k / experts) if chances is None else chances.reshape(-1)
        return cls(record_bytes, -np.sort(-found))

    def used(self, tokens: int) -> float:
        """Experts that a pass of so many tokens computes, over all layers."""
        return self.missed(tokens, 0)

    def missed(self, tokens: int, slots: int) -> float:
        """Those of them that are not in `slots` slots, which hold the likeliest."""
        return float((1 - (1 - self.chances[slots:]) ** tokens).sum())


def expert_turn_seconds(
    load: ExpertLoad, slots: int, streamed: float, tokens: int, rates: Rates
) -> float:
    """A typical turn, but for the arithmetic, which is the same for passes of any length.

    `streamed`: bytes of other weights that every pass reads.
    """

    def one(n: int) -> float:
        flash = streamed + load.missed(n, slots) * load.record_bytes
        memory = load.used(n) * load.record_bytes
        return flash / rates.disk_bytes_per_s + memory / rates.memory_bytes_per_s

    whole, rest = divmod(PROMPT, tokens)
    return whole * one(tokens) + (one(rest) if rest else 0.0) + ANSWER * one(1)


def fastest_expert_pass(
    left: Callable[[int], tuple[int, float] | None], load: ExpertLoad, rates: Rates
) -> int | None:
    """The pass with the shortest turn; `left(tokens)` is (slots, bytes of other weights streamed),
    None where it does not fit.
    """
    turns = []
    for tokens in PASSES:
        found = left(tokens)
        if found is not None:
            turns.append((expert_turn_seconds(load, *found, tokens, rates), -tokens))
    return -min(turns)[1] if turns else None


def requests_for(profile: DeviceProfile | None) -> tuple[int, int]:
    """Size of a request and number of readers for a device: large ones where they are clearly
    faster, small ones where the disk is slow.
    """
    if profile is None:
        return USUAL
    rates = {(r.request_bytes, r.readers): r.bytes_per_s for r in profile.reads}
    if rates.get(LARGE, 0.0) > CLEARLY * rates.get(SMALL, float("inf")):
        return LARGE
    return SMALL if profile.disk_bytes_per_s <= SLOW else USUAL
