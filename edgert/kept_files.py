"""Small files that edgert keeps for itself in the user's cache folder.

Owns: replacing one as a whole, and how many stay. Must not know what is in them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

__all__ = ["keep_file", "prune_files"]


def keep_file(path: Path, data: bytes | memoryview) -> bool:
    """Write `path` whole or not at all, its folder too; False where that is not possible."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with open(handle, "wb") as file:
                file.write(data)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return True
    return False


def prune_files(folder: Path, most: int) -> None:
    """Delete all but the `most` files of `folder` that were written last."""
    with contextlib.suppress(OSError):
        ages = sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime)
        for path in ages[most:]:
            path.unlink(missing_ok=True)
