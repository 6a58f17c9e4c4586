"""Widths of experts: what is observed, what is chosen, and the pack that comes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import edgert as library
from edgert.errors import InputError
from edgert.expert_widths import Option, choose_widths, measure_options, observe
from edgert.models.reference import ReferenceModel
from edgert.quant.formats import BY_NAME, PLANES
from edgert.quant.packing import Array
from edgert.storage.backend import FileBackend
from tests.command import assert_error, edgert, inside
from tests.seeded import bits64
from tests.tight import tight
from tests.tiny import build, prompt_of, spec_of, tiny_model

SIZE = 64
TEXT = "the tin hen sat on a red mat and ate a nut. " * 20


@pytest.fixture(scope="module")
def engine(tiny_moe_gguf: Path) -> Iterator[library.Engine]:
    with tight(tiny_moe_gguf, None, prefill_tokens=24) as engine:
        yield engine


# ------------------------------------------------------------------------ what is observed


class Listener(ReferenceModel):
    """The reference model, summing up what its experts see as the definition reads."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        spec = self.spec
        experts = spec.num_hidden_layers, spec.num_experts
        self.uses, self.shares = np.zeros(experts), np.zeros(experts)
        self.into = np.zeros((*experts, spec.hidden_size))
        self.inner = np.zeros((*experts, spec.moe_intermediate_size))

    def _experts(self, at: str, x: Array) -> Array:
        w, layer = self.weights, int(at.split(".")[1])
        chosen, weights = self._route(x @ w[f"{at}ffn_gate_inp.weight"].T)
        for t in range(len(x)):
            for e, share in zip(chosen[t], weights[t], strict=True):
                g = w[f"{at}ffn_gate_exps.weight"][e] @ x[t]
                u = w[f"{at}ffn_up_exps.weight"][e] @ x[t]
                self.uses[layer, e] += 1
                self.shares[layer, e] += share**2
                self.into[layer, e] += np.square(x[t])
                self.inner[layer, e] += np.square(g / (1 + np.exp(-g)) * u)
        return super()._experts(at, x)


def test_what_is_observed_is_what_the_reference_sees(engine: library.Engine) -> None:
    tokens, model = prompt_of("olmoe", 50), build("olmoe", "Q8_0")
    truth = Listener(spec_of(model), model.weights)
    truth.logits(tokens)
    found = observe(engine, [tokens])
    assert np.array_equal(found.uses, truth.uses)
    assert np.allclose(found.weights, truth.shares, rtol=0.02)
    for mine, sums in ((found.into, truth.into), (found.inner, truth.inner)):
        # As if each expert had had 16 inputs of the mean of all, besides its own.
        mean = sums.sum(1, keepdims=True) / truth.uses.sum(1)[:, None, None]
        theirs = (sums + 16 * mean) / (truth.uses[:, :, None] + 16)
        assert np.abs(mine - theirs).max() < 0.03 * theirs.max()
    assert (found.share > 0).all()
    assert np.array_equal(found.squares(1, "down"), found.inner[1])
    assert np.array_equal(found.squares(1, "up"), found.into[1])
    shares = found.shares(1)
    assert shares.sum() == pytest.approx(found.share[1]) and (shares > 0).all()
    assert np.array_equal(np.argsort(shares), np.argsort(found.weights[1]))


def test_looking_changes_nothing_that_follows(engine: library.Engine) -> None:
    tokens = prompt_of("olmoe", 40)
    before = engine.logits(tokens)
    observe(engine, [tokens[::-1], tokens])
    assert np.array_equal(engine.logits(tokens), before)


