"""The engine's one arithmetic: the same bits however the work is cut, stored and read.

Models are tiny and random; budgets are so tight that they stream all the same (tests/tight.py).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import edgert
from edgert.errors import BudgetError, ContextError, EdgertError, InputError
from edgert.kernels_cpu.attention import context_parts
from edgert.kernels_cpu.attention_ref import SPAN
from edgert.models.reference import ReferenceModel
from edgert.quant.metrics import rms_error
from edgert.results import logits_hash
from edgert.units import KIB, MIB
from tests.gguf_file import write_gguf
from tests.tight import PROCESS, fixed_process, floor_of, tight
from tests.tiny import FAMILIES, build, prompt_of, spec_of, tiny_model

PROMPT_TOKENS = 70  # more than a pass of 64, and no multiple of 7
SPARE = [0, 200 * KIB, 600 * KIB]  # of budgets under which each of the two models streams
FLOAT_CACHE_DISTANCE = 1e-5  # RMS over that of the logits, all in float32: 16 x 2^-24 found 10 x
HALF_CACHE_DISTANCE = 2e-3  # keys and values rounded to 11 bits: 3e-4 found

Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="module", params=["llama", "olmoe"])
def model(request: pytest.FixtureRequest, tiny_gguf: Path, tiny_moe_gguf: Path) -> Path:
    return tiny_gguf if request.param == "llama" else tiny_moe_gguf


def prompt(path: Path) -> list[int]:
    return prompt_of("llama" if path.name.startswith("llama") else "olmoe", PROMPT_TOKENS)


@lru_cache
def expected(path: Path, kv_cache_type: str = "f16") -> Logits:
    """Logits after each prompt token, everything in memory, one thread, in as few passes."""
    with tight(path, None, threads=1, kv_cache_type=kv_cache_type) as engine:
        assert engine.plan.streamed_bytes == 0 and engine.plan.prefill_tokens >= PROMPT_TOKENS
        return engine.logits(prompt(path))


@lru_cache
def expected_tokens(path: Path) -> tuple[tuple[int, ...], str]:
    """Greedy continuation of the prompt and the hash of its last logits."""
    with tight(path, None, threads=1) as engine:
        done = engine.generate(prompt(path), max_tokens=12, temperature=0)
        return done.tokens, done.stats.logits_hash


def reads_in_passes(engine: edgert.Engine) -> bool:
    plan = engine.plan
    spec = engine.spec
    experts = spec.num_hidden_layers * spec.num_experts
    return plan.streamed_bytes > 0 or plan.expert_slots < experts


@pytest.fixture(scope="module")
def resident(tiny_gguf: Path) -> Iterator[edgert.Engine]:
    with tight(tiny_gguf, None) as engine:
        yield engine


# ------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("spare", SPARE)
def test_streamed_equals_resident_to_the_bit(model: Path, spare: int) -> None:
    with tight(model, spare) as engine:
        assert reads_in_passes(engine), engine.plan.table()
        before = engine.weights.total_read_bytes
        assert np.array_equal(engine.logits(prompt(model)), expected(model))
        assert engine.weights.total_read_bytes > before, "nothing was streamed"
        done = engine.generate(prompt(model), max_tokens=12, temperature=0)
    assert (done.tokens, done.stats.logits_hash) == expected_tokens(model)


@pytest.mark.parametrize("threads", [1, 3, 4])
def test_the_number_of_threads_changes_no_bit(model: Path, threads: int) -> None:
    with tight(model, 200 * KIB, threads=threads) as engine:
        assert reads_in_passes(engine) and engine.plan.threads == threads
        assert np.array_equal(engine.logits(prompt(model)), expected(model))


@pytest.mark.parametrize("spare", [200 * KIB, None])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_size_of_a_pass_changes_no_bit(model: Path, chunk: int, spare: int | None) -> None:
    with tight(model, spare, prefill_tokens=chunk) as engine:
        assert engine.plan.prefill_tokens == chunk
        assert reads_in_passes(engine) == (spare is not None)
        assert np.array_equal(engine.logits(prompt(model)), expected(model))
        done = engine.generate(prompt(model), max_tokens=12, temperature=0)
    assert (done.tokens, done.stats.logits_hash) == expected_tokens(model)


def test_threads_that_share_one_kv_head_are_as_good_as_one(tmp_path: Path) -> None:
    """Over three spans: token by token, each thread taking parts of the context, and in chunks.

    The reference model says that these bits are right past the first span, too.
    """
    family, count = "llama_narrow", 2 * SPAN + 70
    tiny = build(family, "F32")
    longer = tiny.metadata | {"llama.context_length": count}
    path = write_gguf(tmp_path / "model.gguf", longer, tiny.tensors)
    tokens = prompt_of(family, count)
    truth = ReferenceModel(spec_of(tiny), tiny.weights, np.float64).logits(tokens)
    found = []
    for threads, chunk in ((2, 1), (1, 1), (1, 200)):
        with tight(
            path, None, threads=threads, prefill_tokens=chunk, context_length=count,
            kv_cache_type="f32",
        ) as engine:  # fmt: skip
            assert (context_parts(engine.spec.num_key_value_heads, threads) > 1) == (threads > 1)
            found.append(engine.logits(tokens))
        assert logits_hash(found[-1]) == logits_hash(found[0]), (threads, chunk)
    late = slice(SPAN, None)
    size = float(np.sqrt(np.mean(truth**2)))
    assert rms_error(found[0][late], truth[late]) <= FLOAT_CACHE_DISTANCE * size


@pytest.mark.parametrize("spare", [0, None])
def test_a_float32_cache_is_streamed_and_resident_alike(model: Path, spare: int | None) -> None:
    with tight(model, spare, kv_cache_type="f32") as engine:
        assert np.array_equal(engine.logits(prompt(model)), expected(model, "f32"))
    assert not np.array_equal(expected(model, "f32"), expected(model))


def test_any_number_of_expert_slots_gives_the_same_bits(tiny_moe_gguf: Path) -> None:
    """From the experts of one token of one layer to all of them, whatever else stays."""
    seen = {}
    for spare in range(0, 6 * MIB, 300 * KIB):
        with tight(tiny_moe_gguf, spare, prefill_tokens=16) as engine:
            slots = engine.plan.expert_slots
            if slots not in seen:
                seen[slots] = engine.logits(prompt(tiny_moe_gguf)[:24])
    assert min(seen) <= 5 and max(seen) == 16 and len(seen) > 6, sorted(seen)
    want = expected(tiny_moe_gguf)[:24]
    assert [slots for slots, logits in seen.items() if not np.array_equal(logits, want)] == []


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_is_the_reference_model_streamed_or_not(family: str, tmp_path: Path) -> None:
    """F32 weights, so that nothing but the order of additions and the KV cache's type differs."""
    path = tiny_model(family, "F32", path=tmp_path / "model.gguf")
    tiny = build(family, "F32")
    tokens = prompt_of(family, 33)
    truth = ReferenceModel(spec_of(tiny), tiny.weights, np.float64).logits(tokens)
    size = float(np.sqrt(np.mean(truth**2)))
    found = []
    for spare, kv, most in (
        (0, "f32", FLOAT_CACHE_DISTANCE), (None, "f32", FLOAT_CACHE_DISTANCE),
        (None, "f16", HALF_CACHE_DISTANCE),
    ):  # fmt: skip
        with tight(path, spare, kv_cache_type=kv) as engine:
            found.append(engine.logits(tokens))
        assert rms_error(found[-1], truth) <= most * size
    assert np.array_equal(found[0], found[1])


