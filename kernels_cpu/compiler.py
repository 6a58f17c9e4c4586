"""Numba and LLVM, or a stand-in for them: the only place that imports the compiler.

Owns: whether this process has a compiler. Must not know what is compiled.

A process that finds kernels compiled needs none: Numba and LLVM hold some 60 MiB of every memory
budget. It gets a stand-in, in which decorators, types and instructions mean nothing, and machine
code comes from the cache alone (jit.py), which child processes fill (edgert/compiling.py). Import
Numba before edgert to have it here.

    from edgert.kernels_cpu.compiler import intrinsic, ir, types
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from typing import Any

from edgert.kernels_cpu.cache import can_start_python, read_note, target_note
from edgert.kernels_cpu.linking import CAN_LINK

__all__ = ["Target", "can_be_left_out", "left_out", "target_key"]

_NUMBA_WAS_HERE = "numba" in sys.modules  # the application uses it itself
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


def can_be_left_out() -> bool:
    """True where a process runs without the compiler once there are kernels.

    Linking must need no LLVM, Numba not have been here before, and a child be able to compile what
    is wanted later.
    """
    return CAN_LINK and can_start_python() and not _NUMBA_WAS_HERE


def left_out() -> bool:
    """True when this process has no compiler and never will. Decided when it is first asked."""
    return _compiled_for() is not None


def target_key() -> Target:
    """(triple, CPU name, features) of the kernels' machine code: those of Numba's target."""
    found = _compiled_for()
    if found is None:
        found = __getattr__("cpu_target").target_context.codegen().magic_tuple()
    triple, cpu, features = map(str, found)
    return triple, cpu, features


@cache
def _compiled_for() -> Target | None:
    """The target of the cache, where that is enough; None: Numba is to be imported."""
    note = read_note(target_note()) if can_be_left_out() else None
    if note is None or len(note.target) != 3 or not note.folder.is_dir():
        return None
    triple, cpu, features = note.target
    return triple, cpu, features


def __getattr__(name: str) -> Any:
    if name not in _PARTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if left_out():
        return Absent
    module, attribute = _PARTS[name]
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found
