"""Where compiled kernels are kept, what their key is made of, and their files. Imports no Numba.

Owns: the folders, the digest of the kernel sources, reading and writing one kernel's machine code.
Must not know how kernels are compiled.

    root/                  the user's cache folder, or a temporary one where that cannot be written
    root/KEY/NAME.code     a kernel: digest, symbol, object code
    root/ready-...         a set of kernels is complete (edgert/compiling.py)
    root/target-...        what kernels are compiled for here, for processes without a compiler

A file appears under its name only when it is complete, and is believed only when its digest fits:
processes that compile at once write the same, and a damaged file is compiled anew.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import platformdirs

__all__ = [
    "Note", "cache_root", "can_start_python", "child_environment", "machine_parts", "prune",
    "read_code", "read_note", "sources_digest", "target_note", "use_temporary_root", "writable",
    "write_code",
]  # fmt: skip

KEPT_FOLDERS = 4  # caches of the newest source versions and CPU kinds; a folder is a few MB
KEPT_SECONDS = 86_400  # a younger one may be in use by another process
KEY_LENGTH = 20  # hex digits
_DIGEST_BYTES = 32
_temporary: list[Path] = []  # the root that took the user's place in this process


def cache_root() -> Path:
    """The folder of all caches: in `NUMBA_CACHE_DIR` where the user set it, else the user's."""
    if _temporary:
        return _temporary[0]
    given = os.environ.get("NUMBA_CACHE_DIR")
    root = Path(given) if given else Path(platformdirs.user_cache_dir("edgert", appauthor=False))
    return root / "kernels"


def use_temporary_root() -> Path:
    """Keep caches in a temporary folder from now on; it is deleted when this process ends."""
    if not _temporary:
        folder = tempfile.mkdtemp(prefix="edgert-kernels-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _temporary.append(Path(folder) / "kernels")
        _temporary[0].mkdir()
    return _temporary[0]


def writable(folder: Path) -> bool:
    """Make the folder if need be; True when files can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def sources_digest(folder: Path | None = None) -> str:
    """64 hex digits that change with the text of any kernel source in `folder`."""
    digest = hashlib.sha256()
    for path in sorted((folder or Path(__file__).parent).glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def read_code(path: Path) -> tuple[str, bytes] | None:
    """(symbol, object code) of a kernel, or None when there is no sound file."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    content = data[_DIGEST_BYTES:]
    symbol, found, code = content.partition(b"\n")
    if not found or hashlib.sha256(content).digest() != data[:_DIGEST_BYTES]:
        return None
    return symbol.decode(), code


def write_code(path: Path, symbol: str, code: bytes) -> None:
    """Keep a kernel. Raises OSError when it cannot be written."""
    content = symbol.encode() + b"\n" + code
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with open(handle, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


class Note(NamedTuple):
    """What a small file beside the folders says: kernels are in `folder`, made for `target`."""

    folder: Path
    target: tuple[str, ...]  # triple, CPU name, features


def read_note(path: Path) -> Note | None:
    """The note, or None when there is no sound one."""
    with contextlib.suppress(OSError, ValueError):
        folder, *target = path.read_text(encoding="utf-8").split("\t")
        return Note(Path(folder), tuple(target))
    return None


def target_note() -> Path:
    """The note that any set of kernels leaves for this machine, sources, compiler and Python."""
    digest = hashlib.sha256("\0".join(machine_parts()).encode())
    return cache_root() / f"target-{digest.hexdigest()[:KEY_LENGTH]}"


def machine_parts() -> list[str]:
    """What compiled code depends on: sources, compiler, CPU and Python."""
    parts = [sources_digest(), _cpu(), platform.machine(), platform.python_version()]
    parts += [importlib.metadata.version(name) for name in ("numba", "llvmlite", "numpy")]
    return parts + [os.environ.get(name, "") for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")]


def _cpu() -> str:
    """What tells CPUs apart for compiled code."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def can_start_python() -> bool:
    """False inside a frozen application, whose executable is not an interpreter."""
    name = Path(sys.executable or "").name.lower()
    return "python" in name and not getattr(sys, "frozen", False)


def child_environment() -> dict[str, str]:
    """For a Python process that imports this very package and compiles into this cache."""
    source = str(Path(str(sys.modules["edgert"].__file__)).parents[1])
    paths = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, "NUMBA_CACHE_DIR": str(cache_root().parent)}


def prune(root: Path, keep: Path) -> None:
    """Delete old caches but the newest, and what nothing needs any more: the size stays bounded.

    Errors are ignored: another process may be doing the same.
    """
    with contextlib.suppress(OSError, ValueError):
        ages = {p: time.time() - p.stat().st_mtime for p in root.iterdir()}
        folders = sorted((p for p in ages if _is_cache(p) and p != keep), key=ages.__getitem__)
        for folder in folders[KEPT_FOLDERS - 1 :]:
            if ages[folder] > KEPT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        for path in (*root.glob("ready-*"), *root.glob("target-*")):
            note = read_note(path)
            if note is None or not note.folder.is_dir():
                path.unlink(missing_ok=True)
        for path in root.rglob("*.part"):  # of a process that was killed while it wrote
            if ages.get(path.parent, ages.get(path, 0.0)) > KEPT_SECONDS:
                path.unlink(missing_ok=True)


def _is_cache(path: Path) -> bool:
    return len(path.name) == KEY_LENGTH and path.is_dir()
