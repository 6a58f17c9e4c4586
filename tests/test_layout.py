"""Tiles of 16 rows: the compiled mover against its twin, the twin against what formats mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import random_activations, random_raw, tiles_of

from edgert.errors import InputError
from edgert.kernels_cpu import activations, layout
from edgert.kernels_cpu.layout_tables import PIECES, STEPS
from edgert.kernels_cpu.matmul_ref import QUANTIZED_INPUT, matmul_ref
from edgert.quant.formats import BY_NAME, QuantFormat
from edgert.quant.packing import pack, unpack
from edgert.quant.reference import dequantize_ref, numbers_ref

FORMATS = list(BY_NAME.values())
BLOCKED = [f for f in FORMATS if not f.is_float]
by_name = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
blocked_by_name = pytest.mark.parametrize("fmt", BLOCKED, ids=lambda f: f.name)


def random_bytes(fmt: QuantFormat, rows: int, K: int, seed: int = 6) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (rows, fmt.row_bytes(K)), dtype=np.uint8)


# --- moving -------------------------------------------------------------------------------------


@by_name
def test_repack_equals_its_reference_and_unpack_inverts_it(fmt: QuantFormat) -> None:
    widths = {1: (1, 37, 40, 96), 32: (32, 96, 576, 896, 1408, 2880), 256: (256, 768)}
    for K in widths[fmt.block_size]:
        for rows in (1, 15, 16, 33):
            raw = random_bytes(fmt, rows, K)
            tiles = tiles_of(fmt, raw, K)
            assert np.array_equal(tiles, layout.repack_ref(fmt, raw, rows, K)), (rows, K)
            assert np.array_equal(layout.unpack_ref(fmt, tiles, rows, K), raw), (rows, K)


@by_name
def test_rows_longer_than_prefetching_takes(fmt: QuantFormat) -> None:
    K = 16384
    assert fmt.row_bytes(K) > 2048
    raw = random_bytes(fmt, 18, K)
    assert np.array_equal(tiles_of(fmt, raw, K), layout.repack_ref(fmt, raw, 18, K))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 50), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_unpack_inverts_repack(fmt: QuantFormat, rows: int, blocks: int, seed: int) -> None:
    K = blocks * fmt.block_size
    raw = random_bytes(fmt, rows, K, seed)
    assert np.array_equal(layout.unpack_ref(fmt, tiles_of(fmt, raw, K), rows, K), raw)


@by_name
def test_only_the_tiles_are_written(fmt: QuantFormat) -> None:
    K, rows = 3 * fmt.block_size, 17
    raw, nbytes = random_bytes(fmt, rows, K), layout.matrix_bytes(fmt, rows, K)
    out = np.full(64 + nbytes + 64, 0xA5, np.uint8)
    layout.repack(fmt, raw, rows, K, out[64:-64])
    assert np.all(out[:64] == 0xA5) and np.all(out[-64:] == 0xA5)
    assert np.array_equal(out[64:-64], layout.repack_ref(fmt, raw, rows, K))


@by_name
def test_tiles_cost_at_most_four_percent_and_padding_is_zero(fmt: QuantFormat) -> None:
    K = 2 * fmt.block_size if fmt.block_size > 1 else 64
    assert layout.tile_bytes(fmt, K) <= 1.04 * 16 * fmt.row_bytes(K)
    assert layout.matrix_bytes(fmt, 17, K) == 2 * layout.tile_bytes(fmt, K)
    raw = np.full((17, fmt.row_bytes(K)), 0xFF, np.uint8)
    full = layout.unpack_ref(fmt, tiles_of(fmt, raw, K), 32, K)
    assert np.all(full[:17] == 0xFF) and not full[17:].any()


def test_repack_in_pieces_of_sixteen_rows_is_the_same() -> None:
    fmt = BY_NAME["Q4_K"]
    raw = random_bytes(fmt, 48, 256)
    pieces = [tiles_of(fmt, raw[a:b], 256) for a, b in ((0, 16), (16, 48))]
    assert np.array_equal(tiles_of(fmt, raw, 256), np.concatenate(pieces))


def test_repack_refuses_wrong_sizes() -> None:
    fmt = BY_NAME["Q8_0"]
    with pytest.raises(InputError, match=r"Q8_0 \[2, 32\]: raw must be 68 contiguous bytes"):
        layout.repack(fmt, np.zeros(67, np.uint8), 2, 32, np.zeros(544, np.uint8))
    with pytest.raises(InputError, match="out must be 544"):
        layout.repack(fmt, np.zeros(68, np.uint8), 2, 32, np.zeros(543, np.uint8))


# --- what lies where ----------------------------------------------------------------------------


@blocked_by_name
def test_every_byte_of_a_block_is_moved_once(fmt: QuantFormat) -> None:
    """The pieces and the packed bytes that a step takes tile the block, without a gap."""
    step = STEPS.get(fmt.name)
    taken = [i for start, unit, n in PIECES[fmt.name] for i in range(start, start + unit * n)]
    taken += range(step.start, step.stop) if step else ()
    assert sorted(taken) == list(range(fmt.block_bytes + (step.nbytes if step else 0)))


def expanded(fmt: QuantFormat, raw: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """(blocks, bytes) that the step of `fmt` makes."""
    step, blocks = STEPS[fmt.name], raw.reshape(-1, fmt.block_bytes)
    return step.expand(blocks[:, step.start : step.stop])


@pytest.mark.parametrize("name", sorted(STEPS.keys() & BY_NAME.keys()))
def test_expanded_scales_are_those_of_the_format(name: str) -> None:
    fmt = BY_NAME[name]
    raw = random_bytes(fmt, 50, fmt.block_size).reshape(-1)
    numbers, found = numbers_ref(fmt, raw), expanded(fmt, raw)
    if name in ("Q5_0", "Q5_1"):
        high, want = unpack(fmt, raw)["high"], np.zeros_like(found)
        for v, j in np.ndindex(4, 4):
            want[:, j] |= high[:, 4 * v + j] << np.uint8(v)
            want[:, j] |= high[:, 16 + 4 * v + j] << np.uint8(4 + v)
        assert np.array_equal(found, want)
    elif numbers.mins is not None:
        assert np.array_equal(found[:, 0::2], numbers.scales)
        assert np.array_equal(found[:, 1::2], numbers.mins)
    else:
        assert np.array_equal(found.view(np.int8), numbers.scales)


def test_a_tile_by_hand() -> None:
    """Q4_1 and Q3_K, whose units are of all kinds, at places computed from the documented order."""
    fmt = BY_NAME["Q4_1"]
    raw = random_bytes(fmt, 32, 64).reshape(32, 2, 20)
    block = tiles_of(fmt, raw.reshape(32, -1), 64).reshape(2, 2, 320)[
        1, 1
    ]  # rows 16.., weights 32..
    for r in range(16):
        assert np.array_equal(block[2 * r : 2 * r + 2], raw[16 + r, 1, :2])
        assert np.array_equal(block[32 + 2 * r : 34 + 2 * r], raw[16 + r, 1, 2:4])
        for i in range(4):
            at = 64 + 64 * i + 4 * r
            assert np.array_equal(block[at : at + 4], raw[16 + r, 1, 4 + 4 * i : 8 + 4 * i])
    fmt = BY_NAME["Q3_K"]
    raw = random_bytes(fmt, 16, 256)
    scales, block = expanded(fmt, raw), tiles_of(fmt, raw, 256)
    for r, half, pair in np.ndindex(16, 2, 4):
        at = 32 + 512 + half * (128 + 512) + 32 * pair + 2 * r
        assert np.array_equal(block[at : at + 2], scales[r, 8 * half + 2 * pair :][:2])
        at = 32 + 512 + half * (128 + 512) + 128 + 64 * pair + 4 * r
        start = 32 + 32 * half + 4 * pair
        assert np.array_equal(block[at : at + 4], raw[r, start : start + 4])


# --- the meaning of the reference ---------------------------------------------------------------


@blocked_by_name
@pytest.mark.parametrize("K", [256, 1536])
def test_the_reference_is_near_the_product_in_float64(fmt: QuantFormat, K: int) -> None:
    """Within n * 2**-24 of the sum of all magnitudes, n being the roundings a term goes through.

    A term d * q * d_x * q_x or m * d_x * q_x takes part in one product and in at most all sums,
    two a block; four more are for the weights and activations it is compared with.
    """
    rng = np.random.default_rng(K)
    raw = random_raw(fmt, 40, K, rng)
    x = activations.quantize_ref(random_activations(5, K, rng))
    values = activations.dequantize_activations_ref(x).astype(np.float64)
    weights = dequantize_ref(fmt, raw).astype(np.float64)
    d, q, m, scales, mins = (
        None if v is None else v.astype(np.float64) for v in numbers_ref(fmt, raw)
    )
    steps = np.abs(d if scales is None else d * scales)
    magnitude = np.abs(q) * np.repeat(steps, q.shape[-1] // steps.shape[-1], -1)
    if m is not None:
        offsets = np.abs(m if mins is None else m * mins)
        magnitude = magnitude + np.repeat(offsets, q.shape[-1] // offsets.shape[-1], -1)
    bound = np.abs(values) @ magnitude.reshape(weights.shape).T
    error = np.abs(matmul_ref(fmt, raw, x) - values @ weights.T)
    assert np.all(error <= (2 * K / 32 + 5) * 2.0**-24 * bound)


@blocked_by_name
def test_a_scale_that_is_not_finite_spoils_its_own_row_alone(fmt: QuantFormat) -> None:
    rng = np.random.default_rng(2)
    raw = random_raw(fmt, 6, 512, rng)
    x = activations.quantize_ref(random_activations(3, 512, rng))
    good = matmul_ref(fmt, raw, x)
    fields = unpack(fmt, raw)
    if fmt.name == "MXFP4":
        fields["exponent"][2, 1] = 255  # 2**127: the format has no infinity, float32 has
    else:
        fields["d"][2, 1], fields["d"][4, 1] = np.inf, np.nan
    bad = matmul_ref(fmt, pack(fmt, fields), x)
    spoilt = [2] if fmt.name == "MXFP4" else [2, 4]
    kept = [row for row in range(6) if row not in spoilt]
    assert np.array_equal(bad[:, kept], good[:, kept])
    assert not np.isfinite(bad[:, spoilt[1:]]).any() and not np.array_equal(bad[:, 2], good[:, 2])


@blocked_by_name
def test_integer_dots_are_exact_in_float32(fmt: QuantFormat) -> None:
    """32 of the largest weight times the largest scale and activation are below 2**24."""
    numbers = numbers_ref(fmt, random_bytes(fmt, 1, 4096 * fmt.block_size))
    largest = int(np.abs(numbers.q.astype(int)).max())
    if numbers.scales is not None and fmt.block_size // numbers.scales.shape[-1] < 32:
        largest *= int(np.abs(numbers.scales.astype(int)).max())
    assert fmt.name in QUANTIZED_INPUT and 32 * largest * 127 < 2**24
    expected = {"Q6_K": 32 * 128, "Q3_K": 4 * 32, "Q2_K": 3 * 15, "IQ4_XS": 127, "Q5_K": 31}
    assert largest == expected.get(fmt.name, largest)
