"""Packs: one value for each of T tokens, held in registers, so that a kernel is written once.

`Pack(item, T)` is an LLVM array whose length is part of its type; LLVM takes it apart into T
registers. A kernel body gets `xs`, the addresses of T activation rows, and what it derives from
them is T wide: with T = 1 the body is the kernel of a decoded token, with T = 8 that of a prefill.
Weights are loaded and unpacked once for all T.

A single token works on the 16 rows of a tile at once (the tile is then read as one sequential
stream), more tokens on parts of `LANES` rows. `acc`, the float32 sums, carries that number: loads
take it as their first argument.

Activations are rows of blocks (`activations`): 32 int8, scale, two sums, scale * sum.
`offset` is where in the row, from the addresses in `xs`, a value or a block begins.

    accumulators(xs)   -> acc            integers(acc) -> sums for mac_u8, all zero
    mac_u8(sums, w, xs, offset)          four products of each row, w unsigned (limits: `dots`)
    total(sums) -> totals                int32 of finished sums;  add(totals, totals)
    signed_totals(acc, xs, offset)       what mac_s8 over the whole block at `offset` begins with
    mac_s8(totals, w, xs, offset)        four products of each row, w signed
    scaled_16(acc, w0, w1, w2, w3, xs, offset, scale) -> totals      scale * 16 products
    dot_pairs(totals, pairs, xs, offset)       totals + pairs . (the two sums of the block)
    times(factor)(totals)                      each total times a constant
    fma_totals(acc, totals, scale, xs, offset) acc = fma(float(total), scale * d_x, acc)
    fma_sum(acc, m, xs, offset)                acc = fma(m, d_x * float(sum_x), acc)
    fma_pairs(acc, m, pairs, xs, offset)       acc = fma(float(pairs . sums), m * d_x, acc)
    fma_values(acc, w, xs, offset)             acc = fma(w, x, acc), x float32
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgert.kernels_cpu import dots
from edgert.kernels_cpu.compiler import cpu_target, intrinsic, ir, models, register_model, types
from edgert.kernels_cpu.lanes import LANES
from edgert.kernels_cpu.vectors import (
    I32,
    LLVM,
    Vec,
    constant,
    declare,
    half_to_float,
    load,
    splat,
    store,
    vec,
)

__all__ = [
    "Pack", "accumulators", "add", "add_floats", "addresses", "bfloats", "bytes_as_float",
    "constant_pairs", "dot_pairs", "exponents", "floats", "fma_pairs", "fma_sum", "fma_totals",
    "fma_values", "half_scales", "halves", "integers", "mac_s8", "mac_u8", "pairs", "scaled_16",
    "signed_bytes_as_float", "signed_totals", "step", "store_pack", "times", "total",
    "unsigned_pairs", "weights",
]  # fmt: skip

_SCALE, _SUMS, _SCALED_SUM = 32, 36, 40  # offsets in a block of activations
_I64 = LLVM["i64"]
_Emit = Callable[..., Any]


class Pack(types.Type):  # type: ignore[misc]
    """Numba type of `n` values of `item`, a `Vec` or int64."""

    def __init__(self, item: Any, n: int) -> None:
        self.item, self.n = item, n
        super().__init__(name=f"Pack({item}x{n})")


@(lambda model: register_model(Pack)(model))
class _PackModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: Pack) -> None:
        item = fe_type.item.llvm if isinstance(fe_type.item, Vec) else _I64
        super().__init__(manager, fe_type, ir.ArrayType(item, fe_type.n))


def _operation(arity: int, result: Callable[..., Any], emit: _Emit) -> Any:
    """A function for kernels: result(argument types) -> type, emit(builder, type, ...) -> value."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = emit(builder, sig.return_type, *args)
        return context.get_dummy_value() if value is None else value

    def typed(*args: Any) -> Any:
        return result(*args)(*args), generate

    forms: tuple[Callable[..., Any], ...] = (
        lambda typingctx, a: typed(a),
        lambda typingctx, a, b: typed(a, b),
        lambda typingctx, a, b, c: typed(a, b, c),
        lambda typingctx, a, b, c, d: typed(a, b, c, d),
        lambda typingctx, a, b, c, d, e: typed(a, b, c, d, e),
        lambda typingctx, a, b, c, d, e, f: typed(a, b, c, d, e, f),
        lambda typingctx, a, b, c, d, e, f, g: typed(a, b, c, d, e, f, g),
        lambda typingctx, a, b, c, d, e, f, g, h: typed(a, b, c, d, e, f, g, h),
    )
    return intrinsic(forms[arity - 1])


