"""Mixtures of experts of unusual shapes, and routers that say nonsense: the same bits, no crash."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import edgert
from edgert.errors import UnsupportedError
from edgert.expert_look import ExpertLook, watch_experts
from edgert.expert_simulation import simulate
from edgert.kernels_cpu.moe import moe_route, moe_route_ref
from edgert.opening import open_model
from edgert.quant.formats import BY_NAME
from edgert.quant.quantize import quantize_ref
from edgert.routing import join_passes
from edgert.speculation import PassCosts
from tests import tiny
from tests.answers import prompt
from tests.gguf_file import write_gguf
from tests.tight import tight

Q8_0, Q4_0, F32 = (BY_NAME[name] for name in ("Q8_0", "Q4_0", "F32"))


def write(path: Path, model: tiny.TinyModel) -> Path:
    write_gguf(path, model.metadata, model.tensors)
    return path


def family(
    monkeypatch: pytest.MonkeyPatch, experts: int, k: int, layers: int = 2
) -> tiny.TinyModel:
    """A small OLMoE with so many experts, its router as random as the rest."""
    shape = tiny.TinyFamily(
        "olmoe", layers, hidden=64, heads=2, kv_heads=2, ffn=32, experts=experts,
        experts_per_token=k,
    )  # fmt: skip
    monkeypatch.setitem(tiny.FAMILIES, f"olmoe {experts} {k}", shape)
    monkeypatch.setattr(tiny, "_routed", lambda f, name, values: values)
    return tiny.build(f"olmoe {experts} {k}", "Q8_0")


def same_at_any_budget(path: Path) -> edgert.Plan:
    """All logits of a prompt are equal with all in memory and with next to nothing."""
    found = []
    for spare, chunk in ((None, 64), (0, 64), (0, 1), (64 * 1024, 7)):
        with tight(path, spare, prefill_tokens=chunk) as engine:
            found.append(engine.logits(prompt(path)))
            plan = engine.plan
    for other in found[1:]:
        assert np.array_equal(found[0], other, equal_nan=True)
    return plan


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (8, 8), (512, 3)])
def test_one_expert_all_of_them_and_very_many(
    experts: int, k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_at_any_budget(write(tmp_path / "olmoe.gguf", family(monkeypatch, experts, k)))


def test_experts_of_other_types_and_sizes_in_each_layer(tmp_path: Path) -> None:
    model = tiny.build("olmoe", "Q8_0")
    for name in [n for n in model.tensors if n.startswith("blk.1.ffn_") and "_exps" in n]:
        fmt = Q8_0 if "down" in name else Q4_0
        values = model.weights[name]
        model.tensors[name] = (fmt, values.shape, quantize_ref(fmt, values).tobytes())
    plan = same_at_any_budget(write(tmp_path / "olmoe.gguf", model))
    assert plan.expert_slot_bytes >= 3 * 256 * 256  # the larger ones, of 8 bits


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_router_that_says_nonsense_chooses_in_a_defined_order(bad: float, tmp_path: Path) -> None:
    model = tiny.build("olmoe", "Q8_0")
    name = "blk.0.ffn_gate_inp.weight"
    values = model.weights[name].copy()
    values[3, 5] = bad
    model.tensors[name] = (F32, values.shape, values.tobytes())
    same_at_any_budget(write(tmp_path / "olmoe.gguf", model))


@pytest.mark.parametrize("experts", [1, 5, 16, 40])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_logits_route_as_the_reference_does(
    experts: int, bad: float, rng: np.random.Generator
) -> None:
    logits = rng.normal(size=(6, experts)).astype(np.float32)
    logits[1, 0] = logits[2, experts - 1] = logits[3, experts // 2] = bad
    logits[4] = bad
    for k in {1, experts, max(1, experts // 2)}:
        ids, weights = moe_route(logits, k, norm_topk=True)
        ids_ref, weights_ref = moe_route_ref(logits, k, norm_topk=True)
        assert np.array_equal(ids, ids_ref)
        assert np.array_equal(np.isnan(weights), np.isnan(weights_ref))
        assert all(len(set(row)) == k for row in ids.tolist())
        assert ids.min() >= 0 and ids.max() < experts


def test_gate_and_up_in_one_tensor_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny.build("olmoe", "Q8_0")
    fmt, (n, m, k), raw = model.tensors.pop("blk.0.ffn_gate_exps.weight")
    _, _, more = model.tensors.pop("blk.0.ffn_up_exps.weight")
    model.tensors["blk.0.ffn_gate_up_exps.weight"] = (fmt, (n, 2 * m, k), raw + more)
    with pytest.raises(UnsupportedError, match=r"'blk\.0\.ffn_gate_up_exps\.weight'.*in one"):
        open_model(write(tmp_path / "olmoe.gguf", model))


@pytest.mark.parametrize("spare", [0, 900 * 1024])
def test_a_pass_reads_each_expert_once_however_many_tokens_want_it(
    tiny_moe_gguf: Path, spare: int
) -> None:
    tokens = prompt(tiny_moe_gguf)
    with tight(tiny_moe_gguf, spare, prefill_tokens=len(tokens)) as engine:
        streamer, control = engine.weights.experts, engine.experts
        assert streamer is not None and control is not None
        read: Counter[tuple[int, int]] = Counter()
        parts_of, chosen = streamer._parts, []

        def counted(layer: int, expert: int) -> object:
            read[layer, expert] += 1
            return parts_of(layer, expert)

        streamer._parts = counted  # type: ignore[assignment]
        control.record(chosen.append)
        for text in (tokens, tokens[::-1]):
            engine.logits(text)
            (pass_,) = chosen
            wanted = {(la, int(e)) for la in range(2) for e in np.unique(pass_[:, la])}
            assert set(read) <= wanted and max(read.values()) == 1
            assert len(pass_) == len(tokens)
            read.clear()
            chosen.clear()


def test_passes_one_after_another_keep_what_the_next_will_want(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted on the device, beside the least there can be: half a layer more for each pass."""
    path = write(tmp_path / "olmoe.gguf", family(monkeypatch, 16, 4, layers=6))
    tokens = prompt(path)
    with tight(path, 350 * 1024, prefill_tokens=len(tokens)) as engine:
        control, slots, passes = engine.experts, engine.plan.expert_slots, []
        assert control is not None and 24 < slots < 72
        control.record(passes.append)
        for turn in range(8):
            engine.logits(tokens[turn:] + tokens[:turn])
        misses = control.counts[1]
        experts = engine.spec.num_experts
    trace = join_passes(passes, experts)
    found = {f.policy: f for f in simulate(trace, [slots], ("lru", "auto", "belady"))}
    missed = {name: round(f.misses_per_token * trace.tokens) for name, f in found.items()}
    assert missed["auto"] == misses
    assert misses <= missed["belady"] + len(passes) * experts / 2
    assert misses <= 0.7 * missed["lru"]


