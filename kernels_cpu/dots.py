"""Integer dot products of bytes by instruction set: the only arithmetic spelled more than once.

Bytes meet as groups of four: lane i of an int32 vector gets the sum of four products. Integers are
exact, so all spellings give the same bits. Activations are in -127..127, never -128.

    P = mac_u8(P, w, x), sum_u8(P)        w unsigned, P from zero; see the limits below
    i = mac_s8(i, w, x)                   w signed, all of -128..127; i from offset_s8(sums)
    pair_dot(a, b)                        int16 pairs -> int32
    scaled_16(w0..w3, x0..x3, scale)      scale * (16 products), scale from pair_low or pair_high

Unfinished sums P are int16 pairs on AVX2 (`partial`), int32 elsewhere. On AVX2 a P may take 8
products of four-bit weights, 4 of five-bit and 2 of six-bit ones: 8 * 2 * 15 * 127,
4 * 2 * 31 * 127 and 2 * 2 * 63 * 127 are below 2**15.

Each function takes an LLVM builder and values. Must not know formats.
"""

from __future__ import annotations

from typing import Any

from edgert.kernels_cpu.compiler import ir
from edgert.kernels_cpu.isa import AVX2, AVX512_VNNI, ISA
from edgert.kernels_cpu.vectors import I32, Vec, constant, declare, vec

__all__ = [
    "constant_like", "join", "mac_s8", "mac_u8", "offset_s8", "pair_dot", "pair_half", "partial",
    "scaled_16", "split", "sum_u8",
]  # fmt: skip


def partial(rows: int) -> Vec:
    """The type of an unfinished sum for `rows` rows."""
    return vec("i16", 2 * rows) if ISA is AVX2 else vec("i32", rows)


def constant_like(value: Any, number: int) -> Any:
    """A vector of `value`'s type that holds `number` in all lanes."""
    return constant(value.type, [number] * value.type.count)


def split(builder: Any, value: Any, nbytes: int) -> list[Any]:
    """Parts of `nbytes` of a register value."""
    kind = value.type
    n = nbytes * 8 // kind.element.width
    undefined = ir.Constant(kind, ir.Undefined)
    index = ir.VectorType(I32, n)
    return [
        builder.shuffle_vector(value, undefined, ir.Constant(index, list(range(i, i + n))))
        for i in range(0, kind.count, n)
    ]


def join(builder: Any, parts: list[Any]) -> Any:
    """The inverse of `split`."""
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
    parts = zip(split(builder, a, 32), split(builder, b, 32), strict=True)
    results = []
    for x, y in parts:
        call = declare(builder, f"llvm.x86.avx2.{name}", out, [x.type, y.type])
        results.append(builder.call(call, [x, y]))
    return join(builder, results)


def pair_dot(builder: Any, a: Any, b: Any) -> Any:
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
    mask, top = constant_like(total, 255), constant_like(total, 24)
    for byte in range(4):
        right, left = constant_like(total, 8 * byte), constant_like(total, 24 - 8 * byte)
        unsigned = builder.and_(builder.lshr(w, right), mask)
        signed = builder.ashr(builder.shl(x, left), top)
        total = builder.add(total, builder.mul(unsigned, signed))
    return total


def mac_u8(builder: Any, total: Any, w: Any, x: Any) -> Any:
    """A partial sum and the four products of each lane; w unsigned."""
    if ISA is AVX2:
        product = _avx2_call(builder, "pmadd.ub.sw", vec("i16", 16).llvm, w, x)
        return builder.add(total, product)
    return _dpbusd(builder, total, w, x)


def sum_u8(builder: Any, total: Any) -> Any:
    """int32 of a partial sum."""
    return pair_dot(builder, total, constant_like(total, 1)) if ISA is AVX2 else total


def mac_s8(builder: Any, total: Any, w: Any, x: Any) -> Any:
    """int32 and the four products of each lane; w signed."""
    if ISA is AVX2:  # |w| <= 128 and |x| <= 127: a pair is at most 32512, no saturation
        call = declare(builder, f"llvm.abs.v{w.type.count}i8", w.type, [w.type, ir.IntType(1)])
        magnitude = builder.call(call, [w, ir.Constant(ir.IntType(1), 0)])
        signed = _avx2_call(builder, "psign.b", vec("i8", 32).llvm, x, w)
        pairs = _avx2_call(builder, "pmadd.ub.sw", vec("i16", 16).llvm, magnitude, signed)
        return builder.add(total, pair_dot(builder, pairs, constant_like(pairs, 1)))
    return _dpbusd(builder, total, builder.xor(w, constant_like(w, -128)), x)


def offset_s8(builder: Any, sums: Any) -> Any:
    """What a sum of mac_s8 begins with; `sums`: int16 pairs, together the sum of its 32 x."""
    if ISA is AVX2:
        n = sums.type.count // 2
        return constant(ir.VectorType(I32, n), [0] * n)
    return pair_dot(builder, sums, constant_like(sums, -128))


def pair_half(builder: Any, pairs: Any, high: bool) -> Any:
    """One of each row's two int16 scales: twice as int16 on AVX2, as int32 elsewhere."""
    n = pairs.type.count // 2
    v = builder.bitcast(pairs, ir.VectorType(I32, n))
    sixteen = constant_like(v, 16)
    if ISA is not AVX2:
        return builder.ashr(v if high else builder.shl(v, sixteen), sixteen)
    low, top = builder.lshr(v, sixteen), builder.shl(v, sixteen)
    if high:
        both = builder.or_(builder.and_(v, constant_like(v, -65536)), low)
    else:
        both = builder.or_(builder.and_(v, constant_like(v, 65535)), top)
    return builder.bitcast(both, pairs.type)


def scaled_16(builder: Any, w: list[Any], x: list[Any], scale: Any) -> Any:
    """scale * sum of 16 products of weights of at most six bits; `scale` from pair_half."""
    if ISA is AVX2:
        zero = constant_like(scale, 0)
        low = mac_u8(builder, mac_u8(builder, zero, w[0], x[0]), w[1], x[1])
        high = mac_u8(builder, mac_u8(builder, zero, w[2], x[2]), w[3], x[3])
        return builder.add(pair_dot(builder, low, scale), pair_dot(builder, high, scale))
    total = constant_like(scale, 0)
    for w_v, x_v in zip(w, x, strict=True):
        total = mac_u8(builder, total, w_v, x_v)
    return builder.mul(total, scale)
