"""Formats against ggml: the bytes, the floats they mean, the bytes that floats become."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import UnsupportedError
from edgert.quant.formats import BY_NAME, BY_TYPE_ID, QuantFormat, format_of
from edgert.quant.metrics import max_abs_error, relative_rms, rms_error
from edgert.quant.packing import layout, pack, pack_planes, unpack, unpack_planes
from edgert.quant.quantize import quantize_ref
from edgert.quant.reference import dequantize_ref, exponent_to_scale
from tests.seeded import random_blocks, uniform

ORACLE = Path(__file__).parents[2] / "shared" / "data" / "quant_oracle"
GOLDEN = json.loads((Path(__file__).parent / "parity" / "golden_blocks.json").read_text())
FORMATS = list(BY_NAME.values())
BLOCKED = [f for f in FORMATS if not f.is_float]
LIKE_GGML = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 MXFP4".split()

# Relative RMS error of a format on numbers uniform in [-1, 1). With L evenly spaced codes over a
# block's range the error is uniform in half a step, 2 / L / sqrt(12) against an RMS of 1 / sqrt(3):
# 1 / L. The measured value lies within 20 % of it for evenly spaced codes; the others have the
# value measured here, in the same 20 %.
EVENLY_SPACED = {
    "Q8_0": 255, "Q4_0": 16, "Q4_1": 16, "Q5_0": 32, "Q5_1": 32, "Q2_K": 4, "Q3_K": 8, "Q4_K": 16,
    "Q5_K": 32, "Q6_K": 64,
}  # fmt: skip
UNIFORM_RELATIVE_RMS = {name: 1 / levels for name, levels in EVENLY_SPACED.items()} | {
    "F16": 1.84e-4, "BF16": 1.48e-3, "IQ4_NL": 0.069, "IQ4_XS": 0.069, "MXFP4": 0.144,
}  # fmt: skip
UNIFORM_MARGIN = 1.2

# Quantising what was quantised changes nothing in 32-weight blocks. In super-blocks a sub-block
# that did not use its whole range may get another scale: at most this, relative RMS, per pass.
REQUANTISED_RELATIVE_RMS = 0.003


def ids(formats: list[QuantFormat]) -> dict[str, object]:
    return {"argvalues": formats, "ids": [f.name for f in formats]}


def bits(a: np.ndarray) -> np.ndarray:
    return a.view(np.uint32)


@pytest.mark.parametrize("fmt", **ids(FORMATS))
def test_golden_blocks(fmt: QuantFormat) -> None:
    golden = GOLDEN[fmt.name]
    raw = np.frombuffer(bytes.fromhex(golden["blocks"]), np.uint8)
    weights = dequantize_ref(fmt, raw)
    assert weights.size == raw.size // fmt.block_bytes * fmt.block_size
    some = weights[:: max(1, weights.size // 8)]
    assert some.tolist() == golden["some_weights"]
    assert hashlib.sha256(weights.astype("<f4").tobytes()).hexdigest() == golden["weights_sha256"]


@pytest.mark.parametrize("fmt", **ids(BLOCKED))
def test_ggml_oracle(fmt: QuantFormat) -> None:
    if not ORACLE.exists():
        pytest.skip(f"no {ORACLE}: blocks made by libggml")
    oracle = np.load(ORACLE / f"{fmt.name}.npz")
    weights = dequantize_ref(fmt, oracle["blocks"])
    assert np.array_equal(bits(weights), bits(oracle["dequant"]))
    source = np.load(ORACLE / "source.npz")["x"]
    if fmt.name in LIKE_GGML:
        assert np.array_equal(quantize_ref(fmt, source), oracle["blocks"])


@pytest.mark.parametrize("fmt", **ids(FORMATS))
def test_dequantize_equals_gguf(fmt: QuantFormat) -> None:
    gguf = pytest.importorskip("gguf")
    raw = random_blocks(fmt, f"gguf {fmt.name}", 256).reshape(4, 8, -1)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[fmt.name])
    assert np.array_equal(bits(dequantize_ref(fmt, raw)), bits(theirs))


@pytest.mark.parametrize("name", LIKE_GGML)
def test_quantize_equals_gguf(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    rows = [uniform(f"row {i}", (256,)) * np.float32(10.0 ** (i % 5 - 2)) for i in range(64)]
    x = np.stack([*rows, np.zeros(256, np.float32), np.full(256, -3, np.float32)])
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name])
    assert np.array_equal(quantize_ref(BY_NAME[name], x), theirs.view(np.uint8))


@pytest.mark.parametrize("fmt", **ids(FORMATS))
def test_sizes(fmt: QuantFormat) -> None:
    assert BY_TYPE_ID[fmt.type_id] is fmt is format_of(fmt.type_id)
    x = uniform("sizes", (3, 2, 512))
    raw = quantize_ref(fmt, x)
    assert raw.shape == (3, 2, fmt.row_bytes(512)) and raw.dtype == np.uint8
    assert raw.nbytes == fmt.nbytes(x.shape) == x.size * fmt.bits_per_weight / 8
    assert dequantize_ref(fmt, raw).shape == x.shape


def test_unknown_types_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="tensor type 16 .IQ2_XXS. is not one of F32 F16"):
        format_of(16)
    with pytest.raises(UnsupportedError, match="tensor type 77 .unknown."):
        format_of(77)


@pytest.mark.parametrize("fmt", **ids(BLOCKED))
def test_pack_is_the_inverse_of_unpack(fmt: QuantFormat) -> None:
    assert sum(part.nbytes for part in layout(fmt)) == fmt.block_bytes
    raw = random_blocks(fmt, "pack", 16).reshape(4, -1)
    assert np.array_equal(pack(fmt, unpack(fmt, raw)), raw)


@pytest.mark.parametrize("fmt", **ids(BLOCKED))
def test_every_bit_matters(fmt: QuantFormat) -> None:
    """Flipping any one bit of a block changes its fields: no bit is read twice or not at all."""
    raw = random_blocks(fmt, "bits", 1)
    flips = np.arange(raw.size * 8)
    flipped = np.repeat(raw[None], flips.size, axis=0)
    flipped[flips, flips // 8] ^= (1 << (flips % 8)).astype(np.uint8)
    fields, before = unpack(fmt, flipped), unpack(fmt, raw)
    changed = np.zeros(flips.size, int)
    for name in fields:
        wide = fields[name].view(np.uint16) if fields[name].dtype == np.float16 else fields[name]
        base = before[name].view(np.uint16) if before[name].dtype == np.float16 else before[name]
        changed += (wide != base).reshape(flips.size, -1).sum(axis=1)
    assert (changed == 1).all()


@given(st.sampled_from([(1, 1), (1, 32), (2, 1), (2, 32), (4, 1), (4, 16), (4, 64)]), st.data())
def test_planes_round_trip(form: tuple[int, int], data: st.DataObject) -> None:
    width_bits, width = form
    groups = data.draw(st.integers(1, 3))
    raw = np.frombuffer(
        data.draw(st.binary(min_size=groups * width, max_size=groups * width)), "u1"
    )
    numbers = unpack_planes(raw, width_bits, width)
    assert numbers.max() < 2**width_bits and numbers.size == raw.size * 8 // width_bits
    assert np.array_equal(pack_planes(numbers, width_bits, width), raw)


@pytest.mark.parametrize("fmt", **ids(FORMATS))
def test_error_on_uniform_numbers(fmt: QuantFormat) -> None:
    x = uniform("error", (64, 1024))
    error = relative_rms(dequantize_ref(fmt, quantize_ref(fmt, x)), x)
    expected = UNIFORM_RELATIVE_RMS.get(fmt.name, 0.0)
    assert expected / UNIFORM_MARGIN <= error <= expected * UNIFORM_MARGIN


@pytest.mark.parametrize("fmt", **ids(FORMATS))
def test_requantising_is_stable(fmt: QuantFormat) -> None:
    x = uniform("stable", (64, 1024))
    once = dequantize_ref(fmt, quantize_ref(fmt, x))
    twice = dequantize_ref(fmt, quantize_ref(fmt, once))
    exact = fmt.block_size < 256 and fmt.name != "IQ4_NL"
    assert relative_rms(twice, once) <= (0 if exact else REQUANTISED_RELATIVE_RMS)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(BLOCKED), st.integers(0, 2**32), st.floats(2**-10, 2**10))
def test_no_weight_is_further_than_its_block_allows(
    fmt: QuantFormat, seed: int, scale: float
) -> None:
    """|error| <= 1.1 x the block's largest |x|: holds whatever the codes are, unless bits move."""
    x = uniform(f"bounded {seed}", (4, 256)) * np.float32(scale)
    back = dequantize_ref(fmt, quantize_ref(fmt, x))
    largest = np.abs(x).reshape(-1, fmt.block_size).max(axis=1)
    errors = np.abs(back - x).reshape(-1, fmt.block_size).max(axis=1)
    worst_step = {"Q2_K": 0.4, "Q3_K": 0.3, "MXFP4": 0.26}.get(fmt.name, 0.15)
    assert (errors <= worst_step * largest).all()


