"""What a longer pass is worth, and that the budget is filled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edgert.plan import PlanOptions, plan_memory
from edgert.plan_policy import LARGE, PASSES, SMALL, USUAL, rates_of, turn_seconds
from edgert.units import GIB, MIB
from tests.device import profile
from tests.test_plan import MODELS, manifest_of
from tests.tight import PROCESS
from tests.tiny_specs import tiny

EIGHT_B = tiny(
    "llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, head_dim=128,
    num_key_value_heads=4, intermediate_size=14336, vocab_size=512, rope_dim=128,
    max_position_embeddings=4096,
)  # fmt: skip
MODELS["8b"] = EIGHT_B
EXPECTED_PROCESS = 137 * MIB  # with so small a vocabulary, loading.py


@pytest.mark.parametrize("gib", [2, 3])
@pytest.mark.parametrize("disk", [None, 0.2e9, 1e9, 3e9])
def test_large_budgets_hold_weights(gib: int, disk: float | None) -> None:
    wanted = PlanOptions(gib * GIB, threads=2, context_length=2048)
    with_profile = None if disk is None else profile(disk)
    found = plan_memory(EIGHT_B, manifest_of("8b"), wanted, EXPECTED_PROCESS, None, with_profile)
    assert found.streamed_bytes
    assert found.resident_bytes >= (0.84 if disk == 0.2e9 else 0.85) * found.budget_bytes
    # Filled to the last slot: not one more tile would fit.
    assert found.budget_bytes - found.total_bytes < found.slot_bytes


def test_a_small_budget_still_reads_a_prompt_in_few_passes() -> None:
    """At 256 MiB the keys and values alone are beyond their share; passes must not shrink to 1."""
    found = plan_memory(
        EIGHT_B, manifest_of("8b"), PlanOptions(256 * MIB, threads=2), EXPECTED_PROCESS
    )
    assert found.prefill_tokens >= 64


@pytest.mark.parametrize("gib", [0.5, 1, 2, 3])
@pytest.mark.parametrize("disk", [0.1e9, 1e9, 4e9])
def test_the_chosen_pass_is_the_fastest_of_all(gib: float, disk: float) -> None:
    """The slow twin: every pass is planned whole, and its turn computed from the plan."""
    with_profile, budget = profile(disk), int(gib * GIB)
    rates = rates_of(with_profile, 2)

    def turn(tokens: int | None) -> tuple[float, int]:
        wanted = PlanOptions(budget, threads=2, context_length=512, prefill_tokens=tokens)
        found = plan_memory(
            EIGHT_B, manifest_of("8b"), wanted, EXPECTED_PROCESS, NEEDS, with_profile
        )
        streamed = sum(t.nbytes for t in found.tiles if t.stream_index >= 0)
        nbytes = sum(t.nbytes for t in found.tiles)
        weights = nbytes * 32 // 18  # Q4_0
        seconds = turn_seconds(streamed, nbytes, weights, found.prefill_tokens, rates)
        return seconds, found.prefill_tokens

    chosen, tokens = turn(None)
    assert tokens in PASSES
    assert chosen <= 1.002 * min(turn(n)[0] for n in PASSES)


NEEDS: dict[int, Any] = {}


def test_a_slower_disk_makes_passes_longer() -> None:
    def tokens(disk: float) -> int:
        wanted = PlanOptions(2 * GIB, threads=2, context_length=2048)
        return plan_memory(
            EIGHT_B, manifest_of("8b"), wanted, EXPECTED_PROCESS, NEEDS, profile(disk)
        ).prefill_tokens

    chosen = [tokens(disk) for disk in (0.1e9, 1e9, 10e9)]
    assert chosen == sorted(chosen, reverse=True) and chosen[0] > chosen[-1]


def test_a_plan_is_pure_with_a_profile_too() -> None:
    wanted = PlanOptions(GIB, threads=2)
    plans = [
        plan_memory(EIGHT_B, manifest_of("8b"), wanted, PROCESS, NEEDS, profile(1e9))
        for _ in range(2)
    ]
    assert plans[0] == plans[1]


def test_a_device_gets_the_requests_it_wants() -> None:
    slow = tuple(
        replace(r, bytes_per_s=r.bytes_per_s / (1 if r.request_bytes >= 2 * MIB else 3))
        for r in profile().reads
    )
    wanted = PlanOptions(GIB, threads=2)
    found = [
        plan_memory(EIGHT_B, manifest_of("8b"), wanted, PROCESS, NEEDS, p)
        for p in (None, profile(1e9), profile(3e9), profile(reads=slow))
    ]
    assert [p.tile_bytes for p in found] == [USUAL[0], SMALL[0], USUAL[0], LARGE[0]]
    assert found[3].reader_threads == LARGE[1]


def test_the_caller_may_fix_the_pass() -> None:
    for tokens in (1, 24, 512):
        wanted = PlanOptions(GIB, threads=2, prefill_tokens=tokens)
        found = plan_memory(EIGHT_B, manifest_of("8b"), wanted, PROCESS, NEEDS, profile(1e8))
        assert found.prefill_tokens == tokens