def test_observing_needs_experts_and_what_is_beside_them(
    tiny_gguf: Path, engine: library.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tight(tiny_gguf, None) as dense, pytest.raises(InputError, match="has no experts"):
        observe(dense, [[1, 2]])
    monkeypatch.setattr(engine.forward, "_plan", replace(engine.plan, streamed_bytes=1))
    with pytest.raises(InputError, match="do not fit into the budget.*--memory-budget"):
        observe(engine, [[1, 2]])


def test_options_of_every_tensor(engine: library.Engine, tiny_moe_gguf: Path) -> None:
    manifest = library.read_manifest(tiny_moe_gguf)
    activity = observe(engine, [prompt_of("olmoe", 40)])
    backend = FileBackend(manifest.files, file_bytes=manifest.file_bytes)
    try:
        options = measure_options(manifest, backend, activity)
    finally:
        backend.close()
    assert len(options) == 3 * engine.spec.num_hidden_layers * engine.spec.num_experts
    for found in options.values():
        assert [o.format.name for o in found[-1:]] == ["Q8_0"] and found[-1].cost == 0
        by_group = [[o.cost for o in found if o.format.name.endswith(g)] for g in ("_32", "_128")]
        for costs in by_group:  # the more bits, the less error
            assert len(costs) == 4 and costs == sorted(costs, reverse=True) and costs[-1] > 0


# ------------------------------------------------------------------------ what is chosen


def options_of(key: str, tensors: int) -> dict[tuple[str, int], list[Option]]:
    """Costs that fall by chance with the bits."""
    found = {}
    for i in range(tensors):
        steps = np.sort(bits64(f"{key} {i}", 4) % np.uint64(1000))[::-1].astype(float)
        formats = [PLANES[f"P{bits}_32"] for bits in (1, 2, 3, 4)]
        found["t", i] = [
            Option(f, f.nbytes((64, 64)), float(c)) for f, c in zip(formats, steps, strict=True)
        ]
    return found


@pytest.mark.parametrize("key", ["a", "b", "c"])
def test_the_choice_is_within_the_budget_and_near_the_best(key: str) -> None:
    options = options_of(key, 5)
    least, most = (sum(o[i].nbytes for o in options.values()) for i in (0, -1))
    for budget in np.linspace(least, most, 7).astype(int).tolist():
        chosen = choose_widths(options, budget)
        used = sum(o.nbytes for o in chosen.values())
        cost = sum(o.cost for o in chosen.values())
        assert used <= budget
        best = min(
            sum(o.cost for o in each)
            for each in product(*options.values())
            if sum(o.nbytes for o in each) <= budget
        )
        worst = sum(o[0].cost for o in options.values())
        assert best <= cost <= best + 0.15 * worst
        assert chosen == choose_widths(dict(options), budget)
    assert all(o.format.name == "P4_32" for o in choose_widths(options, most).values())


def test_too_small_a_budget_names_the_smallest() -> None:
    options = options_of("a", 2)
    with pytest.raises(InputError, match=r"2,048 bytes at least, 2.00bpw, more than the 2,000"):
        choose_widths(options, 2000)


def test_weights_as_they_are_cost_nothing() -> None:
    keep = Option(BY_NAME["Q8_0"], 100, 0.0)
    options = {("a", 0): [Option(PLANES["P1_32"], 25, 1.0), keep], ("b", 0): [keep]}
    assert choose_widths(options, 200) == {("a", 0): keep, ("b", 0): keep}


def greedy(
    options: dict[tuple[str, int], list[Option]], budget: int
) -> dict[tuple[str, int], Option]:
    """The same choice, looking at every step there is each time."""
    chosen = {key: found[0] for key, found in options.items()}
    left = budget - sum(option.nbytes for option in chosen.values())
    while True:
        best, step = 0.0, None
        for key, found in options.items():
            for option in found:
                more = option.nbytes - chosen[key].nbytes
                gain = (chosen[key].cost - option.cost) / max(more, 1)
                if more <= left and gain > best:
                    best, step = gain, (key, option)
        if step is None:
            return chosen
        left -= step[1].nbytes - chosen[step[0]].nbytes
        chosen[step[0]] = step[1]


@pytest.mark.parametrize("key", ["a", "b", "c", "d"])
def test_the_choice_is_that_of_looking_at_every_step(key: str) -> None:
    options = options_of(key, 9)
    least, most = (sum(o[i].nbytes for o in options.values()) for i in (0, -1))
    for budget in range(least, most, 700):
        assert choose_widths(options, budget) == greedy(options, budget)


# ------------------------------------------------------------------------ the pack


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize") / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_command(tiny_moe_gguf: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.edgert"
    command = ("quantize", tiny_moe_gguf, "-o", out, "-f", text, "-c", SIZE, "--json")
    run = edgert(*command, "--experts-budget", "3.2bpw")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert 2.5 < found["bits_per_weight"] <= 3.2 and len(found["formats"]) == 6
    tensors = library.read_manifest(out).tensors
    for name, formats in found["formats"].items():
        assert [tensors[name].matrix(e).format.name for e in range(8)] == formats
    assert any(len(set(formats)) > 1 for formats in found["formats"].values())
    kept = {n: t.format.name for n, t in tensors.items() if n not in found["formats"]}
    source = library.read_manifest(tiny_moe_gguf).tensors
    assert kept == {name: source[name].format.name for name in kept}
    assert found["before"]["scored_tokens"] == found["after"]["scored_tokens"] > 0
    assert found["before"]["perplexity"] != found["after"]["perplexity"]
    # The same again is the same pack, to the byte.
    data = out.read_bytes()
    again = edgert(*command[:-1], "--experts-budget", "3.2bpw", "--force")
    assert again.returncode == 0, again.stderr
    assert out.read_bytes() == data
    assert again.stdout.startswith("layer") and "perplexity" in again.stdout


def test_as_much_as_there_is_keeps_the_weights(
    tiny_moe_gguf: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "same.edgert"
    found = library.quantize_experts(
        tiny_moe_gguf, out, "8.5bpw", text=text.read_text(), context_length=SIZE, threads=1
    )
    assert {fmt for each in found.formats.values() for fmt in each} == {"Q8_0"}
    assert found.before == found.after


REFUSED = {
    "no budget": (["--experts-budget", "0bpw"], "above 0 and at most 32"),
    "no size": (["--experts-budget", "small"], "'small'"),
    "too small": (["--experts-budget", "0.5bpw"], "1.25bpw"),
    "a short text": (["--experts-budget", "3bpw", "-c", "200"], "two or more"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_are_refused(
    name: str, tiny_moe_gguf: Path, text: Path, tmp_path: Path
) -> None:
    words, said = REFUSED[name]
    more = [] if "-c" in words else ["-c", SIZE]
    file = tmp_path / "short.txt"
    file.write_text(TEXT[: 250 if "short" in name else None])
    out = tmp_path / "out.edgert"
    call = inside if name in ("no budget", "no size") else edgert
    run = call("quantize", tiny_moe_gguf, "-o", out, "-f", file, *more, *words)
    assert_error(run, 2, said)
    assert not out.exists()


def test_a_dense_model_has_no_experts(tiny_gguf: Path, tmp_path: Path) -> None:
    run = inside("quantize", tiny_gguf, "-o", tmp_path / "out", "--experts-budget", "3bpw")
    assert_error(run, 2, "has no experts")


def test_an_output_that_is_there_is_kept(tiny_moe_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.edgert"
    out.write_bytes(b"mine")
    run = inside("quantize", tiny_moe_gguf, "-o", out, "--experts-budget", "3bpw")
    assert_error(run, 2, "--force replaces it")
    assert out.read_bytes() == b"mine"


def test_experts_of_other_formats_too(tmp_path: Path) -> None:
    """Q4_0 is smaller than P4_32; only what is smaller still is an option."""
    path = tiny_model("mixtral", "Q4_0", path=tmp_path / "mixtral.gguf")
    found = library.quantize_experts(
        path, tmp_path / "out.edgert", "3.6bpw", text=TEXT, context_length=SIZE, threads=1
    )
    assert found.bits_per_weight <= 3.6
    used = {fmt for each in found.formats.values() for fmt in each}
    assert used <= {"Q4_0", *PLANES} - {"P4_32"}
