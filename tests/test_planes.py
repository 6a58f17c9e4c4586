"""Plane formats: records and quantisers, and the kernels against their NumPy twins, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from kernel_cases import random_activations

from edgert.errors import InputError
from edgert.kernels_cpu import activations, layout, lut
from edgert.kernels_cpu.isa import AVX512_VNNI, ISA
from edgert.kernels_cpu.jit import Kernel
from edgert.kernels_cpu.matmul import matmul, matmul_ref
from edgert.kernels_cpu.matmul_planes import DIRECT, LOOKUP
from edgert.kernels_cpu.plane_fit import quantize_planes
from edgert.quant.formats import PLANES, PlaneFormat
from edgert.quant.metrics import max_abs_error, relative_rms
from edgert.quant.packing import pack, unpack
from edgert.quant.planes import dequantize_stack_ref, quantize_planes_ref, quantize_stack
from edgert.quant.reference import dequantize_ref
from tests.seeded import random_blocks, uniform

FORMATS = list(PLANES.values())
KERNELS = [PLANES[n] for n in ("P1_128", "P2_32", "P3_128", "P4_32")]  # every width, both groups
by_name = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
by_kernel = pytest.mark.parametrize("fmt", KERNELS, ids=lambda f: f.name)
lookups = pytest.mark.skipif(not LOOKUP, reason="no table lookup on this instruction set")
_U8, _F32 = npt.NDArray[np.uint8], npt.NDArray[np.float32]


def normal(key: str, shape: tuple[int, ...]) -> _F32:
    """Numbers like weights: the sum of six uniform ones."""
    return np.asarray(uniform(key, (6, *shape)).sum(0), np.float32)


def random_rows(fmt: PlaneFormat, rows: int, K: int) -> _U8:
    raw: _U8 = random_blocks(fmt, f"{fmt.name} {rows} {K}", rows * K // fmt.block_size)
    return raw.reshape(rows, -1)


def tiles_of(fmt: PlaneFormat, raw: _U8, K: int) -> _U8:
    out = np.zeros(layout.matrix_bytes(fmt, len(raw), K), np.uint8)
    layout.repack(fmt, raw, len(raw), K, out)
    return out


def same_bits(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Equal to the bit; any NaN equals any other."""
    both = np.isnan(a) & np.isnan(b)
    return a.shape == b.shape and bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | both))


def call(kernel: Kernel, tiles: _U8, x: _U8, rows: int, K: int, bias: int = 0) -> _F32:
    """`kernel` on all tiles and tokens, added to ones where there is a bias."""
    y, index = np.ones((len(x), layout.tile_count(rows) * 16), np.float32), np.arange(len(x))
    kernel(
        tiles.ctypes.data, x.ctypes.data, x.strides[0], y.ctypes.data, y.strides[0], K,
        0, layout.tile_count(rows), len(x), index.ctypes.data, index.ctypes.data,
        int(bias != 0), bias,
    )  # fmt: skip
    return np.ascontiguousarray(y[:, :rows])


# --- formats ------------------------------------------------------------------------------------


@by_name
def test_records(fmt: PlaneFormat) -> None:
    assert fmt.name == f"P{fmt.bits}_{fmt.block_size}" and fmt.type_id == -1
    assert fmt.bits_per_weight == fmt.bits + 32 / fmt.block_size
    raw = random_rows(fmt, 3, 256)
    assert np.array_equal(pack(fmt, unpack(fmt, raw)), raw)


