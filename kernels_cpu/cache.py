"""Where compiled kernels are kept, and what their key is made of. Imports no Numba.

Owns: the folder and the digest of the kernel sources. Must not know how kernels are compiled.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import platformdirs

__all__ = ["cache_root", "sources_digest"]


def cache_root() -> Path:
    """The folder of all caches: in `NUMBA_CACHE_DIR` where the user set it, else the user's."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    root = Path(given) if given else Path(platformdirs.user_cache_dir("edgert", appauthor=False))
    return root / "kernels"


def sources_digest(folder: Path | None = None) -> str:
    """64 hex digits that change with the text of any kernel source in `folder`."""
    digest = hashlib.sha256()
    for path in sorted((folder or Path(__file__).parent).glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
