"""Traces of routing: recorded by the engine, read back, replayed to the same hits, refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

import edgert
from edgert.errors import InputError, ModelError
from edgert.expert_simulation import replay, simulate
from edgert.routing import Routing, join_passes, read_routing, write_routing
from edgert.storage.expert_policy import POLICIES, Lru, Predicted, Robust
from tests.answers import answer, expected
from tests.command import edgert as command
from tests.command import inside
from tests.recording import counted, recorded
from tests.tight import tight


@pytest.mark.parametrize("policy", ["auto", *POLICIES])
@pytest.mark.parametrize("spare", [0, 900 * 1024])
def test_the_device_hits_as_the_simulator_says(
    tiny_moe_gguf: Path, policy: str, spare: int
) -> None:
    with tight(tiny_moe_gguf, spare, prefill_tokens=1) as engine:
        assert engine.experts is not None
        engine.experts.set_policy(policy)
        trace, slots, hits, misses = counted(engine, tiny_moe_gguf)
        done = answer(engine)
    assert done == expected(tiny_moe_gguf)[1]
    (figure,) = simulate(trace, [slots], [policy])
    assert hits + misses == trace.requests[0].size
    assert figure.hit_rate == pytest.approx(hits / (hits + misses), abs=1e-12)


def test_the_simulator_begins_as_an_engine_that_knows_its_model(
    tiny_moe_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.npz"
    monkeypatch.setenv("EDGERT_EXPERT_PROFILE", str(path))
    with tight(tiny_moe_gguf, None) as engine:
        recorded(engine, tiny_moe_gguf)
    uses = edgert.read_expert_profile(path).uses.astype(float)
    for spare in (900 * 1024, 2400 * 1024):
        before = path.read_bytes()
        with tight(tiny_moe_gguf, spare, prefill_tokens=1) as engine:
            trace, slots, hits, misses = counted(engine, tiny_moe_gguf)
        path.write_bytes(before)
        (known,) = simulate(trace, [slots], ["auto"], profile=uses, loaded=True)
        assert known.hit_rate == pytest.approx(hits / (hits + misses), abs=1e-12)


def test_a_predictor_that_always_lies_changes_no_bit(tiny_moe_gguf: Path) -> None:
    with tight(tiny_moe_gguf, 900 * 1024) as engine:
        streamer = engine.weights.experts
        assert streamer is not None
        order = Lru(streamer.shape)

        def lies(owner: np.ndarray) -> np.ndarray:
            return order.seen[owner] < np.median(order.seen[owner])

        streamer.set_policy(lambda n: Robust(streamer.shape, n, Predicted(lies, order)))
        done = answer(engine)
    assert done == expected(tiny_moe_gguf)[1]


def test_what_is_recorded_does_not_depend_on_the_passes(tiny_moe_gguf: Path) -> None:
    found = []
    for chunk, spare in ((1, 0), (7, 900 * 1024), (64, None)):
        with tight(tiny_moe_gguf, spare, prefill_tokens=chunk) as engine:
            found.append(recorded(engine, tiny_moe_gguf))
    assert found[0].passes[0].max() == 1 and found[2].passes[0].max() > 7
    for other in found[1:]:
        assert np.array_equal(found[0].requests[0], other.requests[0])
    assert found[0].requests[0].dtype == np.int16


def test_a_trace_survives_its_file(tmp_path: Path) -> None:
    trace = join_passes([np.zeros((3, 2, 1), np.int16), np.ones((1, 2, 1), np.int16)], 5, 77)
    path = tmp_path / "t.npz"
    with path.open("wb") as stream:
        write_routing(stream, trace)
    back = read_routing(path)
    assert (back.experts, back.layers, back.k, back.tokens, back.record_bytes) == (5, 2, 1, 4, 77)
    assert np.array_equal(back.requests[0], trace.requests[0])
    assert back.passes[0].tolist() == [3, 1]
    assert back.uses().tolist() == [[3, 1, 0, 0, 0]] * 2


def test_traces_of_others_are_requests(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    several = np.arange(2 * 3 * 2, dtype=np.uint8).reshape(2, 3, 2, 1) % 5
    np.savez(path, layers=np.arange(2), a=several, b=several[:, 0])
    found = read_routing(path)
    assert (len(found.requests), found.layers, found.k, found.experts) == (4, 2, 1, 5)
    assert len(read_routing(path, array="b", experts=9).requests) == 1
    with pytest.raises(InputError, match=r"no array 'c'; it has: layers, a, b"):
        read_routing(path, array="c")


def _file(**arrays: object) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


_GOOD = {
    "layers": 2, "experts": 4, "k": 1, "record_bytes": 0,
    "choices": np.zeros((3, 2, 1), np.int16), "passes": np.array([1, 2]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a routing trace"),
        (b"GGUF" * 100, "not a routing trace"),
        (_file(**_GOOD)[:-30], "not a routing trace"),
        (_file(a=np.zeros(4)), "no array of integers"),
        (_file(a=np.zeros((2, 2, 2))), "no array of integers"),
        (_file(a=np.array([object()])), "not a routing trace"),
        (_file(a=np.full((2, 2, 1), -1)), "names expert -1"),
        (_file(a=np.full((2, 2, 1), 1 << 20)), "names expert 1048576"),
        (_file(a=np.zeros((2, 2, 2), np.int8)), "same expert twice"),
        (_file(**{**_GOOD, "choices": np.zeros((3, 2, 2), np.int16)}), "not .tokens, 2 layers"),
        (_file(**{**_GOOD, "choices": np.full((3, 2, 1), 4)}), "names expert 4 of 4"),
        (_file(**{**_GOOD, "passes": np.array([1, 1])}), "do not add up"),
        (_file(**{**_GOOD, "layers": np.array([2])}), "not one whole number"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=says):
        read_routing(path)


def test_arrays_that_do_not_fit_and_files_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, a=np.zeros((2, 2, 1), np.int8), b=np.zeros((2, 3, 1), np.int8))
    with pytest.raises(InputError, match="2 x 1 and 3 x 1"):
        read_routing(path)
    for missing in (tmp_path / "no.npz", tmp_path):
        with pytest.raises(ModelError, match="does not exist|is a folder"):
            read_routing(missing)


def test_many_tokens_in_a_pass_use_an_expert_once() -> None:
    choices = np.array([[[0], [1]], [[0], [2]], [[3], [1]]], np.int16)
    whole = Routing(4, (choices,), (np.array([3], np.int32),))
    (figure,) = simulate(whole, [4], ["lru"])
    assert figure.misses_per_token * 3 == 4 and figure.hit_rate == 0
    assert replay([np.array([0]), np.array([0])], (1, 4), 1, Lru((1, 4))) == 1


def test_trace_and_simulate_agree_on_the_command_line(tiny_moe_gguf: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "t.npz", tmp_path / "t.png"
    run = command(
        "trace", tiny_moe_gguf, "-c", 64, "-n", 8, "--temp", 0, "-p", "a b", "--out", out, "--json"
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    again = inside("simulate", out, "--slots", told["slots"], "--policies", "auto", "--json")
    found = json.loads(again.stdout)
    assert found["figures"][0]["hit_rate"] == pytest.approx(told["hit_rate"], abs=1e-12)
    table = inside("simulate", out, "--budgets", "50%,1MiB")
    assert table.returncode == 0, table.stderr
    assert "belady" in table.stdout and "auto is" in table.stdout
    pytest.importorskip("matplotlib")
    assert inside("simulate", out, "--plot", picture).returncode == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--budgets", "0%"), "no share"),
        (("--budgets", "x%"), "no share"),
        (("--budgets", "1GiB"), "--record-bytes"),
        (("--slots", "a"), "no list of slots"),
        (("--slots", "99999"), "give from"),
        (("--policies", "magic"), "no policy 'magic'"),
    ],
)
def test_simulate_says_what_is_wrong(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, a=np.arange(12, dtype=np.int8).reshape(6, 2, 1) % 4)
    run = inside("simulate", path, *arguments)
    assert run.returncode == 1 or run.returncode == 2
    assert says in run.stderr and "Error" not in run.stderr


def test_a_dense_model_has_nothing_to_trace(tiny_gguf: Path, tmp_path: Path) -> None:
    run = inside("trace", tiny_gguf, "-c", 64, "-p", "a", "--out", tmp_path / "t.npz")
    assert run.returncode != 0 and "no experts" in run.stderr
    assert not (tmp_path / "t.npz").exists()
