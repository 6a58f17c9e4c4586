"""Sampling against slow twins and against probability, options, and stop strings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.config import LoadOptions, SamplingParams
from edgert.errors import InputError, ModelError
from edgert.sampler import SURENESS, Sampler
from edgert.stop import StopMatcher

quick = settings(max_examples=200, deadline=None, database=None, derandomize=True)
OFF: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}


def probabilities_ref(
    logits: np.ndarray[Any, Any], params: SamplingParams, recent: list[int]
) -> np.ndarray[Any, Any]:
    """The chain by the book: everything sorted, one step after the other, (n_vocab,) float64."""
    x = [float(v) for v in logits]
    for token, bias in params.logit_bias.items():
        x[token] += bias
    window = recent if params.repeat_last_n < 0 else recent[-params.repeat_last_n or len(recent) :]
    for token in set(window):
        x[token] = (
            x[token] * params.repeat_penalty if x[token] <= 0 else x[token] / params.repeat_penalty
        )
        x[token] -= params.presence_penalty + window.count(token) * params.frequency_penalty
    # The sampler holds the changed logits in float32, and so must its twin to cut alike.
    x = [float(np.float32(v)) for v in x]
    order = sorted((i for i in range(len(x)) if x[i] > -math.inf), key=lambda i: (-x[i], i))
    if params.top_k:
        order = order[: params.top_k]
    weights = [math.exp(x[i] - x[order[0]]) for i in order]
    kept, total = [], 0.0
    for i, weight in zip(order, weights, strict=True):
        kept.append(i)
        total += weight
        if params.top_p < 1 and total >= params.top_p * sum(weights):
            break
    kept = [i for i in kept if math.exp(x[i] - x[order[0]]) >= params.min_p * (1 - 1e-12)]
    out = np.zeros(len(x))
    for i in kept:
        out[i] = math.exp((x[i] - x[order[0]]) / params.temperature)
    return out / out.sum()


def drawn(
    params: SamplingParams, logits: np.ndarray[Any, Any], count: int, recent: Any = ()
) -> Any:
    sampler = Sampler(params, 1234)
    return np.bincount(
        [sampler.sample(logits, recent) for _ in range(count)], minlength=len(logits)
    )


def splitmix64_ref(key: int, n: int) -> int:
    """Number n of the stream that begins at `key`, in whole numbers of Python."""
    x = (key + n * 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def chi_square(counts: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Sum of (seen - expected)^2 / expected; tokens of probability 0 must not be seen at all."""
    assert not counts[expected == 0].any()
    wanted = expected[expected > 0] * counts.sum()
    return float((((counts[expected > 0] - wanted) ** 2) / wanted).sum())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 3.0, "min_p": 0.0},
        {"top_k": 5},
        {"top_p": 0.6},
        {"top_p": 0.0},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.1, "temperature": 1.5},
        {"repeat_penalty": 1.8, "repeat_last_n": 4},
        {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repeat_last_n": -1},
        {"repeat_penalty": 0.7},
        {"logit_bias": {3: 2.5, 7: -math.inf, 9: -1.0}},
    ],
    ids=str,
)
def test_draws_follow_the_slow_twin(options: dict[str, Any], rng: np.random.Generator) -> None:
    params = SamplingParams(**{**OFF, **options})
    logits = rng.normal(0, 2, 24).astype(np.float32)
    before = logits.copy()
    recent = [int(t) for t in rng.integers(0, 24, 30)]
    expected = probabilities_ref(logits, params, recent)
    counts = drawn(params, logits, 4000, recent)
    # 24 tokens are 23 degrees of freedom at most; chance exceeds 65 once in 100,000 runs.
    assert chi_square(counts, expected) < 65
    assert np.array_equal(logits, before)


def test_a_draw_takes_the_largest_noisy_logit(rng: np.random.Generator) -> None:
    assert splitmix64_ref(0, 1) == 0xE220A8397B1DCDAF, "the first one of its authors' code"
    params = SamplingParams(top_k=30, top_p=0.9, min_p=0.02, temperature=0.7)
    sampler, random = Sampler(params, 11), np.random.PCG64(11)
    for _ in range(100):
        logits = rng.normal(0, 2, 500).astype(np.float32)
        key, scores = int(random.random_raw()), {}
        for token in np.flatnonzero(probabilities_ref(logits, params, [])).tolist():
            uniform = ((splitmix64_ref(key, token) >> 12) + 0.5) / 2**52
            noise = -math.log(-math.log(uniform))
            scores[token] = float(logits[token]) + params.temperature * noise
        best = max(scores, key=lambda token: scores[token])
        second = max((s for t, s in scores.items() if t != best), default=-math.inf)
        sure = int(min(2 * (scores[best] - second), SURENESS - 1))
        assert sampler.fork().guess(logits) == (best, sure)
        assert sampler.sample(logits) == best