def _items(builder: Any, pack: Any) -> list[Any]:
    return [builder.extract_value(pack, t) for t in range(pack.type.count)]


def _packed(builder: Any, items: list[Any]) -> Any:
    value = ir.Constant(ir.ArrayType(items[0].type, len(items)), ir.Undefined)
    for t, item in enumerate(items):
        value = builder.insert_value(value, item, t)
    return value


def _each(builder: Any, emit: _Emit, *packs: Any) -> Any:
    """The pack of emit(item of each pack) for every token."""
    columns = zip(*(_items(builder, pack) for pack in packs), strict=True)
    return _packed(builder, [emit(*column) for column in columns])


# --- addresses --------------------------------------------------------------------------------


def addresses(T: int) -> Any:
    """at(index, base, stride, last) -> base + index[t] * stride for t = 0..T-1.

    `index` is the address of int64s; after entry `last` that entry is repeated.
    """

    def emit(b: Any, kind: Any, index: Any, base: Any, stride: Any, last: Any) -> Any:
        items = []
        for t in range(T):
            at = _I64(t)
            if t:
                at = b.select(b.icmp_signed("<", at, last), at, last)
            row = load(b, b.add(index, b.shl(at, _I64(3))), _I64)
            items.append(b.add(base, b.mul(row, stride)))
        return _packed(b, items)

    return _operation(4, lambda *args: Pack(types.int64, T), emit)


# step(xs, nbytes): every address moved on
step = _operation(2, lambda xs, n: xs, lambda b, kind, xs, n: _each(b, lambda x: b.add(x, n), xs))


# --- integers ---------------------------------------------------------------------------------


def _rows(acc: Pack) -> int:
    return int(acc.item.n)


def _zeros(builder: Any, kind: Pack, *args: Any) -> Any:
    zero: Any = 0.0 if kind.item.elt == "f32" else 0
    return _packed(builder, [constant(kind.item.llvm, [zero] * kind.item.n)] * kind.n)


def _totals(acc: Pack) -> Pack:
    return Pack(vec("i32", _rows(acc)), acc.n)


