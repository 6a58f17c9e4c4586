"""The command line: whole transcripts, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgert as library
from tests.command import STATS, argv, assert_error, edgert, environment, inside
from tests.tiny import TinyModel, build

PROMPT = "the tin hen"
HELP = """\
Usage: edgert [OPTIONS] COMMAND [ARGS]...

  Run language models bigger than the memory they may use.

Options:
  -V, --version  Show the version and exit.
  -h, --help     Show this message and exit.

Commands:
  run         Continue a text, or talk to the model in a terminal.
  chat        Like run, with the model's chat template.
  plan        Show where every byte of a memory budget goes.
  show        Show what is in a model file.
  pack        Make a model file ready for streaming.
  quantize    Give the experts of a model fewer bits.
  bench       Measure prefill, decode and reading speed.
  perplexity  Measure how well models predict a text.
  stress      Run under real memory limits and compare.
  trace       Record which experts a run chooses.
  simulate    Replay that with other caches.
  doctor      Look at CPU, threads, memory, disk and cache.
  warmup      Compile the kernels ahead of the first run.
  logits      Save the logits of a list of tokens.

  Start with: edgert run -p 'Once upon a time'
"""
COMMANDS = re.findall(r"^  (\w+)  +[A-Z]", HELP.split("Commands:")[1], re.MULTILINE)


@pytest.fixture(scope="module")
def long_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context so long that an answer can be interrupted, and no end: the
    logit of the token that would end a greedy text is 0, and the best of the others above it.
    """
    model = build("llama", "Q8_0")
    fmt, shape, data = model.tensors["output.weight"]
    row, end = fmt.row_bytes(shape[1]), model.metadata["tokenizer.ggml.eos_token_id"]
    silent = data[: row * end] + bytes(row) + data[row * (end + 1) :]
    tensors = model.tensors | {"output.weight": (fmt, shape, silent)}
    path = tmp_path_factory.mktemp("long") / "long.gguf"
    return altered(path, model=TinyModel(model.metadata, tensors), context_length=16384)


def altered(
    path: Path, architecture: str = "llama", model: TinyModel | None = None, **keys: int
) -> Path:
    """The tiny model with other metadata."""
    from tests.gguf_file import write_gguf

    model = model or build("llama", "Q8_0")
    metadata = {**model.metadata, "general.architecture": architecture}
    metadata |= {f"{architecture}.{key}": value for key, value in keys.items()}
    write_gguf(path, metadata, model.tensors)
    return path


# ----------------------------------------------------------------------------- help


