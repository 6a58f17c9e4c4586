"""SIMD vectors as Numba values: kernels are ordinary Python loops over `Vec` locals.

A `Vec` is an LLVM vector held in registers; every function here is one LLVM operation (or a short
fixed sequence). Results are defined per lane and do not depend on the CPU: LLVM splits a
16-lane vector into two 8-lane halves on AVX2 and four 4-lane ones on NEON or SSE. There is no
fast-math: what is written is what is computed, and `fma` rounds once everywhere.

Owns: loads, stores, lane arithmetic. Must not know number formats or what the vectors mean.
Addresses are plain integers (`array.ctypes.data + offset`); nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgert.kernels_cpu.compiler import intrinsic, ir, types
from edgert.kernels_cpu.vectors import (
    I32,
    LLVM,
    SCALAR,
    Emit,
    Vec,
    constant,
    declare,
    emit_prefetch,
    float_to_half,
    generic,
    half_to_float,
    is_float,
    load,
    operation,
    splat,
    store,
    suffix,
    vec,
)

__all__ = [
    "F32x16", "I32x16", "I8x64", "Vec", "bc_f32x16", "bc_f32x8", "bc_i32x16", "bc_i32x8",
    "bitcast_to", "const_of", "convert_to", "f32_to_i32", "fma", "fnma", "i32_to_f32",
    "ld_bf16x16", "ld_bf16x8", "ld_f16", "ld_f16x16", "ld_f16x8", "ld_f32", "ld_f32x16",
    "ld_f32x8", "ld_i16", "ld_i32", "ld_i64", "ld_i8", "ld_u16", "ld_u32", "ld_u8", "llvm_op",
    "loader", "operation", "prefetch", "reduce_add", "reduce_max", "select_ge",
    "select_gt", "shift_of", "shuffle_of", "splat_f32x16", "splat_f32x8", "splat_i32x16",
    "st_f16x16", "st_f32", "st_f32x16", "st_f32x8", "st_i16", "st_i32", "st_i64", "st_i8",
    "stack_buffer", "storer", "vabs", "vadd", "vand", "vdiv", "vec", "vmax", "vmin", "vmul",
    "vneg", "vor", "vrint", "vsqrt", "vsub", "vxor", "zero_f32x16", "zero_i32x16",
]  # fmt: skip

F32x16 = Any  # names for annotations only: Numba infers the types, mypy cannot see them
I32x16 = Any
I8x64 = Any

# --- memory ---------------------------------------------------------------------------------


def loader(kind: Any) -> Any:
    """load(address) -> `kind` (a `Vec` or a Numba scalar of 1 to 8 bytes), any alignment."""
    llvm = kind.llvm if isinstance(kind, Vec) else _LLVM_OF[kind]
    return operation(kind, (types.intp,), lambda ctx, b, sig, args: load(b, args[0], llvm))


def storer(kind: Any) -> Any:
    """store(address, value of `kind`), any alignment."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        store(builder, args[0], args[1])
        return context.get_dummy_value()

    return operation(types.void, (types.intp, kind), emit)


def _broadcast(elt: str, n: int, as_kind: Vec | None = None) -> Any:
    out = as_kind or vec(elt, n)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = splat(builder, load(builder, args[0], LLVM[elt]), n)
        return builder.bitcast(value, out.llvm) if as_kind else value

    return operation(out, (types.intp,), emit)


def _splat_of(elt: str, n: int) -> Any:
    return operation(vec(elt, n), (SCALAR[elt],), lambda ctx, b, sig, args: splat(b, args[0], n))


