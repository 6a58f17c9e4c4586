"""`edgert bench`: rows of a model, the kernels alone, llama.cpp beside edgert."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import edgert as library
from edgert import attention_bench, bench_harness, kernel_bench
from edgert.cli import bench_model, bench_speculation
from edgert.cli.answer import Answer
from edgert.kernels_cpu import limits
from edgert.units import KIB, MIB
from tests.command import ROOT, assert_error, edgert, inside

SIZES = ("--prompt-tokens", 9, "--gen-tokens", 4, "--trials", 2)


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# ----------------------------------------------------------------------------- a model


def test_a_model(tiny_gguf: Path) -> None:
    found = json.loads(edgert("bench", tiny_gguf, *SIZES, "-b", "1GiB", "--json").stdout)
    assert found["budget_bytes"] == 2**30 and found["model"] == tiny_gguf.name
    assert (found["prompt_tokens"], found["gen_tokens"], found["trials"]) == (9, 4, 2)
    for name in ("prefill_tok_s", "decode_tok_s", "resident_bytes", "peak_bytes", "threads"):
        assert found[name] > 0, name
    for name in ("read_bytes_per_token", "read_bytes_per_s", "device_bytes_per_s", "stall_share"):
        assert found[name] >= 0, name
    assert found["roof_tok_s"] is found["share_of_roof"] is found["share_of_device"] is None
    assert all(found[f"batch_{n}_tok_s"] > 0 for n in (1, 2, 4, 8))
    header, row = edgert("bench", tiny_gguf, *SIZES, "--batch", "3").stdout.splitlines()
    assert header.startswith("model ") and " batch 3 " in header and "batch 2" not in header
    assert row.startswith(tiny_gguf.name) and row.endswith(f"#{found['logits_hash'][:8]}")
    (line,) = rows_of(edgert("bench", tiny_gguf, *SIZES, "--csv").stdout)
    assert line.keys() == found.keys() and line["logits_hash"] == found["logits_hash"]


def test_a_prompt_nobody_gave_fits_the_context(tiny_gguf: Path) -> None:
    run = edgert("bench", tiny_gguf, "-c", 64, "--gen-tokens", 4, "--trials", 1, "--json")
    assert json.loads(run.stdout)["prompt_tokens"] == 64 - 4 - 1
    run = edgert("bench", tiny_gguf, "-c", 64, "--prompt-tokens", 65)
    assert_error(run, 2, "the context of 64")


def test_ctrl_c_ends_all_trials(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def answer(engine: Any, prompt: list[int], *_: Any, **__: Any) -> Answer:
        asked.append(len(prompt))
        return Answer()  # what is left of one that was cancelled

    monkeypatch.setattr(bench_model, "answer", answer)
    run = inside("bench", tiny_gguf, *SIZES)
    assert (run.returncode, run.stdout, asked) == (130, "", [9])


def test_guessing_by_turns(tiny_gguf: Path, tmp_path: Path) -> None:
    sizes = ("--gen-tokens", 6, "--trials", 2, "-b", "1GiB", "--speculate")
    run = edgert("bench", tiny_gguf, *sizes, "--prompt-tokens", 30, "--json")
    rows = json.loads(run.stdout)["rows"]
    asked = [(row["prompt"], row["prompt_tokens"], row["temperature"]) for row in rows]
    assert asked == [("own text", 30, 0), ("own text", 30, 0.8), ("new", 16, 0), ("new", 16, 0.8)]
    for row in rows:
        assert min(row["plain_tok_s"], row["speculate_tok_s"], row["ratio"]) > 0
        assert row["gen_tokens"] == 6 and 1 <= row["tokens_per_pass"] <= 6
        assert 0 <= row["accepted_tokens"] <= row["drafted_tokens"]
    text = tmp_path / "tale.txt"
    text.write_text("a tale a tale a tale")
    header, *lines = edgert("bench", tiny_gguf, *sizes, "--prompt-file", text).stdout.splitlines()
    assert " ratio " in header and [line.split()[3] for line in lines] == ["tale.txt"] * 2
    assert_error(edgert("bench", tiny_gguf, *sizes, "--prompt-file", tmp_path / "x"), 2, "x cannot")
    text.write_bytes(b"\xff")
    assert_error(edgert("bench", tiny_gguf, *sizes, "--prompt-file", text), 2, "not UTF-8")


def test_guessing_that_changes_a_token_is_an_error() -> None:
    engine, case = SimpleNamespace(plan=None), SimpleNamespace(name="tale")
    with pytest.raises(library.EdgertError, match="tale: guessing changed the tokens"):
        bench_speculation._row(engine, case, [(Answer(tokens=[1]), Answer(tokens=[2]))])  # type: ignore[arg-type]


BAD_OPTIONS = {
    "a text to continue": (["--prompt-file", "x"], "--prompt-file needs --speculate"),
    "guesses of kernels": (["--speculate", "--kernels"], "one of --kernels, --attention"),
    "batches": (["--batch", "1,x"], "'1,x' is not a list"),
    "no batch": (["--batch", "0"], "'0' is not a list"),
    "two forms": (["--csv", "--json"], "not both"),
    "formats of a model": (["--formats", "Q4_0"], "--formats needs --kernels"),
    "kernels of a model": (["--kernels"], "measure without a model"),
    "attention of a model": (["--attention"], "measure without a model"),
    "two things": (["--attention", "--kernels"], "one of --kernels, --attention"),
    "a draft model alone": (["--draft-model", "x"], "needs --speculate"),
    "python alone": (["--baseline-python", "x"], "needs --baseline"),
    "another baseline": (["--baseline", "ollama"], "'ollama' is not"),
    "no python": (["--baseline", "llamacpp", "--baseline-python", "/no/python"], "/no/python"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case: str, tiny_gguf: Path) -> None:
    options, words = BAD_OPTIONS[case]
    assert_error(inside("bench", tiny_gguf, *options), 2, words)


# ----------------------------------------------------------------------------- the kernels


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sizes that take milliseconds; what is computed stays the same."""
    sizes: list[tuple[Any, dict[str, Any]]] = [
        (bench_harness, {"READ_BYTES": MIB, "PEAK_UNITS": 8}),
        (kernel_bench, {"ROWS": 64, "COLUMNS": 256, "GEMM_TOKENS": 9, "CHAIN_BYTES": 48 * KIB,
                        "CACHE_BYTES": 8 * KIB, "REPACK_ROWS": 64}),
        (attention_bench, {"SHARED": 2, "KV_HEADS": (2, 1), "HEAD_DIM": 16, "CHAIN_BYTES": 64 * KIB,
                           "PROMPT_TOKENS": 3}),
    ]  # fmt: skip
    for module, values in sizes:
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    yield


