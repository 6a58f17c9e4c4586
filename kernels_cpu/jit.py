"""How kernels are compiled: the only place with JIT flags and the only one that knows the cache.

Machine code is kept in the user's cache folder under a key made of the text of all kernel sources,
Numba's version and the CPU features, because Numba's own cache does not notice edits in imported
modules. Each kernel has one signature and each folder one target, so two processes that compile
at once write equal entries, and Numba replaces files atomically.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import numba

from edgert.kernels_cpu.cache import cache_root, sources_digest
from edgert.kernels_cpu.isa import target_key

__all__ = ["JIT", "Kernel", "cache_folder", "cache_key", "inline", "kernel", "void"]

JIT = {"nogil": True, "boundscheck": False, "error_model": "numpy", "fastmath": False}
_KEPT_FOLDERS = 4  # caches of the newest source versions and CPU kinds; a folder is a few MB
_KEPT_SECONDS = 86_400  # a younger one may be in use by another process
_COMPILING = threading.RLock()  # Numba's place for the cache is one setting for the process
_F = TypeVar("_F", bound=Callable[..., Any])
_TYPES = {"i": numba.types.int64, "f": numba.types.float32}


def cache_key(folder: Path | None = None) -> str:
    """20 hex digits that change when any kernel source in `folder`, Numba or the CPU changes."""
    digest = hashlib.sha256(sources_digest(folder).encode())
    for part in (numba.__version__, llvmlite.__version__, *target_key()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _prune(root: Path, keep: Path) -> None:
    """Delete old cache folders but the newest. Errors are ignored: another process may do it."""
    with contextlib.suppress(OSError):
        ages = {p: time.time() - p.stat().st_mtime for p in root.iterdir() if len(p.name) == 20}
        oldest = sorted((p for p in ages if p != keep), key=ages.__getitem__)
        for folder in oldest[_KEPT_FOLDERS - 1 :]:
            if ages[folder] > _KEPT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


@cache
def cache_folder() -> Path:
    """Where machine code is kept; a temporary folder, deleted at exit, when not writable.

    The root is `NUMBA_CACHE_DIR` where the user has set it, else the user's cache folder.
    """
    root = cache_root()
    folder = root / cache_key()
    existed = folder.is_dir()
    if _writable(folder):
        if not existed:
            _prune(root, folder)
        return folder
    temporary = Path(tempfile.mkdtemp(prefix="edgert-kernels-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


@contextlib.contextmanager
def _numba_cache() -> Iterator[None]:
    """Point Numba at our folder while it picks a place for one function; others keep theirs."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(cache_folder())
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def inline(function: _F) -> _F:
    """Decorator for a helper that is compiled into the kernels that call it.

    It cannot be called from Python.
    """
    dispatcher = numba.njit(
        forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **JIT
    )(function)
    _keep_as_ir(dispatcher)
    compiled: _F = dispatcher
    return compiled


def _keep_as_ir(dispatcher: Any) -> None:
    """Stop Numba from optimising a helper and making machine code of it before it is inlined.

    Without this each helper is also compiled alone, which takes time and memory (12.8 s instead of
    17.9 s and 55 MB less over seven kernels), and LLVM's code generator rewrites the very
    module that is inlined later: of such loops LLVM 22 has made wrong code. This reaches into
    Numba (0.62 to 0.68 at least); where the parts are not found the helper stays as it is.
    """
    if not all(hasattr(dispatcher, name) for name in ("_compiler", "targetctx", "overloads")):
        return

    def no_machine_code(flags: Any) -> Any:
        flags.no_compile = True
        return flags

    def add_overload(result: Any) -> None:
        result = result._replace(entry_point=object())  # Numba's name for it: must be unique
        dispatcher.targetctx.insert_user_function(
            result.entry_point, result.fndesc, [result.library]
        )
        dispatcher.overloads[tuple(result.signature.args)] = result
        _only_link(result.library)

    dispatcher._compiler._customize_flags = no_machine_code
    dispatcher.add_overload = add_overload


def _only_link(library: Any) -> None:
    """Let `library` be linked into others, but neither optimised nor compiled by itself."""
    parts = ("_optimize_final_module", "_finalize_final_module", "_finalize_dynamic_globals")
    if not all(hasattr(library, name) for name in (*parts, "_finalized")) or library._finalized:
        return

    def finish() -> None:
        library._finalize_dynamic_globals()
        library._finalized = True

    library._optimize_final_module = lambda: None
    library._finalize_final_module = finish


class Kernel:
    """One compiled function with a fixed C signature.

    `address` is what an executor calls; calling the object runs the same machine code from Python
    with the GIL released. Nothing is compiled, or read from the cache, before the first of these.
    """

    def __init__(self, function: Callable[..., None], signature: Any) -> None:
        self.py_func = function
        self.name = function.__name__.strip("_").removesuffix("_kernel")
        self.signature = signature
        self._compiled: Any = None

    def compile(self) -> Kernel:
        """Compile now, or load from the cache. Safe from several threads."""
        if self._compiled is None:
            with _COMPILING:
                if self._compiled is None:
                    with _numba_cache():
                        compiled = numba.cfunc(self.signature, cache=True, **JIT)(self.py_func)
                    self._compiled = compiled
        return self

    @property
    def address(self) -> int:
        """Address of the C function."""
        return int(self.compile()._compiled.address)

    def __call__(self, *args: float) -> None:
        """Run it. Addresses are not checked."""
        self.compile()._compiled.ctypes(*args)

    def __repr__(self) -> str:
        return f"Kernel({self.name})"


def void(letters: str) -> Any:
    """The signature void(...) with one letter for each argument: i int64 or address, f float32."""
    return numba.types.void(*(_TYPES[letter] for letter in letters))


def kernel(signature: Any) -> Callable[[Callable[..., None]], Kernel]:
    """Decorator: `@kernel(void("iiif"))`, or any Numba signature, makes a `Kernel`."""
    return lambda function: Kernel(function, signature)
