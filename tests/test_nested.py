"""Bases of Q8_0 and the parts of nested matrices, against their twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import InputError
from edgert.kernels_cpu import activations, layout
from edgert.kernels_cpu.matmul import matmul
from edgert.kernels_cpu.matmul_ref import matmul_ref
from edgert.kernels_cpu.nested import Part, move_bits, move_bits_ref, part_bytes
from edgert.placing import place_base, place_refined, place_rows, split_parts
from edgert.quant.formats import BASES, BY_NAME, BaseFormat
from edgert.quant.packing import pack, unpack
from edgert.quant.quantize import quantize_ref
from edgert.quant.reference import dequantize_ref
from edgert.storage.manifest import Extent, TensorEntry

_U8 = npt.NDArray[np.uint8]
Q8_0 = BY_NAME["Q8_0"]
SPLITS = [(4, 4), (5, 3), (3, 5), (3, 1, 4), (3, 1, 1, 3), (1, 2, 5), (2, 2, 2, 2), (1, 7), (6, 2)]
NESTED = [split for split in SPLITS if split not in ((1, 7), (6, 2))]  # that have a base
by_format = pytest.mark.parametrize("fmt", BASES.values(), ids=lambda f: f.name)
by_split = pytest.mark.parametrize("split", NESTED, ids=lambda s: "+".join(map(str, s)))


def q8_rows(rows: int, K: int, seed: int) -> _U8:
    """Rows of Q8_0 with random codes, -128 among them, and scales of ordinary size."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, Q8_0.row_bytes(K)), dtype=np.uint8)
    blocks = raw.reshape(rows, -1, 34)
    d = (0.1 * rng.standard_normal(blocks.shape[:2])).astype("<f2")
    blocks[..., :2] = d[..., None].view(np.uint8)
    blocks[:, 0, 2:4] = (128, 127)
    return raw


def base_rows(fmt: BaseFormat, raw: _U8) -> _U8:
    """The same rows of Q8_0 as rows of a base, by what FORMAT.md says of its codes."""
    fields = unpack(Q8_0, raw)
    codes = (fields["codes"].astype(np.int16) + 128 >> (8 - fmt.bits)).astype(np.uint8)
    low = {3: 2, 5: 4}.get(fmt.bits, fmt.bits)
    parts = {"codes": codes, "low": codes & (2**low - 1), "high": codes >> low}
    return pack(fmt, {"d": fields["d"]} | parts)


def tiles_of(fmt: Any, raw: _U8, K: int) -> _U8:
    tiles = np.empty(layout.matrix_bytes(fmt, len(raw), K), np.uint8)
    layout.repack(fmt, raw, len(raw), K, tiles)
    return tiles


# ----------------------------------------------------------------------------- bases


@by_format
def test_a_base_is_the_middle_of_what_its_code_can_stand_for(fmt: BaseFormat) -> None:
    """Every code of Q8_0 and its weight, with d = 0.25."""
    steps = 2 ** (8 - fmt.bits)
    q = np.arange(-128, 128, dtype=np.int8).reshape(8, 32)
    raw = pack(Q8_0, {"d": np.full((8, 1, 1), 0.25, "<f2"), "codes": q[:, None]})
    weights = dequantize_ref(fmt, base_rows(fmt, raw)).reshape(-1)
    for code in range(2**fmt.bits):
        same = slice(code * steps, (code + 1) * steps)
        middle = np.mean(0.25 * q.reshape(-1)[same].astype(np.float64))
        assert np.all(weights[same] == middle)
    assert fmt.block_bytes == 2 + 4 * fmt.bits


@by_format
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (16, 3), (33, 7)])
def test_matmul_equals_its_reference(fmt: BaseFormat, rows: int, blocks: int) -> None:
    K, rng = 32 * blocks, np.random.default_rng(rows)
    raw = base_rows(fmt, q8_rows(rows, K, blocks))
    x = rng.standard_normal((11, K)).astype(np.float32)
    x[:, 0] *= 20
    quantised, tiles = activations.quantize_ref(x), tiles_of(fmt, raw, K)
    wanted = matmul_ref(fmt, raw, quantised)
    for first, stop in ((0, 11), (0, 1), (3, 7), (1, 9)):  # every size of a pack, the same bits
        found = matmul(fmt, tiles, quantised[first:stop], rows)
        assert np.array_equal(found.view(np.uint32), wanted[first:stop].view(np.uint32))
    true = x.astype(np.float64) @ dequantize_ref(fmt, raw).astype(np.float64).T
    error = np.sqrt(np.mean((wanted - true) ** 2))
    assert error <= 2e-2 * np.sqrt(np.mean(true**2))


@by_format
def test_extreme_integers_do_not_saturate(fmt: BaseFormat) -> None:
    K = 64
    for q, sign in ((-128, 1), (127, 1), (127, -1)):
        d, codes = np.full((3, 2, 1), 1, "<f2"), np.full((3, 2, 32), q, np.int8)
        raw = base_rows(fmt, pack(Q8_0, {"d": d, "codes": codes}))
        x = activations.quantize_ref(np.full((9, K), sign * 127, np.float32))
        found = matmul(fmt, tiles_of(fmt, raw, K), x, 3)
        assert np.array_equal(found, matmul_ref(fmt, raw, x))
        middle = q + (0.5 - 2.0 ** (7 - fmt.bits) if q > 0 else 2.0 ** (7 - fmt.bits) - 0.5)
        assert np.all(found == K * 127 * sign * middle)