def _total_type(sums: Pack) -> Pack:
    halves = sums.item.elt == "i16"
    return Pack(vec("i32", sums.item.n // 2 if halves else sums.item.n), sums.n)


def _broadcast(b: Any, x: Any, offset: Any, kind: Any) -> Any:
    """The 32-bit word at `x + offset` in every lane of the LLVM vector type `kind`."""
    element = kind.element
    word = LLVM["f32"] if element == LLVM["f32"] else I32
    lanes = kind.count * (32 if word is LLVM["f32"] else element.width) // 32
    return b.bitcast(splat(b, load(b, b.add(x, offset), word), lanes), kind)


def _block_sums(b: Any, x: Any, offset: Any, rows: int) -> Any:
    return _broadcast(b, b.add(x, _I64(_SUMS)), offset, vec("i16", 2 * rows).llvm)


def _mac(emit: _Emit) -> _Emit:
    def emit_all(b: Any, kind: Any, sums: Any, w: Any, xs: Any, offset: Any) -> Any:
        def one(total: Any, x: Any) -> Any:
            return emit(b, total, w, _broadcast(b, x, offset, w.type))

        return _each(b, one, sums, xs)

    return emit_all


def _signed_totals(b: Any, kind: Pack, acc: Any, xs: Any, offset: Any) -> Any:
    n = kind.item.n
    return _each(b, lambda x: dots.offset_s8(b, _block_sums(b, x, offset, n)), xs)


def _scaled_16(
    b: Any, kind: Any, acc: Any, w0: Any, w1: Any, w2: Any, w3: Any, xs: Any, offset: Any,
    scale: Any,
) -> Any:  # fmt: skip
    w = [w0, w1, w2, w3]

    def one(x: Any) -> Any:
        values = [_broadcast(b, b.add(x, _I64(4 * v)), offset, w0.type) for v in range(4)]
        return dots.scaled_16(b, w, values, scale)

    return _each(b, one, xs)


def _dot_pairs(b: Any, kind: Pack, totals: Any, pairs: Any, xs: Any, offset: Any) -> Any:
    def one(total: Any, x: Any) -> Any:
        sums = _block_sums(b, x, offset, total.type.count)
        return b.add(total, dots.pair_dot(b, sums, pairs))

    return _each(b, one, totals, xs)


accumulators = _operation(1, lambda xs: Pack(vec("f32", 16 if xs.n == 1 else LANES), xs.n), _zeros)
integers = _operation(1, lambda acc: Pack(dots.partial(_rows(acc)), acc.n), _zeros)
mac_u8 = _operation(4, lambda sums, w, xs, offset: sums, _mac(dots.mac_u8))
mac_s8 = _operation(4, lambda totals, w, xs, offset: totals, _mac(dots.mac_s8))
total = _operation(
    1, _total_type, lambda b, kind, sums: _each(b, lambda s: dots.sum_u8(b, s), sums)
)


def times(factor: int) -> Any:
    """multiply(totals) -> each times `factor`."""

    def emit(b: Any, kind: Any, totals: Any) -> Any:
        return _each(b, lambda i: b.mul(i, constant(i.type, [factor] * i.type.count)), totals)

    return _operation(1, lambda totals: totals, emit)


add = _operation(2, lambda p, q: p, lambda b, kind, p, q: _each(b, b.add, p, q))
add_floats = _operation(2, lambda p, q: p, lambda b, kind, p, q: _each(b, b.fadd, p, q))
signed_totals = _operation(3, lambda acc, xs, offset: _totals(acc), _signed_totals)
scaled_16 = _operation(8, lambda acc, *rest: _totals(acc), _scaled_16)
dot_pairs = _operation(4, lambda totals, *rest: totals, _dot_pairs)


# --- float32 ----------------------------------------------------------------------------------


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    kind = z.type
    return b.call(declare(b, f"llvm.fma.v{kind.count}f32", kind, [kind] * 3), [x, y, z])


def _fma_totals(b: Any, kind: Any, acc: Any, totals: Any, scale: Any, xs: Any, offset: Any) -> Any:
    def one(a: Any, i: Any, x: Any) -> Any:
        d = _broadcast(b, b.add(x, _I64(_SCALE)), offset, a.type)
        return _fma(b, b.sitofp(i, a.type), b.fmul(scale, d), a)

    return _each(b, one, acc, totals, xs)


def _fma_sum(b: Any, kind: Any, acc: Any, m: Any, xs: Any, offset: Any) -> Any:
    def one(a: Any, x: Any) -> Any:
        return _fma(b, m, _broadcast(b, b.add(x, _I64(_SCALED_SUM)), offset, a.type), a)

    return _each(b, one, acc, xs)


def _fma_pairs(b: Any, kind: Any, acc: Any, m: Any, pairs: Any, xs: Any, offset: Any) -> Any:
    def one(a: Any, x: Any) -> Any:
        count = dots.pair_dot(b, _block_sums(b, x, offset, a.type.count), pairs)
        d = _broadcast(b, b.add(x, _I64(_SCALE)), offset, a.type)
        return _fma(b, b.sitofp(count, a.type), b.fmul(m, d), a)

    return _each(b, one, acc, xs)


def _fma_values(b: Any, kind: Any, acc: Any, w: Any, xs: Any, offset: Any) -> Any:
    return _each(b, lambda a, x: _fma(b, w, _broadcast(b, x, offset, w.type), a), acc, xs)


fma_totals = _operation(5, lambda acc, *rest: acc, _fma_totals)
fma_sum = _operation(4, lambda acc, *rest: acc, _fma_sum)
fma_pairs = _operation(5, lambda acc, *rest: acc, _fma_pairs)
fma_values = _operation(4, lambda acc, *rest: acc, _fma_values)


# --- loads and stores: at(acc, address) -> values of `acc`'s rows --------------------------------


def _loader(source: str, each: int, how: tuple[str, ...], target: str) -> Any:
    """`each` values of `source` a row, converted by LLVM's `how` to `target`."""

    def emit(b: Any, kind: Vec, acc: Any, address: Any) -> Any:
        value = load(b, address, vec(source, kind.n).llvm)
        for name in how:
            to = kind if name == how[-1] else vec("i32", kind.n)
            value = getattr(b, name)(value, to.llvm)
        return value

    return _operation(2, lambda acc, address: vec(target, each * _rows(acc)), emit)


def _load_halves(b: Any, kind: Vec, acc: Any, address: Any) -> Any:
    return half_to_float(cpu_target.target_context, b, load(b, address, vec("i16", kind.n).llvm))


def _load_half_scales(b: Any, kind: Vec, acc: Any, address: Any) -> Any:
    return b.fmul(_load_halves(b, kind, acc, address), constant(kind.llvm, [0.5] * kind.n))


def _load_shifted(source: str, shift: int) -> _Emit:
    def emit(b: Any, kind: Vec, acc: Any, address: Any) -> Any:
        wide = vec("i32", kind.n).llvm
        bits = b.zext(load(b, address, vec(source, kind.n).llvm), wide)
        return b.bitcast(b.shl(bits, constant(wide, [shift] * kind.n)), kind.llvm)

    return emit


def _load_exponents(b: Any, kind: Vec, acc: Any, address: Any) -> Any:
    """2 ** (e - 128) of bytes e: subnormal for e = 0 and 1, so made by a product of two powers."""
    wide = vec("i32", kind.n).llvm
    e = b.zext(load(b, address, vec("i8", kind.n).llvm), wide)
    small = b.icmp_signed("<", e, constant(wide, [2] * kind.n))
    normal = b.shl(b.sub(e, constant(wide, [1] * kind.n)), constant(wide, [23] * kind.n))
    tiny = b.shl(constant(wide, [0x00200000] * kind.n), e)
    return b.bitcast(b.select(small, tiny, normal), kind.llvm)


def _f32_rows(acc: Pack, address: Any) -> Vec:
    return vec("f32", _rows(acc))


def constant_pairs(number: int) -> Any:
    """at(acc) -> int16 pairs of `number` for each row."""
    return _operation(
        1,
        lambda acc: vec("i16", 2 * _rows(acc)),
        lambda b, kind, acc: constant(kind.llvm, [number] * kind.n),
    )


weights = _loader("i8", 4, (), "i8")  # a unit of 4 bytes of each row
pairs = _loader("i8", 2, ("sext",), "i16")  # two int8 of each row
unsigned_pairs = _loader("i8", 2, ("zext",), "i16")
bytes_as_float = _loader("i8", 1, ("zext", "uitofp"), "f32")
signed_bytes_as_float = _loader("i8", 1, ("sext", "sitofp"), "f32")
floats = _loader("f32", 1, (), "f32")
halves = _operation(2, _f32_rows, _load_halves)
half_scales = _operation(2, _f32_rows, _load_half_scales)  # each times 0.5
bfloats = _operation(2, _f32_rows, _load_shifted("i16", 16))
exponents = _operation(2, _f32_rows, _load_exponents)


def _store_pack(b: Any, kind: Any, address: Any, acc: Any) -> None:
    for t, item in enumerate(_items(b, acc)):
        store(b, b.add(address, _I64(64 * t)), item)


# store_pack(address, acc): token t at address + 64 t
store_pack = _operation(2, lambda address, acc: types.void, _store_pack)
