"""`edgert run` and `edgert chat`: one answer for a prompt or a pipe, a conversation in a terminal.

`run` continues the text it is given, as llama.cpp's completion does; `chat` sends it through the
model's own chat template as one turn. In a terminal both open the same conversation.
"""

from __future__ import annotations

import dataclasses
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from edgert import InputError, follow_pressure
from edgert.cli.answer import Answer, answer
from edgert.cli.options import (
    ModelOptions,
    debug_options,
    draft_option,
    json_option,
    load_options,
    sampling_options,
    trace_option,
)
from edgert.cli.progress import Progress
from edgert.cli.report import note, print_json, stats_line
from edgert.cli.text_file import read_text, valid_text, without_last_newline
from edgert.cli.timeline import recorded

__all__ = ["chat", "run"]

_INTERRUPTED = 130


@dataclasses.dataclass(frozen=True, slots=True)
class _Request:
    """What the user asked for, apart from how to load and sample."""

    prompt: str | None
    file: Path | None
    system: str | None
    as_json: bool
    quiet: bool
    history: bool
    display_prompt: bool | None
    adaptive: bool
    trace: Path | None


def _prompt_options(function: Any) -> Any:
    for option in (
        click.option(
            "--display-prompt/--no-display-prompt",
            default=None,
            help="Print the text that is continued before its continuation; the default in a "
            "terminal, and not when stdout goes elsewhere.",
        ),
        click.option(
            "--adaptive",
            is_flag=True,
            help="Give memory back when others need it, and take it again later, up to the budget.",
        ),
        click.option("--no-history", is_flag=True, help="Do not keep what is typed."),
        click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors."),
        click.option(
            "-sys", "--system-prompt", "system", metavar="TEXT", help="The system message."
        ),
        click.option(
            "-f",
            "--file",
            type=click.Path(path_type=Path),
            help="Read the prompt from a file; - is stdin.",
        ),
        click.option("-p", "--prompt", metavar="TEXT", help="The prompt; stdin is not read then."),
    ):
        function = option(function)
    return function


def _shared(function: Any) -> Any:
    for decorate in (
        debug_options, json_option, trace_option, sampling_options, _prompt_options, draft_option,
        load_options,
    ):  # fmt: skip
        function = decorate(function)
    return function


@click.command()
@_shared
def run(options: ModelOptions, sampling: dict[str, Any], no_history: bool, **given: Any) -> None:
    """Continue a text, or talk to the model in a terminal.

    The prompt comes from -p, from -f, or from stdin when something is piped in. Without any of
    them, in a terminal, a conversation starts; /help lists its commands. An empty prompt (-p "")
    is allowed for models that have a beginning-of-text token, and starts from nothing.

    The text goes to stdout, everything else to stderr. The last line there gives the speed, what
    was read, the peak of memory, the seed, and a hash of the logits.

    \b
    edgert run -p "Once upon a time"
    edgert run model.gguf -b 600MiB -n 200 -p "The ship"
    cat notes.txt | edgert run model.gguf --temp 0
    """
    _main(options, sampling, _Request(history=not no_history, **given), chat=False)


@click.command()
@_shared
def chat(options: ModelOptions, sampling: dict[str, Any], no_history: bool, **given: Any) -> None:
    """Talk to the model through its chat template.

    With -p, -f or a pipe: one turn. In a terminal: a conversation; /help lists its commands.

    \b
    edgert chat
    edgert chat -p "Tell me a story about a dog and a red ball."
    """
    _main(options, sampling, _Request(history=not no_history, **given), chat=True)


def _main(
    options: ModelOptions, sampling: dict[str, Any], request: _Request, *, chat: bool
) -> None:
    prompt = _read_prompt(request)
    if prompt is None:
        if request.as_json:
            raise InputError("--json needs a prompt: give one with -p, -f or a pipe")
        from edgert.cli.repl import converse

        converse(
            options,
            sampling,
            chat=chat,
            system=request.system,
            history=request.history,
            quiet=request.quiet,
            adaptive=request.adaptive,
            trace=request.trace,
        )
        return
    if chat and not prompt.strip():
        raise InputError("the prompt is empty; give one with -p")
    messages = [{"role": "user", "content": prompt}]
    if request.system is not None:
        if not chat:
            raise InputError("--system-prompt needs a conversation: use `edgert chat`")
        messages.insert(0, {"role": "system", "content": request.system})
    opening = prompt if not chat and _display(request) else ""
    with (
        recorded(request.trace) as timeline,
        Progress() as progress,
        options.load(progress, timeline=timeline) as engine,
        follow_pressure(engine) if request.adaptive else nullcontext(),
    ):
        found = answer(
            engine,
            messages if chat else prompt,
            sampling,
            progress,
            opening=opening,
            silent=request.as_json,
        )
        memory = engine.memory().to_dict() if request.as_json else None
    _finish(options, request, found, memory)


def _display(request: _Request) -> bool:
    if request.as_json:
        return False
    return sys.stdout.isatty() if request.display_prompt is None else request.display_prompt


def _finish(
    options: ModelOptions, request: _Request, found: Answer, memory: dict[str, Any] | None
) -> None:
    if request.as_json:
        print_json(
            {
                "model": options.path.name,
                "text": found.text,
                "tokens": found.tokens,
                "finish_reason": found.finish_reason,
                "stats": found.stats.to_dict() if found.stats else None,
                "memory": memory,
            }
        )
    elif found.stats and not request.quiet:
        note(stats_line(found.stats))
    if found.finish_reason == "cancelled":
        click.get_current_context().exit(_INTERRUPTED)


def _read_prompt(request: _Request) -> str | None:
    """The prompt, or None when a person at a terminal is to be asked."""
    if request.prompt is not None and request.file is not None:
        raise click.UsageError("give the prompt with -p or with -f, not both")
    if request.prompt is not None:
        return valid_text(request.prompt.encode("utf-8", "surrogateescape"), "the prompt")
    if request.file is not None and str(request.file) != "-":
        return without_last_newline(read_text(request.file))
    if request.file is None and sys.stdin.isatty():
        return None
    text = without_last_newline(valid_text(sys.stdin.buffer.read(), "stdin"))
    if not text:
        raise InputError("there is no prompt: stdin is empty; give one with -p")
    return text
