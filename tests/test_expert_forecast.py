"""What a pass will have to read: replayed from a profile, and what the planner makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgert.expert_forecast import forecast_misses
from edgert.expert_profile import ENVIRONMENT, ExpertLearner, Identity
from edgert.expert_tuning import synthetic_routing
from edgert.plan import PlanOptions, plan_memory
from edgert.plan_policy import PASSES, ExpertLoad, expert_turn_seconds, rates_of
from edgert.units import GIB, MIB
from tests.command import inside
from tests.device import PROFILE, profile
from tests.test_plan import MODELS, manifest_of
from tests.tight import PROCESS, tight
from tests.tiny_specs import tiny

MODELS["wide-moe"] = tiny(
    "olmoe", hidden_size=1024, num_hidden_layers=8, intermediate_size=512,
    moe_intermediate_size=512, num_experts=32, num_experts_per_tok=4, vocab_size=512,
    max_position_embeddings=4096,
)  # fmt: skip


def learnt(kind: str, tokens: int = 300) -> Any:
    trace = synthetic_routing(kind, tokens=tokens)
    learner = ExpertLearner(Identity("0" * 20, "m", trace.layers, trace.experts, trace.k))
    learner.add(trace.requests[0])
    return learner.profile(None)


def test_without_a_profile_nothing_is_forecast() -> None:
    assert forecast_misses(None, 10, 64) is None
    assert forecast_misses(learnt("skewed", 10), 10, 64) is None


def test_favourites_are_missed_less_than_even_routing_is() -> None:
    even = ExpertLoad.of(8, 32, 4, 1)
    for slots in (40, 100, 200):
        skewed, random = (forecast_misses(learnt(k), slots, 64) for k in ("skewed", "random"))
        assert skewed is not None and random is not None
        assert skewed(1) < random(1)
        assert random(1) == pytest.approx(even.missed(1, slots), rel=0.15)
        # A layer of a long pass needs slots for all it uses: those are not kept over the pass.
        assert 1 <= random(64) / even.missed(64, slots) <= 1.15
        assert skewed(64) <= random(64) + 1


def test_more_slots_miss_less_and_all_of_them_nothing() -> None:
    known = learnt("skewed")
    misses = [forecast_misses(known, slots, 32)(1) for slots in (32, 64, 128, 192, 256)]  # type: ignore[misc]
    assert misses == sorted(misses, reverse=True) and misses[0] > 2 and misses[-1] < 0.3


def test_what_a_pass_uses_is_the_union_of_its_tokens() -> None:
    load, rng = ExpertLoad.of(3, 16, 4, 1), np.random.default_rng(1)
    assert load.used(1) == pytest.approx(3 * 4)
    unions = [
        sum(len({e for _ in range(10) for e in rng.permutation(16)[:4]}) for _ in range(3))
        for _ in range(300)
    ]
    assert load.used(10) == pytest.approx(np.mean(unions), rel=0.02)
    assert load.missed(10, 48) == 0


def test_what_a_profile_says_takes_the_place_of_even_chances() -> None:
    even = ExpertLoad.of(8, 32, 4, 1)
    skewed, random = (learnt(kind) for kind in ("skewed", "random"))
    for known in (skewed, random):
        assert known.chances.shape == (8, 32) and known.chances.max() <= 1
        assert known.chances.sum() == pytest.approx(8 * 4, rel=0.01)
        load = ExpertLoad.of(8, 32, 4, 1, known.chances)
        sample = known.sample.astype(int)
        for n in (1, 8, 64):  # the union of n tokens, counted
            unions = [
                sum(len(np.unique(sample[at : at + n, layer])) for layer in range(8))
                for at in range(0, len(sample) - n + 1, n)
            ]
            assert load.used(n) == pytest.approx(np.mean(unions), rel=0.05)
            assert load.used(n) <= 1.001 * even.used(n)
            assert load.missed(n, 256) == 0
    assert ExpertLoad.of(8, 32, 4, 1, skewed.chances).missed(1, 64) < 0.7 * even.missed(1, 64)


@pytest.mark.parametrize("mib", [190, 240, 300])
@pytest.mark.parametrize("disk", [0.1e9, 1e9, 4e9])
@pytest.mark.parametrize("kind", ["", "skewed"])
def test_the_chosen_pass_is_the_fastest_of_all(mib: int, disk: float, kind: str) -> None:
    """The slow twin: every pass is planned whole, and its turn computed from the plan."""
    with_profile, spec = profile(disk), MODELS["wide-moe"]
    chances = learnt(kind).chances if kind else None
    needs: dict[int, Any] = {}

    def turn(tokens: int | None) -> tuple[float, int]:
        wanted = PlanOptions(mib * MIB, threads=2, context_length=512, prefill_tokens=tokens)
        manifest = manifest_of("wide-moe")
        found = plan_memory(spec, manifest, wanted, PROCESS, needs, with_profile, chances)
        load = ExpertLoad.of(8, 32, 4, found.expert_slot_bytes, chances)
        streamed = sum(t.nbytes for t in found.tiles if t.stream_index >= 0)
        rates = rates_of(with_profile, 2)
        seconds = expert_turn_seconds(
            load, found.expert_slots, streamed, found.prefill_tokens, rates
        )
        return seconds, found.prefill_tokens

    chosen, tokens = turn(None)
    assert tokens in PASSES
    assert chosen <= 1.01 * min(turn(n)[0] for n in PASSES)


def test_all_in_memory_takes_the_comfortable_pass() -> None:
    wanted = PlanOptions(8 * GIB, threads=2)
    found = plan_memory(MODELS["wide-moe"], manifest_of("wide-moe"), wanted, PROCESS)
    assert found.prefill_tokens == 256


def test_an_engine_and_plan_predict_from_the_profile(
    tiny_moe_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "p.npz"))
    monkeypatch.setattr("edgert.engine.load_profile", lambda files, threads: PROFILE)
    monkeypatch.setattr("edgert.forecasting._profile", lambda *_: (PROFILE, True))
    options = ("-c", 64, "-t", 2)
    told = inside("plan", tiny_moe_gguf, "-b", "1GiB", *options, "--json").stdout
    budget = json.loads(told)["floor_bytes"] + (1 << 20)
    arguments = ("plan", tiny_moe_gguf, "-b", budget, *options)
    assert "no profile of this model" in inside(*arguments).stdout
    found = []
    for _ in range(2):
        with tight(tiny_moe_gguf, 2400 * 1024, prefill_tokens=1) as engine:
            assert engine.prediction is not None and engine.experts is not None
            engine.generate([1, 5, 9], max_tokens=60, temperature=0)
            hits, misses = engine.experts.counts
            found.append((engine.prediction, hits / (hits + misses)))
            stats = engine.last_stats
    (first, _), (second, measured) = found
    assert first.even_routing and not second.even_routing
    assert stats is not None and stats.predicted_tok_s == second.decode_tok_s
    assert second.hit_rate == pytest.approx(measured, abs=0.08)
    text = inside(*arguments).stdout
    assert re.search(r"^experts +\d+ % of those a token uses are in memory", text, re.MULTILINE)
