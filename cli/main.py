"""The `edgert` command group, and the one place where errors become messages and exit codes.

Owns: the list of commands, their lazy import, exit codes, what happens on Ctrl-C and on a closed
stdout. Must not know what a command does. Importing this file loads click and nothing heavier:
`edgert --help` is answered without NumPy, numba or rich.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from typing import Any, NoReturn

import click

from edgert import EdgertError, __version__

__all__ = ["Commands", "cli", "main"]

INTERRUPTED = 130  # 128 + SIGINT, as every shell reports it
_NO = ("", "0", "false", "no", "off", "f", "n")  # as click reads an option's variable

_COMMANDS = {  # in the order of the help page; each is the attribute `command` of its module
    "run": ("edgert.cli.run", "run", "Continue a text, or talk to the model in a terminal."),
    "chat": ("edgert.cli.run", "chat", "Like run, with the model's chat template."),
    "plan": ("edgert.cli.plan", "plan", "Show where every byte of a memory budget goes."),
    "show": ("edgert.cli.show", "show", "Show what is in a model file."),
    "pack": ("edgert.cli.pack", "pack", "Make a model file ready for streaming."),
    "quantize": ("edgert.cli.quantize", "quantize", "Give the experts of a model fewer bits."),
    "bench": ("edgert.cli.bench", "bench", "Measure prefill, decode and reading speed."),
    "perplexity": (
        "edgert.cli.perplexity",
        "perplexity",
        "Measure how well models predict a text.",
    ),
    "stress": ("edgert.cli.stress", "stress", "Run under real memory limits and compare."),
    "trace": ("edgert.cli.trace", "trace", "Record which experts a run chooses."),
    "simulate": ("edgert.cli.simulate", "simulate", "Replay that with other caches."),
    "doctor": ("edgert.cli.doctor", "doctor", "Look at CPU, threads, memory, disk and cache."),
    "warmup": ("edgert.cli.warmup", "warmup", "Compile the kernels ahead of the first run."),
    "logits": ("edgert.cli.logits", "logits", "Save the logits of a list of tokens."),
}


class _ReaderLeft(Exception):
    """Whoever read our stdout has closed it."""


class Commands(click.Group):
    """A group that imports a command's module when the command is used, not for the help page."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. A closed stdout leaves as `_ReaderLeft`: click would exit 1 for it."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _ReaderLeft from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table above."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, importing its module."""
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), cmd_name
        for option in command.params:
            if isinstance(option, click.Option) and option.envvar is None:
                # One variable for all commands, named as the option: --ctx-size, EDGERT_CTX_SIZE.
                name = next(flag for flag in option.opts if flag.startswith("--"))
                option.envvar = "EDGERT_" + name[2:].upper().replace("-", "_")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The help page's list, from the table: no command module is imported."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: edgert run -p 'Once upon a time'",
)
@click.version_option(__version__, "-V", "--version", message="edgert %(version)s")
def cli() -> None:
    """Run language models bigger than the memory they may use."""


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line `argv` (the process's own by default) and exit with its code.

    0 done, 1 failed, 2 wrong use, 3 model missing or damaged, 4 not supported, 5 the memory
    budget cannot work, 6 a run went over its budget, 130 interrupted.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and stream.encoding.lower() != "utf-8":
            stream.reconfigure(encoding="utf-8")
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except (_ReaderLeft, BrokenPipeError):
        code = _reader_left()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is a moment of tidying up
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    try:
        color = False if os.environ.get("NO_COLOR") else None
        result = cli.main(arguments, prog_name="edgert", standalone_mode=False, color=color)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        _say_error(error.format_message() + _help_hint(error))
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except (_ReaderLeft, BrokenPipeError):
        raise
    except Exception as error:
        if "--debug" in arguments or os.environ.get("EDGERT_DEBUG", "").lower() not in _NO:
            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> int:
    if isinstance(error, EdgertError):
        text, code = str(error), error.exit_code
    elif isinstance(error, MemoryError):
        text, code = "the machine has no memory left; give a smaller budget with -b", 1
    elif isinstance(error, OSError):
        text, code = str(error), 1
    else:
        first = str(error).partition("\n")[0]
        text = (
            f"{type(error).__name__}: {first}\n\nThis is a mistake in edgert; --debug shows where."
        )
        code = 1
    _say_error(text)
    return code


def _say_error(text: str) -> None:
    color = False if os.environ.get("NO_COLOR") else None
    click.echo(f"{click.style('error:', fg='red', bold=True)} {text}", err=True, color=color)


def _help_hint(error: click.ClickException) -> str:
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"\n\nSee '{error.ctx.command_path} --help'."
    return ""


def _reader_left() -> int:
    """Whoever read stdout has enough (`| head -1`): end quietly, successfully.

    The descriptor is pointed at the null device so that the interpreter's last flush cannot fail.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
