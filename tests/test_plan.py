"""The budget arithmetic: every byte has a place, the sum fits, and the smallest sum is known.

A plan is pure, so models of any size are planned here without a file.
"""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import edgert
from edgert.config import LoadOptions
from edgert.errors import BudgetError, ContextError, InputError
from edgert.loading import make_plan
from edgert.models.tensors import required_tensors
from edgert.opening import open_model
from edgert.plan import Layout, Plan, PlanOptions, plan_memory
from edgert.plan_parts import TilePlan, need_of
from edgert.plan_regions import Shape
from edgert.quant.formats import BY_NAME
from edgert.storage.manifest import Extent, Manifest, TensorEntry
from edgert.storage.reader import parts_bytes
from edgert.units import GIB, KIB, MIB, format_bytes
from tests.tight import PROCESS, fixed_process
from tests.tiny_specs import FAMILIES, metadata_of, tiny

BIG = {
    "dense-wide": tiny(
        "llama", hidden_size=4096, num_hidden_layers=4, num_attention_heads=32, head_dim=128,
        num_key_value_heads=8, intermediate_size=14336, vocab_size=128256, rope_dim=128,
        max_position_embeddings=8192,
    ),
    "tied-half-b": tiny(
        "qwen2", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, head_dim=64,
        num_key_value_heads=2, intermediate_size=4864, vocab_size=151936, rope_dim=64,
        max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "64-experts": tiny(
        "olmoe", hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, head_dim=128,
        num_key_value_heads=16, intermediate_size=1024, moe_intermediate_size=1024,
        vocab_size=50304, rope_dim=128, max_position_embeddings=4096, num_experts=64,
        num_experts_per_tok=8,
    ),
}  # fmt: skip
MODELS = FAMILIES | BIG
SMALL = list(FAMILIES)


@lru_cache
def manifest_of(name: str) -> Manifest:
    """The index of a file: matrices in Q4_0 where their rows allow it, all else in F32."""
    spec, at, tensors = MODELS[name], 4096, {}
    for need in required_tensors(spec).values():
        fits = need.kind != "vector" and need.shape[-1] % 32 == 0
        fmt = BY_NAME["Q4_0" if fits else "F32"]
        tensors[need.name] = TensorEntry(
            need.name, fmt, need.shape, Extent(0, at, fmt.nbytes(need.shape))
        )
        at += -(-fmt.nbytes(need.shape) // 32) * 32
    return Manifest((Path("model.gguf"),), (at,), metadata_of(spec), tensors)


@lru_cache(maxsize=4096)
def _plan(name: str, budget: int, options: tuple[tuple[str, Any], ...]) -> Plan:
    wanted = PlanOptions(budget, **({"threads": 2} | dict(options)))
    return plan_memory(MODELS[name], manifest_of(name), wanted, PROCESS)


def plan(name: str, budget: int, **options: Any) -> Plan:
    return _plan(name, budget, tuple(sorted(options.items())))


def ends(name: str, **options: Any) -> tuple[int, int]:
    """The smallest budget that works and the largest that is of use."""
    roomy = plan(name, 2**62, **options)
    return roomy.floor_bytes, roomy.full_bytes


def assert_sound(name: str, found: Plan) -> None:
    """What is true of every plan."""
    spec, manifest = MODELS[name], manifest_of(name)
    assert found.total_bytes == sum(r.nbytes for r in found.regions) <= found.budget_bytes
    assert all(r.nbytes >= 0 for r in found.regions)
    assert len({r.name for r in found.regions}) == len(found.regions)
    assert found.floor_bytes <= found.full_bytes

    rows: dict[str, list[range]] = {}
    for tile in found.tiles:
        rows.setdefault(tile.tensor, []).append(range(tile.first_row, tile.first_row + tile.rows))
        entry = manifest.tensors[tile.tensor]
        assert tile.extents == (entry.rows(tile.first_row, tile.first_row + tile.rows),)
        assert tile.stream_index < 0 or tile.nbytes <= found.slot_bytes
    kinds = {n.name: n.kind for n in required_tensors(spec).values()}
    wanted = {n for n, kind in kinds.items() if kind == "matrix"}
    wanted |= {"token_embd.weight"} if spec.tie_word_embeddings else set()
    assert set(rows) == wanted
    for tensor, parts in rows.items():
        covered = [row for part in parts for row in part]
        assert covered == list(range(manifest.tensors[tensor].shape[0])), tensor

    streamed = [t.stream_index for t in found.tiles if t.stream_index >= 0]
    assert streamed == list(range(len(streamed)))
    assert not streamed or 2 <= found.slots < len(streamed)
    assert streamed or found.slots == 0
    resident = sum(t.nbytes for t in found.tiles if t.stream_index < 0)
    assert found.region("resident").nbytes == resident
    assert found.region("window").nbytes == found.slots * found.slot_bytes
    reads = sum(t.read_bytes for t in found.tiles if t.stream_index >= 0)
    assert found.streamed_bytes == reads
    experts = spec.num_hidden_layers * spec.num_experts
    least = spec.num_experts_per_tok if spec.is_moe else 0
    assert least <= found.expert_slots <= experts
    assert found.region("experts").nbytes == found.expert_slots * found.expert_slot_bytes


# ------------------------------------------------------------------------ sums and layouts


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [4 * KIB, 64 * KIB, 2 * MIB])
def test_tiles_are_counted_and_measured_without_laying_them_out(name: str, size: int) -> None:
    spec, manifest = MODELS[name], manifest_of(name)
    need = need_of(spec, manifest, 2, "f16", size)
    tiles = need.tiles
    assert need.n_tiles == len(tiles)
    assert need.tile_bytes == sum(t.nbytes for t in tiles)
    assert need.weights == sum(t.rows * manifest.tensors[t.tensor].shape[-1] for t in tiles)
    assert need.slot_bytes >= max(t.nbytes for t in tiles) > need.slot_bytes - 4096
    for cut in need.cuts:
        here = [t for t in tiles if (t.tensor, t.is_head) == _kind(cut.kinds[0][1])]
        assert cut.read_bytes() == max(parts_bytes(t.extents, 4096) for t in here)
    assert need.staging_bytes >= max(parts_bytes(t.extents, 4096) for t in tiles)


def _kind(tile: TilePlan) -> tuple[str, bool]:
    return tile.tensor, tile.is_head


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [Shape(64, 10, 96 * KIB, 6), Shape(1, 4, 8 * KIB, 2)])
def test_the_smallest_and_the_full_budget_are_those_of_laid_out_plans(
    name: str, shape: Shape
) -> None:
    layout = Layout(MODELS[name], manifest_of(name), PlanOptions(0, 2), PROCESS, {})
    ways: tuple[dict[str, bool], ...] = ({}, {"keep_dense": True}, {"everything": True})
    for way in ways:
        assert layout.bytes_of(64, shape, **way) == layout.plan(64, shape, **way).total_bytes