@by_format
def test_hostile_scales_do_not_crash(fmt: BaseFormat) -> None:
    raw = np.random.default_rng(5).integers(0, 256, (17, fmt.row_bytes(256)), dtype=np.uint8)
    raw[3:6] = 0xFF
    x = activations.quantize_ref(np.random.default_rng(6).standard_normal((5, 256), np.float32))
    found, wanted = matmul(fmt, tiles_of(fmt, raw, 256), x, 17), matmul_ref(fmt, raw, x)
    both = np.isnan(found) & np.isnan(wanted)
    assert np.all((found.view(np.uint32) == wanted.view(np.uint32)) | both)


@by_format
def test_quantising_to_a_base_takes_the_top_bits_of_q8_0(fmt: BaseFormat) -> None:
    x = np.random.default_rng(8).standard_normal((4, 96)).astype(np.float32)
    assert np.array_equal(quantize_ref(fmt, x), base_rows(fmt, quantize_ref(Q8_0, x)))


# ----------------------------------------------------------------------------- parts


def parts_of(split: tuple[int, ...], n_blocks: int) -> list[Part]:
    """Room for the parts of a split."""
    lows = 8 - np.cumsum(split)
    return [
        Part(np.full(part_bytes(bits, int(low), n_blocks), 0xA5, np.uint8), int(low), bits)
        for bits, low in zip(split, lows, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(1, 9), st.integers(0, 2**32 - 1), st.booleans())
def test_parts_are_those_of_the_twin_and_make_the_whole(
    split: tuple[int, ...], n_blocks: int, seed: int, extreme: bool
) -> None:
    """Any bytes, NaN scales and codes of -128 included, come back as they were."""
    rng = np.random.default_rng(seed)
    values = [0, 127, 128, 255] if extreme else np.arange(256)
    whole = rng.choice(np.array(values, np.uint8), 544 * n_blocks)
    found, wanted = parts_of(split, n_blocks), parts_of(split, n_blocks)
    move_bits(n_blocks, [Part(whole, 0, 8)], found)
    move_bits_ref(n_blocks, [Part(whole, 0, 8)], wanted)
    for a, b in zip(found, wanted, strict=True):
        assert np.array_equal(a.data, b.data)
    for move in (move_bits, move_bits_ref):
        back = np.zeros_like(whole)
        move(n_blocks, found, [Part(back, 0, 8)])
        assert np.array_equal(back, whole)


@by_format
def test_the_first_part_is_what_the_kernel_of_the_base_wants(fmt: BaseFormat) -> None:
    raw = q8_rows(32, 96, 3)
    part = parts_of((fmt.bits, 8 - fmt.bits), 2 * 3)[0]
    move_bits(6, [Part(tiles_of(Q8_0, raw, 96), 0, 8)], [part])
    assert np.array_equal(part.data, tiles_of(fmt, base_rows(fmt, raw), 96))


def test_wrong_sizes_and_missing_bits_are_refused() -> None:
    whole, (high, low) = Part(np.zeros(544, np.uint8), 0, 8), parts_of((4, 4), 1)
    with pytest.raises(InputError, match="4 bits of 2 blocks must be 576 contiguous bytes"):
        move_bits(2, [Part(np.zeros(1088, np.uint8), 0, 8)], [high])
    with pytest.raises(InputError, match=r"bits \[0, 1, 2, 3\] of the codes are in no part"):
        move_bits(1, [high], [whole])
    with pytest.raises(InputError, match="not float64"):
        move_bits(1, [high, Part(np.zeros(256), 0, 4)], [whole])  # type: ignore[arg-type]
    move_bits(1, [high, low], [whole])


@by_split
def test_placing_puts_base_and_refinement_together(split: tuple[int, ...]) -> None:
    """For every base that a split has: 37 rows, of which the last tile is filled up."""
    rows, K = 37, 160
    raw = q8_rows(rows, K, 9)
    tiles = tiles_of(Q8_0, raw, K)
    entry = TensorEntry("w", Q8_0, (rows, K), Extent(0, 0, tiles.nbytes), "nested", 0, (), split)
    parts = split_parts(entry, range(len(split)), rows, tiles)
    assert entry.base_bits and sum(p.nbytes for p in parts) == tiles.nbytes
    out = np.empty_like(tiles)
    for bits in entry.base_bits:
        count, fmt = entry.base_parts(bits), BASES[bits]
        base = np.empty(layout.matrix_bytes(fmt, rows, K), np.uint8)
        place_base(entry, bits, rows, parts[:count], base)
        assert np.array_equal(layout.unpack_ref(fmt, base, rows, K), base_rows(fmt, raw))
        out[:] = 0xA5
        place_refined(entry, bits, rows, base, parts[count:], out)
        assert np.array_equal(out, tiles)
    out[:] = 0xA5
    place_rows(entry, rows, parts, out)
    assert np.array_equal(out, tiles)
