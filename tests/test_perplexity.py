"""Perplexity: the protocol, the twin, what the command prints and refuses."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import edgert as library
from edgert.errors import ContextError, InputError
from edgert.evaluation import Perplexity, perplexity_ref, text_chunks
from tests.command import argv, assert_error, edgert, environment, inside
from tests.tight import tight
from tests.tiny import prompt_of

TEXT = "the tin hen sat on a red mat and ate a nut. " * 12
SIZE = 64


@pytest.fixture(scope="module")
def engine(tiny_gguf: Path) -> Iterator[library.Engine]:
    with tight(tiny_gguf, None) as engine:
        yield engine


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT + "\n")
    return path


def test_chunks_do_not_overlap_and_begin_with_bos() -> None:
    assert text_chunks(range(20), 8, None) == [[*range(8)], [*range(8, 16)]]
    assert text_chunks(range(20), 8, 99) == [[99, *range(1, 8)], [99, *range(9, 16)]]
    assert text_chunks(range(8), 8, None) == [[*range(8)]]


def test_equals_its_twin(engine: library.Engine) -> None:
    tokens = prompt_of("llama", 3 * SIZE + 5)
    bos = engine.tokenizer.bos_id
    assert engine.tokenizer.add_bos
    figure, error = perplexity_ref(engine.logits, tokens, SIZE, bos)
    seen: list[Perplexity] = []
    found = library.perplexity(engine, tokens, chunk_tokens=SIZE, on_chunk=seen.append)
    assert found.perplexity == pytest.approx(figure, rel=1e-9)
    assert found.error == pytest.approx(error, rel=1e-7)
    assert found.nll == pytest.approx(math.log(figure))
    assert (found.chunks, found.text_chunks, found.chunk_tokens) == (3, 3, SIZE)
    assert found.scored_tokens == 3 * (SIZE - SIZE // 2 - 1)
    assert [step.chunks for step in seen] == [1, 2, 3] and seen[-1] == found
    first = library.perplexity(engine, tokens, chunk_tokens=SIZE, chunks=1)
    assert first.perplexity == seen[0].perplexity


def test_a_uniform_model_is_as_surprised_as_it_has_tokens() -> None:
    figure, error = perplexity_ref(
        lambda tokens: np.zeros((len(tokens), 32), np.float32), range(32), 16, None
    )
    assert figure == pytest.approx(32) and error == pytest.approx(0, abs=1e-6)
    assert Perplexity.of([800.0, 900.0], 1, 1, 16).perplexity == math.inf


@pytest.mark.parametrize("odd", [SIZE - 1, SIZE])
def test_the_same_figure_while_streaming_and_with_few_rows(
    tiny_gguf: Path, engine: library.Engine, odd: int
) -> None:
    expected = library.perplexity(engine, TEXT, chunk_tokens=odd)
    with tight(tiny_gguf, 0, prefill_tokens=5) as small:
        assert small.plan.streamed_bytes and small.plan.logit_rows <= 5
        assert library.perplexity(small, TEXT, chunk_tokens=odd) == expected


def test_a_text_that_is_too_short_says_so(engine: library.Engine) -> None:
    with pytest.raises(InputError, match="11 tokens, less than one chunk of 64.*--ctx-size"):
        library.perplexity(engine, [1] * 11, chunk_tokens=SIZE)
    with pytest.raises(InputError, match="chunk of 4 tokens is too short"):
        library.perplexity(engine, [1] * 11, chunk_tokens=4)
    with pytest.raises(ContextError):
        library.perplexity(engine, TEXT, chunk_tokens=engine.plan.context_length + 1)


def test_by_default_the_stories_in_chunks_of_the_context(engine: library.Engine) -> None:
    found = library.perplexity(engine, chunks=1)
    assert found.chunk_tokens == min(library.CHUNK_TOKENS, engine.plan.context_length)
    assert found.text_chunks == 1


# ------------------------------------------------------------------------------ the command


def test_a_table_of_models(tiny_gguf: Path, tiny_moe_gguf: Path, text: Path) -> None:
    run = edgert("perplexity", tiny_gguf, tiny_gguf, tiny_moe_gguf, "-f", text, "-c", SIZE)
    assert run.returncode == 0, run.stderr
    header, *rows = run.stdout.splitlines()
    assert header.split() == [
        "model", "file", "bits/weight", "perplexity", "+-", "ratio", "scored"
    ]  # fmt: skip
    assert [row.split()[0] for row in rows] == [tiny_gguf.name] * 2 + [tiny_moe_gguf.name]
    assert rows[0].split()[-2] == rows[1].split()[-2] == "1.0000"
    assert run.stderr == ""


def test_json_of_a_pipe(tiny_gguf: Path) -> None:
    command = ("perplexity", tiny_gguf, "-f", "-", "-c", SIZE, "--chunks", 2, "--json")
    run = edgert(*command, stdin=TEXT.encode())
    found = json.loads(run.stdout)
    assert found["finished"] is True
    (row,) = found["rows"]
    assert (row["model"], row["chunks"], row["ratio"]) == (tiny_gguf.name, 2, 1.0)
    assert row["file_bytes"] == tiny_gguf.stat().st_size and 8 < row["bits_per_weight"] < 9


REFUSED = {
    "empty": (b"", 2, ["empty"]),
    "not UTF-8": (b"a\xff", 2, ["not UTF-8", "0xff at offset 1"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_texts_are_refused(name: str, tiny_gguf: Path, tmp_path: Path) -> None:
    data, code, words = REFUSED[name]
    file = tmp_path / "text"
    file.write_bytes(data)
    assert_error(inside("perplexity", tiny_gguf, "-f", file), code, *words)


def test_bad_requests_are_refused(tiny_gguf: Path, text: Path, tmp_path: Path) -> None:
    assert_error(inside("perplexity", tiny_gguf, "-f", tmp_path / "no"), 2, "cannot be read")
    assert_error(inside("perplexity", tmp_path / "no.gguf"), 3, "no.gguf")
    run = edgert("perplexity", tiny_gguf, "-f", text, "-c", 4096)
    assert_error(run, 2, "context of 4,096 tokens", "made for: 256")  # the model's own context
    run = edgert("perplexity", tiny_gguf, "-f", "-", "-c", SIZE, stdin=b"short")
    assert_error(run, 2, "less than one chunk of 64")


def test_ctrl_c_gives_the_figure_so_far(tiny_gguf: Path, tmp_path: Path) -> None:
    """The text is so long that the command cannot end by itself within the test's time."""
    long = tmp_path / "long.txt"
    long.write_text(TEXT * 3000)
    program = (
        "import edgert.evaluation as e, sys, _thread\n"
        "of = e.Perplexity.of\n"
        "def slow(*given):\n"
        "    if given[1] == 3: _thread.interrupt_main()\n"
        "    return of(*given)\n"
        "e.Perplexity.of = slow\n"
        "from edgert.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    words = ["perplexity", tiny_gguf, "-f", long, "-c", SIZE, "--json"]
    run = subprocess.run(
        [argv()[0], "-c", program, *map(str, words)], capture_output=True, text=True, timeout=150,
        env=environment(),
    )  # fmt: skip
    assert run.returncode == 128 + signal.SIGINT, run.stderr
    found = json.loads(run.stdout)
    assert found["finished"] is False
    assert 1 <= found["rows"][0]["chunks"] <= 3 < found["rows"][0]["text_chunks"]
    assert re.search(r"stopped after \d of [\d,]+ chunks", run.stderr)


# ------------------------------------------------------------------------------ llama.cpp


@pytest.mark.baseline
def test_llama_cpp_finds_the_same() -> None:
    """Both round activations to 8 bits, not the same way; the error of the figure is 10 %."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path, text = library.bundled_model(), library.bundled_text()
    model = llama_cpp.Llama(str(path), n_ctx=512, n_batch=512, logits_all=True, verbose=False)
    tokens = model.tokenize(text.encode(), add_bos=True, special=False)

    def logits_of(chunk: list[int]) -> np.ndarray:
        model.reset()
        model.eval(chunk)
        return np.array(model.scores[: len(chunk)])

    figure, error = perplexity_ref(logits_of, tokens, 512, model.token_bos())
    with library.load(path) as engine:
        assert engine.tokenize(text) == tokens
        found = library.perplexity(engine, text)
    assert found.perplexity == pytest.approx(figure, rel=2e-3)
    assert found.error == pytest.approx(error, rel=1e-2)