_LLVM_OF = {
    types.int8: LLVM["i8"], types.uint8: LLVM["i8"], types.int16: LLVM["i16"],
    types.uint16: LLVM["i16"], types.int32: LLVM["i32"], types.uint32: LLVM["i32"],
    types.int64: LLVM["i64"], types.float32: LLVM["f32"],
}  # fmt: skip
ld_f32x16, ld_f32x8 = loader(vec("f32", 16)), loader(vec("f32", 8))
st_f32x16, st_f32x8 = storer(vec("f32", 16)), storer(vec("f32", 8))
ld_f32, ld_i64 = loader(types.float32), loader(types.int64)
ld_i8, ld_u8, ld_i16 = loader(types.int8), loader(types.uint8), loader(types.int16)
ld_u16, ld_i32, ld_u32 = loader(types.uint16), loader(types.int32), loader(types.uint32)
st_f32, st_i8, st_i16 = storer(types.float32), storer(types.int8), storer(types.int16)
st_i32, st_i64 = storer(types.int32), storer(types.int64)
bc_f32x16, bc_f32x8 = _broadcast("f32", 16), _broadcast("f32", 8)
bc_i32x16, bc_i32x8 = _broadcast("i32", 16), _broadcast("i32", 8)
splat_f32x16, splat_f32x8 = _splat_of("f32", 16), _splat_of("f32", 8)
splat_i32x16 = _splat_of("i32", 16)


def stack_buffer(nbytes: int) -> Any:
    """buffer() -> address of `nbytes` uninitialised bytes, 64-byte aligned, freed on return."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.ArrayType(LLVM["i8"], nbytes)
        with builder.goto_entry_block():
            slot = builder.alloca(kind)
            slot.align = 64
        return builder.ptrtoint(slot, LLVM["i64"])

    return operation(types.intp, (), emit)


@(lambda f: operation(types.void, (types.intp,), f))
def prefetch(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """prefetch(address): ask for the cache line; never faults."""
    emit_prefetch(builder, args[0])
    return context.get_dummy_value()


def _half_loader(n: int) -> Any:
    kind = ir.VectorType(ir.IntType(16), n) if n > 1 else ir.IntType(16)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return half_to_float(context, builder, load(builder, args[0], kind))

    return operation(vec("f32", n) if n > 1 else types.float32, (types.intp,), emit)


ld_f16x16, ld_f16x8, ld_f16 = _half_loader(16), _half_loader(8), _half_loader(1)


@(lambda f: operation(types.void, (types.intp, vec("f32", 16)), f))
def st_f16x16(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """st_f16x16(address, f32x16): 16 IEEE halves, rounded to nearest even."""
    store(builder, args[0], float_to_half(context, builder, args[1]))
    return context.get_dummy_value()


def _bf16_loader(n: int) -> Any:
    wide = ir.VectorType(I32, n)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.zext(load(builder, args[0], ir.VectorType(ir.IntType(16), n)), wide)
        return builder.bitcast(builder.shl(bits, constant(wide, [16] * n)), vec("f32", n).llvm)

    return operation(vec("f32", n), (types.intp,), emit)


ld_bf16x16, ld_bf16x8 = _bf16_loader(16), _bf16_loader(8)


# --- lane arithmetic ------------------------------------------------------------------------


def _binary(integer: str, real: str | None) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        name = real if is_float(args[0]) else integer
        assert name is not None, "this operation is for integer lanes"
        return getattr(builder, name)(*args)

    return generic(2, emit)


def _choose(relation: str) -> Emit:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        test = builder.fcmp_ordered if is_float(args[0]) else builder.icmp_signed
        chosen = args[2:] or args
        return builder.select(test(relation, args[0], args[1]), *chosen)

    return emit


def _unary_llvm(name: str) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = args[0].type
        return builder.call(declare(builder, f"{name}.{suffix(kind)}", kind, [kind]), args)

    return generic(1, emit, float_only=True)


def _fma(negate: bool) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b, c = args
        kind = a.type
        a = builder.fneg(a) if negate else a
        call = declare(builder, f"llvm.fma.{suffix(kind)}", kind, [kind] * 3)
        return builder.call(call, [a, b, c])

    return generic(3, emit, float_only=True)


vadd, vsub, vmul = _binary("add", "fadd"), _binary("sub", "fsub"), _binary("mul", "fmul")
vdiv = _binary("sdiv", "fdiv")
vand, vor, vxor = _binary("and_", None), _binary("or_", None), _binary("xor", None)
vmax = generic(2, _choose(">"))  # a > b ? a : b, so a NaN in `a` gives b
vmin = generic(2, _choose("<"))  # a < b ? a : b
vneg = generic(1, lambda ctx, b, sig, args: b.fneg(args[0]), float_only=True)
vsqrt, vrint, vabs = (_unary_llvm(f"llvm.{n}") for n in ("sqrt", "roundeven", "fabs"))
fma, fnma = _fma(False), _fma(True)  # a*b + c and -(a*b) + c, rounded once; vectors or float32


def _selector(relation: str) -> Any:
    def typed(a: Any, b: Any, x: Any, y: Any) -> Any:
        if not (isinstance(a, Vec) and a == b and isinstance(x, Vec) and x == y and a.n == x.n):
            return None
        return x(a, b, x, y), _choose(relation)

    return intrinsic(lambda typingctx, a, b, x, y: typed(a, b, x, y))


select_gt, select_ge = _selector(">"), _selector(">=")  # a > b ? x : y, lane by lane


def const_of(kind: Vec, values: list[Any]) -> Any:
    """constant() -> the vector of `values`, one for each lane (or one value for all)."""
    lanes = values if len(values) == kind.n else values * kind.n
    return operation(kind, (), lambda ctx, b, sig, args: constant(kind.llvm, lanes))


def shift_of(how: str, kind: Vec, count: int) -> Any:
    """shift(v) with `how` in shl, lshr, ashr by a constant `count` of bits in each lane."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, how)(args[0], constant(kind.llvm, [count] * kind.n))

    return operation(kind, (kind,), emit)


