"""Opening the file that holds a model's header, and saying clearly why it cannot be.

Owns: which paths are refused before a byte of them is parsed. Must not know any format.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from edgert.errors import FormatError, ModelError

__all__ = ["open_model_file", "read_magic"]


@contextmanager
def open_model_file(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """The file, unbuffered, and its bytes; what goes wrong while it is open is a `ModelError`.

    Raises `ModelError` (missing, a folder, not a regular file, unreadable), `FormatError` (empty).
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ModelError(f"{path} is a folder; name the .gguf file in it")
        if not stat.S_ISREG(mode):
            raise ModelError(f"{path} is not a regular file; copy the model to a disk first")
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise FormatError(path, "the file is empty; download or copy it again")
            yield file, size
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; check the name and the folder") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        why = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{path} cannot be read: {why}") from error


def read_magic(path: Path, nbytes: int) -> bytes:
    """The first bytes of the file. Raises as `open_model_file`."""
    with open_model_file(path) as (file, _):
        return file.read(nbytes) or b""