@by_name
def test_weights_are_scale_times_code_plus_offset(fmt: PlaneFormat) -> None:
    """Set one weight's code bit by bit: that weight alone moves, by the bit's value."""
    d, m = np.float16(0.5), np.float16(-3)
    head = np.frombuffer(d.tobytes() + m.tobytes(), np.uint8)
    empty = np.concatenate([head, np.zeros(fmt.block_bytes - 4, np.uint8)])
    seen = np.zeros(fmt.block_size, int)
    for bit in range(8 * (fmt.block_bytes - 4)):
        raw = empty.copy()
        raw[4 + bit // 8] |= 1 << bit % 8
        steps = (dequantize_ref(fmt, raw) - m) / d
        assert np.count_nonzero(steps) == 1
        seen += steps.astype(int)
    assert np.all(seen == 2**fmt.bits - 1)


# --- quantisers ---------------------------------------------------------------------------------

# Relative RMS error on normally distributed weights, as measured, in percent: nearest, refined.
NORMAL_ERROR = {
    "P1_32": (136, 57), "P1_128": (177, 59), "P2_32": (37, 29), "P2_128": (46, 33),
    "P3_32": (16, 14.2), "P3_128": (20, 17.3), "P4_32": (7.4, 6.8), "P4_128": (9.3, 8.7),
}  # fmt: skip


@by_name
def test_error_on_normal_weights(fmt: PlaneFormat) -> None:
    x = normal("weights", (64, 1024))
    for refine, percent in zip((False, True), NORMAL_ERROR[fmt.name], strict=True):
        error = relative_rms(dequantize_ref(fmt, quantize_planes_ref(fmt, x, refine=refine)), x)
        assert error == pytest.approx(percent / 100, rel=0.05)


@by_name
def test_what_is_representable_is_kept(fmt: PlaneFormat) -> None:
    codes = (uniform("codes", (4, 256)) * 1e6).astype(np.int64) % 2**fmt.bits
    codes[:, :: fmt.block_size] = 0
    codes[:, 1 :: fmt.block_size] = 2**fmt.bits - 1
    x = (np.float32(0.25) * codes - np.float32(1.5)).astype(np.float32)
    assert np.array_equal(dequantize_ref(fmt, quantize_planes_ref(fmt, x)), x)


@by_name
def test_zeros_constants_and_extremes(fmt: PlaneFormat) -> None:
    zeros = np.zeros((2, 128), np.float32)
    assert not dequantize_ref(fmt, quantize_planes_ref(fmt, zeros)).any()
    constant = np.full((1, 128), -1.5, np.float32)
    assert max_abs_error(dequantize_ref(fmt, quantize_planes_ref(fmt, constant)), constant) <= 0.002
    for scale in (1e-6, 1e4):
        x = normal("extreme", (4, 256)) * np.float32(scale)
        error = relative_rms(dequantize_ref(fmt, quantize_planes_ref(fmt, x)), x)
        assert error <= 1.1 * NORMAL_ERROR[fmt.name][1] / 100 + (0.05 if scale < 1 else 0)
    with np.errstate(all="ignore"):
        x = normal("hostile", (1, 256))
        x[0, 3], x[0, 200] = np.nan, np.inf
        back = dequantize_ref(fmt, quantize_planes_ref(fmt, x))
    assert not np.isfinite(back[0, 3]) and not np.isfinite(back[0, 200])


def test_importance_moves_the_error_to_columns_that_count_less() -> None:
    fmt, x = PLANES["P2_128"], normal("important", (256, 256))
    weight = np.where(np.arange(256) % 16 == 0, np.float32(100), np.float32(1))
    plain, weighted = (dequantize_ref(fmt, quantize_planes_ref(fmt, x, w)) for w in (None, weight))
    errors = [np.square(y - x).mean(0) for y in (plain, weighted)]
    assert (errors[1] * weight).sum() < 0.8 * (errors[0] * weight).sum()
    even = np.full(256, 3, np.float32)
    assert np.array_equal(quantize_planes_ref(fmt, x, even), quantize_planes_ref(fmt, x))
    nothing = np.zeros(256, np.float32)
    assert np.array_equal(quantize_planes_ref(fmt, x, nothing), quantize_planes_ref(fmt, x))


def test_each_level_of_a_stack_lessens_the_error() -> None:
    x = normal("stack", (64, 1024))
    formats = [PLANES["P1_128"]] * 4
    stack = quantize_stack(formats, x)
    errors = [relative_rms(dequantize_stack_ref(formats[:n], stack[:n]), x) for n in range(1, 5)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.19
    base, plane = PLANES["P3_128"], PLANES["P1_128"]
    nested = dequantize_stack_ref([base, plane], quantize_stack([base, plane], x))
    whole = dequantize_ref(PLANES["P4_128"], quantize_planes_ref(PLANES["P4_128"], x))
    assert relative_rms(nested, x) < 1.15 * relative_rms(whole, x)


def test_quantize_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"P3_128: float32 \[2, 192\] in groups of 128"):
        quantize_planes_ref(PLANES["P3_128"], np.zeros((2, 192), np.float32))
    with pytest.raises(InputError, match=r"importance must be \[128\]"):
        quantize_planes_ref(
            PLANES["P3_128"], np.zeros((2, 128), np.float32), np.ones(64, np.float32)
        )


KINDS = {
    "normal": lambda shape: normal("fit", shape),
    "few values": lambda shape: np.rint(normal("few", shape)),
    "an offset": lambda shape: normal("offset", shape) * np.float32(0.01) + np.float32(3),
    "an outlier": lambda shape: normal("outlier", shape) ** 5,
    "zeros, constants, tiny": lambda shape: (
        normal("tiny", shape) * np.logspace(-30, 4, shape[0], dtype=np.float32)[:, None]
    ).round(3),
}


@by_name
@pytest.mark.parametrize("kind", KINDS)
def test_the_quantiser_equals_its_twin_to_the_bit(fmt: PlaneFormat, kind: str) -> None:
    x = KINDS[kind]((24, 256)).astype(np.float32)
    for weight in (None, np.square(normal("counts", (256,))), np.zeros(256, np.float32)):
        for refine in (True, False):
            expected = quantize_planes_ref(fmt, x, weight, refine=refine)
            assert np.array_equal(quantize_planes(fmt, x, weight, refine=refine), expected)


def test_the_quantiser_keeps_what_is_no_number_and_refuses_what_does_not_fit() -> None:
    fmt, x = PLANES["P3_32"], normal("hostile", (1, 96))
    x[0, 3], x[0, 70] = np.nan, np.inf
    with np.errstate(all="ignore"):
        back, expected = (
            dequantize_ref(fmt, f(fmt, x)) for f in (quantize_planes, quantize_planes_ref)
        )
    assert np.array_equal(back, expected, equal_nan=True)
    assert not np.isfinite(back[0, :32]).any() and np.isfinite(back[0, 32:64]).all()
    with pytest.raises(InputError, match=r"P3_32: float32 \[2, 48\] in groups of 32"):
        quantize_planes(fmt, np.zeros((2, 48), np.float32))


# --- kernels ------------------------------------------------------------------------------------


@by_kernel
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (33, 3), (160, 7)])
def test_matmul_equals_its_reference(fmt: PlaneFormat, rows: int, blocks: int) -> None:
    K, rng = fmt.block_size * blocks, np.random.default_rng(rows)
    raw = random_rows(fmt, rows, K)
    tiles = tiles_of(fmt, raw, K)
    assert np.array_equal(tiles, layout.repack_ref(fmt, raw, rows, K))
    assert np.array_equal(layout.unpack_ref(fmt, tiles, rows, K), raw)
    x = activations.quantize_ref(random_activations(21, K, rng))
    bias = rng.standard_normal(rows).astype(np.float32)
    residual = rng.standard_normal((21, rows)).astype(np.float32)
    for T in (1, 2, 4, 5, 8, 21):
        expected = matmul_ref(fmt, raw, x[:T], bias=bias, residual=residual[:T])
        assert same_bits(
            matmul(fmt, tiles, x[:T], rows, bias=bias, residual=residual[:T]), expected
        )


