"""Experts of several formats and sizes in one layer: the same bits however they come to memory."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgert
from edgert.errors import UnsupportedError
from edgert.expert_records import LayerExperts, expert_records
from edgert.expert_simulation import simulate
from edgert.expert_sizes import slot_sizes, slots_within
from edgert.kernels_cpu.layout import repack_ref
from edgert.models.spec import spec_from_manifest
from edgert.models.tensors import check_tensors
from edgert.opening import open_model
from edgert.placing import place_part
from edgert.quant.formats import BY_NAME, PLANES, QuantFormat
from edgert.quant.planes import quantize_planes_ref
from edgert.quant.reference import dequantize_ref
from edgert.routing import join_passes, read_routing, write_routing
from edgert.storage.expert_cache import SlotSizes, fitting, plan_sized_admission, that_fit
from edgert.storage.expert_policy import POLICIES
from edgert.storage.manifest import Extent, Manifest, TensorEntry
from edgert.storage.pack import read_pack
from tests.answers import answer
from tests.command import inside
from tests.gguf_file import write_gguf
from tests.recording import counted, recorded
from tests.tight import tight
from tests.tiny import TinyModel, build, prompt_of

EXPERTS = 8
Q8_0 = BY_NAME["Q8_0"]
WIDTHS = [PLANES[name] for name in ("P1_128", "P2_32", "P3_128", "P4_32")] + [Q8_0]
PARTS = ("gate", "up", "down")


def formats_of(names: list[str]) -> dict[str, list[QuantFormat]]:
    """Another format for nearly every matrix."""
    return {
        name: [WIDTHS[(3 * at + 2 * e + at * e) % len(WIDTHS)] for e in range(EXPERTS)]
        for at, name in enumerate(names)
    }


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return build("olmoe", "Q8_0")


@pytest.fixture(scope="module")
def mixed(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    source, out = folder / "olmoe.gguf", folder / "olmoe.edgert"
    write_gguf(source, model.metadata, model.tensors)
    names = [name for name in model.tensors if "_exps" in name]
    edgert.pack_model(source, out, formats=formats_of(names))
    return out


@pytest.fixture(scope="module")
def rows(model: TinyModel) -> dict[str, list[np.ndarray]]:
    """Every matrix of the experts in its format, by the slow twin."""
    names = [name for name in model.tensors if "_exps" in name]
    weights, found = model.weights, {}
    for name, formats in formats_of(names).items():
        whole = np.frombuffer(model.tensors[name][2], np.uint8).reshape(EXPERTS, 256, -1)
        found[name] = [
            whole[e] if fmt is Q8_0 else quantize_planes_ref(fmt, weights[name][e])  # type: ignore[arg-type]
            for e, fmt in enumerate(formats)
        ]
    return found


# ------------------------------------------------------------------------ the file


def test_the_file_says_what_each_expert_is(mixed: Path) -> None:
    manifest = read_pack(mixed)
    names = [name for name in manifest.tensors if "_exps" in name]
    for name, formats in formats_of(names).items():
        entry = manifest.tensors[name]
        assert entry.layout == "mixed" and entry.formats == tuple(dict.fromkeys(formats))
        assert [entry.matrix(e).format for e in range(EXPERTS)] == formats
        assert entry.nbytes == sum(entry.matrix(e).nbytes for e in range(EXPERTS))
    edgert.verify_pack(mixed)
    run = inside("show", mixed, "--json")
    shown = json.loads(run.stdout)
    counts = [f for name in names for f in formats_of(names)[name]]
    for fmt in WIDTHS[:-1]:
        each = shown["formats"][fmt.name]
        assert each["parameters"] == counts.count(fmt) * 256 * 256
        assert each["nbytes"] == counts.count(fmt) * fmt.nbytes((256, 256))
        assert each["tensors"] == sum(fmt in manifest.tensors[name].formats for name in names)
    assert shown["tensor_bytes"] == sum(f["nbytes"] for f in shown["formats"].values())


def test_alike_experts_make_the_file_they_always_made(
    model: TinyModel, mixed: Path, tmp_path: Path
) -> None:
    names = [name for name in model.tensors if "_exps" in name]
    one = {name: PLANES["P2_32"] for name in names}
    source = mixed.with_name("olmoe.gguf")
    edgert.pack_model(source, tmp_path / "a", formats=one)
    edgert.pack_model(source, tmp_path / "b", formats={n: [f] * EXPERTS for n, f in one.items()})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def records_of(manifest: Manifest, size: int) -> tuple[LayerExperts, ...]:
    spec = spec_from_manifest(manifest.metadata, manifest.tensors)
    return expert_records(spec, check_tensors(spec, manifest.tensors), manifest, size)


def apart(manifest: Manifest) -> Manifest:
    """The same, up and down of each expert exchanged, so that no record lies as in a slot."""
    tensors = dict(manifest.tensors)
    for layer in range(2):
        gate, up = (tensors[f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate", "up"))
        for one, other in ((gate, up), (up, gate)):
            tensors[one.name] = replace(other, name=one.name)
    return replace(manifest, tensors=tensors)


@pytest.fixture(scope="module")
def tiles(rows: dict[str, list[np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """Every matrix as memory holds it, by the slow twin."""
    shape = (256, 256)
    return {
        name: [
            repack_ref(fmt, raw.reshape(-1), *shape)
            for fmt, raw in zip(formats, rows[name], strict=True)
        ]
        for name, formats in formats_of(list(rows)).items()
    }


@pytest.mark.parametrize("size", [1, 20_000, 1 << 20])
def test_parts_make_the_record_of_each_expert(
    tiles: dict[str, list[np.ndarray]], mixed: Path, size: int
) -> None:
    manifest, data = read_pack(mixed), mixed.read_bytes()
    for found, is_packed in ((manifest, True), (apart(manifest), False)):
        for layer, expert in product(records_of(found, size), range(EXPERTS)):
            record = layer.record(expert)
            slot = np.zeros(record.nbytes, np.uint8)
            names = {part.tensor for part in record.parts}
            assert names == ({""} if is_packed else set(layer.tensors))
            for part in record.parts:
                at = part.of(expert)
                raw = np.frombuffer(data, np.uint8, at.nbytes, at.offset)
                place_part(part, found, raw, slot)
            starts = (0, record.up_offset, record.down_offset)
            held = layer.tensors if is_packed else (*layer.tensors[1::-1], layer.tensors[2])
            for name, start in zip(held, starts, strict=True):
                truth = tiles[name][expert]
                assert np.array_equal(slot[start : start + truth.nbytes], truth)


# ------------------------------------------------------------------------ the same model


def test_a_mixed_model_computes_what_its_numbers_say(
    model: TinyModel, rows: dict[str, list[np.ndarray]], mixed: Path, tmp_path: Path
) -> None:
    """Beside a model whose weights are those numbers in 32 bits; what is left is the rounding of
    activations."""
    tensors = {}
    for name, values in model.weights.items():
        for e, raw in enumerate(rows.get(name, ())):
            values[e] = dequantize_ref(formats_of(list(rows))[name][e], raw)
        tensors[name] = (BY_NAME["F32"], values.shape, values.astype(np.float32).tobytes())
    write_gguf(tmp_path / "exact.gguf", model.metadata, tensors)
    tokens = prompt_of("olmoe", 24)
    with tight(tmp_path / "exact.gguf", None) as engine:
        truth = engine.logits(tokens).copy()
    with tight(mixed, None) as engine:
        found = engine.logits(tokens)
    assert np.sqrt(np.mean((found - truth) ** 2) / np.mean(truth**2)) < 0.03


def test_only_the_experts_that_are_chosen_count(
    model: TinyModel, mixed: Path, tmp_path: Path
) -> None:
    """Bits: one token uses three experts of each layer; those have the same format in both."""
    source, tokens = mixed.with_name("olmoe.gguf"), prompt_of("olmoe", 1)
    chosen: list[np.ndarray] = []
    with tight(source, None) as engine:
        assert engine.experts is not None
        engine.experts.record(chosen.append)
        engine.logits(tokens)
    fmt, used = PLANES["P3_128"], chosen[0][0]
    names = [name for name in model.tensors if "_exps" in name]
    formats = formats_of(names)
    for name in names:
        for expert in used[int(name[4])].tolist():
            formats[name][expert] = fmt
    edgert.pack_model(source, tmp_path / "all", formats=dict.fromkeys(names, fmt))
    edgert.pack_model(source, tmp_path / "some", formats=formats)
    found = []
    for name in ("all", "some"):
        with tight(tmp_path / name, None) as engine:
            found.append(engine.logits(tokens).copy())
    assert np.array_equal(*found)


def hashes(path: Path, spare: int | None, **options: int) -> tuple[str, edgert.Plan]:
    with tight(path, spare, **options) as engine:
        return edgert.logits_hash(engine.logits(prompt_of("olmoe", 30))), engine.plan


def test_any_budget_and_any_threads_give_the_same_bits(mixed: Path) -> None:
    truth, plan = hashes(mixed, None, threads=1)
    records = [r for layer in records_of(read_pack(mixed), 1 << 20) for r in layer.records]
    sizes = [-(-record.nbytes // 4096) * 4096 for record in records]
    assert plan.region("experts").nbytes == sum(sizes)  # of each what it is
    assert len(set(sizes)) > 5
    slots = set()
    for spare, threads, chunk in product((0, 150_000, 600_000, 1_200_000), (1, 2), (1, 30)):
        found, plan = hashes(mixed, spare, threads=threads, prefill_tokens=chunk)
        assert found == truth
        assert plan.expert_sizes is not None
        held = plan.expert_sizes.slots
        assert plan.region("experts").nbytes == held.sum() and held.max() == max(sizes)
        slots.add(plan.expert_slots)
    assert len(slots) >= 3 and min(slots) == 3 and max(slots) < 16


def test_slots_come_and_go_with_the_budget(mixed: Path) -> None:
    with tight(mixed, None) as engine:
        truth = answer(engine)
        least, most = engine.smallest_budget(), engine.plan.total_bytes
        for share in (0, 0.3, 1, 0.7, 0.1, 0.9):
            engine.set_memory_budget(int(least + share * (most - least)))
            assert answer(engine) == truth
            assert engine.plan.total_bytes <= least + share * (most - least)


@pytest.mark.parametrize("policy", ["auto", *POLICIES])
@pytest.mark.parametrize("spare", [0, 600_000])
def test_the_device_hits_as_the_simulator_says(mixed: Path, policy: str, spare: int) -> None:
    with tight(mixed, spare, prefill_tokens=1) as engine:
        assert engine.experts is not None
        engine.experts.set_policy(policy)
        assert engine.plan.expert_sizes is not None
        trace, slots, hits, misses = counted(engine, mixed)
    (figure,) = simulate(trace, [slots], [policy])
    assert figure.hit_rate == pytest.approx(hits / (hits + misses), abs=1e-12)


@pytest.mark.parametrize("spare", [0, 150_000, 600_000, 1_200_000])
def test_an_engine_that_knows_its_model_begins_with_what_fits(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    path = tmp_path / "profile.npz"
    monkeypatch.setenv("EDGERT_EXPERT_PROFILE", str(path))
    with tight(mixed, None) as engine:
        recorded(engine, mixed)
    uses, before = edgert.read_expert_profile(path).uses.astype(float), path.read_bytes()
    with tight(mixed, spare, prefill_tokens=1) as engine:
        assert engine.plan.expert_sizes is not None
        trace, slots, hits, misses = counted(engine, mixed)
    path.write_bytes(before)
    (known,) = simulate(trace, [slots], ["auto"], profile=uses, loaded=True)
    assert known.hit_rate == pytest.approx(hits / (hits + misses), abs=1e-12)


def test_a_trace_keeps_the_sizes(tmp_path: Path) -> None:
    sizes = np.array([[4096, 8192, 4096], [12288, 4096, 4096]])
    trace = join_passes([np.zeros((3, 2, 1), np.int16)], 3, 12288, sizes)
    assert [trace.slots_within(n) for n in (12287, 12288, 20480, 10**6)] == [0, 1, 2, 6]
    path = tmp_path / "t.npz"
    with path.open("wb") as stream:
        write_routing(stream, trace)
    back = read_routing(path).record_sizes
    assert back is not None and np.array_equal(back, sizes)
    for bad in (sizes[:1], sizes - 4096, sizes.astype(float)):
        with path.open("wb") as stream:
            write_routing(stream, replace(trace, record_sizes=bad))
        with pytest.raises(edgert.ModelError, match="record_sizes"):
            read_routing(path)


# ------------------------------------------------------------------------ slots of several sizes

PAGES = st.integers(1, 6)


@given(st.lists(PAGES, min_size=1, max_size=24), st.integers(1, 4))
def test_slots_are_those_of_all_experts_the_largest_first(records: list[int], k: int) -> None:
    sizes = slot_sizes(np.array(records), k)
    assert sorted(sizes) == sorted(records)
    assert sizes[:k].tolist() == sorted(records, reverse=True)[:k]
    for nbytes in range(sum(records) + 2):
        count = slots_within(sizes, nbytes)
        assert sizes[:count].sum() <= nbytes
        assert count == len(sizes) or sizes[: count + 1].sum() > nbytes


def test_fewer_slots_keep_large_and_small_experts_in_proportion() -> None:
    sizes = slot_sizes(np.repeat([1, 2, 3, 4], 64), 8)
    for count in (64, 100, 128, 200):
        shares = [np.count_nonzero(sizes[:count] == n) / 64 for n in (1, 2, 3, 4)]
        assert max(shares) - min(shares) < 0.16


def most_that_fit(needs: list[int], slots: list[int]) -> bool:
    """Whether all can have a slot: the largest in the largest."""
    pairs = zip(sorted(needs, reverse=True), sorted(slots, reverse=True), strict=False)
    return len(needs) <= len(slots) and all(need <= slot for need, slot in pairs)


@given(st.data())
def test_an_expert_gets_a_slot_as_large_as_it_if_there_is_any_way(data: st.DataObject) -> None:
    records = np.array(data.draw(st.lists(PAGES, min_size=4, max_size=12)))
    n = data.draw(st.integers(1, len(records)))
    slots = slot_sizes(records, 2)[:n]
    owner = np.full(n, -1)
    tenants = data.draw(st.permutations(range(len(records))))
    for slot in range(n):  # in a slot that fits, or in none
        if records[tenants[slot]] <= slots[slot] and data.draw(st.booleans()):
            owner[slot] = tenants[slot]
    busy = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    rank = np.array(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)), float)
    wanted = [key for key in data.draw(st.permutations(range(len(records)))) if key not in owner]
    sizes = SlotSizes(records, slots)
    free = slots[~busy].tolist()
    chosen = fitting(wanted, sizes, ~busy)
    assert most_that_fit([records[key] for key in chosen], free)
    for at, key in enumerate(wanted):  # first come, first served
        before = [records[other] for other in wanted[:at] if other in chosen]
        assert (key in chosen) == most_that_fit([*before, records[key]], free)
    plan = plan_sized_admission(chosen, owner, rank, busy, sizes)
    assert {item.expert for item in plan.admitted} == set(chosen) and not plan.waiting
    taken = [item.slot for item in plan.admitted]
    assert len(set(taken)) == len(taken) and not busy[taken].any()
    for item in plan.admitted:
        assert slots[item.slot] >= records[item.expert] and item.evicted == owner[item.slot]
    rest = plan_sized_admission(wanted, owner, rank, busy, sizes)
    assert {*(item.expert for item in rest.admitted), *rest.waiting} == set(wanted)


def test_of_free_slots_the_smallest_and_of_tenants_the_lowest() -> None:
    sizes = SlotSizes(np.array([1, 2, 3, 1, 2]), np.array([3, 1, 2, 2]))
    none, rank = np.zeros(4, np.bool_), np.array([5.0, 1.0, 4.0, 3.0])
    plan = plan_sized_admission([3, 4], np.array([-1, -1, 1, -1]), rank, none, sizes)
    assert {(i.expert, i.slot, i.evicted) for i in plan.admitted} == {(4, 3, -1), (3, 1, -1)}
    full = plan_sized_admission([4], np.array([2, 3, 1, 0]), rank, none, sizes)
    assert [(i.slot, i.evicted) for i in full.admitted] == [(3, 0)]
    assert [part.tolist() for part in that_fit([np.array([0, 2])], sizes)] == [[0, 2]]
    small = SlotSizes(np.array([3, 3]), np.array([3, 1]))
    assert [part.tolist() for part in that_fit([np.array([0]), np.array([0])], small)] == [[0], []]


# ------------------------------------------------------------------------ what is refused


def test_experts_that_read_in_two_ways_are_refused(mixed: Path) -> None:
    manifest = read_pack(mixed)
    name = "blk.1.ffn_down_exps.weight"
    entry = manifest.tensors[name]
    matrices = (*entry.matrices[:-1], (BY_NAME["F16"], entry.matrices[-1][1]))
    bad = replace(manifest, tensors={**manifest.tensors, name: replace(entry, matrices=matrices)})
    with pytest.raises(UnsupportedError, match=r"ffn_down_exps.weight has F16.*must all be"):
        records_of(bad, 1 << 20)


def test_a_mixed_pack_is_not_packed_again(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(edgert.InputError, match="is an .edgert file already"):
        edgert.pack_model(mixed, tmp_path / "again")
    assert open_model(mixed).manifest.tensors["blk.0.ffn_up_exps.weight"].matrices


def test_entries_of_one_matrix(mixed: Path) -> None:
    entry = TensorEntry("t", Q8_0, (3, 16, 32), Extent(0, 4096, 544), "tiles", 4096)
    assert entry.matrix(2).extent == Extent(0, 4096 + 2 * 4096, 544)
    rows = TensorEntry("t", Q8_0, (3, 16, 32), Extent(0, 100, 3 * 544))
    assert rows.matrix(1) == TensorEntry("t", Q8_0, (16, 32), Extent(0, 644, 544))
