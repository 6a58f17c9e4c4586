"""The conversation in a terminal: scripted lines in this process, and one real terminal."""

from __future__ import annotations

import io
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edgert
from edgert.cli import repl
from edgert.cli.options import SAMPLING, ModelOptions
from edgert.cli.progress import Progress
from tests.command import STATS, argv, environment

CTRL_C, CTRL_D = KeyboardInterrupt, EOFError
Line = str | type[BaseException]


@pytest.fixture(scope="module")
def engine(tiny_gguf: Path) -> Iterator[edgert.Engine]:
    with edgert.load(tiny_gguf, context_length=256, threads=1) as engine:
        yield engine


@pytest.fixture
def talk(engine: edgert.Engine, tiny_gguf: Path) -> repl.Conversation:
    sampling = {"max_tokens": 4, "temperature": 0.0, "seed": 1}
    options = ModelOptions(tiny_gguf)
    return repl.Conversation(engine, options, sampling, Progress(), chat=True)


def typed(*lines: Line) -> Callable[[str], str]:
    """A reader that plays these lines and then Ctrl-D."""
    left = [*lines, CTRL_D]

    def read(_prompt: str) -> str:
        line = left.pop(0)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_turns_are_remembered(talk: repl.Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk.loop(typed("the hen", "", "and the tin")) == 0
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    said = capsys.readouterr()
    assert said.out == "".join(m["content"] + "\n" for m in talk.messages[1::2])
    assert len(re.findall(STATS, said.err)) == 2
    assert talk.last and talk.last.stats and talk.last.stats.reused_tokens > 0


def test_clear_and_regen(talk: repl.Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    talk.loop(typed("/regen", "the hen", "/regen"))
    assert [m["content"] for m in talk.messages[::2]] == ["the hen"]
    assert talk.last and talk.last.stats and talk.last.stats.seed != 1, "the same answer again"
    talk.loop(typed("/clear"))
    assert talk.messages == []
    assert "There is no question" in capsys.readouterr().err


def test_several_lines(talk: repl.Conversation) -> None:
    talk.loop(typed('"""the hen', "", "the tin", '"""', '"""one"""'))
    assert [m["content"] for m in talk.messages[::2]] == ["the hen\n\nthe tin", "one"]


def test_set(talk: repl.Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    talk.loop(typed("/set parameter temperature 0.25", "/set parameter max_tokens -1"))
    assert talk.sampling == {"temperature": 0.25, "seed": 1}
    talk.loop(typed("/set parameter speculate off", "/set parameter draft_max 7"))
    assert talk.sampling.pop("speculate") is False and talk.sampling.pop("draft_max") == 7
    for line in ("parameter heat 1", "parameter top_k", "parameter top_k -3", "parameter top_p x"):
        talk.loop(typed(f"/set {line}"))
    assert talk.sampling == {"temperature": 0.25, "seed": 1}
    talk.loop(typed("/set system be brief", "/set", "/show parameters"))
    assert talk.system == "be brief"
    said = capsys.readouterr()
    assert said.out == ""
    assert "top_k: -3 is not in the range" in said.err
    assert said.err.count("use /set parameter NAME VALUE") == 3
    assert said.err.endswith("temperature = 0.25\nseed = 1\n")


def test_the_system_message_comes_first(talk: repl.Conversation) -> None:
    talk.loop(typed("the hen"))
    assert talk.last and talk.last.stats
    before = talk.last.stats.prompt_tokens
    talk.loop(typed("/clear", "/set system be brief", "the hen"))
    assert talk.last.stats.prompt_tokens > before


def test_facts(talk: repl.Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["/stats", "/help", "/?", "/budget", "/show info", "/show plan", "/show template"]
    talk.loop(typed(*lines, "/memory", "/show", "/fly"))
    said = capsys.readouterr()
    assert said.out == ""
    for words in ("nothing yet", "budget ", "architecture  ", "KV cache", "/fly is not a command"):
        assert words in said.err
    assert "held" in said.err and "page cache of the model" in said.err
    for name in (*repl.COMMANDS, *SAMPLING):
        assert name in said.err, "the help names everything"


def test_the_budget_changes_and_the_answer_does_not(
    tiny_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampling = {"max_tokens": 4, "temperature": 0.0, "seed": 1}
    options = ModelOptions(tiny_gguf)
    with edgert.load(tiny_gguf, context_length=256, threads=1) as engine:
        talk = repl.Conversation(engine, options, sampling, Progress(), chat=True)
        floor = engine.smallest_budget()
        talk.loop(typed("the hen", f"/budget {floor}", "/regen", "/budget", "/budget 100%"))
        assert engine.plan.budget_bytes == engine.plan.full_bytes
        first, second, _ = capsys.readouterr().out.split("\n")
        assert first == second
        talk.loop(typed("/budget 1MiB", "/budget much", "/budget 0"))
        assert engine.plan.budget_bytes == engine.plan.full_bytes
    said = capsys.readouterr().err
    assert "error: memory budget 1.0 MiB is too small: the smallest that works is " in said
    assert "error: 'much' is not a size" in said and "error: memory_budget is 0" in said


@pytest.mark.parametrize("word", ["/exit", "/bye"])
def test_leaving(word: str, talk: repl.Conversation) -> None:
    assert talk.loop(typed(word, "never read")) == 0
    assert talk.messages == []


def test_ctrl_c_twice_leaves_and_once_does_not(
    talk: repl.Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk.loop(typed(CTRL_C, CTRL_C, "never read")) == 130
    assert talk.loop(typed(CTRL_C, "/stats", CTRL_C, CTRL_D)) == 0
    assert "Ctrl-C again leaves" in capsys.readouterr().err
    assert talk.messages == []


def test_an_error_does_not_end_the_conversation(
    talk: repl.Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk.loop(typed("a" * 500, "the hen")) == 0
    assert "error: 5" in capsys.readouterr().err  # 500 and some tokens do not fit
    assert [m["content"] for m in talk.messages[::2]] == ["the hen"]


def test_without_a_template_texts_are_continued(engine: edgert.Engine, tiny_gguf: Path) -> None:
    assert engine.chat_template is None
    options = ModelOptions(tiny_gguf)
    talk = repl.Conversation(engine, options, {"max_tokens": 3, "temperature": 0.0}, Progress())
    talk.loop(typed("the hen"))
    whole = engine.generate("the hen", max_tokens=3, temperature=0.0)
    assert talk.messages[-1]["content"] == whole.text


def test_plain_lines_where_no_editor_can_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setattr("sys.stdin", io.StringIO("the hen\n"))
    read = repl.line_reader(history=True)
    assert read(">>> ") == "the hen"
    with pytest.raises(EOFError):
        read(">>> ")
    said = capsys.readouterr()
    assert said.out == "" and "plain line input" in said.err


# ----------------------------------------------------------------------------- a real terminal


class Terminal:
    """The command in a pseudo-terminal: send keys, wait for text."""

    def __init__(self, *arguments: object, **env: str) -> None:
        import pty

        self.seen = ""  # since what was waited for last
        self.all = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, argv(*arguments), environment(**env))

    def wait(self, text: str, seconds: float = 90) -> None:
        """Read until `text` was seen after what earlier calls waited for."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    read = os.read(self.fd, 65536).decode("utf-8", "replace")
                except OSError:
                    raise AssertionError(f"it ended: {self.seen!r}") from None
                self.seen += read
                self.all += read
        self.seen = self.seen.partition(text)[2]

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def end(self) -> int:
        """Read what is left; the exit code."""
        try:
            while read := os.read(self.fd, 65536):
                self.all += read.decode("utf-8", "replace")
        except OSError:
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are a POSIX thing")
def test_progress_is_shown_in_terminals(tiny_gguf: Path) -> None:
    terminal = Terminal("run", tiny_gguf, "-n", 1, "-p", "the hen " * 5, TERM="xterm")
    for what in ("load", "prefill", "the hen", "# 1 tok"):
        terminal.wait(what)
    assert terminal.end() == 0
    assert terminal.all.index("prefill") < terminal.all.index("the hen"), "the bar would wipe it"


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are a POSIX thing")
def test_colour_is_for_terminals_that_want_it() -> None:
    for env, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        terminal = Terminal("run", "no.gguf", "-p", "a", TERM="xterm", **env)
        terminal.wait("error:")
        assert terminal.end() == 3
        assert ("\x1b[" in terminal.all) == coloured


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are a POSIX thing")
@pytest.mark.parametrize("history", [True, False])
def test_a_conversation_in_a_terminal(history: bool, tmp_path: Path) -> None:
    from tests.test_cli import altered

    model = altered(tmp_path / "long.gguf", context_length=16384)
    more: list[Any] = [] if history else ["--no-history"]
    env = {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    terminal = Terminal("chat", model, "-c", 16000, *more, **env)
    terminal.wait("/help lists the commands")
    terminal.wait(">>>")
    terminal.type("the hen\r")
    terminal.wait("\n")  # the line was taken
    time.sleep(1.0)
    terminal.type("\x03")  # stops the answer
    terminal.wait("# ")
    terminal.wait(">>>")
    terminal.type("/stats\r")
    terminal.wait("decode")
    terminal.wait(">>>")
    terminal.type("\x03")
    terminal.wait("Ctrl-C again leaves")
    terminal.wait(">>>")
    terminal.type("\x04")
    assert terminal.end() == 0
    kept = tmp_path / "edgert" / "history"
    assert kept.exists() == history
    assert not history or "the hen" in kept.read_text()