@by_kernel
def test_extreme_integers_do_not_saturate(fmt: PlaneFormat) -> None:
    raw = np.full((16, fmt.row_bytes(256)), 0xFF, np.uint8)
    blocks = raw.reshape(16, -1, fmt.block_bytes)
    blocks[..., :4] = np.frombuffer(np.float16([0.5, -2]).tobytes(), np.uint8)
    signs = np.ones((4, 256), np.float32)
    signs[1], signs[2, ::2], signs[3, 1::4] = -1, -1, -1
    x = activations.quantize_ref(signs * np.float32(1000))
    assert same_bits(matmul(fmt, tiles_of(fmt, raw, 256), x, 16), matmul_ref(fmt, raw, x))


@by_kernel
def test_hostile_bytes_do_not_crash(fmt: PlaneFormat) -> None:
    raw = np.random.default_rng(5).integers(0, 256, (17, fmt.row_bytes(256)), dtype=np.uint8)
    raw[3:6] = 0xFF
    x = random_activations(5, 256, np.random.default_rng(6))
    x[1, 40], x[2, 3], x[3] = np.nan, np.inf, 0
    x = activations.quantize_ref(x)
    assert same_bits(matmul(fmt, tiles_of(fmt, raw, 256), x, 17), matmul_ref(fmt, raw, x))


