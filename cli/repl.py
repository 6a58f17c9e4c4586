"""The conversation in a terminal.

Owns: the line editor, slash commands, the list of messages, Ctrl-C and Ctrl-D. Answers go to
stdout, everything else to stderr. A file with a chat template gets chat turns; one without gets
each text to continue.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgert import EdgertError, __version__, follow_pressure, format_bytes
from edgert.cli.answer import Answer, answer
from edgert.cli.options import SAMPLING, ModelOptions
from edgert.cli.progress import Progress
from edgert.cli.report import memory_text, note, stats_line
from edgert.cli.timeline import recorded

if TYPE_CHECKING:
    from edgert import Engine

__all__ = ["COMMANDS", "Conversation", "converse", "line_reader"]

_HELP = '''\
/help, /?                      this list
/clear                         forget the conversation
/regen                         answer the last question again
/set parameter NAME VALUE      change the sampling: {names}
/set system TEXT               change the system message
/show info                     the model and its file
/show parameters               the sampling values that were set
/show plan                     where the memory goes
/show template                 the model's chat template
/stats                         the figures of the last answer
/budget                        memory promised and memory used
/budget SIZE                   another budget from now on: 600MiB, 50%
/memory                        the same region by region, and what the system counts
/exit, /bye                    leave (Ctrl-D too)
"""                            starts and ends a text of several lines
Ctrl-C                         stops the answer and keeps the conversation'''


class _Leave(Exception):
    """The user wants to go; `code` is the exit code."""

    def __init__(self, code: int) -> None:
        self.code = code


def converse(
    options: ModelOptions,
    sampling: dict[str, Any],
    *,
    chat: bool,
    system: str | None,
    history: bool,
    quiet: bool,
    adaptive: bool = False,
    trace: Path | None = None,
) -> None:
    """Load the model and talk until the user leaves."""
    read = line_reader(history)
    with (
        recorded(trace) as timeline,
        Progress() as progress,
        options.load(progress, timeline=timeline) as engine,
    ):
        progress.close()
        if not quiet:
            note(f"edgert {__version__}, {options.path.name}. /help lists the commands.")
        talk = Conversation(
            engine, options, sampling, progress, chat=chat, system=system, quiet=quiet
        )
        with follow_pressure(engine) if adaptive else nullcontext():
            code = talk.loop(read)
    click.get_current_context().exit(code)


def line_reader(history: bool) -> Callable[[str], str]:
    """A function that asks for one line with a prompt.

    prompt_toolkit gives editing, completion and history; plain `input` where it cannot start.
    """
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.output import create_output

        kept: History = InMemoryHistory()
        if history:
            from platformdirs import user_state_path

            kept = FileHistory(user_state_path("edgert", ensure_exists=True) / "history")
        session: PromptSession[str] = PromptSession(
            history=kept,
            completer=WordCompleter([*COMMANDS, *SAMPLING], WORD=True),
            complete_while_typing=False,
            output=create_output(stdout=sys.stdout if sys.stdout.isatty() else sys.stderr),
        )
        return session.prompt
    except Exception as error:  # a terminal it does not know, a state folder that is read-only
        note(f"plain line input: {error}")
        return _plain_input


def _plain_input(prompt: str) -> str:
    click.echo(prompt, nl=False, err=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


class Conversation:
    """The messages so far, and what each line that is typed does to them."""

    def __init__(
        self,
        engine: Engine,
        options: ModelOptions,
        sampling: dict[str, Any],
        progress: Progress,
        *,
        chat: bool = False,
        system: str | None = None,
        quiet: bool = False,
    ) -> None:
        """`chat` uses the default template for a file that has none; else it continues texts."""
        self.engine = engine
        self.options = options
        self.sampling = dict(sampling)
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.last: Answer | None = None
        self._progress = progress
        self._quiet = quiet
        self._chat = chat or engine.chat_template is not None

    def loop(self, read: Callable[[str], str]) -> int:
        """Ask and answer until the user leaves; the exit code."""
        warned = False
        while True:
            try:
                text = _several_lines(read)
                warned = False
                self.line(text)
            except EOFError:
                return 0
            except _Leave as leave:
                return leave.code
            except KeyboardInterrupt:
                if warned:
                    return 130
                warned = True
                note("Ctrl-C again leaves, and so do Ctrl-D and /bye.")
            except EdgertError as error:
                click.secho(f"error: {error}", err=True, fg="red")

    def line(self, text: str) -> None:
        """Do what one line says: a command, or something to answer."""
        if text.startswith("/"):
            self._command(text)
        elif text.strip():
            self._ask(text, self.sampling)

    def _ask(self, text: str, sampling: dict[str, Any]) -> None:
        question = {"role": "user", "content": text}
        if self._chat:
            first = [] if self.system is None else [{"role": "system", "content": self.system}]
            prompt: str | list[dict[str, str]] = [*first, *self.messages, question]
        else:
            prompt = text
        self.last = answer(self.engine, prompt, sampling, self._progress)
        # What was said before Ctrl-C was said: it stays in the conversation.
        self.messages += [question, {"role": "assistant", "content": self.last.text}]
        if self.last.stats and not self._quiet:
            note(stats_line(self.last.stats))

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name not in COMMANDS:
            note(f"{name} is not a command; /help lists them")
            return
        COMMANDS[name](self, rest.strip())

    def _help(self, _: str) -> None:
        note(_HELP.format(names=" ".join(SAMPLING)))

    def _clear(self, _: str) -> None:
        self.messages = []
        note("The conversation is forgotten.")

    def _regen(self, _: str) -> None:
        if len(self.messages) < 2:
            note("There is no question to answer again.")
            return
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        self._ask(question, {k: v for k, v in self.sampling.items() if k != "seed"})

    def _set(self, rest: str) -> None:
        what, _, value = rest.partition(" ")
        if what == "system":
            self.system = value.strip() or None
            note("system message set" if self.system else "system message removed")
        elif what == "parameter":
            self._set_parameter(*value.split())
        else:
            note("use /set parameter NAME VALUE or /set system TEXT")

    def _set_parameter(self, name: str = "", value: str = "", *more: str) -> None:
        if name not in SAMPLING or not value or more:
            note(f"use /set parameter NAME VALUE, NAME one of {' '.join(SAMPLING)}")
            return
        try:
            number = SAMPLING[name][1].convert(value, None, None)
        except click.BadParameter as error:
            note(f"{name}: {error.message}")
            return
        if number == -1 and name in ("max_tokens", "seed"):  # the engine's own choice
            self.sampling.pop(name, None)
        else:
            self.sampling[name] = number
        note(f"{name} = {value}")

    def _show(self, what: str) -> None:
        if what == "info":
            from edgert import read_manifest
            from edgert.cli.show import describe, facts_text

            note(facts_text(describe(read_manifest(self.options.path))))
        elif what == "parameters":
            lines = [f"{name} = {value}" for name, value in self.sampling.items()]
            note("\n".join(lines) or "all at the model's defaults")
        elif what == "plan":
            note(self.engine.plan.table())
        elif what == "template":
            note(self.engine.chat_template or "the file has no chat template")
        else:
            note("use /show info, /show parameters, /show plan or /show template")

    def _stats(self, _: str) -> None:
        note(stats_line(self.last.stats) if self.last and self.last.stats else "nothing yet")

    def _budget(self, size: str) -> None:
        if size:
            self.engine.set_memory_budget(size)
        memory = self.engine.memory()
        note(
            f"budget {format_bytes(memory.budget_bytes)}, planned "
            f"{format_bytes(sum(memory.planned.values()))}, in use "
            f"{format_bytes(memory.resident_bytes)}, peak {format_bytes(memory.peak_bytes)}"
        )

    def _memory(self, _: str) -> None:
        note(memory_text(self.engine.memory()))

    def _leave(self, _: str) -> None:
        raise _Leave(0)


COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "/help": Conversation._help,
    "/?": Conversation._help,
    "/clear": Conversation._clear,
    "/regen": Conversation._regen,
    "/set": Conversation._set,
    "/show": Conversation._show,
    "/stats": Conversation._stats,
    "/budget": Conversation._budget,
    "/memory": Conversation._memory,
    "/exit": Conversation._leave,
    "/bye": Conversation._leave,
}


def _several_lines(read: Callable[[str], str]) -> str:
    """A line, or the text between two triple quotes, over as many lines as it takes."""
    text = read(">>> ")
    if not text.startswith('"""'):
        return text
    text = text.removeprefix('"""')
    while '"""' not in text:
        text += "\n" + read("... ")
    return text.partition('"""')[0].strip("\n")