# ------------------------------------------------------------------------ the KV cache


def test_a_prompt_that_is_cached_gives_the_same_bits(resident: edgert.Engine) -> None:
    tokens = prompt(resident.path)
    want = expected(resident.path)
    for stop in (40, 70, 41, 1, 70):
        session = resident.session()
        options = resident.options(max_tokens=0)
        events = list(session.generate(tokens[:stop], options))
        assert [e.finish_reason for e in events] == ["length"]
        assert session.last_stats is not None
        assert session.last_stats.logits_hash == logits_hash(want[stop - 1 : stop])


def test_what_is_reused_is_the_common_beginning_but_one(resident: edgert.Engine) -> None:
    tokens = prompt(resident.path)
    other = [*tokens[:30], (tokens[30] + 1) % 256, *tokens[31:]]
    for prompt_tokens, reused in ((tokens, None), (tokens, 69), (other, 30), (tokens[:10], 9)):
        stats = resident.generate(prompt_tokens, max_tokens=0).stats
        assert stats.prompt_tokens == len(prompt_tokens)
        assert reused is None or stats.reused_tokens == reused


def test_asking_for_all_logits_does_not_disturb_a_generation(resident: edgert.Engine) -> None:
    tokens = prompt(resident.path)
    events = resident.generate(tokens, stream=True, max_tokens=12, temperature=0)
    found = []
    for event in events:
        found.append(event.token)
        assert np.array_equal(resident.logits(tokens[:9]), expected(resident.path)[:9])
    assert tuple(found) == expected_tokens(resident.path)[0]


@pytest.mark.parametrize("spare", [0, None])
def test_sessions_that_take_turns_are_as_good_as_alone(model: Path, spare: int | None) -> None:
    starts = [prompt(model)[:20], prompt(model)[20:40], prompt(model)[:25]]
    with tight(model, spare, prefill_tokens=16) as engine:
        how: dict[str, Any] = dict(max_tokens=6, temperature=0)
        alone = [engine.generate(tokens, **how).tokens for tokens in starts]
        turns = [engine.generate(tokens, stream=True, **how) for tokens in starts]
        together = list(zip(*turns, strict=True))
    assert [tuple(e.token for e in column) for column in zip(*together, strict=True)] == alone


@pytest.mark.parametrize("spare", [0, None])
def test_threads_that_generate_at_once_are_as_good_as_alone(model: Path, spare: int | None) -> None:
    starts = [prompt(model)[:20], prompt(model)[20:40], prompt(model)[:25]]
    found: dict[int, tuple[int, ...]] = {}
    with tight(model, spare, prefill_tokens=16) as engine:

        def run(i: int) -> None:
            found[i] = engine.generate(starts[i], max_tokens=6, temperature=0).tokens

        alone = []
        for i in range(3):
            run(i)
            alone.append(found.pop(i))
        threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[i] for i in range(3)] == alone


