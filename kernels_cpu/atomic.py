"""What compiled code needs of the machine besides arithmetic: atomics, clock, sleep, wake-ups.

Owns: Numba intrinsics over LLVM atomics and a few C library calls, so that a thread team can run a
whole token without entering Python. Must not know what is computed.

The calls are resolved by name when code is linked: `sched_yield`, `usleep`, `clock_gettime`, `read`
and `write` are in every POSIX C library; on Windows `register_symbols` provides their counterparts.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from edgert.kernels_cpu.compiler import cgutils, intrinsic, ir, llvm, types

__all__ = [
    "arg",
    "atomic_add",
    "await_notice",
    "call_matmul",
    "call_op",
    "full_fence",
    "load_acquire",
    "load_int",
    "notify",
    "now_ns",
    "pause",
    "register_symbols",
    "sleep_us",
    "store_int",
    "store_release",
    "yield_cpu",
]

_I64 = ir.IntType(64)
_I32 = ir.IntType(32)
_CLOCK_MONOTONIC = 6 if sys.platform == "darwin" else 1
_WINDOWS = sys.platform == "win32"


def _declare(builder: Any, name: str, returns: Any, arguments: list[Any]) -> Any:
    function_type = ir.FunctionType(returns, arguments)
    return cgutils.get_or_insert_function(builder.module, function_type, name)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I64.as_pointer())


def register_symbols() -> None:
    """Make the C calls known to LLVM by name where the C library lacks them (Windows).

    Call before compiled code is loaded, cached or not.
    """
    if not _WINDOWS:
        return
    kernel32 = ctypes.CDLL("kernel32")
    runtime = ctypes.CDLL("msvcrt")
    for name, function in (
        ("edgert_sleep_ms", kernel32.Sleep),
        ("edgert_yield", kernel32.SwitchToThread),
        ("edgert_counter", kernel32.QueryPerformanceCounter),
        ("edgert_read", runtime._read),
        ("edgert_write", runtime._write),
    ):
        llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)


@intrinsic
def load_int(typingctx, address):  # type: ignore[no-untyped-def]
    """The int64 at `address`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load(_pointer(builder, args[0]))

    return types.int64(types.intp), codegen


@intrinsic
def arg(typingctx, row, index):  # type: ignore[no-untyped-def]
    """Field `index` of the int64 row at address `row`.

    An intrinsic, because Numba compiles a helper anew for every constant it is called with.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        offset = builder.mul(args[1], ir.Constant(_I64, 8))
        return builder.load(_pointer(builder, builder.add(args[0], offset)))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def store_int(typingctx, address, value):  # type: ignore[no-untyped-def]
    """Write the int64 `value` at `address`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store(args[1], _pointer(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def load_acquire(typingctx, address):  # type: ignore[no-untyped-def]
    """The int64 at `address`; later reads see what its writer wrote before it."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load_atomic(_pointer(builder, args[0]), "acquire", 8)

    return types.int64(types.intp), codegen


@intrinsic
def store_release(typingctx, address, value):  # type: ignore[no-untyped-def]
    """Write the int64 `value` at `address` after all earlier writes."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store_atomic(args[1], _pointer(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def atomic_add(typingctx, address, value):  # type: ignore[no-untyped-def]
    """Add `value` to the int64 at `address` and return what was there before."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", _pointer(builder, args[0]), args[1], "acq_rel")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
def full_fence(typingctx):  # type: ignore[no-untyped-def]
    """What was written before is seen by all before anything after it is read."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def pause(typingctx):  # type: ignore[no-untyped-def]
    """Tell the core that this is a spin loop (x86 only; nothing elsewhere)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if "86" in llvm.get_default_triple().split("-")[0]:
            builder.call(_declare(builder, "llvm.x86.sse2.pause", ir.VoidType(), []), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_cpu(typingctx):  # type: ignore[no-untyped-def]
    """Let another thread run on this core."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        name = "edgert_yield" if _WINDOWS else "sched_yield"
        builder.call(_declare(builder, name, _I32, []), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def sleep_us(typingctx, microseconds):  # type: ignore[no-untyped-def]
    """Sleep for about `microseconds` (Windows: at least one millisecond)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if _WINDOWS:
            function = _declare(builder, "edgert_sleep_ms", ir.VoidType(), [_I32])
            builder.call(function, [ir.Constant(_I32, 1)])
        else:
            function = _declare(builder, "usleep", _I32, [_I32])
            builder.call(function, [builder.trunc(args[0], _I32)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def now_ns(typingctx):  # type: ignore[no-untyped-def]
    """Nanoseconds of a monotonic clock (Windows: ticks of 100 ns, scaled)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        cell = cgutils.alloca_once(builder, ir.ArrayType(_I64, 2))
        first = builder.bitcast(cell, _I64.as_pointer())
        if _WINDOWS:
            builder.call(_declare(builder, "edgert_counter", _I32, [_I64.as_pointer()]), [first])
            return builder.mul(builder.load(first), ir.Constant(_I64, 100))
        function = _declare(builder, "clock_gettime", _I32, [_I32, _I64.as_pointer()])
        builder.call(function, [ir.Constant(_I32, _CLOCK_MONOTONIC), first])
        seconds = builder.load(first)
        nanoseconds = builder.load(builder.gep(first, [ir.Constant(_I64, 1)]))
        return builder.add(builder.mul(seconds, ir.Constant(_I64, 10**9)), nanoseconds)

    return types.int64(), codegen


def _transfer(builder: Any, name: str, fd: Any, cell: Any) -> None:
    """Call the C library's `read` or `write` for 8 bytes at `cell`."""
    name, size = (f"edgert_{name}", _I32) if _WINDOWS else (name, _I64)
    function = _declare(builder, name, size, [_I32, _I64.as_pointer(), size])
    builder.call(function, [builder.trunc(fd, _I32), cell, ir.Constant(size, 8)])


@intrinsic
def notify(typingctx, fd, value):  # type: ignore[no-untyped-def]
    """Write the 8 bytes of `value` to the pipe `fd`: wakes whoever reads it."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        cell = cgutils.alloca_once(builder, _I64)
        builder.store(args[1], cell)
        _transfer(builder, "write", args[0], cell)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def await_notice(typingctx, fd):  # type: ignore[no-untyped-def]
    """Sleep until `notify` has written to the pipe `fd`; may also return for no reason."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _transfer(builder, "read", args[0], cgutils.alloca_once(builder, _I64))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


_OP_TYPE = ir.FunctionType(ir.VoidType(), [_I64] * 5)
_MATMUL_TYPE = ir.FunctionType(ir.VoidType(), [_I64] * 13)


@intrinsic
def call_op(typingctx, function, op, frame, start, stop, tid):  # type: ignore[no-untyped-def]
    """Call the op kernel at address `function`: (op, frame, start, stop, tid)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.call(builder.inttoptr(args[0], _OP_TYPE.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@intrinsic
def call_matmul(typingctx, function, w, x, xs, y, ys, k, start, stop, n, xi, yi, mode, bias):  # type: ignore[no-untyped-def]
    """Call the matmul kernel at address `function` (see matmul.py for the arguments)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.call(builder.inttoptr(args[0], _MATMUL_TYPE.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 14), codegen