# ------------------------------------------------------------------------ for every budget


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(SMALL),
    share=st.floats(0, 1.2),
    context=st.sampled_from([None, 1, 17, 64]),
    chunk=st.sampled_from([None, 1, 7, 64, 1000]),
    kv=st.sampled_from(["f16", "f32"]),
    threads=st.sampled_from([1, 4, 16]),
)
@example("llama", 0.0, 1, 1, "f16", 1)
@example("mixtral", 0.5, None, 1, "f16", 1)
def test_any_budget_from_the_floor_on_has_a_sound_plan(
    name: str, share: float, context: int | None, chunk: int | None, kv: str, threads: int
) -> None:
    options = dict(context_length=context, prefill_tokens=chunk, kv_cache_type=kv, threads=threads)
    floor, full = ends(name, **options)
    found = plan(name, floor + int((full - floor) * share), **options)
    assert_sound(name, found)
    assert (found.floor_bytes, found.full_bytes) == (floor, full)
    assert (found.threads, found.kv_cache_type) == (threads, kv)
    assert context is None or found.context_length == context
    assert found.context_length <= MODELS[name].max_position_embeddings
    assert chunk is None or found.prefill_tokens == min(chunk, 64)
    assert 1 <= found.logit_rows <= found.prefill_tokens
    if share >= 1:
        assert found.streamed_bytes == 0
    with pytest.raises(BudgetError):
        plan(name, floor - 1, **options)