def test_help_is_this_text() -> None:
    run = edgert("--help")
    assert (run.returncode, run.stdout, run.stderr) == (0, HELP, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    run = inside(command, "-h")
    assert run.returncode == 0
    assert re.match(
        rf"Usage: edgert {command} \[OPTIONS\] (\[MODEL\](\.\.\.| \[MODEL\]\.\.\.)?|\[?TRACE\]?)\n",
        run.stdout,
    )
    assert re.search(r"^  [A-Z].*\.$", run.stdout, re.MULTILINE), "no sentence says what it does"
    assert max(map(len, run.stdout.splitlines())) <= 80


def test_version() -> None:
    assert edgert("--version").stdout == f"edgert {library.__version__}\n"


# ----------------------------------------------------------------------------- run


def test_the_answer_is_on_stdout_and_the_rest_on_stderr(tiny_gguf: Path) -> None:
    options = ("run", tiny_gguf, "-n", 6, "--temp", 0, "-s", 7)
    plain = edgert(*options, "-p", PROMPT)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.endswith("\n") and plain.stdout.strip()
    assert re.fullmatch(STATS, plain.stderr.splitlines()[-1])
    assert " 6 tok" in plain.stderr and "seed 7" in plain.stderr
    assert "\x1b" not in plain.stdout + plain.stderr

    as_json = edgert(*options, "-p", PROMPT, "--json")
    answer = json.loads(as_json.stdout)
    assert as_json.stderr == ""
    assert answer["text"].removesuffix("\n") + "\n" == plain.stdout
    assert len(answer["tokens"]) == answer["stats"]["generated_tokens"] == 6
    assert answer["finish_reason"] == "length"
    assert f"#{answer['stats']['logits_hash'][:8]}" in plain.stderr

    shown = edgert(*options, "-p", PROMPT, "-q", "--display-prompt")
    assert (shown.stdout, shown.stderr) == (PROMPT + plain.stdout, "")


def test_the_prompt_comes_from_an_option_a_file_or_a_pipe(tiny_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    options = ("run", tiny_gguf, "-n", 4, "--temp", 0, "-q")
    texts = {
        edgert(*options, "-p", PROMPT, stdin=b"not read").stdout,
        edgert(*options, "-f", file).stdout,
        edgert(*options, "-f", "-", stdin=PROMPT.encode() + b"\r\n").stdout,
        edgert(*options, stdin=PROMPT.encode()).stdout,
        edgert("run", "-m", tiny_gguf, *options[2:], "-p", PROMPT).stdout,
    }
    assert len(texts) == 1 and texts != {""}


def test_an_empty_prompt_starts_from_nothing(tiny_gguf: Path) -> None:
    run = edgert("run", tiny_gguf, "-n", 2, "--temp", 0, "-p", "", "--json")
    assert json.loads(run.stdout)["stats"]["prompt_tokens"] == 1  # the beginning-of-text token


def test_a_seed_repeats_a_run_and_no_seed_does_not(tiny_gguf: Path) -> None:
    options = ("run", tiny_gguf, "-n", 24, "--temp", 2, "-p", PROMPT, "--json")
    first, again, other = (
        json.loads(edgert(*options, "-s", seed).stdout)["tokens"] for seed in (3, 3, -1)
    )
    assert first == again != other


def test_an_adaptive_budget_changes_no_token(tiny_gguf: Path) -> None:
    words = ("run", tiny_gguf, "-p", "the hen", "-n", 8, "--temp", 0, "-s", 1, "--json")
    plain, adaptive = edgert(*words), edgert(*words, "--adaptive", "-v")
    assert adaptive.returncode == 0, adaptive.stderr
    first, second = json.loads(plain.stdout), json.loads(adaptive.stdout)
    assert first["tokens"] == second["tokens"]
    assert first["stats"]["logits_hash"] == second["stats"]["logits_hash"]


def test_stop_ends_the_answer_before_it(tiny_gguf: Path) -> None:
    options = ("run", tiny_gguf, "-n", 8, "--temp", 0, "-p", PROMPT, "--json")
    whole = json.loads(edgert(*options).stdout)["text"]
    stop = whole[len(whole) // 2 :][:2]
    run = json.loads(edgert(*options, "-r", stop).stdout)
    assert run["text"] == whole[: whole.index(stop)]
    assert run["finish_reason"] == "stop"


def test_chat_is_one_turn(tiny_gguf: Path) -> None:
    run = edgert("chat", tiny_gguf, "-n", 3, "-p", PROMPT, "-sys", "be brief", "--json")
    assert run.returncode == 0, run.stderr
    completion = edgert("run", tiny_gguf, "-n", 3, "-p", PROMPT, "--json")
    prompts = [json.loads(r.stdout)["stats"]["prompt_tokens"] for r in (run, completion)]
    assert prompts[0] > prompts[1]


def test_options_come_from_the_environment_too(tiny_gguf: Path) -> None:
    env = {"EDGERT_MODEL": str(tiny_gguf), "EDGERT_MAX_TOKENS": "2", "EDGERT_THREADS": "1"}
    run = edgert("run", "-p", PROMPT, "--json", env=env)
    assert len(json.loads(run.stdout)["tokens"]) == 2
    assert_error(edgert("run", "no.gguf", "-p", PROMPT, env=env), 3, "no.gguf")
    assert_error(edgert("run", "-p", PROMPT, env=env | {"EDGERT_CTX_SIZE": "x"}), 2, "--ctx-size")


# ----------------------------------------------------------------------------- bad input


def cut(path: Path, data: bytes, keep: float) -> None:
    path.write_bytes(data[: int(len(data) * keep)])


BAD_FILES: dict[str, tuple[Callable[[Path, bytes], object], int]] = {
    "missing": (lambda path, data: None, 3),
    "directory": (lambda path, data: path.mkdir(), 3),
    "empty": (lambda path, data: path.write_bytes(b""), 3),
    "no model": (lambda path, data: path.write_bytes(b"PK\3\4" + data[4:]), 3),
    "version 1": (lambda path, data: path.write_bytes(data[:4] + b"\1\0\0\0" + data[8:]), 4),
    "big-endian": (lambda path, data: path.write_bytes(data[:4] + b"\0\0\0\3" + data[8:]), 4),
    "cut in the header": (lambda path, data: cut(path, data, 0.001), 3),
    "cut in the data": (lambda path, data: cut(path, data, 0.9), 3),
    "2**60 tensors": (
        lambda path, data: path.write_bytes(data[:8] + struct.pack("<Q", 2**60) + data[16:]),
        3,
    ),
    "2**60 keys": (
        lambda path, data: path.write_bytes(data[:16] + struct.pack("<Q", 2**60) + data[24:]),
        3,
    ),
    "other architecture": (lambda path, data: altered(path, "mamba"), 4),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case: str, tiny_gguf: Path, tmp_path: Path) -> None:
    make, code = BAD_FILES[case]
    path = tmp_path / "bad.gguf"
    make(path, tiny_gguf.read_bytes())
    for arguments in (("run", path, "-p", PROMPT), ("plan", path), ("logits", path, "--tokens=1")):
        assert_error(inside(*arguments), code, "bad.gguf")


BAD_OPTIONS: dict[str, tuple[list[str], bytes, int, str]] = {
    "budget of nonsense": (["-b", "lots", "-p", "a"], b"", 2, "'lots' is not a size"),
    "budget of zero": (["-b", "0", "-p", "a"], b"", 2, "0 bytes"),
    "share of nothing": (["-b", "0%", "-p", "a"], b"", 2, "'0%' is not a share"),
    "budget below the floor": (["-b", "20MiB", "-p", "a"], b"", 5, "budget 20.0 MiB is too small"),
    "context beyond the model": (["-c", "99999999", "-p", "a"], b"", 2, "99,999,999"),
    "prompt beyond the context": (["-c", "16", "-p", "a" * 99], b"", 2, "the context of 16"),
    "stdin is empty": ([], b"", 2, "stdin is empty"),
    "stdin is no text": ([], b"ab\xff", 2, "byte 0xff at offset 2"),
    "prompt is no text": (["-p", "a\udcff"], b"", 2, "byte 0xff at offset 1"),
    "two prompts": (["-p", "a", "-f", "b"], b"", 2, "not both"),
    "no such file": (["-f", "no-such-file"], b"", 2, "no-such-file cannot be read"),
    "temperature": (["--temp", "nan", "-p", "a"], b"", 2, "'nan' is not a number"),
    "threads": (["-t", "0", "-p", "a"], b"", 2, "0 is not in the range"),
    "unknown option": (["--colour"], b"", 2, "No such option"),
    "system prompt": (["-p", "a", "-sys", "b"], b"", 2, "use `edgert chat`"),
    "empty stop": (["-p", "a", "-r", ""], b"", 2, "stop"),
    "two models": (["-m", "other.gguf", "-p", "a"], b"", 2, "two models"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case: str, tiny_gguf: Path) -> None:
    options, stdin, code, words = BAD_OPTIONS[case]
    assert_error(inside("run", tiny_gguf, *options, stdin=stdin), code, words)


def test_other_wrong_use(tiny_gguf: Path, tmp_path: Path) -> None:
    assert_error(inside("sing"), 2, "No such command 'sing'")
    assert_error(inside("chat", tiny_gguf, "-p", " "), 2, "the prompt is empty")
    assert_error(inside("logits", tiny_gguf, "--tokens", "1,x"), 2, "'1,x' is not a list")
    assert_error(inside("logits", tiny_gguf, "--tokens", "1,99999"), 2, "99999")
    out = tmp_path / "none" / "x.npy"
    assert_error(inside("logits", tiny_gguf, "--tokens", "1", "--out", out), 2, "cannot be written")


def test_a_missing_part(tmp_path: Path) -> None:
    from tests.gguf_file import write_split

    model = build("llama", "Q8_0")
    tensors = list(model.tensors.items())
    halves = [dict(tensors[:5]), dict(tensors[5:])]
    parts = write_split(tmp_path, "two", model.metadata, halves)
    assert inside("show", parts[0]).returncode == 0
    parts[1].unlink()
    assert_error(inside("run", parts[0], "-p", PROMPT), 3, parts[1].name)


def test_context_beyond_memory(long_gguf: Path) -> None:
    needed = inside("plan", long_gguf, "-c", 64, "-b", "1MiB")
    smallest = re.search(r"(\d+) MiB \(-b|is (\d+) MiB", needed.stderr)
    assert smallest, needed.stderr
    budget = f"{smallest[1] or smallest[2]}MiB"
    assert inside("plan", long_gguf, "-c", 64, "-b", budget).returncode == 0
    run = inside("run", long_gguf, "-c", 16384, "-b", budget, "-p", "a")
    assert_error(run, 5, "a shorter --ctx-size needs less")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    run = edgert("run", tmp_path / "no.gguf", "-p", "a", "--debug")
    assert run.returncode == 3 and "Traceback" in run.stderr and "error: " in run.stderr


# ----------------------------------------------------------------------------- leaving early


def test_a_reader_that_leaves_ends_the_run_quietly(long_gguf: Path) -> None:
    options = ("run", long_gguf, "-n", 15000, "-c", 16000, "-p", PROMPT)
    child = subprocess.Popen(
        argv(*options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert child.stdout and child.stderr
    assert child.stdout.read(1)
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait(60) == 0


@pytest.mark.skipif(os.name == "nt", reason="signals as Ctrl-C are sent by POSIX systems")
def test_ctrl_c_keeps_what_was_printed(long_gguf: Path) -> None:
    options = ("run", long_gguf, "-n", 15000, "-c", 16000, "-p", PROMPT)
    child = subprocess.Popen(
        argv(*options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=environment()
    )
    assert child.stdout and child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert rest.endswith(b"\n")
    assert b"Traceback" not in errors
    last = errors.decode().splitlines()[-1]
    assert re.fullmatch(STATS, last) and not last.startswith("# 15000 tok")


@pytest.mark.skipif(os.name == "nt", reason="signals as Ctrl-C are sent by POSIX systems")
@pytest.mark.parametrize("delay", [0.05, 0.2, 0.5, 1.0])
def test_ctrl_c_at_any_moment(delay: float, long_gguf: Path) -> None:
    program = "import edgert.__main__ as m; print(flush=True); m.main()"
    # greedy: a sampled text of random weights may end by itself before the signal comes
    options = ("run", long_gguf, "-n", 15000, "-c", 16000, "--temp", 0, "-p", PROMPT)
    child = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(PYTHONWARNINGS="ignore"),  # an import that is cut off leaves files open
    )
    assert child.stdout and child.stdout.readline()
    time.sleep(delay)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, b"Traceback" in errors) == (130, False), errors.decode()


# ----------------------------------------------------------------------------- other commands


def test_plan(tiny_gguf: Path) -> None:
    text = inside("plan", tiny_gguf, "-b", "1GiB", "-c", 128)
    assert text.returncode == 0 and re.fullmatch(r"(measuring [^\n]*\n)?", text.stderr)
    assert re.search(r"^KV cache +[\d.]+ [KM]iB  ", text.stdout, re.MULTILINE)
    plan = json.loads(inside("plan", tiny_gguf, "-b", "1GiB", "-c", 128, "--json").stdout)
    assert plan["feasible"] and plan["budget_bytes"] == 2**30 and plan["context_length"] == 128
    assert sum(region["nbytes"] for region in plan["regions"]) == plan["total_bytes"] <= 2**30


def test_a_plan_that_cannot_work(tiny_gguf: Path) -> None:
    text = inside("plan", tiny_gguf, "-b", "20MiB")
    assert text.returncode == 5
    assert "process" in text.stdout and "total" in text.stdout
    assert re.fullmatch(r"error: memory budget 20.0 MiB is too small: .*\d+ MiB.*\n", text.stderr)
    facts = json.loads(inside("plan", tiny_gguf, "-b", "20MiB", "--json").stdout)
    assert facts["feasible"] is False and facts["floor_bytes"] > 20 * 2**20


def test_show(tiny_gguf: Path, tmp_path: Path) -> None:
    facts = json.loads(inside("show", tiny_gguf, "--json").stdout)
    assert facts["architecture"] == "llama" and facts["tensors"] > 10
    assert sum(f["parameters"] for f in facts["formats"].values()) == facts["parameters"]
    assert set(facts["formats"]) == {"F32", "Q8_0"}
    text = inside("show", tiny_gguf)
    assert re.search(r"^architecture +llama$", text.stdout, re.MULTILINE)
    assert text.stderr == ""
    foreign = altered(tmp_path / "foreign.gguf", "mamba")
    assert json.loads(inside("show", foreign, "--json").stdout)["architecture"] == "mamba"


def test_logits(tiny_gguf: Path, tmp_path: Path) -> None:
    tokens, out = "1,5,9,40,41,42,43,44,45,46", tmp_path / "x.npy"
    run = edgert("logits", tiny_gguf, "--tokens", tokens, "--out", out)
    assert run.returncode == 0, run.stderr
    scores = np.load(out)
    assert scores.dtype == np.float32 and scores.shape[0] == 10
    assert library.logits_hash(scores) == run.stdout.strip()
    assert sorted(tmp_path.iterdir()) == [out]
    for more in (["-t", 1], ["-t", 3], ["--prefill-tokens", 1], ["--prefill-tokens", 7]):
        again = edgert("logits", tiny_gguf, "--tokens", tokens, *more)
        assert again.stdout == run.stdout, more


def test_warmup(tiny_gguf: Path) -> None:
    run = edgert("warmup", tiny_gguf)
    assert (run.returncode, run.stdout) == (0, "")
    assert re.fullmatch(
        r"\d+ kernels are ready after [\d.]+ s\n|all kernels were ready\n", run.stderr
    )
    again = edgert("warmup", tiny_gguf)
    assert (again.returncode, again.stderr) == (0, "all kernels were ready\n")


def test_warmup_of_no_use(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = edgert("warmup", tiny_gguf, env={"NUMBA_CACHE_DIR": str(tmp_path / "file" / "x")})
    assert_error(run, 1, "cannot be written", "NUMBA_CACHE_DIR")
