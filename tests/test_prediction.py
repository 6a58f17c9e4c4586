"""The analytic model of a pass: its bounds, its terms, and what an engine makes of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edgert
from edgert import engine as engine_module
from edgert.device_profile import ReadRate
from edgert.plan import Plan
from edgert.prediction import (
    _DEMAND,
    _WAKE_SECONDS,
    _WAVE_SECONDS,
    TOKEN_SECONDS,
    Prediction,
    predict,
)
from edgert.units import GIB
from tests.command import inside
from tests.device import PROFILE, profile
from tests.test_plan import MODELS, ends, manifest_of, plan
from tests.tight import tight


def predicted(name: str, found: Plan, **options: Any) -> Prediction:
    with_profile = options.pop("profile", PROFILE)
    result = predict(found, MODELS[name], manifest_of(name), with_profile, **options)
    assert result is not None
    return result


def test_a_streamed_pass_by_hand() -> None:
    """A disk so slow that nothing else counts, and one so fast that it does not."""
    found = plan("dense-wide", GIB // 2, context_length=512)
    assert found.streamed_bytes
    slow = predicted("dense-wide", found, device_bytes_per_s=1e6)
    assert slow.decode.flash == found.streamed_bytes / 1e6
    assert slow.decode_tok_s == pytest.approx(1e6 / found.streamed_bytes, rel=1e-3)
    assert slow.limit == "flash"
    # At half its rate while the cores compute, they cost the disk half their time.
    usual = predicted("dense-wide", found)
    cores = usual.decode.memory + usual.decode.compute + usual.decode.attention
    expected = found.streamed_bytes / 2e9 + 0.5 * cores + usual.decode.overhead
    assert usual.decode.total == pytest.approx(expected)
    assert usual.decode.contention == pytest.approx(0.5 * cores)
    # A throttled disk loses nothing to the cores: they leave it more than it may deliver.
    throttled = predicted("dense-wide", found, device_bytes_per_s=0.8e9)
    assert throttled.decode.contention == pytest.approx(0, abs=1e-12)


def test_a_resident_pass_by_hand() -> None:
    found = plan("dense-wide", 8 * GIB, context_length=512)
    result = predicted("dense-wide", found, position=0)
    nbytes = sum(tile.nbytes for tile in found.tiles)
    assert result.decode.flash == result.decode.repack == result.decode.contention == 0
    assert result.decode.memory == pytest.approx(nbytes / 32e9)
    assert result.decode.overhead >= TOKEN_SECONDS
    assert result.limit == "memory" and not result.even_routing
    # A kernel far below the rate of memory is limited by its arithmetic, and says so.
    fast = profile(memory_bytes_per_s=100e9)
    assert predicted("dense-wide", found, profile=fast).limit == "compute"
    # A prompt is arithmetic: every weight once a token, the head's once.
    weights = sum(t.rows * manifest_of("dense-wide").tensors[t.tensor].shape[-1]
                  for t in found.tiles if not t.is_head)  # fmt: skip
    assert result.prefill.compute == pytest.approx(256 * weights / 300e9)


@pytest.mark.parametrize("name", ["dense-wide", "tied-half-b", "64-experts"])
def test_more_of_anything_is_never_predicted_slower(name: str) -> None:
    floor, full = ends(name, context_length=256, prefill_tokens=64)
    speeds = []
    for i in range(9):
        budget = floor + (full - floor) * i // 8
        found = plan(name, budget, context_length=256, prefill_tokens=64)
        by_disk = [predicted(name, found, device_bytes_per_s=rate) for rate in (1e8, 5e8, 2e9, 8e9)]
        decode = [result.decode_tok_s for result in by_disk]
        assert decode == sorted(decode)
        assert all(result.decode_tok_s > 0 and result.prefill_tok_s > 0 for result in by_disk)
        speeds.append(decode[1])
    assert all(more > 0.99 * less for less, more in zip(speeds, speeds[1:], strict=False))


def test_a_longer_context_costs_time() -> None:
    found = plan("dense-wide", 8 * GIB, context_length=4096)
    near, far = (predicted("dense-wide", found, position=p) for p in (0, 4000))
    kv = found.region("KV cache").nbytes / 4096 * 4000
    assert far.decode.attention - near.decode.attention == pytest.approx(kv / 32e9)
    assert far.decode_tok_s < near.decode_tok_s


def test_experts_that_are_missing_are_a_guess_and_marked() -> None:
    floor, full = ends("64-experts", context_length=512)
    whole = predicted("64-experts", plan("64-experts", full, context_length=512))
    half = predicted("64-experts", plan("64-experts", (floor + full) // 2, context_length=512))
    assert not whole.even_routing and half.even_routing
    assert whole.decode_tok_s > half.decode_tok_s
    # One token needs 8 of 64 experts: about an eighth of their weights.
    assert whole.decode.memory < 0.35 * plan("64-experts", full).resident_bytes / 32e9


def _half(**options: Any) -> tuple[Plan, Prediction]:
    floor, full = ends("64-experts", context_length=512)
    found = plan("64-experts", (floor + full) // 2, context_length=512)
    return found, predicted("64-experts", found, **options)


def test_missing_experts_wait_for_their_router_in_every_layer() -> None:
    found, usual = _half(misses=lambda tokens: 32.0)
    cores = usual.decode.memory + usual.decode.compute + usual.decode.attention
    reading = 32 * found.expert_bytes / (2e9 * _DEMAND)
    latency = 256 * 1024 * (1 / 0.3e9 - 1 / 2e9)
    wait = _WAKE_SECONDS + latency + found.staging_bytes / 8e9 + _WAVE_SECONDS
    slow = replace(PROFILE, reads=(*PROFILE.reads, ReadRate(256 * 1024, 1, 0.3e9)))
    _, late = _half(misses=lambda tokens: 32.0, profile=slow)
    total = cores + _missing(32) * wait + reading + late.decode.overhead
    assert late.decode.total == pytest.approx(total)
    assert late.decode_tok_s < usual.decode_tok_s


def test_only_layers_that_miss_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = MODELS["64-experts"].num_hidden_layers
    totals = []
    for seconds in (_WAKE_SECONDS, _WAKE_SECONDS + 1):
        monkeypatch.setattr("edgert.prediction._WAKE_SECONDS", seconds)
        totals.append([_half(misses=lambda _, n=n: n)[1].decode.total for n in (0.1, 1.0, 1e9)])
    few, one, all_ = (after - before for before, after in zip(*totals, strict=True))
    assert few == pytest.approx(0.1, rel=0.1) and one == pytest.approx(1, rel=0.1)
    assert all_ == pytest.approx(layers)


def test_what_lies_as_in_its_slot_is_not_placed() -> None:
    floor, full = ends("64-experts", context_length=512)
    found = plan("64-experts", (floor + full) // 2, context_length=512)
    manifest = manifest_of("64-experts")
    tensors = {
        name: replace(t, layout="tiles") if len(t.shape) == 3 else t
        for name, t in manifest.tensors.items()
    }
    packed = replace(manifest, tensors=tensors)
    totals = []
    for each in (manifest, packed):
        result = predict(found, MODELS["64-experts"], each, PROFILE, misses=lambda _: 1e9)
        assert result is not None
        totals.append(result.decode.total)
    layers = MODELS["64-experts"].num_hidden_layers
    assert totals[0] - totals[1] == pytest.approx(layers * found.staging_bytes / 8e9)


def test_a_disk_that_is_faster_now_answers_sooner() -> None:
    slow = profile(disk=0.4e9, burst_bytes_per_s=0.4e9)
    slow = replace(slow, reads=(*slow.reads, ReadRate(256 * 1024, 1, 0.05e9)))
    totals = []
    for rate in (0.0, 0.8e9):
        _, result = _half(misses=lambda _: 32.0, profile=slow, device_bytes_per_s=rate)
        totals.append(result.decode.total - result.decode.flash / _DEMAND)
    latency = slow.latency_seconds
    assert totals[0] - totals[1] == pytest.approx(latency / 2 * _missing(32), rel=0.01)


def _missing(misses: float) -> float:
    """Of the layers of `_half`, those that miss any."""
    spec = MODELS["64-experts"]
    layers, k = spec.num_hidden_layers, spec.num_experts_per_tok
    return layers * (1 - (1 - misses / (layers * k)) ** k)


def test_a_long_pass_computes_experts_while_others_are_read() -> None:
    count = MODELS["64-experts"].num_hidden_layers * 64
    found, result = _half(misses=lambda tokens: min(8.0 * tokens, count / 2))
    terms = result.prefill
    cores, reading = terms.memory + terms.compute + terms.attention, terms.flash / _DEMAND
    assert max(cores, reading) < terms.total < 0.85 * (cores + reading)
    assert found.prefill_tokens >= 64


def test_a_disk_held_to_a_rate_gives_more_in_the_time_of_a_layer() -> None:
    """What it grants in advance covers the rests between layers, and no more than that."""
    found, held = _half(misses=lambda tokens: 32.0, device_bytes_per_s=0.5e9)
    slow = profile(disk=0.5e9, burst_bytes_per_s=0.5e9)
    _, always = _half(misses=lambda tokens: 32.0, device_bytes_per_s=0.5e9, profile=slow)
    flash = 32 * found.expert_bytes / 0.5e9
    assert held.decode.flash == always.decode.flash == pytest.approx(flash)
    assert flash <= held.decode.total < 0.85 * always.decode.total


def test_a_format_that_was_not_measured_gives_no_prediction() -> None:
    found = plan("dense-wide", GIB)
    nothing = profile(kernels={})
    assert predict(found, MODELS["dense-wide"], manifest_of("dense-wide"), nothing) is None


def test_the_dictionary_is_plain() -> None:
    result = predicted("dense-wide", plan("dense-wide", GIB))
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["decode_tok_s"] == result.decode_tok_s
    assert set(plain["decode"]) >= {"flash", "memory", "compute", "repack", "overhead", "total"}


# ------------------------------------------------------------------------ an engine


def test_an_engine_predicts_at_the_rate_it_has_just_measured(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[float] = []
    monkeypatch.setattr(engine_module, "load_profile", lambda files, threads: PROFILE)
    monkeypatch.setattr(engine_module, "note_drift", lambda p, files, rate: noted.append(rate))
    with tight(tiny_gguf) as engine:
        assert engine.prediction is not None
        assert noted == []  # the profile's own rate, until the disk is measured
        engine.measure_device(0.01)
        engine.generate([1, 5, 9], max_tokens=3)
        assert engine.last_stats is not None
        assert engine.last_stats.predicted_tok_s == engine.prediction.decode_tok_s > 0
        assert noted == [engine.device_bytes_per_s]
        assert engine.prediction.device_bytes_per_s <= engine.device_bytes_per_s
    with tight(tiny_gguf, None) as engine:  # resident: no rate was measured
        assert engine.prediction is not None and engine.prediction.decode.flash == 0
        assert len(noted) == 1


def test_a_machine_that_was_never_profiled_predicts_nothing(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "load_profile", lambda files, threads: None)
    with edgert.load(tiny_gguf, threads=2) as engine:
        assert engine.prediction is None
        assert engine.generate([1, 5, 9], max_tokens=2).stats.predicted_tok_s == 0.0


# ------------------------------------------------------------------------ the command


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A machine with `PROFILE`; the list says whether it can be kept."""
    kept = [True]
    monkeypatch.setattr("edgert.forecasting._profile", lambda *_: (PROFILE, kept[0]))
    return kept


