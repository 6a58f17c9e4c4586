"""Numba and LLVM, or a stand-in for them: the only place that imports the compiler.

Owns: whether this process has a compiler. Must not know what is compiled.

A process that finds its kernels compiled needs none: Numba and LLVM hold some 60 MiB of every
memory budget. `leave_out`, before the first kernel module is imported, gives those modules a
stand-in instead: decorators, types and instructions then mean nothing, and machine code comes from
the cache alone (jit.py), which child processes fill (edgert/compiling.py).

    from edgert.kernels_cpu.compiler import intrinsic, ir, types
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

__all__ = ["Target", "leave_out", "left_out", "target_key"]

Target = tuple[str, str, str]  # triple, CPU name, features of the code that is compiled

_PARTS = {  # name here -> module, and its attribute where it is not the module that is meant
    "cgutils": ("numba.core.cgutils", ""),
    "cpu_target": ("numba.core.registry", "cpu_target"),
    "intrinsic": ("numba.extending", "intrinsic"),
    "ir": ("llvmlite.ir", ""),
    "llvm": ("llvmlite.binding", ""),
    "models": ("numba.extending", "models"),
    "numba": ("numba", ""),
    "register_model": ("numba.extending", "register_model"),
    "types": ("numba.core.types", ""),
}
_left_out: list[Target] = []  # the target of the cache, once there is no compiler


class _Kind(type):
    """Of classes whose attributes and calls are the class: decorators, types, instructions."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent

    def __call__(cls, *args: Any, **options: Any) -> Any:
        return Absent if cls is Absent else super().__call__(*args, **options)


class Absent(metaclass=_Kind):
    """Stands for every part of a compiler that was left out; a base class of what extends one."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __call__(self, *args: object) -> Any:
        return Absent


def leave_out(compiled_for: Target) -> bool:
    """Do without a compiler: kernels are those of the cache, which were compiled for this target.

    False when it is too late: Numba is in this process already.
    """
    if not _left_out and "numba" not in sys.modules:
        _left_out.append(compiled_for)
    return left_out()


def left_out() -> bool:
    """True when this process has no compiler and never will."""
    return bool(_left_out)


def target_key() -> Target:
    """(triple, CPU name, features) of the kernels' machine code: those of Numba's target."""
    if _left_out:
        return _left_out[0]
    triple, cpu, features = __getattr__("cpu_target").target_context.codegen().magic_tuple()
    return str(triple), str(cpu), str(features)


def __getattr__(name: str) -> Any:
    if name not in _PARTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _left_out:
        return Absent
    module, attribute = _PARTS[name]
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found