def test_logits_that_are_alike_draw_the_same_token(rng: np.random.Generator) -> None:
    """At least as often as (1 - d) / (1 + d) for a total variation distance d (Daliri et al.)."""
    params = SamplingParams(**OFF)
    for spread in (0.1, 0.5, 2.0):
        full = rng.normal(0, 2, 50).astype(np.float32)
        other = full + rng.normal(0, spread, 50).astype(np.float32)
        p, q = (probabilities_ref(x, params, []) for x in (full, other))
        distance = float(np.abs(p - q).sum() / 2)
        sampler, same = Sampler(params, 5), 0
        for _ in range(4000):
            guess, _ = sampler.fork().guess(other)
            same += guess == sampler.sample(full)
        least, most = (1 - distance) / (1 + distance), 1 - distance
        chance = 5 * math.sqrt(0.25 / 4000)  # five standard deviations of the frequency
        assert least - chance < same / 4000 < most + chance


def test_defaults_are_llama_cpps() -> None:
    assert dataclasses.asdict(SamplingParams()).items() >= {
        "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05,
        "repeat_penalty": 1.0, "repeat_last_n": 64,
    }.items()  # fmt: skip


def test_top_k_takes_the_largest_and_the_lowest_ids_of_equals(rng: np.random.Generator) -> None:
    logits = rng.integers(0, 6, 3000).astype(np.float32)
    order = sorted(range(3000), key=lambda i: (-logits[i], i))
    for k in (1, 2, 17, 600, 2999):
        params = SamplingParams(**{**OFF, "top_k": k, "temperature": 1000.0})
        seen = set(np.flatnonzero(drawn(params, logits, 300)))
        assert seen <= set(order[:k])
        if k < 20:
            assert seen == set(order[:k])


def test_temperature_zero_is_greedy_with_the_lowest_id_of_equals() -> None:
    greedy = SamplingParams(temperature=0)
    logits = np.array([1, 5, 5, -np.inf, 4], np.float32)
    assert Sampler(greedy, 0).sample(logits) == 1
    penalty = SamplingParams(temperature=0, repeat_penalty=2.0)
    assert Sampler(penalty, 0).sample(logits, [1]) == 2
    assert Sampler(penalty, 0).sample(logits, [1, 2]) == 4
    assert Sampler(SamplingParams(temperature=0, logit_bias={0: 9}), 0).sample(logits) == 0
    assert Sampler(SamplingParams(temperature=1e-300), 0).sample(logits) in (1, 2)


def test_window_of_the_penalties() -> None:
    logits = np.array([3, 2.9, 0], np.float32)
    recent = [0, 2, 2, 2]
    for last_n, token in ((0, 0), (3, 0), (4, 1), (-1, 1), (100, 1)):
        params = SamplingParams(temperature=0, presence_penalty=1.0, repeat_last_n=last_n)
        assert Sampler(params, 0).sample(logits, recent) == token


def test_a_seed_decides_every_draw(rng: np.random.Generator) -> None:
    logits = rng.normal(0, 1, (50, 100)).astype(np.float32)
    runs = []
    for seed in (7, 7, 8):
        sampler = Sampler(SamplingParams(), seed)
        runs.append([sampler.sample(row) for row in logits])
    assert runs[0] == runs[1] != runs[2]
    unseeded = Sampler(SamplingParams())
    repeat = Sampler(SamplingParams(), unseeded.seed)
    assert [unseeded.sample(r) for r in logits] == [repeat.sample(r) for r in logits]
    assert Sampler(SamplingParams()).seed != unseeded.seed
    for bad in (-1, 1.5, True, "1"):
        with pytest.raises(InputError, match="seed is"):
            Sampler(SamplingParams(), bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_cannot_be_used(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature), 0)
    logits = np.array([0, 1, np.nan, np.nan], np.float32)
    with pytest.raises(ModelError, match="2 NaN and 0 infinite of 4 logits"):
        sampler.sample(logits)
    with pytest.raises(ModelError, match="0 NaN and 1 infinite of 3 logits"):
        sampler.sample(np.array([0, np.inf, 1], np.float32))
    with pytest.raises(InputError, match="every token is banned"):
        sampler.sample(np.full(4, -np.inf, np.float32))
    only = np.array([-np.inf, -np.inf, -3e38, -np.inf], np.float32)
    assert sampler.sample(only) == 2
    with pytest.raises(InputError, match="logit_bias names token 9; the vocabulary has 4"):
        Sampler(SamplingParams(logit_bias={9: 1.0}), 0).sample(only)


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([3e38, -3e38, 1], np.float32)
    params = SamplingParams(repeat_penalty=0.01, temperature=0.01)
    assert Sampler(params, 0).sample(logits, [0, 1]) == 0


