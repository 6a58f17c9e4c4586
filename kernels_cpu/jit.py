"""How kernels are compiled: the only place with JIT flags.

Machine code is kept in the user's cache folder (cache.py) under a key made of the text of all
kernel sources, Numba's version and the CPU features. Numba's own cache is not used: it does not
notice edits in imported modules, cannot read a folder that it may not write to, and prepares the
whole compiler before it loads the first function. Object code needs no compiler: linking.py puts
it into memory, and a process can leave the compiler out (compiler.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.metadata
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from edgert.errors import EdgertError
from edgert.kernels_cpu.cache import (
    KEY_LENGTH,
    cache_root,
    child_environment,
    prune,
    read_code,
    sources_digest,
    use_temporary_root,
    writable,
    write_code,
)
from edgert.kernels_cpu.compiler import left_out, llvm, numba, target_key
from edgert.kernels_cpu.linking import CAN_LINK, link

__all__ = ["JIT", "Kernel", "cache_folder", "cache_key", "compile_one", "inline", "kernel", "void"]

JIT = {"nogil": True, "boundscheck": False, "error_model": "numpy", "fastmath": False}
_LOCK = threading.RLock()  # one thread compiles or links at a time
_F = TypeVar("_F", bound=Callable[..., Any])
_C_TYPES: dict[str, Any] = {"i": ctypes.c_int64, "f": ctypes.c_float}
_PACKAGE = Path(__file__).parent
_COMPILE = (
    "import sys, numba; from edgert.kernels_cpu.jit import compile_one as c; c(*sys.argv[1:])"
)


def cache_key(folder: Path | None = None) -> str:
    """20 hex digits that change when any kernel source in `folder`, Numba or the CPU changes."""
    digest = hashlib.sha256(sources_digest(folder).encode())
    versions = (importlib.metadata.version(name) for name in ("numba", "llvmlite"))
    for part in (*versions, *target_key()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:KEY_LENGTH]


_own_key = cache(cache_key)


def cache_folder() -> Path:
    """Where this process looks for machine code and keeps it.

    The root is `NUMBA_CACHE_DIR` where the user has set it, else the user's cache folder; a
    temporary folder, deleted at exit, once something had to be written that could not be.
    """
    return cache_root() / _own_key()


@cache
def _in_use(folder: Path) -> None:
    """Note on disk that the folder is in use, so that it is not pruned as an old one."""
    with contextlib.suppress(OSError):
        os.utime(folder)


@cache
def _engine() -> Any:
    """LLVM's linker and owner of machine code, for the life of the process."""
    target_key()  # Numba prepares LLVM, and names the few functions of its own that kernels call
    machine = llvm.Target.from_default_triple().create_target_machine(codemodel="jitdefault")
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


def _link(symbol: str, code: bytes) -> int:
    """The address of `symbol` in object code, once that is in memory and executable."""
    if CAN_LINK:
        return link(code, symbol)
    engine = _engine()
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return int(engine.get_function_address(symbol))


def inline(function: _F) -> _F:
    """Decorator for a helper that is compiled into the kernels that call it.

    It cannot be called from Python.
    """
    if left_out():
        return function
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

    def __init__(self, function: Callable[..., None], signature: str) -> None:
        self.py_func = function
        self.name = function.__name__.strip("_").removesuffix("_kernel")
        self.signature = signature
        self._address = 0
        self._call: Any = None
        self._compiled: Any = None  # Numba's object, which owns the code it has just compiled

    def compile(self) -> Kernel:
        """Compile now, or load from the cache. Safe from several threads."""
        if not self._address:
            with _LOCK:
                if not self._address:
                    address = self._load() or (
                        self._compile_apart() if left_out() else self._compile()
                    )
                    types = [_C_TYPES[letter] for letter in self.signature]
                    self._call = ctypes.CFUNCTYPE(None, *types)(address)
                    self._address = address
        return self

    def _file_name(self) -> str:
        """The kernel's name, and for one that is not in this package a digest of its source."""
        code = self.py_func.__code__
        name = f"{self.py_func.__module__.removeprefix('edgert.kernels_cpu.')}.{code.co_name}"
        source = Path(code.co_filename)
        if source.parent == _PACKAGE:
            return f"{name}.code"
        digest = hashlib.sha256(f"{code.co_qualname} {code.co_firstlineno}".encode())
        digest.update(source.read_bytes())
        return f"{name}.{digest.hexdigest()[:KEY_LENGTH]}.code"

    def _load(self) -> int:
        """The address of the code in the cache, 0 when it is not there."""
        try:
            path = cache_folder() / self._file_name()
        except OSError:
            return 0  # made from no file
        found = read_code(path)
        if found is None:
            return 0
        _in_use(path.parent)
        return _link(*found)

    def _compile_apart(self) -> int:
        """Let a child process fill the cache, since this one has no compiler; the code's address.

        Raises `EdgertError` where no child can do it.
        """
        if not writable(cache_root()):
            use_temporary_root()
        command = [sys.executable, "-P", "-c", _COMPILE, self.py_func.__module__, self._file_name()]
        try:
            child = subprocess.run(
                command, env=child_environment(), capture_output=True, text=True, check=False
            )
            address, why = self._load(), child.stderr.strip().rpartition("\n")[2]
        except OSError as error:
            address, why = 0, str(error)
        if not address:
            raise EdgertError(
                f"the kernel {self.name} is not in the cache {cache_root()}, and no child process "
                f"could compile it ({why}); run edgert warmup"
            )
        return address

    def _compile(self) -> int:
        """Compile, keep the code, and give its address."""
        kinds = {"i": numba.types.int64, "f": numba.types.float32}
        signature = numba.types.void(*(kinds[letter] for letter in self.signature))
        self._compiled = numba.cfunc(signature, **JIT)(self.py_func)
        _, _, (code, _) = self._compiled._library.serialize_using_object_code()
        with contextlib.suppress(OSError):
            name = self._file_name()
            folder = cache_folder()
            existed = folder.is_dir()
            if not writable(folder):
                use_temporary_root()
                folder = cache_folder()
                folder.mkdir(exist_ok=True)
            elif not existed:
                prune(folder.parent, folder)
            write_code(folder / name, self._compiled.native_name, code)
        return int(self._compiled.address)

    @property
    def address(self) -> int:
        """Address of the C function."""
        self.compile()
        return self._address

    def __call__(self, *args: float) -> None:
        """Run it. Addresses are not checked."""
        self.compile()._call(*args)

    def __repr__(self) -> str:
        return f"Kernel({self.name})"


def void(letters: str) -> str:
    """The signature void(...) with one letter for each argument: i int64 or address, f float32."""
    assert set(letters) <= set(_C_TYPES), letters
    return letters


def kernel(signature: str) -> Callable[[Callable[..., None]], Kernel]:
    """Decorator: `@kernel(void("iiif"))` makes a `Kernel`."""
    return lambda function: Kernel(function, signature)


def compile_one(module: str, file_name: str) -> None:
    """Compile the kernel of `module` that is kept under this name: for a process without Numba."""
    for found in vars(importlib.import_module(module)).values():
        if isinstance(found, Kernel) and found._file_name() == file_name:
            found.compile()
