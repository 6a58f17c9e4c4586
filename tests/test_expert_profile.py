"""What is learnt of a model's routing: counted right, kept safely, believed of this model alone."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

import edgert
from edgert.errors import ModelError
from edgert.expert_profile import (
    ENVIRONMENT,
    MOST_TOKENS,
    SAMPLE_STEPS,
    ExpertLearner,
    Identity,
    identity_of,
    load_expert_profile,
    profile_file,
    read_expert_profile,
    save_expert_profile,
)
from edgert.opening import open_model
from edgert.storage.expert_policy import hottest
from tests.answers import answer, expected
from tests.tight import tight
from tests.tiny import tiny_model

MODEL = Identity("0123456789abcdef0123", "a model", 3, 8, 2)


def choices_of(tokens: int, seed: int = 0, model: Identity = MODEL) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = rng.random((tokens, model.layers, model.experts)) ** np.arange(1, model.experts + 1)
    return np.argsort(-noise, axis=2)[:, :, : model.k].astype(np.int16)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Profiles are kept in an empty folder of the user's."""
    monkeypatch.delenv(ENVIRONMENT)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    return tmp_path / "experts"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one file that profiles are kept in."""
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "mine.npz"))
    return tmp_path / "mine.npz"


def test_counts_are_those_of_a_loop_however_passes_are_cut() -> None:
    choices = choices_of(700)
    uses = np.zeros((3, 8))
    for token in choices:
        for layer in range(3):
            for e in token[layer]:
                uses[layer, e] += 1
    for cut in (1, 7, 700):
        learner = ExpertLearner(MODEL)
        for at in range(0, 700, cut):
            learner.add(choices[at : at + cut])
        found = learner.profile(None)
        assert learner.seen == found.tokens == 700
        assert np.array_equal(found.uses, uses)
        assert np.array_equal(found.sample, choices[-(SAMPLE_STEPS // 3) :])


def test_old_uses_fade() -> None:
    profile, learner = None, ExpertLearner(MODEL)
    for seed in range(4):
        learner = ExpertLearner(MODEL)
        learner.add(choices_of(int(MOST_TOKENS) // 2, seed))
        profile = learner.profile(profile)
        assert profile.tokens <= MOST_TOKENS
        assert profile.uses.sum() == pytest.approx(profile.tokens * 2 * 3, rel=1e-3)


def test_a_profile_survives_its_file(kept: Path) -> None:
    learner = ExpertLearner(MODEL)
    learner.add(choices_of(100))
    profile = learner.profile(None)
    assert load_expert_profile(MODEL) is None
    assert save_expert_profile(profile)
    back = load_expert_profile(MODEL)
    assert back is not None and back.identity == MODEL and back.tokens == 100
    for name in ("uses", "sample"):
        assert np.array_equal(getattr(back, name), getattr(profile, name))
    assert [p.suffix for p in kept.iterdir()] == [".npz"]


def test_off_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = ExpertLearner(MODEL)
    learner.add(choices_of(20))
    monkeypatch.setenv(ENVIRONMENT, "off")
    assert profile_file(MODEL) is None and not save_expert_profile(learner.profile(None))
    assert load_expert_profile(MODEL) is None


def test_another_model_is_refused_by_name(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = ExpertLearner(MODEL)
    learner.add(choices_of(20))
    assert save_expert_profile(learner.profile(None))
    other = Identity("f" * 20, "another", 3, 8, 2)
    with pytest.raises(ModelError, match=r"of another model: a model .*not another.*EDGERT_EXPERT"):
        load_expert_profile(other)
    monkeypatch.setenv(ENVIRONMENT, "")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    found = profile_file(other)
    assert found is not None
    found.parent.mkdir()
    found.write_bytes(mine.read_bytes())  # nobody asked for this file: it counts as none
    assert load_expert_profile(other) is None


def _damaged(**changes: object) -> bytes:
    stream = io.BytesIO()
    values = {
        "version": 2, "fingerprint": MODEL.fingerprint, "model": "m", "k": 2, "tokens": 5.0,
        "uses": np.ones((3, 8), np.float32),
        "sample": np.zeros((5, 3, 2), np.int16),
    }  # fmt: skip
    np.savez(stream, **{n: v for n, v in (values | changes).items() if v is not None})  # type: ignore[arg-type]
    return stream.getvalue()


def _bomb() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("uses.npy", bytes(64 << 20))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "can be read"),
        (b"GGUF" * 100, "can be read"),
        (_damaged()[:-40], "can be read"),
        (_bomb(), "unpacks to more than 32 MiB"),
        (_damaged(version=1), "version 1"),
        (_damaged(uses=None), "uses"),
        (_damaged(uses=np.ones((3, 8))), "uses are not"),
        (_damaged(uses=np.full((3, 8), np.nan, np.float32)), "negative or no number"),
        (_damaged(uses=np.full((3, 8), -1, np.float32)), "negative or no number"),
        (_damaged(tokens=np.inf), "negative or no number"),
        (_damaged(sample=np.zeros((5, 3, 3), np.int16)), "sample is not"),
        (_damaged(sample=np.full((5, 3, 2), 8, np.int16)), "none of 8"),
        (_damaged(sample=np.zeros((5000, 3, 2), np.int16)), "too long"),
        (_damaged(k=np.array([object()])), "can be read"),
        (_damaged(k=np.zeros(2)), "can be read"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "p.npz"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=says):
        read_expert_profile(path)


def test_models_differ_by_their_routers(tmp_path: Path) -> None:
    paths = [tiny_model("olmoe", "Q8_0", seed, path=tmp_path / f"{seed}.gguf") for seed in (0, 1)]
    found = [identity_of(o.spec, o.manifest) for o in map(open_model, paths)]
    assert found[0].fingerprint != found[1].fingerprint
    again = open_model(paths[0])
    assert identity_of(again.spec, again.manifest) == found[0]


def test_the_hottest_are_as_many_for_each_layer() -> None:
    uses = np.array([[9, 1, 5, 0.1], [0, 100, 90, 80]], np.float32)
    assert [h.tolist() for h in hottest(uses, 5)] == [[0, 2], [1, 2, 3]]
    assert [h.tolist() for h in hottest(uses, 8)] == [[0, 1, 2], [1, 2, 3]]  # never used: not read
    assert [h.tolist() for h in hottest(uses, 1)] == [[], [1]]


@pytest.mark.parametrize("spare", [0, 900 * 1024, None])
def test_a_run_teaches_the_next_one_and_changes_no_bit(
    tiny_moe_gguf: Path, mine: Path, spare: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGERT_PREFETCH", "off")  # it is the profile that is to help here
    want = expected(tiny_moe_gguf)[1]
    mine.unlink(missing_ok=True)
    counts, resident = [], []
    for _ in range(2):
        with tight(tiny_moe_gguf, spare, prefill_tokens=1) as engine:
            assert engine.experts is not None and engine.weights.experts is not None
            resident.append(np.count_nonzero(engine.weights.experts.slot_address))
            assert answer(engine) == want
            counts.append(engine.experts.counts)
    assert resident[0] == 0 <= resident[1] and sum(counts[0]) == sum(counts[1])
    if spare != 0:  # there is room for three experts alone, which belong to no layer
        assert resident[1] > 0 and counts[0][1] > counts[1][1]
    opened = open_model(tiny_moe_gguf)
    found = load_expert_profile(identity_of(opened.spec, opened.manifest))
    assert found is not None and found.uses.sum() == 2 * sum(counts[0])


def test_a_short_run_and_a_dense_model_leave_nothing(
    tiny_moe_gguf: Path, tiny_gguf: Path, mine: Path
) -> None:
    for path in (tiny_moe_gguf, tiny_gguf):
        with tight(path) as engine:
            engine.generate([1, 5, 9], max_tokens=3)
    assert not mine.exists()


def test_an_engine_refuses_the_profile_of_another_model(tiny_moe_gguf: Path, mine: Path) -> None:
    mine.write_bytes(_damaged())
    with pytest.raises(edgert.ModelError, match="expert profile of another model: m"):
        tight(tiny_moe_gguf)