@pytest.mark.parametrize("name", BIG)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.6, 0.95, 1.0])
def test_models_of_real_size_have_sound_plans(name: str, share: float) -> None:
    floor, full = ends(name)
    found = plan(name, floor + int((full - floor) * share))
    assert_sound(name, found)
    if share == 1:
        assert found.streamed_bytes == 0
        assert found.expert_slots == found.region("experts").nbytes // max(
            1, found.expert_slot_bytes
        )
    # What is left over is small: a tile, an expert, or what a more comfortable shape would take.
    if 0.1 <= share < 1:
        assert found.budget_bytes - found.total_bytes < 0.2 * found.budget_bytes


@pytest.mark.parametrize("name", MODELS)
def test_planning_is_pure(name: str) -> None:
    floor, full = ends(name)
    wanted = PlanOptions((floor + full) // 2, threads=2)
    plans = [plan_memory(MODELS[name], manifest_of(name), wanted, PROCESS) for _ in range(2)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("name", [*SMALL, "64-experts"])
def test_more_memory_never_reads_more_for_the_same_shape(name: str) -> None:
    """With the context and the pass fixed, only what stays in memory is left to choose."""
    options = dict(context_length=64, prefill_tokens=8)
    floor, full = ends(name, **options)
    plans = [plan(name, floor + (full - floor) * i // 12, **options) for i in range(13)]
    assert plans[-1].streamed_bytes == 0
    for less, more in pairwise(plans):
        if (less.slots, less.tile_bytes) == (more.slots, more.tile_bytes):
            assert more.resident_bytes >= less.resident_bytes - less.slot_bytes
            assert more.streamed_bytes <= less.streamed_bytes + less.slot_bytes
            assert more.expert_slots >= less.expert_slots or more.streamed_bytes == 0


# ------------------------------------------------------------------------ the floor


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("context", [None, 64])
def test_the_floor_is_refused_by_one_byte_and_the_printed_figure_works(
    name: str, context: int | None
) -> None:
    options = {} if context is None else {"context_length": context}
    floor, _ = ends(name, **options)
    with pytest.raises(BudgetError) as caught:
        plan(name, floor - 1, **options)
    error = caught.value
    assert (error.budget_bytes, error.need_bytes, error.exit_code) == (floor - 1, floor, 5)
    printed = -(-floor // MIB)
    assert f"the smallest that works is {printed} MiB" in str(error)
    assert error.table and error.table in str(error)
    assert ("a shorter --ctx-size needs less" in str(error)) == (context is not None)
    assert plan(name, printed * MIB, **options).total_bytes <= printed * MIB
    assert plan(name, floor, **options).total_bytes <= floor


@pytest.mark.parametrize("name", MODELS)
def test_the_floor_has_nothing_to_spare(name: str) -> None:
    """A plan at the floor holds no more experts than one token of one layer needs."""
    spec = MODELS[name]
    floor, _ = ends(name)
    found = plan(name, floor)
    if spec.is_moe:
        assert found.expert_slots == spec.num_experts_per_tok, (
            f"{found.expert_slots - spec.num_experts_per_tok} experts of "
            f"{found.expert_slot_bytes} bytes could go: the floor is not the smallest that works"
        )
    assert floor - found.total_bytes < 64 * KIB


def test_a_real_model_streams_in_a_small_part_of_its_size() -> None:
    """Beside its keys and values, which nothing can stream."""
    for name, least in (("dense-wide", GIB), ("64-experts", 3 * GIB)):
        floor, full = ends(name, context_length=512)
        kv = plan(name, floor, context_length=512).region("KV cache").nbytes
        assert full > least
        assert floor - PROCESS - kv < 48 * MIB


# ------------------------------------------------------------------------ options


def test_a_longer_context_takes_its_keys_and_values() -> None:
    plans = [plan("dense-wide", 2 * GIB, context_length=n) for n in (512, 1024)]
    kv = [p.region("KV cache").nbytes for p in plans]
    assert kv[1] == 2 * kv[0] == 2 * 512 * 4 * 2 * 8 * 128 * 2
    wide = plan("dense-wide", 2 * GIB, context_length=512, kv_cache_type="f32")
    assert wide.region("KV cache").nbytes == 2 * kv[0]
    assert "512 tokens" in plans[0].region("KV cache").why


def test_a_context_beyond_the_models_is_refused() -> None:
    assert plan("llama", GIB, context_length=64).context_length == 64
    with pytest.raises(ContextError, match="made for: 64; lower --ctx-size") as caught:
        plan("llama", GIB, context_length=65)
    assert (caught.value.tokens, caught.value.context_length) == (65, 64)


def test_a_context_beyond_memory_is_a_budget_that_is_too_small() -> None:
    with pytest.raises(BudgetError) as caught:
        plan("tied-half-b", 256 * MIB, context_length=32768)
    assert "a shorter --ctx-size needs less" in str(caught.value)
    assert plan("tied-half-b", 256 * MIB).context_length < 32768


def test_longer_passes_take_more_activations() -> None:
    sizes = [
        plan("dense-wide", 4 * GIB, prefill_tokens=n).region("activations").nbytes
        for n in (1, 16, 256)
    ]
    assert sizes == sorted(set(sizes))


# ------------------------------------------------------------------------ for people


def test_the_table_shows_every_region_and_the_sum() -> None:
    found = plan("64-experts", GIB)
    lines = found.table().splitlines()
    shown = [r for r in found.regions if r.nbytes]
    assert len(lines) == len(shown) + 1
    for line, region in zip(lines, shown, strict=False):
        assert line.startswith(region.name) and line.endswith(region.why)
        assert format_bytes(region.nbytes) in line
    assert lines[-1].startswith("total") and lines[-1].endswith("of a budget of 1.0 GiB")
    assert format_bytes(found.total_bytes) in lines[-1]


def test_the_dictionary_is_plain_and_complete() -> None:
    found = plan("64-experts", GIB)
    plain = json.loads(json.dumps(found.to_dict()))
    for key in ("budget_bytes", "total_bytes", "floor_bytes", "full_bytes", "context_length",
                "resident_bytes", "streamed_bytes", "expert_bytes", "prefill_tokens", "threads",
                "kv_cache_type", "expert_slots", "weight_bytes"):  # fmt: skip
        assert plain[key] == getattr(found, key)
    assert sum(r["nbytes"] for r in plain["regions"]) == plain["total_bytes"]
    assert all(set(r) == {"name", "nbytes", "why"} and r["why"] for r in plain["regions"])


def test_a_share_is_of_what_the_whole_model_needs(tiny_gguf: Path) -> None:
    with fixed_process():
        full = edgert.plan_model(tiny_gguf, threads=2).full_bytes
        for share in (100, 99.5):
            found = edgert.plan_model(tiny_gguf, threads=2, memory_budget=f"{share}%")
            assert found.budget_bytes == int(full * share / 100)
        assert edgert.plan_model(tiny_gguf, threads=2, memory_budget="100%").streamed_bytes == 0
        assert edgert.plan_model(tiny_gguf, memory_budget="1.5GiB").budget_bytes == 3 * 2**29
        with pytest.raises(BudgetError):
            edgert.plan_model(tiny_gguf, memory_budget="1%")
        for nonsense in ("0%", "-5%", "101%", "x%", "%", "many", "", -1, 0, True, 1.5):
            with pytest.raises(InputError):
                edgert.plan_model(tiny_gguf, memory_budget=nonsense)  # type: ignore[arg-type]


def test_a_model_is_cut_once_however_often_it_is_planned(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What planning leaves in the process makes a second plan; only tiles are made anew for it."""
    sizes: list[int] = []

    def counted(*given: Any) -> Any:
        sizes.append(given[-1])
        return need_of(*given)

    held = iter([PROCESS + MIB])
    monkeypatch.setattr("edgert.plan.need_of", counted)
    monkeypatch.setattr("edgert.loading.load_profile", lambda files, threads: None)
    monkeypatch.setattr("edgert.loading.process_bytes", lambda opened, *, measured: next(held))
    found = make_plan(open_model(tiny_gguf), LoadOptions("100%"), PROCESS, here=True)
    assert found.region("process").nbytes == PROCESS + MIB and next(held, None) is None
    assert sizes and len(sizes) == len(set(sizes))
