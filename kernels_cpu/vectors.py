"""The LLVM side of `simd`: the `Vec` type and what emits instructions for it.

Owns: how a Numba type becomes an LLVM vector, and half-precision conversion on any CPU. Kernels
do not use this module; they use `simd`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgert.kernels_cpu.compiler import cgutils, intrinsic, ir, models, register_model, types

__all__ = [
    "Emit", "I32", "LLVM", "SCALAR", "Vec", "constant", "declare", "emit_prefetch",
    "float_to_half", "generic",
    "half_to_float", "is_float", "load", "operation", "splat", "store", "suffix", "vec",
]  # fmt: skip

Emit = Callable[..., Any]  # (context, builder, signature, args) -> LLVM value

LLVM = {
    "i8": ir.IntType(8), "i16": ir.IntType(16), "i32": ir.IntType(32), "i64": ir.IntType(64),
    "f16": ir.HalfType(), "f32": ir.FloatType(),
}  # fmt: skip
SCALAR = {
    "i8": types.int8, "i16": types.int16, "i32": types.int32, "i64": types.int64,
    "f32": types.float32,
}  # fmt: skip
I32 = ir.IntType(32)


class Vec(types.Type):  # type: ignore[misc]
    """Numba type of an LLVM vector: `elt` is one of i8 i16 i32 i64 f16 f32, `n` the lanes."""

    def __init__(self, elt: str, n: int) -> None:
        self.elt, self.n = elt, n
        super().__init__(name=f"Vec({elt}x{n})")

    @property
    def llvm(self) -> Any:
        """The LLVM type <n x elt>."""
        return ir.VectorType(LLVM[self.elt], self.n)


@(lambda model: register_model(Vec)(model))
class _VecModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: Vec) -> None:
        super().__init__(manager, fe_type, fe_type.llvm)


def vec(elt: str, n: int) -> Vec:
    """The `Vec` type of `n` lanes of `elt`. Numba types of equal name are one type."""
    return Vec(elt, n)


def operation(result: Any, args: tuple[Any, ...], emit: Emit) -> Any:
    """A function for kernels: takes Numba types `args`, returns `result`, code from `emit`."""
    answer = (result(*args), emit)
    forms: tuple[Callable[..., Any], ...] = (
        lambda typingctx: answer,
        lambda typingctx, a: answer,
        lambda typingctx, a, b: answer,
        lambda typingctx, a, b, c: answer,
        lambda typingctx, a, b, c, d: answer,
    )
    return intrinsic(forms[len(args)])


def generic(arity: int, emit: Emit, float_only: bool = False) -> Any:
    """An operation on equal types (vectors or float32 scalars) that returns the same type."""

    def typed(*args: Any) -> Any:
        first = args[0]
        floating = first == types.float32 or (isinstance(first, Vec) and first.elt == "f32")
        known = isinstance(first, Vec) or floating
        if not known or any(a != first for a in args) or (float_only and not floating):
            return None
        return first(*args), emit

    forms: tuple[Callable[..., Any], ...] = (
        lambda typingctx, a: typed(a),
        lambda typingctx, a, b: typed(a, b),
        lambda typingctx, a, b, c: typed(a, b, c),
    )
    return intrinsic(forms[arity - 1])


def is_float(value: Any) -> bool:
    """True for an LLVM value of float32, scalar or vector."""
    kind = value.type
    return bool((kind.element if isinstance(kind, ir.VectorType) else kind) == LLVM["f32"])


def suffix(kind: Any) -> str:
    """The type suffix of an LLVM intrinsic's name: v16f32, i32."""
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{suffix(kind.element)}"
    return "f32" if kind == LLVM["f32"] else f"i{kind.width}"