@pytest.mark.parametrize("fmt", **ids(FORMATS))
def test_zeros_and_constants(fmt: QuantFormat) -> None:
    zeros = np.zeros((2, 256), np.float32)
    assert not dequantize_ref(fmt, quantize_ref(fmt, zeros)).any()
    ones = np.full((1, 256), -1.5, np.float32)
    back = dequantize_ref(fmt, quantize_ref(fmt, ones))
    assert max_abs_error(back, ones) <= 0.01 * 1.5


def test_bf16_rounds_to_even_and_keeps_nan() -> None:
    x = np.array([0x3F808000, 0x3F818000, 0x7FFFFFFF, 0xFF800001, 0x7F7FFFFF], np.uint32)
    stored = quantize_ref(BY_NAME["BF16"], x.view(np.float32)).view("<u2")
    assert stored.tolist() == [0x3F80, 0x3F82, 0x7FFF, 0xFFC0, 0x7F80]


def test_exponent_to_scale_covers_all_bytes() -> None:
    exponents = np.arange(256, dtype=np.uint8)
    scales = exponent_to_scale(exponents).astype(np.float64)
    assert np.array_equal(scales, 2.0 ** (np.arange(256) - 128))


def test_metrics() -> None:
    a, b = np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 2.0])
    assert rms_error(a, b) == pytest.approx((5 / 3) ** 0.5)
    assert max_abs_error(a, b) == 2
    assert relative_rms(a, b) == pytest.approx((5 / 21) ** 0.5)
    assert relative_rms(2 * b, b) == 1
    assert relative_rms(0 * b, 0 * b) == 0 and relative_rms(b, 0 * b) == float("inf")
    assert np.isnan(rms_error(a, np.array([1.0, np.nan, 3.0])))
    with pytest.raises(AssertionError):
        rms_error(a, b[:1])
    big = np.full(10_000, 1e30, np.float32)
    assert rms_error(big, 0 * big) == pytest.approx(1e30, rel=1e-6)


def test_readme_table_agrees_with_the_records() -> None:
    readme = Path(__file__).parents[1] / "quant" / "README.md"
    seen = set()
    for line in readme.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 8 or ":" not in cells[1] or cells[0] == "name":
            continue
        names = cells[0].split(", ")
        weights, sizes = cells[1].split(": ")
        for name, nbytes, width in zip(names, sizes.split(", "), cells[2].split(", "), strict=True):
            fmt = BY_NAME[name]
            assert (fmt.block_size, fmt.block_bytes) == (int(weights), int(nbytes)), name
            assert fmt.bits_per_weight == float(width), name
            seen.add(name)
    assert seen == set(BY_NAME)
