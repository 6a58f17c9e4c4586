"""What matmul kernels need of 16-row tiles: two widths of the same operations, and integer dots.

A single token is computed on all 16 rows of a tile at once (names ending in 16): the tile is then
read as one sequential stream. A batch keeps several tokens in registers and walks the tile in
parts of `ISA.lanes` rows (names ending in L; 8 on AVX2, whose 16 registers would spill with 16).
Lanes never mix, so both give the same bits.

Bytes meet as groups of four: lane i of an int32 vector gets the sum of four products. The only
code that differs by instruction set is here, and integers are exact. Activations are in
-127..127, never -128.

    P = mul_u8(w, x), P = mac_u8(P, w, x), sum_u8(P)      w unsigned, see the limits below
    mac_s8(i, w, x) from offset_s8(sums)                  w signed, all of -128..127
    pair_dot(a, b)                                        int16 pairs -> int32
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgert.kernels_cpu.isa import AVX2, AVX512_VNNI, ISA
from edgert.kernels_cpu.jit import inline
from edgert.kernels_cpu.simd import (
    bc_f32x8,
    bc_f32x16,
    const_of,
    ld_bf16x8,
    ld_bf16x16,
    ld_f16x8,
    ld_f16x16,
    ld_f32x8,
    ld_f32x16,
    loader,
    prefetch,
    st_f32x8,
    st_f32x16,
    vadd,
    vec,
    vmul,
    zero_f32x16,
)
from edgert.kernels_cpu.vectors import (
    I32,
    Vec,
    constant,
    declare,
    half_to_float,
    load,
    operation,
    splat,
)

__all__ = [
    "LANES", "PARTS", "TILE_ROWS", "bc16", "bcL", "bs16", "bsL", "bx16", "bxL", "dot16_scaled",
    "high_nibbles", "ld16", "ldL", "ld_bf16L", "ld_bytes16", "ld_f16L", "ld_f16_16",
    "ld_half_split", "ld_pairs16", "ld_pairsL", "ld_u8f16", "ld_u8fL", "ld_w16", "ld_wL",
    "low_nibbles", "mac_s8", "mac_u8", "minus8_16", "minus8_L", "mul_u8", "offset_s8", "ones16",
    "onesL", "pair_dot", "pair_high", "pair_low", "prefetch_lines", "q6_bits_0", "q6_bits_1",
    "q6_bits_2", "q6_bits_3", "st16", "stL", "sum_u8", "times32", "to_float", "zero16", "zeroL",
]  # fmt: skip

TILE_ROWS = 16
LANES = ISA.lanes
PARTS = TILE_ROWS // LANES
PREFETCH_BYTES = 2048  # 1 to 12 KiB measure alike; none costs a tenth (Q4_0) to a third (Q6_K)
_Emit = Callable[..., Any]

_wide = LANES == 16
ld16, st16, bc16, zero16 = ld_f32x16, st_f32x16, bc_f32x16, zero_f32x16
ldL, stL, bcL = (ld16, st16, bc16) if _wide else (ld_f32x8, st_f32x8, bc_f32x8)
zeroL = zero_f32x16 if _wide else const_of(vec("f32", 8), [0.0])
ld_f16_16, ld_f16L = ld_f16x16, ld_f16x16 if _wide else ld_f16x8
ld_bf16L = ld_bf16x16 if _wide else ld_bf16x8
ld_w16, ld_wL = loader(vec("i8", 64)), loader(vec("i8", 4 * LANES))


def _word_broadcast(elt: str, lanes: int) -> Any:
    """load(address) -> the 32-bit word there in every lane, seen as `elt`."""
    out = vec(elt, lanes * (4 if elt == "i8" else 2))

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(splat(builder, load(builder, args[0], I32), lanes), out.llvm)

    return operation(out, (types.intp,), emit)


bx16, bxL = _word_broadcast("i8", 16), _word_broadcast("i8", LANES)  # four activations
bs16, bsL = _word_broadcast("i16", 16), _word_broadcast("i16", LANES)  # their two sums
minus8_16, minus8_L = (const_of(vec("i16", 2 * n), [-8]) for n in (16, LANES))
ones16, onesL = (const_of(vec("i16", 2 * n), [1]) for n in (16, LANES))


def _convert_loader(source: str, how: tuple[str, ...], target: Vec) -> Any:
    """load(address) -> `target.n` values of `source` through LLVM's conversions `how`."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = load(builder, args[0], vec(source, target.n).llvm)
        for step in how:
            kind = target if step == how[-1] else vec("i32", target.n)
            value = getattr(builder, step)(value, kind.llvm)
        return value

    return operation(target, (types.intp,), emit)