def test_plan_predicts(tiny_gguf: Path, profiled: list[bool]) -> None:
    text = inside("plan", tiny_gguf, "-b", "1GiB", "-c", 128, "-t", 2)
    assert (text.returncode, text.stderr) == (0, "")
    assert re.search(r"^decode +[\d.e+]+ tok/s, limited by memory$", text.stdout, re.MULTILINE)
    assert re.search(r"^prefill +[\d.e+]+ tok/s, 127 tokens in", text.stdout, re.MULTILINE)
    assert re.search(r"^budget +resident +read a pass", text.stdout, re.MULTILINE)
    run = inside("plan", tiny_gguf, "-b", "1GiB", "-c", 128, "-t", 2, "--json")
    found = json.loads(run.stdout)
    assert found["feasible"] and found["prediction"]["decode_tok_s"] > 0
    budgets = [point["budget_bytes"] for point in found["curve"]]
    assert budgets[0] == found["floor_bytes"] and budgets[-1] == found["full_bytes"]
    assert len(budgets) == 8 and found["curve"][-1]["streamed_bytes"] == 0


def test_a_profile_that_cannot_be_kept_is_said_only_to_who_asks(
    tiny_gguf: Path, profiled: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    profiled[0] = False
    with caplog.at_level("DEBUG", "edgert"):
        assert inside("plan", tiny_gguf, "-b", "1GiB").stderr == ""
    assert [r.message for r in caplog.records].count(
        "the cache folder cannot be written: the machine is measured each time"
    ) == 1


def test_plan_draws_its_curve(tiny_gguf: Path, profiled: list[bool], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    assert inside("plan", tiny_gguf, "-b", "1GiB", "--plot", picture).returncode == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
