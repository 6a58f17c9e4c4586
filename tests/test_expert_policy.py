"""Expert policies: what each evicts, what liars cost, and the simulator against plain twins."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import InputError
from edgert.expert_simulation import SIMULATED, replay, simulate
from edgert.expert_tuning import synthetic_routing
from edgert.routing import Routing, join_passes
from edgert.storage.expert_order import DecayedLfu, Lru
from edgert.storage.expert_policy import (
    POLICIES,
    Partitioned,
    Predicted,
    Robust,
    choose_policy,
    make_policy,
)


def routing(tokens: int, layers: int, experts: int, k: int, seed: int = 1) -> Routing:
    """Routing with favourites, which are others after every 60 tokens for half of the layers."""
    rng = np.random.default_rng(seed)
    weight = 1 / np.arange(1, experts + 1)
    order = np.array([rng.permutation(experts) for _ in range(layers)])
    picks = []
    for token in range(tokens):
        if token % 60 == 59:
            order[token // 60 % 2 :: 2] = [
                rng.permutation(experts) for _ in order[token // 60 % 2 :: 2]
            ]
        chance = weight / weight.sum()
        picks.append([layer[rng.choice(experts, k, False, chance)] for layer in order])
    return join_passes([np.array([token], np.int16) for token in picks], experts)


def steps_of(trace: Routing) -> list[np.ndarray]:
    choices = trace.requests[0].astype(np.int64)
    return [
        np.sort(token[la] + la * trace.experts) for token in choices for la in range(trace.layers)
    ]


def lru_hits(steps: list[np.ndarray], slots: int) -> int:
    """LRU as everybody writes it: an ordered dictionary."""
    cache: dict[int, None] = {}
    hits = 0
    for keys in steps:
        here = [key for key in keys.tolist() if key in cache]
        hits += len(here)
        for key in here:
            del cache[key]
        for key in [key for key in keys.tolist() if key not in here]:
            if len(cache) + len(here) >= slots:
                del cache[next(iter(cache))]
            cache[key] = None
        # Keys of a layer are used at once: of equals the lower slot leaves, which we do not model.
        cache |= dict.fromkeys(here)
    return hits


def best_hits(steps: list[np.ndarray], slots: int) -> int:
    """The most hits there can be, by trying every eviction."""
    states = {frozenset(): 0}
    for keys in (set(step.tolist()) for step in steps):
        after: dict[frozenset[int], int] = {}
        for cache, hits in states.items():
            full, gained = cache | keys, hits + len(keys & cache)
            spare = sorted(full - keys)
            for gone in combinations(spare, max(len(full) - slots, 0)):
                kept = frozenset(full - set(gone))
                after[kept] = max(after.get(kept, 0), gained)
        states = after
    return max(states.values())


@pytest.mark.parametrize("seed", range(4))
def test_belady_is_the_optimum_and_nothing_beats_it(seed: int) -> None:
    trace = routing(14, 2, 4, 2, seed)
    for slots in (3, 4, 5):
        figures = {f.policy: f.hit_rate for f in simulate(trace, [slots])}
        most = best_hits(steps_of(trace), slots) / trace.requests[0].size
        assert figures["belady"] == pytest.approx(most)
        assert max(figures.values()) == figures["belady"]


def test_one_expert_a_layer_hits_as_a_dictionary_does() -> None:
    trace = routing(300, 3, 8, 1)
    steps = steps_of(trace)
    for slots in range(3, 24, 4):
        assert replay(steps, (3, 8), slots, Lru((3, 8))) == lru_hits(steps, slots)


def test_below_one_token_lru_hits_nothing_and_the_choice_does() -> None:
    trace = routing(400, 4, 8, 2)
    for slots in (3, 4, 6):  # the experts of all layers but one are between two uses of one
        rates = {f.policy: f.hit_rate for f in simulate(trace, [slots])}
        assert rates["lru"] == 0
        assert rates["auto"] >= 0.35 * (slots - 2) / 8 > 0  # two are nobody's
        assert rates["auto"] >= max(rates[name] for name in POLICIES) - 0.08


def test_above_one_token_the_choice_beats_lru_and_lfu_in_the_median() -> None:
    trace = routing(400, 4, 16, 2, seed=3)
    gains = []
    for slots in range(10, 60, 8):
        rates = {f.policy: f.hit_rate for f in simulate(trace, [slots], ("lru", "lfu", "auto"))}
        gains.append((rates["auto"] - rates["lru"], rates["auto"] - rates["lfu"]))
    assert (np.median(gains, axis=0) > 0).all()


class _Liar:
    """Keeps all but what was used last."""

    def __init__(self) -> None:
        self.order = Lru((4, 8))

    def keeps(self, owner: np.ndarray) -> np.ndarray:
        seen = self.order.seen[owner]
        return seen < np.quantile(seen, 0.8)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 31), st.integers(0, 1000))
def test_a_predictor_that_lies_costs_no_more_than_promised(slots: int, seed: int) -> None:
    trace = routing(150, 4, 8, 2, seed)
    steps = steps_of(trace)
    uses = sum(map(len, steps))
    liar = _Liar()
    policy = Robust((4, 8), slots, Predicted(liar.keeps, liar.order))
    misses = uses - replay(steps, (4, 8), slots, policy)
    assert misses == policy.misses
    lru = uses - replay(steps, (4, 8), slots, Lru((4, 8)))
    assert misses <= 1.05 * lru + 2 * slots + 4 * 2


def test_a_liar_is_found_out() -> None:
    """Unguarded, the same lies cost several times as much, so the guard has something to do."""
    trace = routing(600, 4, 8, 2)
    steps, slots = steps_of(trace), 16
    uses = sum(map(len, steps))
    lies = [_Liar(), _Liar()]
    free = uses - replay(steps, (4, 8), slots, Predicted(lies[0].keeps, lies[0].order))
    guarded = Robust((4, 8), slots, Predicted(lies[1].keeps, lies[1].order))
    misses = uses - replay(steps, (4, 8), slots, guarded)
    lru = uses - replay(steps, (4, 8), slots, Lru((4, 8)))
    assert misses <= 1.05 * lru + 2 * slots < free
    assert guarded.lru_misses == pytest.approx(lru, rel=0.05)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 40)), min_size=1, max_size=40))
def test_decayed_weights_are_the_sum_over_uses(uses: list[tuple[int, int]]) -> None:
    life = 48.0
    policy, stamps = DecayedLfu((1, 8), None, life), np.zeros(8, np.int64)
    weight, clock = np.zeros(8), 0
    for key, wait in uses:
        clock += wait
        weight *= 2 ** (-wait / life)
        weight[key] += 1
        stamps[key] = clock
        policy.observe(stamps)
    assert np.allclose(2 ** (policy.score - clock / life), weight)


def test_a_partition_keeps_the_best_of_each_layer() -> None:
    order = DecayedLfu((2, 4))
    policy = Partitioned((2, 4), 5, 1, order)  # two a layer, one slot to pass through
    for stamps in ([1, 1, 1, 0, 2, 2, 0, 0], [3, 3, 1, 0, 4, 2, 0, 0]):
        policy.observe(np.array(stamps, np.int64))
    owner = np.array([0, 1, 2, 4, 5])
    assert owner[np.argmin(policy.ranks(owner))] == 2
    owner = np.array([0, 1, 4, 5, 6])
    assert owner[np.argmin(policy.ranks(owner))] == 6


@pytest.mark.parametrize("size", [24, 64])
def test_long_passes_miss_little_more_than_the_optimum(size: int) -> None:
    """Each expert is wanted once a pass, in the order of layers: LRU hits nothing."""
    one = synthetic_routing("random", tokens=6 * size)
    trace = Routing(32, one.requests, (np.full(6, size, np.int32),))
    for slots in (20, 60, 100, 150, 200, 240):
        found = simulate(trace, [slots], ("lru", "auto", "belady"))
        misses = {f.policy: f.misses_per_token for f in found}
        assert misses["auto"] <= 1.15 * misses["belady"], slots
        assert misses["auto"] < misses["lru"] or slots < 64, slots


def test_a_layer_of_a_long_pass_takes_the_slots_of_the_one_before() -> None:
    policy = Partitioned((3, 4), 8, 0, DecayedLfu((3, 4)))
    # Layers 0 and 1 have four experts each; layer 2 wants its four: two of each may stay.
    for clock, used in enumerate(([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]), 1):
        stamps = policy._seen.copy()
        stamps[used] = clock
        policy.observe(stamps)
    order = np.argsort(policy.ranks(np.arange(8)))
    assert order[:2].tolist() == [6, 7] and sorted(order[:4].tolist()) == [2, 3, 6, 7]


def test_the_choice_is_by_the_working_set() -> None:
    assert [choose_policy(n, (4, 8), 2).name for n in (2, 7, 8, 31, 32)] == [
        "partition", "partition", "robust", "robust", "lru",
    ]  # fmt: skip


def test_a_profile_helps_a_cold_start_and_pins() -> None:
    trace, earlier = routing(40, 4, 16, 2, seed=5), routing(41, 4, 16, 2, seed=5)
    names = ("auto", "pinned")
    without = {f.policy: f.hit_rate for f in simulate(trace, [20], names)}
    known = {f.policy: f.hit_rate for f in simulate(trace, [20], names, profile=earlier.uses())}
    assert known["auto"] > without["auto"] and known["pinned"] > without["pinned"]


def test_everything_kept_misses_each_expert_once() -> None:
    trace = routing(100, 2, 4, 2)
    for figure in simulate(trace, [8], SIMULATED):
        assert figure.misses_per_token * 100 == pytest.approx(np.count_nonzero(trace.uses()))


def test_layers_apart_are_traces_of_one_layer() -> None:
    trace = routing(80, 3, 8, 2)
    whole = {f.policy: f.hit_rate for f in simulate(trace, [12], per_layer=True)}
    for name in SIMULATED:
        rates = []
        for layer in range(3):
            one = Routing(8, (trace.requests[0][:, layer : layer + 1],), trace.passes)
            rates += [f.hit_rate for f in simulate(one, [4], [name])]
        assert whole[name] == pytest.approx(np.mean(rates)), name


@pytest.mark.parametrize(
    ("slots", "policies", "per_layer", "says"),
    [
        ([1], ("lru",), False, "from 2 to 32"),
        ([33], ("lru",), False, "from 2 to 32"),
        ([-5], ("lru",), False, "from 2 to 32"),
        ([4], ("lru",), True, "from 8 to 32"),
        ([9], ("lru",), True, "no whole number"),
        ([8], ("best",), False, "no policy 'best'"),
    ],
)
def test_nonsense_is_refused(slots, policies, per_layer, says) -> None:
    with pytest.raises(InputError, match=says):
        simulate(routing(4, 4, 8, 2), slots, policies, per_layer=per_layer)


def test_a_profile_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="profile is of 2 layers"):
        simulate(routing(4, 4, 8, 2), [8], profile=np.ones((2, 8)))


def test_every_policy_can_be_made() -> None:
    for name in POLICIES:
        made = make_policy(name, 8, (4, 8), 2)
        assert made.name == ("predicted" if name == "pinned" else name)
