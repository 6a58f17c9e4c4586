"""Matmul and activation kernels against their NumPy twins, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from kernel_cases import random_activations, random_raw, tiles_of

from edgert.errors import InputError
from edgert.kernels_cpu import activations, layout
from edgert.kernels_cpu.isa import AVX2, AVX512_VNNI, ISA, PORTABLE, detect
from edgert.kernels_cpu.matmul import (
    describe,
    matmul,
    matmul_kernel,
    matmul_ref,
    takes_quantized_input,
    warm_up,
)
from edgert.quant.formats import BY_NAME, QuantFormat
from edgert.quant.reference import dequantize_ref

FORMATS = list(BY_NAME.values())
MAIN = [BY_NAME[n] for n in ("F32", "F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K")]
by_name = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
main_by_name = pytest.mark.parametrize("fmt", MAIN, ids=lambda f: f.name)


def same_bits(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Equal to the bit; any NaN equals any other."""
    both = np.isnan(a) & np.isnan(b)
    return a.shape == b.shape and bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | both))


def input_for(fmt: QuantFormat, x: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    return activations.quantize_ref(x) if takes_quantized_input(fmt) else x


# --- matmul -------------------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("rows", [1, 16, 33])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 17])
def test_matmul_equals_its_reference(fmt: QuantFormat, rows: int, T: int) -> None:
    rng = np.random.default_rng([rows, T])
    K = fmt.block_size * 3 if fmt.block_size > 1 else 37
    if fmt.block_size == 1 and rows == 16:
        K = 32
    raw = random_raw(fmt, rows, K, rng)
    x = input_for(fmt, random_activations(T, K, rng))
    bias = rng.standard_normal(rows).astype(np.float32) if T % 2 else None
    residual = rng.standard_normal((T, rows)).astype(np.float32) if T > 2 else None
    before = x.copy()
    y = matmul(fmt, tiles_of(fmt, raw, K), x, rows, bias=bias, residual=residual)
    assert same_bits(y, matmul_ref(fmt, raw, x, bias=bias, residual=residual))
    assert np.array_equal(x, before)


@main_by_name
@pytest.mark.parametrize(("rows", "K"), [(172, 96), (16, 2880), (40, 1024)])
def test_matmul_equals_its_reference_at_odd_sizes(fmt: QuantFormat, rows: int, K: int) -> None:
    K = -(-K // fmt.block_size) * fmt.block_size
    rng = np.random.default_rng(K)
    raw = random_raw(fmt, rows, K, rng)
    x = input_for(fmt, random_activations(5, K, rng))
    assert same_bits(matmul(fmt, tiles_of(fmt, raw, K), x, rows), matmul_ref(fmt, raw, x))


@by_name
def test_matmul_is_near_the_dequantised_product(fmt: QuantFormat) -> None:
    """The reference means what it should: within the error of int8 activations with outliers."""
    rng = np.random.default_rng(7)
    raw, x = random_raw(fmt, 64, 512, rng), random_activations(3, 512, rng)
    true = x.astype(np.float64) @ dequantize_ref(fmt, raw).astype(np.float64).T
    error = np.sqrt(np.mean((matmul(fmt, tiles_of(fmt, raw, 512), x, 64) - true) ** 2))
    limit = 2e-2 if takes_quantized_input(fmt) else 1e-6
    assert error <= limit * np.sqrt(np.mean(true**2))


@by_name
def test_a_token_does_not_depend_on_its_batch(fmt: QuantFormat) -> None:
    rng = np.random.default_rng(3)
    raw, x = random_raw(fmt, 32, 512, rng), random_activations(23, 512, rng)
    tiles, x = tiles_of(fmt, raw, 512), input_for(fmt, x)
    together = matmul(fmt, tiles, x, 32)
    alone = np.concatenate([matmul(fmt, tiles, x[t : t + 1], 32) for t in range(23)])
    assert same_bits(together, alone)


@by_name
def test_tokens_are_found_and_placed_through_the_index_arrays(fmt: QuantFormat) -> None:
    """Rows are gathered by xi, scattered by yi; only the asked tiles are written."""
    rng = np.random.default_rng(4)
    raw, x = random_raw(fmt, 48, 256, rng), random_activations(9, 256, rng)
    tiles, x = tiles_of(fmt, raw, 256), input_for(fmt, x)
    xi, yi = np.array([8, 0, 3, 3, 5, 1]), np.array([2, 6, 0, 5, 1, 3])
    y = np.full((7, 50), np.float32(9))
    matmul_kernel(fmt)(
        tiles.ctypes.data, x.ctypes.data, x.strides[0], y.ctypes.data, y.strides[0], 256, 1, 3,
        6, xi.ctypes.data, yi.ctypes.data, 0, 0,
    )  # fmt: skip
    expected = np.full((7, 50), np.float32(9))
    expected[yi, 16:48] = matmul_ref(fmt, raw, x)[xi, 16:]
    assert same_bits(y, expected)


@by_name
def test_hostile_bytes_do_not_crash(fmt: QuantFormat) -> None:
    """Infinite and not-a-number scales and weights give what they give, as in the reference."""
    rng = np.random.default_rng(5)
    raw = rng.integers(0, 256, (17, fmt.row_bytes(256)), dtype=np.uint8)
    raw[3:6] = 0xFF
    x = random_activations(5, 256, rng)
    x[1, 40], x[2, 3], x[3] = np.nan, np.inf, 0
    x = input_for(fmt, x)
    with np.errstate(all="ignore"):
        expected = matmul_ref(fmt, raw, x)
    assert same_bits(matmul(fmt, tiles_of(fmt, raw, 256), x, 17), expected)


def test_q8_0_takes_minus_128() -> None:
    fmt = BY_NAME["Q8_0"]
    raw = np.zeros((16, 34), np.uint8)
    raw[:, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    raw[:, 2:] = 0x80
    x = np.full((5, 32), -3, np.float32)
    assert np.all(matmul(fmt, tiles_of(fmt, raw, 32), x, 16) == 128 * 3 * 32)


@main_by_name
def test_extreme_integers_do_not_saturate(fmt: QuantFormat) -> None:
    """All weight bits set against activations of full range and either sign."""
    raw = np.full((16, fmt.row_bytes(256)), 0xFF, np.uint8)
    blocks = raw.reshape(16, -1, fmt.block_bytes)
    for offset in {"Q6_K": (208,), "Q4_K": (0, 2)}.get(fmt.name, (0,)):
        blocks[..., offset : offset + 2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    if fmt.name == "Q6_K":
        blocks[..., 192:208] = 0x80
    if fmt.is_float:
        raw = np.full((16, 256), 3e4).astype({"F32": "<f4", "F16": "<f2"}[fmt.name])
        raw = raw.view(np.uint8)
    signs = np.ones((4, 256), np.float32)
    signs[1], signs[2, ::2], signs[3, 1::4] = -1, -1, -1
    x = input_for(fmt, signs * np.float32(1000))
    assert same_bits(matmul(fmt, tiles_of(fmt, raw, 256), x, 16), matmul_ref(fmt, raw, x))


def test_matmul_refuses_what_does_not_fit() -> None:
    fmt = BY_NAME["Q4_0"]
    tiles, x = np.zeros(layout.matrix_bytes(fmt, 16, 64), np.uint8), np.zeros((2, 64), np.float32)
    with pytest.raises(InputError, match=r"Q4_0 \[16, 32\]: tiles must be 288 contiguous bytes"):
        matmul(fmt, tiles, np.ascontiguousarray(x[:, :32]), 16)
    with pytest.raises(InputError, match="blocks of 32"):
        matmul(fmt, tiles, np.ascontiguousarray(x[:, :48]), 16)
    with pytest.raises(InputError, match="contiguous rows, not float64"):
        matmul(fmt, tiles, x.astype(np.float64), 16)
    with pytest.raises(InputError, match="bias must be float32"):
        matmul(fmt, tiles, x, 16, bias=np.zeros(15, np.float32))


# --- activations --------------------------------------------------------------------------------


def test_quantize_equals_its_reference() -> None:
    rng = np.random.default_rng(9)
    x = random_activations(6, 320, rng)
    x[0, :32], x[1, 64:96], x[2, 5] = 0, 1e-44, np.nan
    x[3, 7], x[4, 33], x[5, 0:32] = np.inf, -np.inf, np.nan
    rows = activations.quantize(x)
    assert rows.shape == (6, activations.activation_bytes(320)) == (6, 440)
    assert np.array_equal(rows, activations.quantize_ref(x))
    q = rows.view(activations.RECORD)["q"]
    assert q.min() == -127 and q.max() == 127


def test_quantize_is_within_half_a_step() -> None:
    x = random_activations(20, 256, np.random.default_rng(10))
    rows = activations.quantize(x)
    step = np.repeat(rows.view(activations.RECORD)["d"], 32, axis=1)
    assert np.all(np.abs(activations.dequantize_activations_ref(rows) - x) <= step * 0.5001)


def test_quantize_refuses_other_shapes() -> None:
    with pytest.raises(InputError, match="multiple of 32"):
        activations.quantize(np.zeros((1, 33), np.float32))


# --- instruction sets ---------------------------------------------------------------------------

_VARIANTS = {
    "portable": ("x86-64", "+sse,+sse2", PORTABLE),
    "avx2": ("haswell", "+sse2,+ssse3,+avx,+avx2,+fma,+f16c", AVX2),
}


def test_detect_takes_the_best_that_is_complete() -> None:
    vnni = "+avx512f,+avx512bw,+avx512vl,+avx512vnni"
    assert detect(f"+avx2,+fma,+f16c,{vnni}") is AVX512_VNNI
    assert detect(f"-avx2,+fma,+f16c,{vnni},-sse4a") is AVX512_VNNI
    assert detect("+avx2,+fma,+f16c,+avx512f,+avx512bw,-avx512vnni") is AVX2
    assert detect("+avx2,+fma,-f16c") is PORTABLE
    assert detect("") is PORTABLE
    assert describe()["instruction_set"] == ISA.name


@pytest.mark.parametrize("variant", sorted(_VARIANTS))
def test_instruction_sets_agree_to_the_bit(variant: str) -> None:
    cpu, features, isa = _VARIANTS[variant]
    if variant == "avx2" and ISA is not AVX512_VNNI:
        pytest.skip("on this CPU the other tests run AVX2, or it lacks it")
    env = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    assert run_cases(env) == [isa.name, *run_cases({})[1:]]


def run_cases(env: dict[str, str]) -> list[str]:
    """What `kernel_cases.py` prints in a process of its own: the variant, then a hash a case."""
    root = Path(__file__).parents[1]
    full = {**os.environ, **env, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    script = root / "tests" / "kernel_cases.py"
    done = subprocess.run(
        [sys.executable, str(script)], env=full, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_warm_up_names_each_kernel_once() -> None:
    names = list(warm_up([BY_NAME["Q4_0"], BY_NAME["Q8_0"], BY_NAME["Q4_0"]]))
    assert names == ["repack_blocks", "quantize_rows", "matmul_q4_0", "matmul_q8_0"]