def test_large_vocabulary_allocates_three_vectors_at_most() -> None:
    import tracemalloc

    logits = np.random.default_rng(0).normal(0, 3, 150_000).astype(np.float32)
    sampler = Sampler(SamplingParams(repeat_penalty=1.1), 0)
    sampler.sample(logits, [1, 2])
    tracemalloc.start()
    sampler.sample(logits, [1, 2])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 3 * logits.nbytes


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be between 0 and 1000"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"temperature": True}, "temperature is True"),
        ({"top_k": -1}, "top_k is -1; it must be between 0"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be a whole number"),
        ({"top_p": 1.01}, "top_p is 1.01; it must be between 0 and 1"),
        ({"min_p": -1}, "min_p is -1"),
        ({"repeat_penalty": 0}, "repeat_penalty is 0; it must be between 0.01 and 100"),
        ({"repeat_last_n": -2}, "repeat_last_n is -2"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf"),
        ({"frequency_penalty": 101}, "frequency_penalty is 101"),
        ({"logit_bias": {-1: 1.0}}, "a token of logit_bias is -1"),
        ({"logit_bias": {5: math.inf}}, r"logit_bias\[5\] is inf"),
    ],
)
def test_sampling_params_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingParams(**options)


def test_sampling_params_do_not_change() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 3.0
    assert params.logit_bias == {1: 2.0}
    assert len({params, SamplingParams(logit_bias={1: 2.0})}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]


def test_from_metadata_takes_the_files_advice_but_not_its_nonsense() -> None:
    metadata = {
        "general.sampling.temp": np.float32(0.5),
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 7.0,
        "general.sampling.penalty_last_n": 32,
        "general.sampling.mirostat": 2,
    }
    params = SamplingParams.from_metadata(metadata, top_k=None, min_p=0.2)
    assert params == SamplingParams(temperature=0.5, top_k=20, min_p=0.2, repeat_last_n=32)
    assert SamplingParams.from_metadata(metadata, top_k=3).top_k == 3
    with pytest.raises(InputError, match="top_k is -3"):
        SamplingParams.from_metadata(metadata, top_k=-3)


def test_load_options() -> None:
    LoadOptions()
    LoadOptions(memory_budget="1.5GiB", context_length=1, threads=4, kv_cache_type="f32")
    LoadOptions(memory_budget="50%", prefill_tokens=64)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"memory_budget": "lots"}, "'lots' is not a size"),
        ({"memory_budget": "0%"}, "above 0%"),
        ({"memory_budget": "x%"}, "memory_budget is 'x%'"),
        ({"memory_budget": "nan%"}, "above 0%"),
        ({"memory_budget": 0}, "memory_budget is 0"),
        ({"memory_budget": "0GiB"}, "memory_budget is 0"),
        ({"context_length": 0}, "context_length is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 2.5}, "threads is 2.5"),
        ({"kv_cache_type": "q8"}, "kv_cache_type is 'q8'; choose 'f16' or 'f32'"),
        ({"prefill_tokens": 0}, "prefill_tokens is 0"),
    ]
    for options, message in bad:
        with pytest.raises(InputError, match=message):
            LoadOptions(**options)


# --- stop strings -----------------------------------------------------------------------------


def stopped_ref(stops: list[str], text: str) -> tuple[str, bool]:
    """Grow the text by one character until it ends in a stop string."""
    for end in range(len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@quick
@given(
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4),
    parts=st.lists(st.text("ab\nc", max_size=5), max_size=8),
)
def test_stop_matcher_whatever_the_cuts(stops: list[str], parts: list[str]) -> None:
    matcher = StopMatcher(stops)
    emitted = pushed = ""
    for part in parts:
        emitted += matcher.push(part)
        pushed += part
        if matcher.stopped:
            continue
        # Held back is exactly the longest end that begins a stop string.
        held = pushed[len(emitted) :]
        ends = [pushed[at:] for at in range(len(pushed))]
        assert held == next((e for e in ends if any(s.startswith(e) for s in stops)), "")
    text, stopped = stopped_ref(stops, "".join(parts))
    assert emitted + matcher.flush() == text
    assert matcher.stopped == stopped


def test_stop_matcher_across_tokens() -> None:
    matcher = StopMatcher(["</end>", "STOP"])
    assert [matcher.push(t) for t in ("Hi <", "/e", "n, ST", "OP", "more")] == [
        "Hi ", "", "</en, ", "", "",
    ]  # fmt: skip
    assert matcher.stop == "STOP" and matcher.flush() == ""
    assert StopMatcher("ab").push("xaby") == "x"
    assert StopMatcher().push("anything") == "anything"
    for bad in ([""], [3]):
        with pytest.raises(InputError, match="stop string"):
            StopMatcher(bad)  # type: ignore[arg-type]
