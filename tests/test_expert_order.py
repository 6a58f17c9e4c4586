"""Orders of eviction: the chain against a twin that keeps every token, and what it is worth."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.expert_simulation import replay, replay_steps, steps_of, tokens_of
from edgert.expert_tuning import synthetic_routing
from edgert.routing import Routing
from edgert.storage import expert_order
from edgert.storage.expert_order import USUAL, DecayedLfu, ExpertPolicy, Lfu, Markov, likeliest
from edgert.storage.expert_policy import Partitioned, choose_policy

LAYERS, EXPERTS, K = 3, 8, 2

Token = list[list[int]]  # of each layer the experts used
Order = TypeVar("Order", bound=ExpertPolicy)


def fed(policy: Order, tokens: list[Token], every: int) -> Order:
    """Tokens one after the other, observed after each `every` layers, as after each token."""
    stamps, clock = np.zeros(LAYERS * EXPERTS, np.int64), 0
    for token in tokens:
        for layer, experts in enumerate(token):
            clock += 1
            stamps[[layer * EXPERTS + e for e in experts]] = clock
            if clock % every == 0:
                policy.observe(stamps)
        policy.observe(stamps)
    return policy


def chances(tokens: list[Token], layer: int) -> list[float]:
    """The formula as it reads, over all that a layer has used."""
    uses = [set(token[layer]) for token in tokens]
    last, pairs = uses[-1], list(zip(uses, uses[1:], strict=False))
    pairs = [(a, b) for a, b in pairs if len(a) == len(b) == K]
    weight = [
        sum(2 ** ((at + 1 - len(uses)) / USUAL.half_life) for at, u in enumerate(uses) if e in u)
        for e in range(EXPERTS)
    ]
    found = []
    for e in range(EXPERTS):
        turns = sum(s in a for s in last for a, _ in pairs)
        followed = sum(s in a and e in b for s in last for a, b in pairs)
        often = K * weight[e] / sum(weight)
        found.append((followed + USUAL.doubt * often) / (turns + USUAL.doubt))
    return found


experts_used = st.one_of(
    st.lists(st.integers(0, EXPERTS - 1), min_size=K, max_size=K, unique=True),
    st.lists(st.integers(0, EXPERTS - 1), min_size=K, max_size=EXPERTS, unique=True),
)
texts = st.lists(st.lists(experts_used, min_size=LAYERS, max_size=LAYERS), min_size=1, max_size=25)


@settings(max_examples=40, deadline=None)
@given(texts, st.integers(1, LAYERS))
def test_the_chain_is_its_formula_however_often_it_looks(tokens: list[Token], every: int) -> None:
    policy = fed(Markov((LAYERS, EXPERTS), K), tokens, every)
    for layer in range(LAYERS):
        assert policy.chance[layer] == pytest.approx(chances(tokens, layer))
    owner = np.array([0, 9, 17, 23])
    assert (policy.ranks(owner) == policy.chance.reshape(-1)[owner]).all()


tokens_of_k = st.lists(
    st.lists(
        st.lists(st.integers(0, EXPERTS - 1), min_size=K, max_size=K, unique=True),
        min_size=LAYERS, max_size=LAYERS,
    ),
    min_size=1, max_size=25,
)  # fmt: skip


ORDERS = {
    "markov": lambda: Markov((LAYERS, EXPERTS), K),
    "decayed": lambda: DecayedLfu((LAYERS, EXPERTS)),
    "boosted": lambda: DecayedLfu((LAYERS, EXPERTS), boost=2.0),
    "lfu": lambda: Lfu((LAYERS, EXPERTS)),
}


@pytest.mark.parametrize("name", ORDERS)
@settings(max_examples=30, deadline=None)
@given(tokens_of_k, st.lists(st.integers(1, 9), min_size=1), st.integers(1, LAYERS))
def test_a_pass_teaches_what_its_tokens_would_one_by_one(
    name: str, tokens: list[Token], sizes: list[int], every: int
) -> None:
    """However many tokens a pass has, and whenever a thread looks, also between two stamps."""
    one_by_one, policy = fed(ORDERS[name](), tokens, 1), ORDERS[name]()
    stamps, clock, left = np.zeros(LAYERS * EXPERTS, np.int64), 0, tokens
    for size in sizes * len(tokens):
        some, left = np.array(left[:size], np.int64), left[size:]  # (tokens, layers, k)
        if not len(some):
            break
        chosen = list(some.transpose(1, 0, 2)) if len(some) > 1 else None
        for layer in range(LAYERS):
            clock += 1
            keys = np.unique(layer * EXPERTS + some[:, layer])
            if clock % every == 0 and chosen:
                stamps[keys[::2]] = clock
                policy.observe(stamps, chosen)
            stamps[keys] = clock
            if clock % every == 0:
                policy.observe(stamps, chosen)
        policy.observe(stamps, chosen)
    if isinstance(policy, Lfu):  # tokens of one pass have one stamp, which orders equals
        assert (policy._uses == one_by_one._uses).all()
    else:
        owner = np.arange(LAYERS * EXPERTS)
        assert policy.ranks(owner) == pytest.approx(one_by_one.ranks(owner))


def test_a_layer_seen_while_it_is_stamped_counts_once() -> None:
    """Threads that read may look between two stamps of a layer."""
    policy, stamps = Markov((1, 8), 2), np.zeros(8, np.int64)
    for clock, used in enumerate(([0, 1], [2, 3], [0, 1], [4, 5]), 1):
        for key in used:
            stamps[key] = clock
            policy.observe(stamps)
    assert policy._turns.max() == 0  # none was seen whole: nothing is said of what follows
    twice = Markov((1, 8), 2)
    for clock, used in enumerate(([0, 1], [2, 3], [0, 1], [4, 5]), 1):
        stamps[used] = clock + 4
        twice.observe(stamps)
        twice.observe(stamps)
    assert twice._turns[0].tolist() == [2, 2, 1, 1, 0, 0, 0, 0]
    assert twice._followed[0, 0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_counts_are_halved_before_a_byte_is_full() -> None:
    policy = Markov((1, 4), 1)
    stamps = np.zeros(4, np.int64)
    for clock in range(1, 700):
        stamps[clock % 2] = clock
        policy.observe(stamps)
        assert policy._turns.max() < expert_order._TURNS
        assert (policy._followed <= policy._turns[:, :, None]).all()
    assert policy.chance[0].argmax() == 700 % 2 and policy.chance[0].max() > 0.95


def test_a_profile_ranks_before_anything_was_used() -> None:
    policy = Markov((2, 4), 1, np.array([3.0, 1, 0, 0, 0, 0, 2, 2]))
    assert policy.chance.reshape(-1) == pytest.approx([0.75, 0.25, 0, 0, 0, 0, 0.5, 0.5])


def in_turns(tokens: int = 600) -> Routing:
    """Every expert as often as any other; which comes next hangs on the last, in most cases."""
    rng = np.random.default_rng(5)
    after = np.array([rng.permutation(16) for _ in range(6)])
    used = np.zeros((tokens, 6, 1), np.int16)
    for at in range(1, tokens):
        follow = after[np.arange(6), used[at - 1, :, 0]]
        used[at, :, 0] = np.where(rng.random(6) < 0.7, follow, rng.integers(0, 16, 6))
    return Routing(16, (used,), (np.ones(tokens, np.int32),))


def test_what_follows_is_kept_where_frequency_says_nothing() -> None:
    trace = in_turns()
    steps = list(steps_of(trace.requests[0], trace.passes[0], 16))
    hits = [
        replay(steps, (6, 16), 24, Partitioned((6, 16), 24, 0, order))
        for order in (Markov((6, 16), 1), DecayedLfu((6, 16), boost=2.0))
    ]
    assert hits[0] > 1.2 * hits[1]


def test_where_nothing_follows_it_loses_little_to_frequency() -> None:
    trace = synthetic_routing("skewed")
    steps = list(steps_of(trace.requests[0], trace.passes[0], 32))
    hits = [
        replay(steps, (8, 32), 64, Partitioned((8, 32), 64, 0, order))
        for order in (Markov((8, 32), 4), DecayedLfu((8, 32)))
    ]
    assert hits[0] > 0.95 * hits[1]


def test_a_prompt_says_which_experts_the_answer_uses() -> None:
    """A pass of many tokens uses nearly all experts; how often each of them is what counts."""
    trace = synthetic_routing("skewed", tokens=160)
    choices, passes = trace.requests[0], np.array([128] + [1] * 32, np.int32)
    steps, tokens = list(steps_of(choices, passes, 32)), list(tokens_of(choices, passes))
    misses = []
    for known in ((), tokens):
        policy = choose_policy(64, (8, 32), 4)
        hits = list(replay_steps(steps, (8, 32), 64, policy, tokens=known))
        misses.append(8 * 4 * 8 - sum(hits[8:][: 8 * 8]))  # of the first 8 tokens
    assert misses[1] < 0.8 * misses[0]


def test_many_experts_and_many_slots_are_ordered_by_frequency() -> None:
    """Counts of what follows lie in memory that the plan has for small things."""
    assert likeliest((48, 128), 8, 0).name == "markov"
    assert likeliest((60, 384), 8, 0).name == "lfu-decay"
    assert [likeliest((16, 64), 8, slots).name for slots in (512, 513)] == ["markov", "lfu-decay"]
    made = likeliest((16, 64), 8, 512)
    assert isinstance(made, Markov)
    assert made._followed.nbytes == 16 * 64 * 64 <= expert_order._MOST_COUNTS