ld_u8f16 = _convert_loader("i8", ("zext", "uitofp"), vec("f32", 16))
ld_u8fL = _convert_loader("i8", ("zext", "uitofp"), vec("f32", LANES))
ld_pairs16 = _convert_loader("i8", ("sext",), vec("i16", 32))  # int8 pairs, one for each row
ld_pairsL = _convert_loader("i8", ("sext",), vec("i16", 2 * LANES))
ld_bytes16 = _convert_loader("i8", ("zext",), vec("i32", 16))


@(lambda f: operation(vec("f32", 16), (types.intp,), f))
def ld_half_split(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """f32x16 from 16 low bytes of IEEE halves followed by their 16 high bytes."""
    narrow, wide = vec("i8", 16).llvm, vec("i16", 16).llvm
    low = builder.zext(load(builder, args[0], narrow), wide)
    high = builder.zext(load(builder, builder.add(args[0], args[0].type(16)), narrow), wide)
    high = builder.shl(high, constant(wide, [8] * 16))
    return half_to_float(context, builder, builder.or_(low, high))


@inline
def prefetch_lines(p: Any, count: Any) -> None:
    """Ask for `count` cache lines from a fixed distance beyond `p`."""
    for i in range(count):
        prefetch(p + PREFETCH_BYTES + 64 * i)


# --- bytes ----------------------------------------------------------------------------------


def _typed(arity: int, result: Callable[[Vec], Vec], emit: _Emit) -> Any:
    """An operation on vectors whose result type follows from the last argument's type."""

    def answer(*args: Any) -> Any:
        if not all(isinstance(a, Vec) for a in args):
            return None
        return result(args[-1])(*args), emit

    forms: tuple[Callable[..., Any], ...] = (
        lambda typingctx, a: answer(a),
        lambda typingctx, a, b: answer(a, b),
        lambda typingctx, a, b, c: answer(a, b, c),
    )
    return intrinsic(forms[arity - 1])


def _words(builder: Any, value: Any, width: int) -> Any:
    """The same register seen as integers of `width` bits."""
    elt = value.type.element.width
    return builder.bitcast(value, ir.VectorType(ir.IntType(width), value.type.count * elt // width))


def _const_like(value: Any, number: int) -> Any:
    return constant(value.type, [number] * value.type.count)


def _field(shift: int, mask: int) -> _Emit:
    """(byte shifted right by `shift`, left if negative) & mask; by 16-bit shifts and a mask."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = args[0]
        if shift:
            words = _words(builder, value, 16)
            move = builder.lshr if shift > 0 else builder.shl
            words = move(words, _const_like(words, abs(shift)))
            value = builder.bitcast(words, value.type)
        return builder.and_(value, _const_like(value, mask))

    return emit


low_nibbles = _typed(1, lambda v: v, _field(0, 0x0F))
high_nibbles = _typed(1, lambda v: v, _field(4, 0x0F))
# Two-bit field 0..3 of each byte, moved to bits 4 and 5.
q6_bits_0, q6_bits_1, q6_bits_2, q6_bits_3 = (
    _typed(1, lambda v: v, _field(shift, 0x30)) for shift in (-4, -2, 0, 2)
)
to_float = _typed(
    1, lambda v: vec("f32", v.n), lambda ctx, b, sig, args: b.sitofp(args[0], sig.return_type.llvm)
)
times32 = _typed(1, lambda v: v, lambda ctx, b, sig, args: b.shl(args[0], _const_like(args[0], 5)))


# --- integer dot products -------------------------------------------------------------------


def _split(builder: Any, value: Any, nbytes: int) -> list[Any]:
    """Parts of `nbytes` of a register value."""
    kind = value.type
    n = nbytes * 8 // kind.element.width
    undefined = ir.Constant(kind, ir.Undefined)
    index = ir.VectorType(I32, n)
    return [
        builder.shuffle_vector(value, undefined, ir.Constant(index, list(range(i, i + n))))
        for i in range(0, kind.count, n)
    ]


def _join(builder: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        n = 2 * parts[0].type.count
        index = ir.Constant(ir.VectorType(I32, n), list(range(n)))
        parts = [
            builder.shuffle_vector(a, b, index)
            for a, b in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def _avx2_call(builder: Any, name: str, out: Any, a: Any, b: Any) -> Any:
    """llvm.x86.avx2.`name` on each 32-byte part; `out` is the LLVM result of one part."""
    parts = zip(_split(builder, a, 32), _split(builder, b, 32), strict=True)
    results = []
    for x, y in parts:
        call = declare(builder, f"llvm.x86.avx2.{name}", out, [x.type, y.type])
        results.append(builder.call(call, [x, y]))
    return _join(builder, results)


def _pair_dot(builder: Any, a: Any, b: Any) -> Any:
    """int16 x int16 -> sums of neighbouring products, int32."""
    n = a.type.count // 2
    if ISA is AVX512_VNNI:
        call = declare(
            builder, "llvm.x86.avx512.pmaddw.d.512", vec("i32", 16).llvm, [a.type, b.type]
        )
        return builder.call(call, [a, b])
    if ISA is AVX2:
        return _avx2_call(builder, "pmadd.wd", vec("i32", 8).llvm, a, b)
    wide = ir.VectorType(I32, n)
    a, b = builder.bitcast(a, wide), builder.bitcast(b, wide)
    sixteen = constant(wide, [16] * n)
    low = [builder.ashr(builder.shl(v, sixteen), sixteen) for v in (a, b)]
    high = [builder.ashr(v, sixteen) for v in (a, b)]
    return builder.add(builder.mul(*low), builder.mul(*high))


def _dpbusd(builder: Any, total: Any, w: Any, x: Any) -> Any:
    """total + four products of unsigned w and signed x in each 32-bit lane."""
    kind = total.type
    w, x = builder.bitcast(w, kind), builder.bitcast(x, kind)
    if ISA is AVX512_VNNI:
        call = declare(builder, "llvm.x86.avx512.vpdpbusd.512", kind, [kind] * 3)
        return builder.call(call, [total, w, x])
    mask, top = constant(kind, [255] * kind.count), constant(kind, [24] * kind.count)
    for byte in range(4):
        right = constant(kind, [8 * byte] * kind.count)
        left = constant(kind, [24 - 8 * byte] * kind.count)
        unsigned = builder.and_(builder.lshr(w, right), mask)
        signed = builder.ashr(builder.shl(x, left), top)
        total = builder.add(total, builder.mul(unsigned, signed))
    return total


def _emit_mul_u8(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    if ISA is AVX2:
        return _avx2_call(builder, "pmadd.ub.sw", vec("i16", 16).llvm, *args)
    return _dpbusd(builder, constant(sig.return_type.llvm, [0] * sig.return_type.n), *args)


def _emit_mac_u8(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    total, w, x = args
    if ISA is AVX2:
        product = _avx2_call(builder, "pmadd.ub.sw", vec("i16", 16).llvm, w, x)
        return builder.add(total, product)
    return _dpbusd(builder, total, w, x)


def _emit_sum_u8(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    if ISA is AVX2:
        return _pair_dot(builder, args[0], _const_like(args[0], 1))
    return args[0]


def _emit_mac_s8(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    total, w, x = args
    if ISA is AVX2:  # |w| <= 128 and |x| <= 127: a pair is at most 32512, no saturation
        call = declare(builder, f"llvm.abs.v{w.type.count}i8", w.type, [w.type, ir.IntType(1)])
        magnitude = builder.call(call, [w, ir.Constant(ir.IntType(1), 0)])
        signed = _avx2_call(builder, "psign.b", vec("i8", 32).llvm, x, w)
        pairs = _avx2_call(builder, "pmadd.ub.sw", vec("i16", 16).llvm, magnitude, signed)
        return builder.add(total, _pair_dot(builder, pairs, _const_like(pairs, 1)))
    return _dpbusd(builder, total, builder.xor(w, _const_like(w, -128)), x)


def _emit_offset_s8(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    if ISA is AVX2:
        return constant(sig.return_type.llvm, [0] * sig.return_type.n)
    return _pair_dot(builder, args[0], _const_like(args[0], -128))


def _partial(v: Vec) -> Vec:
    """The type of an unfinished sum: int16 pairs on AVX2, else int32."""
    return vec("i16", v.n // 2) if ISA is AVX2 else vec("i32", v.n // 4)


# A partial sum may take 8 products of nibbles, 2 of six-bit weights on AVX2: 8 * 2 * 15 * 127
# and 2 * 2 * 63 * 127 are below 2**15.
mul_u8 = _typed(2, _partial, _emit_mul_u8)
mac_u8 = _typed(3, _partial, _emit_mac_u8)
sum_u8 = _typed(1, lambda p: vec("i32", p.n // 2) if ISA is AVX2 else p, _emit_sum_u8)
mac_s8 = _typed(3, lambda v: vec("i32", v.n // 4), _emit_mac_s8)
offset_s8 = _typed(1, lambda v: vec("i32", v.n // 2), _emit_offset_s8)
pair_dot = _typed(2, lambda v: vec("i32", v.n // 2), lambda ctx, b, sig, args: _pair_dot(b, *args))


def _emit_pair(high: bool) -> _Emit:
    """One int8 scale of each row's pair: twice as int16 on AVX2, as int32 elsewhere."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        v = _words(builder, args[0], 32)
        sixteen = _const_like(v, 16)
        if ISA is not AVX2:
            return builder.ashr(v if high else builder.shl(v, sixteen), sixteen)
        low, top = builder.lshr(v, sixteen), builder.shl(v, sixteen)
        if high:
            both = builder.or_(builder.and_(v, _const_like(v, -65536)), low)
        else:
            both = builder.or_(builder.and_(v, _const_like(v, 65535)), top)
        return builder.bitcast(both, args[0].type)

    return emit


pair_low = _typed(1, lambda v: v if ISA is AVX2 else vec("i32", v.n // 2), _emit_pair(False))
pair_high = _typed(1, lambda v: v if ISA is AVX2 else vec("i32", v.n // 2), _emit_pair(True))

if ISA is AVX2:

    @inline
    def dot16_scaled(
        w0: Any, w1: Any, w2: Any, w3: Any, x0: Any, x1: Any, x2: Any, x3: Any, scale: Any
    ) -> Any:
        """scale * sum of 16 products of six-bit weights; `scale` from pair_low or pair_high."""
        a = pair_dot(mac_u8(mul_u8(w0, x0), w1, x1), scale)
        return vadd(a, pair_dot(mac_u8(mul_u8(w2, x2), w3, x3), scale))

else:

    @inline
    def dot16_scaled(
        w0: Any, w1: Any, w2: Any, w3: Any, x0: Any, x1: Any, x2: Any, x3: Any, scale: Any
    ) -> Any:
        """scale * sum of 16 products of six-bit weights; `scale` from pair_low or pair_high."""
        return vmul(mac_u8(mac_u8(mac_u8(mul_u8(w0, x0), w1, x1), w2, x2), w3, x3), scale)