def convert_to(how: str, source: Vec, target: Vec) -> Any:
    """convert(v) with LLVM's `how`: bitcast, sext, zext, trunc, sitofp, fptosi."""
    return operation(
        target, (source,), lambda ctx, b, sig, args: getattr(b, how)(args[0], target.llvm)
    )


def bitcast_to(source: Vec, target: Vec) -> Any:
    """bitcast(v): the same bits seen as `target`."""
    return convert_to("bitcast", source, target)


def shuffle_of(source: Vec, index: list[int]) -> Any:
    """shuffle(a, b) -> lanes `index` of a (0..n-1) and b (n..2n-1)."""
    mask = [ir.Constant(I32, i) for i in index]
    mask = ir.Constant(ir.VectorType(I32, len(index)), mask)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.shuffle_vector(args[0], args[1], mask)

    return operation(vec(source.elt, len(index)), (source, source), emit)


def llvm_op(name: str, result: Vec, *args: Vec) -> Any:
    """A call of the LLVM intrinsic `name`. One that the target lacks aborts the process."""

    def emit(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        return builder.call(declare(builder, name, result.llvm, [a.llvm for a in args]), values)

    return operation(result, args, emit)


def _reduce(combine: Callable[[Any, Any, Any], Any]) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        v = args[0]
        while v.type.count > 1:
            half = v.type.count // 2
            undefined = ir.Constant(v.type, ir.Undefined)
            parts = [
                builder.shuffle_vector(
                    v, undefined, ir.Constant(ir.VectorType(I32, half), list(lanes))
                )
                for lanes in (range(half), range(half, 2 * half))
            ]
            v = combine(builder, *parts)
        return builder.extract_element(v, I32(0))

    return operation(types.float32, (vec("f32", 16),), emit)


# f32x16 -> float32 by halves (lane i with i+8, then i+4, i+2, i+1): one order on every CPU.
reduce_add = _reduce(lambda b, x, y: b.fadd(x, y))
reduce_max = _reduce(lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
i32_to_f32 = convert_to("sitofp", vec("i32", 16), vec("f32", 16))
f32_to_i32 = convert_to("fptosi", vec("f32", 16), vec("i32", 16))  # in-range values only
zero_f32x16, zero_i32x16 = const_of(vec("f32", 16), [0.0]), const_of(vec("i32", 16), [0])
