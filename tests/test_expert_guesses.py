"""Prefetchers in the simulator: what they guess, and what reading ahead by them gives."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from edgert.errors import InputError
from edgert.expert_guesses import GUESSERS, make_guesser
from edgert.expert_simulation import simulate
from edgert.routing import Routing

_Choices = npt.NDArray[np.int16]


def trace_of(choices: _Choices, experts: int) -> Routing:
    passes = np.ones(len(choices), np.int32)
    return Routing(experts, (choices,), (passes,))


def cycle(tokens: int) -> _Choices:
    """Two layers of 2 of 8; token t uses the pair t mod 4, the second layer the pair behind."""
    pairs = np.array([[0, 1], [2, 3], [4, 5], [6, 7]], np.int16)
    turn = np.arange(tokens) % 4
    return np.stack([pairs[turn], pairs[(turn + 1) % 4]], axis=1)


def test_transitions_are_counted_as_a_loop_does() -> None:
    rng, guesser = np.random.default_rng(2), make_guesser("transitions", 3, 8)
    counts, before = np.zeros((3, 8, 8)), np.zeros(0, np.int64)
    for _ in range(60):
        for layer in range(3):
            beside = np.zeros(8)
            for b in before:
                beside += counts[layer, b]
            likely = sorted(range(8), key=lambda e: (-beside[e], e))[:3]  # noqa: B023
            assert guesser.guess(layer, 3).tolist() == [e for e in likely if beside[e]]
            used = np.sort(rng.choice(8, 3, replace=False))
            guesser.learn(layer, used)
            for b in before:
                for e in used:
                    counts[layer, b, e] += 1
            before = used


def test_the_last_token_is_guessed_again() -> None:
    guesser = make_guesser("last", 2, 8)
    assert guesser.guess(0, 2).size == 0
    guesser.learn(0, np.array([3, 5]))
    assert guesser.guess(0, 2).tolist() == [3, 5] and guesser.guess(1, 2).size == 0


def test_a_cycle_that_no_cache_hits_is_read_ahead_by_transitions() -> None:
    """After one round transitions know it; the last token's experts are never those of this."""
    trace = trace_of(cycle(40), 8)
    found = {f.policy: f for f in simulate(trace, [8], ["lru", "lru+transitions", "lru+last"])}
    assert found["lru"].hit_rate == 0 == found["lru"].wasted_per_token
    ahead = found["lru+transitions"]
    assert ahead.hit_rate == pytest.approx(1 - 16 / 160, abs=0.02)
    assert ahead.wasted_per_token == 0
    assert found["lru+last"].hit_rate == 0


@pytest.mark.parametrize("slots", [2, 3, 5, 8, 15, 16])
@pytest.mark.parametrize("name", [f"{p}+{g}" for p in ("lru", "auto", "robust") for g in GUESSERS])
def test_any_number_of_slots(name: str, slots: int) -> None:
    rng = np.random.default_rng(slots)
    choices = np.stack([[rng.choice(8, 2, replace=False) for _ in range(2)] for _ in range(50)])
    trace = trace_of(np.sort(choices).astype(np.int16), 8)
    plain, ahead = simulate(trace, [slots], [name.partition("+")[0], name])
    assert ahead.policy == name and 0 <= ahead.hit_rate <= 1
    assert ahead.wasted_per_token <= 4
    if slots < 4:  # a quarter of the slots is none
        assert ahead.hit_rate == plain.hit_rate and ahead.wasted_per_token == 0
    if slots == 16:
        assert ahead.hit_rate >= plain.hit_rate


@pytest.mark.parametrize("name", ["belady+last", "lru+nothing", "+last", "nothing+last"])
def test_names_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"add \+last or \+transitions to another than belady"):
        simulate(trace_of(cycle(4), 8), [8], [name])
