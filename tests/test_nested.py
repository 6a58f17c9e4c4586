"""Bases and the parts of nested matrices, of every format that has codes, against their twins."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import random_raw

from edgert.errors import InputError
from edgert.kernels_cpu import activations, layout
from edgert.kernels_cpu.matmul import matmul
from edgert.kernels_cpu.matmul_ref import matmul_ref
from edgert.kernels_cpu.nested import (
    Bits,
    move_bits,
    move_bits_ref,
    part_bytes,
    part_of,
    tiles_of,
)
from edgert.kernels_cpu.places import FIELDS
from edgert.placing import place_base, place_refined, place_rows, split_parts
from edgert.quant.bases import base_ref, codes_ref
from edgert.quant.formats import BASES, BY_NAME, CODE_BITS, BaseFormat, QuantFormat
from edgert.quant.packing import pack, unpack
from edgert.quant.quantize import quantize_ref
from edgert.quant.reference import dequantize_ref, numbers_ref
from edgert.storage.manifest import Extent, TensorEntry
from edgert.storage.pack import part_bytes as bytes_in_file

_U8 = npt.NDArray[np.uint8]
# By bits of a code. The last one of 8, 6 and 4 has no base.
SPLITS = {
    8: [(4, 4), (5, 3), (3, 5), (3, 1, 4), (3, 1, 1, 3), (1, 2, 5), (2, 2, 2, 2), (6, 2)],
    6: [(4, 2), (3, 3), (3, 1, 2), (2, 2, 2), (5, 1)],
    5: [(4, 1), (3, 2), (3, 1, 1), (2, 2, 1)],
    4: [(3, 1), (2, 2), (2, 1, 1), (1, 1, 1, 1)],
}
CASES = [(BY_NAME[name], split) for name, n in CODE_BITS.items() for split in SPLITS[n]]
BASED = [(fmt, split) for fmt, split in CASES if {*accumulate(split)} & {*BASES[fmt.name]}]
ALL = [base for bases in BASES.values() for base in bases.values()]
# A kernel takes some 5 s to compile: those of usual splits and one of each kind always run.
USUAL = ("B3", "B4", "B5", "B4_Q6_K", "B4_Q5_0", "B4_Q5_1", "B3_Q4_0", "B2_Q4_0", "B3_Q4_K")


def name_of(case: Any) -> str:
    return case.name if isinstance(case, QuantFormat) else "+".join(map(str, case))


def computed(base: BaseFormat) -> Any:
    return pytest.param(base, marks=[] if base.name in USUAL else [pytest.mark.stress])


by_kernel = pytest.mark.parametrize("fmt", [computed(base) for base in ALL], ids=name_of)
by_base = pytest.mark.parametrize("fmt", ALL, ids=name_of)


def rows_of(fmt: QuantFormat, rows: int, K: int, seed: int) -> _U8:
    """Rows with random codes, the extreme ones among them, and scales of ordinary size."""
    return random_raw(fmt, rows, K, np.random.default_rng(seed))


def tiles_from(fmt: QuantFormat, raw: _U8, K: int) -> _U8:
    tiles = np.empty(layout.matrix_bytes(fmt, len(raw), K), np.uint8)
    layout.repack(fmt, raw, len(raw), K, tiles)
    return tiles


def codes_all(fmt: QuantFormat, scales: dict[str, Any]) -> _U8:
    """One row in which every code of a format occurs, with these scales."""
    n = CODE_BITS[fmt.name]
    codes = np.arange(max(2**n, fmt.block_size)) % 2**n
    codes = codes.astype(np.uint8).reshape(1, -1, fmt.block_size)
    values = codes.view(np.int8) ^ np.int8(-128) if n == 8 else codes
    fields = {"codes": values, "low": codes & 15, "high": codes >> 4}
    blocks = codes.shape[1]
    return pack(
        fmt, fields | {k: np.broadcast_to(v, (1, blocks, len(v))) for k, v in scales.items()}
    )


# ----------------------------------------------------------------------------- bases


@by_base
def test_a_base_is_the_middle_of_what_its_code_can_stand_for(fmt: BaseFormat) -> None:
    """Every code, with scales that are powers of two, so that weights are exact."""
    scales: dict[str, Any] = {"d": np.array([0.25], "<f2"), "m": np.array([0.5], "<f2")}
    scales["scales"] = np.tile(np.array([4, -2], np.int8), 8)
    scales["scales_mins"] = np.array([1, 2, 4, 8] * 2 + [3, 0, 1, 2] * 2, np.uint8)
    raw = codes_all(fmt.of, scales)
    whole, based = (dequantize_ref(f, r) for f, r in ((fmt.of, raw), (fmt, base_ref(fmt, raw))))
    steps = 2 ** (CODE_BITS[fmt.of.name] - fmt.bits)
    numbers = numbers_ref(fmt.of, raw)
    scale = np.ones((1, 1, 1)) if numbers.scales is None else numbers.scales
    step = 0.25 * np.repeat(np.abs(scale.astype(np.float64)), whole.size // scale.size)
    of_code = whole.reshape(-1, steps)  # neighbouring codes share a base code
    middle = (of_code.min(axis=1) + of_code.max(axis=1)) / 2
    assert np.array_equal(based.reshape(-1, steps), np.repeat(middle[:, None], steps, 1))
    assert np.array_equal(np.ptp(of_code, axis=1), step[::steps] * (steps - 1))


@by_kernel
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (33, 7)])
def test_matmul_equals_its_reference(fmt: BaseFormat, rows: int, blocks: int) -> None:
    K, rng = fmt.block_size * blocks, np.random.default_rng(rows)
    raw = base_ref(fmt, rows_of(fmt.of, rows, K, blocks))
    x = rng.standard_normal((11, K)).astype(np.float32)
    x[:, 0] *= 20
    quantised, tiles = activations.quantize_ref(x), tiles_from(fmt, raw, K)
    wanted = matmul_ref(fmt, raw, quantised)
    for first, stop in ((0, 11), (0, 1), (3, 7), (1, 9)):  # every size of a pack, the same bits
        found = matmul(fmt, tiles, quantised[first:stop], rows)
        assert np.array_equal(found.view(np.uint32), wanted[first:stop].view(np.uint32))
    true = x.astype(np.float64) @ dequantize_ref(fmt, raw).astype(np.float64).T
    error = np.sqrt(np.mean((wanted - true) ** 2))
    assert error <= 2e-2 * np.sqrt(np.mean(true**2))


@by_kernel
def test_extreme_integers_do_not_saturate(fmt: BaseFormat) -> None:
    """All bits of all codes and scales the same, activations of 127 and -127."""
    K = 2 * fmt.block_size
    for byte, sign in ((0, 1), (0xFF, 1), (0x7F, 1), (0x80, -1)):
        raw = np.full((3, fmt.row_bytes(K)), byte, np.uint8)
        fields = unpack(fmt, raw)
        fields |= {k: np.ones_like(fields[k]) for k in ("d", "m") if k in fields}
        raw = pack(fmt, fields)
        x = activations.quantize_ref(np.full((9, K), sign * 127, np.float32))
        found = matmul(fmt, tiles_from(fmt, raw, K), x, 3)
        assert np.array_equal(found, matmul_ref(fmt, raw, x))
        true = dequantize_ref(fmt, raw)[0].astype(np.float64).sum() * 127 * sign
        assert np.allclose(found, true, rtol=1e-6)


@by_kernel
def test_hostile_scales_do_not_crash(fmt: BaseFormat) -> None:
    raw = np.random.default_rng(5).integers(0, 256, (17, fmt.row_bytes(256)), dtype=np.uint8)
    raw[3:6] = 0xFF
    x = activations.quantize_ref(np.random.default_rng(6).standard_normal((5, 256), np.float32))
    found, wanted = matmul(fmt, tiles_from(fmt, raw, 256), x, 17), matmul_ref(fmt, raw, x)
    both = np.isnan(found) & np.isnan(wanted)
    assert np.all((found.view(np.uint32) == wanted.view(np.uint32)) | both)


@by_base
def test_tiles_of_a_base(fmt: BaseFormat) -> None:
    raw = base_ref(fmt, rows_of(fmt.of, 33, 512, 8))
    tiles = tiles_from(fmt, raw, 512)
    assert np.array_equal(tiles, layout.repack_ref(fmt, raw, 33, 512))
    assert np.array_equal(layout.unpack_ref(fmt, tiles, 33, 512), raw)


@by_base
def test_quantising_to_a_base_takes_the_top_bits_of_its_format(fmt: BaseFormat) -> None:
    x = np.random.default_rng(8).standard_normal((4, 512)).astype(np.float32)
    found, whole = quantize_ref(fmt, x), quantize_ref(fmt.of, x)
    assert np.array_equal(found, base_ref(fmt, whole))
    kept = [name for name in unpack(fmt, found) if name not in ("codes", "low", "high")]
    for name in kept:
        assert np.array_equal(unpack(fmt, found)[name], unpack(fmt.of, whole)[name])
    assert kept == [k for k in ("d", "m", "scales_mins", "scales") if k in kept]


# ----------------------------------------------------------------------------- parts


def parts_of(fmt: QuantFormat, split: tuple[int, ...], n_blocks: int) -> list[Bits]:
    """Room for the parts of a split."""
    lows = CODE_BITS[fmt.name] - np.cumsum(split)
    rooms = [part_bytes(fmt, bits, i == 0, n_blocks) for i, bits in enumerate(split)]
    return [
        part_of(fmt, bits, int(low), np.full(nbytes, 0xA5, np.uint8))
        for bits, low, nbytes in zip(split, lows, rooms, strict=True)
    ]


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(CASES), st.integers(1, 9), st.integers(0, 2**32 - 1), st.booleans())
def test_parts_are_those_of_the_twin_and_make_the_whole(
    case: tuple[QuantFormat, tuple[int, ...]], n_blocks: int, seed: int, extreme: bool
) -> None:
    """Any bytes, NaN scales and the lowest codes included, come back as they were."""
    (fmt, split), rng = case, np.random.default_rng(seed)
    values = [0, 127, 128, 255] if extreme else np.arange(256)
    K = n_blocks * fmt.block_size
    raw = rng.choice(np.array(values, np.uint8), (16, fmt.row_bytes(K)))
    whole = tiles_of(fmt, layout.repack_ref(fmt, raw, 16, K))
    found, wanted = parts_of(fmt, split, n_blocks), parts_of(fmt, split, n_blocks)
    move_bits(n_blocks, [whole], found)
    move_bits_ref(n_blocks, [whole], wanted)
    for a, b in zip(found, wanted, strict=True):
        assert np.array_equal(a.data, b.data)
    for move in (move_bits, move_bits_ref):
        back = tiles_of(fmt, np.zeros_like(whole.data))
        move(n_blocks, found, [back])
        assert np.array_equal(back.data, whole.data)


def part_by_the_document(fmt: QuantFormat, raw: _U8, bits: int, low: int) -> _U8:
    """Bytes of a part of 16 rows, as FORMAT.md says it: raw [16, row_bytes]."""
    n, is_first = CODE_BITS[fmt.name], low + bits == CODE_BITS[fmt.name]
    fields, codes = unpack(fmt, raw), codes_ref(fmt, raw)  # [16, blocks, ...]
    out = []
    for b in range(codes.shape[1]):
        if is_first:
            out += [fields[k][:, b].view(np.uint8).reshape(-1) for k in ("d", "m") if k in fields]
        if is_first and "scales" in fields:
            pairs = fields["scales"][:, b].view(np.uint8).reshape(16, 8, 2)
            out += [pairs[:, i].reshape(-1) for i in range(8)]
        if is_first and "scales_mins" in fields:
            both = fields["scales_mins"][:, b].reshape(16, 2, 8)
            scales = [both[:, :, 2 * i : 2 * i + 2].transpose(2, 1, 0) for i in range(4)]
            out += units_of([s.reshape(-1) for s in scales], 6, 4)
        for first in range(0, fmt.block_size, 32):
            kept = codes[:, b, first : first + 32] >> low & (2**bits - 1)
            out += units_of([kept[:, 4 * v : 4 * v + 4].reshape(-1) for v in range(8)], bits, 8)
    assert n >= bits
    return np.concatenate(out)


def units_of(groups: list[_U8], bits: int, count: int) -> list[_U8]:
    """Units of 64 bytes with `bits` bits of the numbers of `count` groups."""
    found = []
    for width, low in FIELDS[bits]:
        u = width * count // 8
        for unit in range(u):
            made = np.zeros(64, np.uint8)
            for v in range(unit, count, u):
                made |= (groups[v] >> low & (2**width - 1)) << (width * (v // u))
            found.append(made)
    return found


@pytest.mark.parametrize(("fmt", "split"), CASES, ids=name_of)
def test_parts_lie_as_the_document_says(fmt: QuantFormat, split: tuple[int, ...]) -> None:
    K = 2 * fmt.block_size
    raw, parts = rows_of(fmt, 16, K, 3), parts_of(fmt, split, 2)
    move_bits(2, [tiles_of(fmt, tiles_from(fmt, raw, K))], parts)
    low = CODE_BITS[fmt.name]
    for i, (part, bits) in enumerate(zip(parts, split, strict=True)):
        low -= bits
        assert np.array_equal(part.data, part_by_the_document(fmt, raw, bits, low))
        assert part.data.nbytes == bytes_in_file(fmt, bits, i == 0, 16, K)
    assert sum(part.data.nbytes for part in parts) == raw.nbytes


def test_wrong_sizes_and_missing_bits_are_refused() -> None:
    fmt = BY_NAME["Q8_0"]
    whole, (high, low) = tiles_of(fmt, np.zeros(544, np.uint8)), parts_of(fmt, (4, 4), 1)
    with pytest.raises(InputError, match="4 bits of 2 blocks must be 576 contiguous bytes"):
        move_bits(2, [tiles_of(fmt, np.zeros(1088, np.uint8))], [high])
    with pytest.raises(InputError, match=r"bits \[0, 1, 2, 3\] of the codes are in no part"):
        move_bits(1, [high], [whole])
    with pytest.raises(InputError, match="not float64"):
        move_bits(1, [high, Bits(np.zeros(256), low.places)], [whole])  # type: ignore[arg-type]
    move_bits(1, [high, low], [whole])


@pytest.mark.parametrize(("fmt", "split"), BASED, ids=name_of)
def test_placing_puts_base_and_refinement_together(
    fmt: QuantFormat, split: tuple[int, ...]
) -> None:
    """For every base that a split has: 37 rows, of which the last tile is filled up."""
    rows, K = 37, 5 * 32 if fmt.block_size == 32 else 512
    raw = rows_of(fmt, rows, K, 9)
    tiles = tiles_from(fmt, raw, K)
    entry = TensorEntry("w", fmt, (rows, K), Extent(0, 0, tiles.nbytes), "nested", 0, (), split)
    parts = split_parts(entry, range(len(split)), rows, tiles)
    assert entry.base_bits and sum(p.nbytes for p in parts) == 3 * 16 * fmt.row_bytes(K)
    out = np.empty_like(tiles)
    for bits in entry.base_bits:
        count, base = entry.base_parts(bits), entry.base_format(bits)
        held = np.empty(layout.matrix_bytes(base, rows, K), np.uint8)
        place_base(entry, bits, rows, parts[:count], held)
        assert np.array_equal(layout.unpack_ref(base, held, rows, K), base_ref(base, raw))
        out[:] = 0xA5
        place_refined(entry, bits, rows, held, parts[count:], out)
        assert np.array_equal(out, tiles)
    out[:] = 0xA5
    place_rows(entry, rows, parts, out)
    assert np.array_equal(out, tiles)
