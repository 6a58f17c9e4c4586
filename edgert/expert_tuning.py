"""Is a policy as good on routing it was not tuned on? Found on one half, tried on the other.

Owns: cutting a trace in two, choosing a setting on one part, the figures on the other; synthetic
routing. Must not know how a policy works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgert.errors import InputError
from edgert.expert_simulation import simulate
from edgert.routing import Routing
from edgert.storage.expert_order import USUAL, Setting

__all__ = ["SETTINGS", "SYNTHETIC", "Trial", "halves", "synthetic_routing", "tune_policy"]

SETTINGS = tuple(Setting(life, doubt) for life in (24.0, 96.0, 384.0) for doubt in (1.0, 4.0, 16.0))
SYNTHETIC = ("random", "skewed", "drifting")


@dataclass(frozen=True, slots=True)
class Trial:
    """One number of slots on the part of a trace that nothing was tuned on: hit rates."""

    tuned_on: str
    slots: int
    lru: float
    lfu: float
    usual: float  # the engine's choice as it is
    tuned: float  # the same with the setting that was best on the other part
    belady: float
    half_life: float  # of that setting
    doubt: float


def halves(trace: Routing) -> tuple[Routing, Routing]:
    """Every other request, or the first and second half of a single one."""
    choices, passes = trace.requests, trace.passes
    if len(choices) == 1:
        if len(passes[0]) < 2:
            raise InputError("a trace of one pass cannot be cut in two")
        middle = len(passes[0]) // 2
        at = int(passes[0][:middle].sum())
        choices = (choices[0][:at], choices[0][at:])
        passes = (passes[0][:middle], passes[0][middle:])
    first, second = (
        Routing(trace.experts, choices[i::2], passes[i::2], trace.record_bytes, trace.record_sizes)
        for i in (0, 1)
    )
    return first, second


def tune_policy(
    trace: Routing,
    slots: Sequence[int],
    *,
    per_layer: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> list[Trial]:
    """Tune on each half and test on the other: what choosing by the test would not show.

    The setting chosen has the best mean over `slots`. Raises `InputError`, as `simulate`.
    """
    parts = halves(trace)
    trials: list[Trial] = []
    done, total = 0, 2 * (len(SETTINGS) + 1)

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    for train, test, name in ((*parts, "first"), (*parts[::-1], "second")):
        means = []
        for setting in SETTINGS:
            figures = simulate(train, slots, ("auto",), per_layer=per_layer, setting=setting)
            means.append(np.mean([f.hit_rate for f in figures]))
            step()
        best = SETTINGS[int(np.argmax(means))]
        for count in slots:
            names = ("lru", "lfu", "auto", "belady")
            rates = {
                f.policy: f.hit_rate
                for f in simulate(test, [count], names, per_layer=per_layer, setting=USUAL)
            }
            (tuned,) = simulate(test, [count], ("auto",), per_layer=per_layer, setting=best)
            trials.append(
                Trial(
                    name, count, rates["lru"], rates["lfu"], rates["auto"], tuned.hit_rate,
                    rates["belady"], *best,
                )
            )  # fmt: skip
        step()
    return trials


def synthetic_routing(
    kind: str, tokens: int = 400, layers: int = 8, experts: int = 32, k: int = 4, seed: int = 1
) -> Routing:
    """Routing of `SYNTHETIC`: every expert as likely as another, favourites that stay, and
    favourites that change places a little at every token (all of them in some 60).
    """
    if kind not in SYNTHETIC:
        raise InputError(f"there is no routing {kind!r}; choose from {', '.join(SYNTHETIC)}")
    rng = np.random.default_rng(seed)
    weight = np.ones(experts) if kind == "random" else 1 / np.arange(1, experts + 1)
    order = np.array([rng.permutation(experts) for _ in range(layers)])
    choices = np.empty((tokens, layers, k), np.int16)
    for token in range(tokens):
        for layer in range(layers):
            # Gumbel's trick: k distinct ones, each by its weight.
            noisy = np.log(weight) + rng.gumbel(size=experts)
            choices[token, layer] = order[layer][np.argsort(-noisy)[:k]]
            if kind == "drifting" and rng.random() < experts / 60:
                i, j = rng.integers(experts, size=2)
                order[layer, [i, j]] = order[layer, [j, i]]
    return Routing(experts, (choices,), (np.ones(tokens, np.int32),))