def declare(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    """The function `name`, declared in the module once."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, args), name)


def constant(kind: Any, values: list[Any]) -> Any:
    """A constant vector of LLVM type `kind`."""
    return ir.Constant(kind, [ir.Constant(kind.element, v) for v in values])


def splat(builder: Any, scalar: Any, n: int) -> Any:
    """`scalar` in all of `n` lanes."""
    kind = ir.VectorType(scalar.type, n)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
    zeros = ir.Constant(ir.VectorType(I32, n), [0] * n)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


def load(builder: Any, address: Any, kind: Any) -> Any:
    """Load `kind` from an integer address of any alignment."""
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 1
    return value


def store(builder: Any, address: Any, value: Any) -> None:
    """Store to an integer address of any alignment."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def emit_prefetch(builder: Any, address: Any, locality: int = 3) -> None:
    """Ask for the cache line at an integer address, into L1 (3) or L2 (2); never faults."""
    pointer = ir.IntType(8).as_pointer()
    call = declare(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, I32, I32, I32])
    builder.call(call, [builder.inttoptr(address, pointer), I32(0), I32(locality), I32(1)])


# --- half precision: the conversion instruction where the target has one, else integer steps.
# Without F16C LLVM would call a compiler runtime function that is not in the process.


def _has_half(context: Any) -> bool:
    triple, _, features = context.codegen().magic_tuple()
    return "+f16c" in features.split(",") or triple.startswith(("aarch64", "arm64"))


def half_to_float(context: Any, builder: Any, bits: Any) -> Any:
    """LLVM <n x i16> or i16 of IEEE half bits -> float of the same shape, exact."""
    wide, real = I32, ir.FloatType()
    half: Any = ir.HalfType()
    if isinstance(bits.type, ir.VectorType):
        n = bits.type.count
        wide, real, half = (ir.VectorType(t, n) for t in (wide, real, half))
    if _has_half(context):
        return builder.fpext(builder.bitcast(bits, half), real)

    def const(kind: Any, value: Any) -> Any:
        vector = isinstance(kind, ir.VectorType)
        return constant(kind, [value] * kind.count) if vector else ir.Constant(kind, value)

    h = builder.zext(bits, wide)
    sign = builder.shl(builder.and_(h, const(wide, 0x8000)), const(wide, 16))
    magnitude = builder.shl(builder.and_(h, const(wide, 0x7FFF)), const(wide, 13))
    scaled = builder.fmul(builder.bitcast(magnitude, real), const(real, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, const(wide, 0x7C00 << 13))
    huge = builder.or_(magnitude, const(wide, 0x7F800000))
    return builder.bitcast(
        builder.or_(builder.select(special, huge, builder.bitcast(scaled, wide)), sign), real
    )


def float_to_half(context: Any, builder: Any, value: Any) -> Any:
    """LLVM <n x float> -> <n x i16> of IEEE half bits, rounded to nearest even."""
    n = value.type.count
    wide, real = ir.VectorType(I32, n), value.type
    narrow = ir.VectorType(ir.IntType(16), n)
    if _has_half(context):
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(ir.HalfType(), n)), narrow)

    def const(x: int) -> Any:
        return constant(wide, [x] * n)

    bits = builder.bitcast(value, wide)
    magnitude = builder.and_(bits, const(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, const(13)), const(1))
    rebased = builder.add(magnitude, const(0xC8000FFF - 2**32))  # exponent -112, half an ulp
    normal = builder.lshr(builder.add(rebased, odd), const(13))
    magic = constant(real, [0.5] * n)  # adding 0.5 rounds a subnormal half at its last bit
    shifted = builder.bitcast(builder.fadd(builder.bitcast(magnitude, real), magic), wide)
    small = builder.sub(shifted, const(0x3F000000))
    is_nan = builder.icmp_unsigned(">", magnitude, const(0x7F800000))
    large = builder.select(is_nan, const(0x7E00), const(0x7C00))
    out = builder.select(builder.icmp_unsigned("<", magnitude, const(0x38800000)), small, normal)
    out = builder.select(builder.icmp_unsigned(">=", magnitude, const(0x47800000)), large, out)
    sign = builder.lshr(builder.and_(bits, const(-(2**31))), const(16))
    return builder.trunc(builder.or_(out, sign), narrow)