def test_kernels(small: None) -> None:
    options = ("bench", "--kernels", "--formats", "F32,Q8_0,P3_128", "-t", 2, "--trials", 2)
    found = json.loads(inside(*options, "--json").stdout)["kernels"]
    for name in ("F32", "Q8_0", "P3_128"):
        measured = [f for f in found if f["format"] == name]
        kinds = [(f["what"], f["tokens"], f["source"], f["threads"]) for f in measured]
        batches = [("matmul", n, "DRAM", 2) for n in (1, 4, 8, 9)]
        assert kinds == [*batches, ("matmul", 1, "L2", 1), ("repack", 0, "DRAM", 1)]
        assert all(f["seconds"] > 0 and f["gb_s"] > 0 and f["hash"] for f in measured)
        for f in measured:
            assert (f["of_read"] > 0) == (f["what"] == "matmul" and f["source"] == "DRAM")
            has_peak = f["what"] == "matmul" and (name == "F32" or limits.DOT_MACS > 0)
            assert (f["of_peak"] > 0) == has_peak
    kinds_of_limit = {f["format"] for f in found if f["what"] == "limit"}
    assert kinds_of_limit == {"read", "fma"} | ({"dot"} if limits.DOT_MACS else set())
    again = json.loads(inside(*options[:4], "-t", 1, "--json").stdout)["kernels"]
    hashes = [
        [(f["format"], f["hash"]) for f in figures if f["hash"]] for figures in (found, again)
    ]
    assert hashes[0] == hashes[1], "results depend on threads"

    lines = inside(*options).stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["format", "F32", "Q8_0", "P3_128"]
    assert lines[4].startswith("limits with 2 threads: read ")
    assert rows_of(inside(*options, "--csv").stdout)[0].keys() == found[0].keys()


def test_kernels_of_a_format_that_is_none() -> None:
    assert_error(inside("bench", "--kernels", "--formats", "Q4_0,Q9"), 2, "Q9 is no number format")