def test_a_stack_is_a_matmul_that_adds_to_another() -> None:
    formats = [PLANES["P3_128"], PLANES["P1_128"]]
    w, x = normal("w", (48, 256)), random_activations(3, 256, np.random.default_rng(1))
    y = None
    for fmt, raw in zip(formats, quantize_stack(formats, w), strict=True):
        y = matmul(fmt, tiles_of(fmt, raw, 256), x, 48, residual=y)
    assert y is not None and relative_rms(y, x @ w.T) < 0.12


# --- table lookup -------------------------------------------------------------------------------


@lookups
def test_tables_equal_their_reference() -> None:
    x = activations.quantize_ref(random_activations(1, 128, np.random.default_rng(2)))
    q = x.view(activations.RECORD)["q"]
    q[0, 0], q[0, 1, ::2] = 127, -127
    tables = np.zeros((4, lut.TABLE_BYTES), np.uint8)
    lut.make_tables(x.ctypes.data, 4, tables.ctypes.data)
    assert np.array_equal(tables, lut.tables_ref(x)[0]) and tables.max() == 31


@lookups
@pytest.mark.parametrize(("rows", "K"), [(80, 1024), (16 * 67 + 5, 384), (130, 128 * 37)])
def test_lookup_equals_direct(rows: int, K: int) -> None:
    """One panel and three, a batch of tiles and two, with a bias and without."""
    fmt = PLANES["P1_128"]
    tiles = tiles_of(fmt, random_rows(fmt, rows, K), K)
    x = activations.quantize_ref(random_activations(1, K, np.random.default_rng(3)))
    bias = np.random.default_rng(4).standard_normal(rows + 16).astype(np.float32)
    for address in (0, bias.ctypes.data):
        found, expected = (
            call(kernels["P1_128"], tiles, x, rows, K, address) for kernels in (LOOKUP, DIRECT)
        )
        assert same_bits(found, expected)


# --- instruction sets ---------------------------------------------------------------------------


def test_instruction_sets_agree_to_the_bit() -> None:
    """The tests of the widest and the one-bit kernels again, as AVX2 code in another process."""
    if ISA is not AVX512_VNNI:
        pytest.skip("on this CPU the other tests run AVX2, or it lacks it")
    root = Path(__file__).parents[1]
    features = "+sse2,+ssse3,+avx,+avx2,+fma,+f16c"
    env = {**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
    env["PYTHONPATH"] = str(root)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    chosen = "(P1_128 or P3_128 or lookup or tables) and (equals or saturate)"
    done = subprocess.run(
        [*command, "-k", chosen], env=env, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:]