# ------------------------------------------------------------------------ facts and refusals


@pytest.mark.parametrize("spare", [0, 600 * KIB, None])
def test_the_ledger_is_the_plan(model: Path, spare: int | None) -> None:
    with tight(model, spare) as engine:
        report = engine.memory()
        assert report.planned == {r.name: r.nbytes for r in engine.plan.regions}
        assert sum(report.planned.values()) == engine.plan.total_bytes <= report.budget_bytes
        assert 0 < report.resident_bytes <= report.peak_bytes
        # What was really allocated is what was planned, but for the ends of regions.
        taken = engine._arena.nbytes
        assert abs(taken - (engine.plan.total_bytes - PROCESS)) <= 128 * KIB


def test_what_a_streamed_pass_reads_is_what_the_plan_says(tiny_gguf: Path) -> None:
    with tight(tiny_gguf, 0) as engine:
        stats = engine.generate(prompt(tiny_gguf)[:4], max_tokens=41, temperature=0).stats
        planned = engine.plan.streamed_bytes
    rows = 2 * 4096  # a token row, in whole blocks
    tiles = 2 * 4096 * sum(t.stream_index >= 0 for t in engine.plan.tiles)
    ahead = engine.plan.slots * engine.plan.slot_bytes / 40
    assert planned - ahead <= stats.read_bytes_per_token <= planned + rows + tiles + ahead
    assert engine.is_streamed and 0 <= stats.stall_share <= 1


def test_the_device_is_measured_between_answers_and_changes_none(tiny_gguf: Path) -> None:
    with tight(tiny_gguf, 0) as engine:
        tokens = prompt(tiny_gguf)[:4]
        want = engine.generate(tokens, max_tokens=5, temperature=0)
        assert engine.device_bytes_per_s == want.stats.device_bytes_per_s == 0
        for _ in range(2):
            rate = engine.measure_device(0.01)
            again = engine.generate(tokens, max_tokens=5, temperature=0)
            assert again.stats.logits_hash == want.stats.logits_hash
            assert again.stats.device_bytes_per_s == rate == engine.device_bytes_per_s > 0


def test_a_resident_model_reads_nothing_while_it_generates(resident: edgert.Engine) -> None:
    before = resident.weights.total_read_bytes
    stats = resident.generate(prompt(resident.path)[:9], max_tokens=5).stats
    assert stats.read_bytes == stats.decode_read_bytes == 0
    assert resident.weights.total_read_bytes == before


def test_logits_are_the_callers_own(resident: edgert.Engine) -> None:
    tokens = prompt(resident.path)[:5]
    first = resident.logits(tokens)
    assert first.shape == (5, resident.vocab_size) and first.dtype == np.float32
    kept = first.copy()
    resident.logits([1, 9, 9, 9, 9, 9])
    assert np.array_equal(first, kept)


def test_tokens_and_contexts_that_cannot_be(resident: edgert.Engine) -> None:
    with pytest.raises(InputError, match="there is no token to compute"):
        resident.logits([])
    for token in (-1, resident.vocab_size):
        with pytest.raises(InputError, match=f"token {token} is outside the vocabulary of 288"):
            resident.logits([1, token])
    with pytest.raises(ContextError) as caught:
        resident.logits([1] * 257)
    assert (caught.value.tokens, caught.value.context_length) == (257, 256)
    assert resident.logits([1] * 256).shape == (256, 288)


def test_a_budget_below_the_floor_is_refused_before_a_weight_is_read(model: Path) -> None:
    def backend(paths: object) -> object:
        raise AssertionError("the files were opened to be read")

    options: dict[str, Any] = dict(context_length=256, threads=2)
    floor = floor_of(model, **options)
    with fixed_process(), pytest.raises(BudgetError) as caught:
        edgert.load(model, memory_budget=floor - 1, backend=backend, **options)
    assert caught.value.need_bytes == floor
    with tight(model, 0) as engine:
        assert engine.plan.budget_bytes == floor


def test_repr_and_names(resident: edgert.Engine) -> None:
    assert repr(resident) == f"Engine(llama-q8_0.gguf, llama, {2**62} bytes)"
    assert (resident.vocab_size, resident.context_length) == (288, 256)
    assert resident.chat_template is None
    text = "a tale"
    assert resident.detokenize(resident.tokenize(text)) == text
    assert resident.tokenize(text, add_bos=False) == resident.tokenize(text)[1:]


def test_nothing_works_after_close_and_closing_twice_is_fine(model: Path) -> None:
    with tight(model, 0) as engine:
        pass
    engine.close()
    for call in (lambda: engine.logits([1]), engine.session, lambda: engine.generate("a")):
        with pytest.raises(EdgertError, match="the engine is closed; load the model again"):
            call()
    assert [t.name for t in threading.enumerate() if t.name.startswith("edgert-")] == []