def test_a_budget_that_changes_while_someone_looks_at_experts(tmp_path: Path) -> None:
    """The change waits; the pass that it stopped begins again, and nothing is seen twice."""
    path = tiny.tiny_model("olmoe", "Q8_0", path=tmp_path / "olmoe.gguf")
    text = prompt(path)
    with tight(path, None, prefill_tokens=5) as engine:
        seen: list[tuple[int, bytes]] = []
        changers: list[threading.Thread] = []

        def look(found: ExpertLook) -> None:
            seen.append((found.layer, found.out.tobytes() + found.ids.tobytes()))

        def disturbed(found: ExpertLook) -> None:
            look(found)
            if len(seen) % 3 == 0 and not any(thread.is_alive() for thread in changers):
                budget = engine.plan.total_bytes - 8192
                changers.append(threading.Thread(target=engine.set_memory_budget, args=(budget,)))
                changers[-1].start()
                while not engine._team.stopped:
                    time.sleep(0.001)

        watch_experts(engine, text, look)
        wanted, seen = seen, []
        assert len(wanted) == -(-len(text) // 5) * engine.spec.num_hidden_layers
        before = engine.plan.total_bytes
        watch_experts(engine, text, disturbed)
        for thread in changers:
            thread.join()
        assert changers and engine.plan.total_bytes < before
        assert seen == wanted


@pytest.mark.parametrize("spare", [0, 200 * 1024, 700 * 1024, None])
def test_a_nested_mixture_does_not_draft_for_itself(
    tmp_path: Path, spare: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its experts have no base, so it never could; its dense parts are read whole."""
    monkeypatch.setattr(PassCosts, "table", lambda self, most: [1.0] * (most + 1))
    monkeypatch.setattr("edgert.speculation._WORTH_SECONDS", 0.0)
    source = tiny.tiny_model("olmoe", "Q8_0", path=tmp_path / "olmoe.gguf")
    path = tmp_path / "olmoe.edgert"
    assert edgert.pack_model(source, path, nested="4+4").base_bits
    text = prompt(path)
    with tight(path, spare, prefill_tokens=9) as engine, tight(source, None) as whole:
        assert not engine.plan.can_draft and not any(t.base for t in engine.plan.tiles)
        want = whole.generate(text, max_tokens=20, temperature=0.7, seed=1, speculate=False)
        found = engine.generate(text, max_tokens=20, temperature=0.7, seed=1)
        assert found.tokens == want.tokens
        assert found.stats.logits_hash == want.stats.logits_hash
        assert all(d.drafter != "self" for d in found.stats.drafts)
