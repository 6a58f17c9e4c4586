"""Every error edgert raises on purpose.

    EdgertError                exit 1   anything the user can be told in one message
    +-- ModelError             exit 3   the file is missing, damaged or not what it says
    |   +-- FormatError        exit 3   bytes that break the file format (carries file and offset)
    |   +-- TokenizerError     exit 3   the vocabulary cannot be used
    +-- UnsupportedError       exit 4   sound, but asks for what edgert cannot run
    +-- BudgetError            exit 5   the budget cannot work (carries the smallest that does)
    +-- BudgetExceededError    exit 6   a run was measured above its budget
    +-- StorageError           exit 1   a read failed (carries file and offset)
    +-- InputError             exit 2   an argument, prompt or option that makes no sense
    |   +-- ContextError       exit 2   more tokens than the context holds
    +-- CancelledError         exit 130 stopped by the caller

A message says what, the numbers with their units, and what to do. Messages are made here and
tested word for word. Assertions elsewhere are for our own mistakes, never for input.
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "BudgetError",
    "BudgetExceededError",
    "CancelledError",
    "ContextError",
    "EdgertError",
    "FormatError",
    "InputError",
    "ModelError",
    "StorageError",
    "TokenizerError",
    "UnsupportedError",
]


class EdgertError(Exception):
    """Base of all errors raised on purpose; `str(error)` is fit to show to a person."""

    exit_code = 1


class ModelError(EdgertError):
    """The model file cannot be used as it is."""

    exit_code = 3


class FormatError(ModelError):
    """Bytes that break the file format.

    Attributes: path, offset (bytes from the start of the file, or None when not tied to one).
    """

    def __init__(self, path: Path | str, what: str, offset: int | None = None) -> None:
        self.path = Path(path)
        self.offset = offset
        where = "" if offset is None else f" (at byte {offset:,})"
        super().__init__(f"{path}: {what}{where}")


class TokenizerError(ModelError):
    """The vocabulary in the file cannot be turned into a tokenizer."""


class UnsupportedError(EdgertError):
    """A sound file that asks for something edgert does not run, named in the message."""

    exit_code = 4


class BudgetError(EdgertError):
    """The memory budget cannot work.

    Attributes: budget_bytes, need_bytes (smallest budget that works), table (the plan as text).
    """

    exit_code = 5

    def __init__(self, budget_bytes: int, need_bytes: int, table: str = "", hint: str = "") -> None:
        self.budget_bytes = budget_bytes
        self.need_bytes = need_bytes
        self.table = table
        smallest = -(-need_bytes // 2**20)  # whole MiB upwards, so that the printed figure works
        text = (
            f"memory budget {budget_bytes / 2**20:.1f} MiB is too small: "
            f"the smallest that works is {smallest} MiB"
        )
        text += f"; {hint}" if hint else f" (-b {smallest}MiB)"
        super().__init__(f"{text}\n\n{table}" if table else text)


class BudgetExceededError(EdgertError):
    """A measured peak was above the budget. Attributes: budget_bytes, peak_bytes."""

    exit_code = 6

    def __init__(self, budget_bytes: int, peak_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.peak_bytes = peak_bytes
        super().__init__(
            f"peak memory {peak_bytes / 2**20:.1f} MiB is above the budget "
            f"of {budget_bytes / 2**20:.1f} MiB"
        )


class StorageError(EdgertError):
    """A read failed. Attributes: path, offset, nbytes."""

    def __init__(self, path: Path | str, offset: int, nbytes: int, why: str) -> None:
        self.path = Path(path)
        self.offset = offset
        self.nbytes = nbytes
        super().__init__(f"{path}: reading {nbytes:,} bytes at byte {offset:,} failed: {why}")


class InputError(EdgertError):
    """An argument, prompt or option that makes no sense."""

    exit_code = 2


class ContextError(InputError):
    """More tokens than the context holds, or than a model was made for, as `message` then says.

    Attributes: tokens, context_length.
    """

    def __init__(self, tokens: int, context_length: int, message: str = "") -> None:
        self.tokens = tokens
        self.context_length = context_length
        super().__init__(
            message
            or f"{tokens:,} tokens do not fit the context of {context_length:,}; "
            "shorten the prompt or raise --ctx-size"
        )


class CancelledError(EdgertError):
    """The caller stopped the generation; the engine stays usable."""

    exit_code = 130

    def __init__(self, what: str = "cancelled") -> None:
        super().__init__(what)