def test_attention(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = library.bench_attention  # with contexts that the small arena holds
    monkeypatch.setattr(library, "bench_attention", partial(whole, (5, 100)))
    found = json.loads(inside("bench", "--attention", "-t", 2, "--trials", 1, "--json").stdout)
    measured = [f for f in found["kernels"] if f["what"] == "attention"]
    shapes = [(f["kv_heads"], f["context"], f["tokens"]) for f in measured]
    assert shapes == [(n, c, t) for n in (2, 1) for c in (5, 100) for t in (1, 3)]
    assert all(f["gmac_s"] > 0 and f["of_peak"] > 0 and f["of_read"] > 0 for f in measured)
    alone = json.loads(inside("bench", "--attention", "-t", 1, "--trials", 1, "--json").stdout)
    hashes = [[f["hash"] for f in figures["kernels"]] for figures in (found, alone)]
    assert hashes[0] == hashes[1], "results depend on threads"
    lines = inside("bench", "--attention", "--trials", 1, "-ctk", "f32").stdout.splitlines()
    starts = [line.split()[:2] for line in lines]
    assert starts == [["KV", "heads"], *([n, c] for n in "21" for c in ("5", "100")),
                      ["limits", "with"]]  # fmt: skip


def test_memory_is_read_at_a_rate_that_can_be() -> None:
    rates = [bench_harness.measure_memory(threads, 64 * MIB) for threads in (1, 2, 3)]
    assert all(1e8 < rate < 2e12 for rate in rates), rates


# ----------------------------------------------------------------------------- llama.cpp

FAKE = """
import ctypes, json, os
__version__ = "1.2.3"
def llama_print_system_info(): return b"FAKE = 1"
class _Context:
    logits = (ctypes.c_float * 5)(0, 1, 2, 1, 0)
    def get_logits(self): return ctypes.cast(self.logits, ctypes.POINTER(ctypes.c_float))
class Llama:
    def __init__(self, path, **options):
        if not os.path.exists(path) or os.environ.get("FAKE_FAILS"):
            raise ValueError("Failed to load model")
        print("noise on stdout")
        self.n_tokens, self._ctx, self._log = 0, _Context(), open(os.environ["FAKE_LOG"], "w")
        self.note(options)
    def note(self, what): self._log.write(json.dumps(what) + "\\n"); self._log.flush()
    def n_vocab(self): return 5
    def eval(self, tokens):
        self.note([self.n_tokens, len(tokens)])
        self.n_tokens += len(tokens)
        if os.environ.get("FAKE_DIES"): os._exit(9)
"""


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    """An environment in which `import llama_cpp` finds a stand-in that logs what it computes."""
    (tmp_path / "llama_cpp.py").write_text(FAKE)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    return {"PYTHONPATH": paths, "FAKE_LOG": str(tmp_path / "log")}


BASELINE = ("--baseline", "llamacpp", "--prompt-tokens", 9, "--gen-tokens", 3, "--batch", "1,4")


def test_llama_cpp_beside_edgert(tiny_gguf: Path, fake: dict[str, str]) -> None:
    options = ("bench", tiny_gguf, *BASELINE, "--trials", 1, "-t", 2)
    run = edgert(*options, "--json", env=fake)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert (found["threads"], found["trials"]) == (2, 1)
    assert found["baseline"] == "llama-cpp-python 1.2.3"
    sizes = [(row["row"], row["tokens"]) for row in found["rows"]]
    assert sizes == [("prefill", 9), ("decode", 3), ("batch 1", 1), ("batch 4", 4)]
    for row in found["rows"]:
        assert row["edgert_tok_s"] > 0 and row["llamacpp_tok_s"] > 0
        ratio = row["llamacpp_seconds"] / row["edgert_seconds"]
        assert row["ratio"] == pytest.approx(ratio)
    settings, *calls = map(json.loads, Path(fake["FAKE_LOG"]).read_text().splitlines())
    assert settings["n_threads"] == settings["n_threads_batch"] == 2
    assert settings["n_ctx"] >= 16 + 4
    prefill, decode = [[0, 1], [0, 9]], [[15, 1], [16, 1], [17, 1], [18, 1]]
    batches = [[[15, 1], [16, 1]], [[15, 1], [16, 4]]]
    first = [*prefill, [0, 16], *decode[1:], *batches[0], *batches[1]]
    second = [*prefill, [0, 16], *decode[1:], *5 * batches[0], *5 * batches[1]]
    assert calls == first + second

    text = edgert(*options, env=fake).stdout.splitlines()
    assert text[0] == f"{tiny_gguf.name}, 2 threads, against llama-cpp-python 1.2.3"
    assert [line.split("  ")[0] for line in text[2:6]] == [
        "prefill 9",
        "decode 3",
        *("batch 1", "batch 4"),
    ]
    assert rows_of(edgert(*options, "--csv", env=fake).stdout)[0].keys() == found["rows"][0].keys()


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [({"FAKE_FAILS": "1"}, 1, "Failed to load model"), ({"FAKE_DIES": "1"}, 1, "exit code 9")],
)
def test_llama_cpp_that_fails(
    more: dict[str, str], code: int, words: str, tiny_gguf: Path, fake: dict[str, str]
) -> None:
    run = edgert("bench", tiny_gguf, *BASELINE, env=fake | more)
    assert_error(run, code, "llama.cpp", words)


def test_no_llama_cpp(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('no such module')")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = edgert("bench", tiny_gguf, *BASELINE, env={"PYTHONPATH": paths})
    assert_error(run, 2, "no such module", "edgert[llamacpp]", "--baseline-python")
    run = edgert("bench", tiny_gguf, "-c", 16, *BASELINE)
    assert_error(run, 2, "the context of 16")


def test_another_python(tiny_gguf: Path, fake: dict[str, str], tmp_path: Path) -> None:
    """It gets no PYTHONPATH of this one: the stand-in is not found."""
    run = edgert("bench", tiny_gguf, *BASELINE, "--baseline-python", sys.executable, env=fake)
    if run.returncode:  # with llama-cpp-python in this environment the real one is used
        assert_error(run, 2, "No module named 'llama_cpp'")
    assert not Path(fake["FAKE_LOG"]).exists()


@pytest.mark.baseline
def test_the_real_llama_cpp(tiny_gguf: Path) -> None:
    pytest.importorskip("llama_cpp")
    run = edgert("bench", tiny_gguf, *BASELINE, "--trials", 1, "--json")
    rows: list[dict[str, Any]] = json.loads(run.stdout)["rows"]
    assert all(row["same_next_token"] for row in rows)
