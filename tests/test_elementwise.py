"""Vector functions, row operations and expert routing against their twins and plain formulas."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgert.errors import InputError
from edgert.kernels_cpu import abi
from edgert.kernels_cpu.activations import quantize_ref
from edgert.kernels_cpu.elementwise import (
    quantize_kernel,
    quantize_op,
    rmsnorm,
    rmsnorm_kernel,
    rmsnorm_op,
    rmsnorm_ref,
    swiglu,
    swiglu_kernel,
    swiglu_op,
    swiglu_ref,
    units_per_row,
)
from edgert.kernels_cpu.moe import (
    moe_combine,
    moe_combine_kernel,
    moe_combine_op,
    moe_combine_ref,
    moe_route,
    moe_route_ref,
)
from edgert.kernels_cpu.vmath import EXP2_MAX_ULP, EXP_MAX_ULP, exp2_ref, exp_ref, fma_ref

RELATIVE_TOLERANCE = 1e-6  # to float64 arithmetic on the same inputs; measured 3e-7
WIDTHS = [1, 8, 63, 64, 65, 100, 288, 1024, 1040, 2080, 4096]


def rows(T: int, K: int, seed: int = 0, size: float = 1.0) -> Any:
    return (np.random.default_rng(seed).standard_normal((T, K)) * size).astype(np.float32)


def strided(name: str, array: Any) -> dict[str, int]:
    return {name: abi.address_of(array), f"{name}_stride": abi.row_stride(array)}


def test_fma_ref_rounds_once() -> None:
    rng = np.random.default_rng(0)
    exponents = np.float32(2.0) ** rng.integers(-40, 40, (3, 2000)).astype(np.float32)
    a, b, c = rng.standard_normal((3, 2000)).astype(np.float32) * exponents
    c[:1000] = -(a[:1000] * b[:1000])  # near cancellation: where two roundings go wrong
    a[1990:] = np.float32(2.0) ** -100
    b[1990:] = np.float32(1.5) * np.float32(2.0) ** np.arange(-49, -39, dtype=np.float32)
    c[1990:] = np.float32(2.0) ** -149  # sums below the normal range
    for x, y, z, result in zip(a, b, c, fma_ref(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        error = abs(Fraction(float(result)) - exact)
        for side in (-np.inf, np.inf):
            neighbour = Fraction(float(np.nextafter(result, np.float32(side))))
            assert error <= abs(neighbour - exact)


def test_fma_ref_keeps_infinities_and_nans() -> None:
    inf = np.float32(np.inf)
    big = np.float32(3e38)
    assert fma_ref(big, big, -inf) == -inf and fma_ref(big, big, np.float32(0)) == inf
    assert np.isnan(fma_ref(inf, np.float32(0), np.float32(1)))


def test_exp_is_within_its_stated_error() -> None:
    x = np.random.default_rng(0).uniform(-87, 88.7, 400_000).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (np.abs(exp_ref(x) - exact) / ulp).max() < EXP_MAX_ULP


def test_exp2_is_within_its_stated_error_and_exact_where_it_must_be() -> None:
    x = np.random.default_rng(0).uniform(-125, 0, 400_000).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (np.abs(exp2_ref(x) - exact) / ulp).max() < EXP2_MAX_ULP
    ends = np.array([0, -0.0, -1, -126, -127, -np.inf, np.nan], np.float32)
    expected = np.array([1, 1, 0.5, 2.0**-126, 2.0**-126, 2.0**-126, np.nan], np.float32)
    assert np.array_equal(exp2_ref(ends), expected, equal_nan=True)


def test_exp_at_the_ends() -> None:
    x = np.array([0, -0.0, -np.inf, -104, -1e30, np.inf, 89, 1e30, np.nan], np.float32)
    expected = np.array([1, 1, 0, 0, 0, np.inf, np.inf, np.inf, np.nan], np.float32)
    assert np.array_equal(exp_ref(x), expected, equal_nan=True)
    tiny = np.linspace(-103.9, -87.5, 1000).astype(np.float32)  # subnormal results
    assert np.abs(exp_ref(tiny) - np.exp(tiny.astype(np.float64))).max() <= 2.0**-149


@pytest.mark.parametrize("K", WIDTHS)
def test_rmsnorm(K: int) -> None:
    x, weight = rows(3, K, size=3.0), rows(1, K, 1)[0]
    out = rmsnorm(x, weight, 1e-5)
    assert np.array_equal(out, rmsnorm_ref(x, weight, 1e-5))
    x64 = x.astype(np.float64)
    plain = x64 / np.sqrt((x64**2).mean(1, keepdims=True) + 1e-5) * weight
    assert np.abs(out / plain - 1).max() < RELATIVE_TOLERANCE
    assert np.array_equal(rmsnorm(x[1:2], weight, 1e-5), out[1:2])


@pytest.mark.parametrize("K", WIDTHS)
def test_swiglu(K: int) -> None:
    gate, up = rows(3, K, size=20.0), rows(3, K, 1)
    out = swiglu(gate, up)
    assert np.array_equal(out, swiglu_ref(gate, up))
    g = gate.astype(np.float64)
    plain = g / (1 + np.exp(-g)) * up
    assert (np.abs(out - plain) <= RELATIVE_TOLERANCE * np.abs(plain) + 1e-38).all()
    assert np.array_equal(swiglu(gate[1:2], up[1:2]), out[1:2])


def test_swiglu_at_the_ends() -> None:
    gate = np.array([[-np.inf, -200.0, -89.0, 0.0, 89.0, 200.0, np.nan]], np.float32)
    out = swiglu(gate, np.ones_like(gate))
    assert np.isnan(out[0, 0]) and np.isnan(out[0, 6])  # -inf * 0 has no value
    assert np.array_equal(out[0, 1:6], np.array([0, 0, 0, 89, 200], np.float32))


def run(kernel: Any, arguments: list[int], units: int, order: Any = None) -> None:
    abi.run_op(kernel, arguments, units, n_tokens=1, order=order)


@pytest.mark.parametrize("K", [32, 1024, 2080])
@pytest.mark.parametrize("both", [False, True])
def test_quantised_outputs_are_the_quantised_float_outputs(K: int, both: bool) -> None:
    x, up, weight = rows(3, K), rows(3, K, 1), rows(1, K, 2)[0]
    y, q = np.empty_like(x), np.zeros((3, K // 32 * 44), np.uint8)
    outputs = strided("q", q) | (strided("y", y) if both else {})
    n = 3 * units_per_row(K)
    cases: list[tuple[Any, list[int], int, Any]] = [
        (
            rmsnorm_kernel,
            rmsnorm_op(**strided("x", x), weight=abi.address_of(weight), eps=1e-5, K=K, **outputs),
            3,
            rmsnorm_ref(x, weight, 1e-5),
        ),
        (
            swiglu_kernel,
            swiglu_op(**strided("gate", x), **strided("up", up), K=K, **outputs),
            n,
            swiglu_ref(x, up),
        ),
        (quantize_kernel, quantize_op(**strided("x", x), K=K, **strided("q", q)), n, x),
    ]
    before = x.copy(), up.copy()
    for kernel, arguments, units, expected in cases:
        q[:], y[:] = 0, 0
        run(kernel, arguments, units)
        assert np.array_equal(q, quantize_ref(expected))
        assert not both or kernel is quantize_kernel or np.array_equal(y, expected)
    assert np.array_equal(x, before[0]) and np.array_equal(up, before[1])


def test_units_may_be_split_and_ordered_at_will() -> None:
    K = 2500
    gate, up, y = abi.activation_rows(rows(4, K)), abi.activation_rows(rows(4, K, 1)), rows(4, 2512)
    arguments = swiglu_op(**strided("gate", gate), **strided("up", up), K=K, **strided("y", y))
    ranges = [(7, 12), (0, 1), (3, 7), (1, 3)]
    run(swiglu_kernel, arguments, 12, ranges)
    assert np.array_equal(y[:, :K], swiglu_ref(gate[:, :K], up[:, :K]))


def test_only_listed_rows_are_done() -> None:
    x, up, listed = rows(6, 1056), rows(6, 1056, 1), np.array([4, 1], np.int64)
    y, q = np.zeros_like(x), np.zeros((6, 33 * 44), np.uint8)
    arguments = swiglu_op(
        **strided("gate", x), **strided("up", up), K=1056, **strided("y", y),
        rows=abi.address_of(listed),
    )  # fmt: skip
    run(swiglu_kernel, arguments, 4)
    assert np.array_equal(y[[1, 4]], swiglu_ref(x, up)[[1, 4]])
    assert not y[[0, 2, 3, 5]].any()
    arguments = quantize_op(
        **strided("x", x), K=1056, **strided("q", q), rows=abi.address_of(listed)
    )  # fmt: skip
    run(quantize_kernel, arguments, 4)
    assert np.array_equal(q[[1, 4]], quantize_ref(x)[[1, 4]])
    assert not q[[0, 2, 3, 5]].any()


@pytest.mark.parametrize(("n", "k"), [(1, 1), (8, 2), (16, 16), (60, 4), (64, 8), (130, 8)])
@pytest.mark.parametrize("norm_topk", [False, True])
def test_moe_route(n: int, k: int, norm_topk: bool) -> None:
    logits = rows(6, n, size=3.0)
    logits[3], logits[4] = 1, np.round(logits[4])  # ties
    logits[5, 0] = 200  # the others underflow
    ids, weights = moe_route(logits, k, norm_topk=norm_topk, scale=2.5)
    twin_ids, twin_weights = moe_route_ref(logits, k, norm_topk=norm_topk, scale=2.5)
    assert np.array_equal(ids, twin_ids) and np.array_equal(weights, twin_weights)
    p = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    p = np.take_along_axis(p / p.sum(1, keepdims=True), ids, axis=1)
    plain = 2.5 * (p / p.sum(1, keepdims=True) if norm_topk else p)
    assert np.abs(weights - plain).max() < 2.5 * RELATIVE_TOLERANCE
    assert np.array_equal(ids[3], np.arange(k))
    alone, _ = moe_route(logits[1:2], k, norm_topk=norm_topk)
    assert np.array_equal(alone[0], ids[1])


def test_moe_route_divides_by_no_less_than_the_smallest_half() -> None:
    """The sum over all experts is 1, so only NaN or a tiny share can reach the floor."""
    logits = np.zeros((1, 40_000), np.float32)
    _, weights = moe_route(logits, 1, norm_topk=True)
    assert weights[0, 0] == np.float32(1 / 40_000) / np.float32(2.0**-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_moe_route_survives_logits_that_are_not_numbers(bad: float) -> None:
    logits = rows(3, 10)
    logits[0], logits[1, 3], logits[2, 4:] = bad, bad, bad
    ids, _ = moe_route(logits, 6, norm_topk=True)
    assert ids.min() >= 0 and ids.max() < 10
    assert all(len(set(row)) == 6 for row in ids.tolist())


@pytest.mark.parametrize(("K", "k"), [(1, 1), (100, 2), (1025, 8), (3000, 3)])
def test_moe_combine(K: int, k: int) -> None:
    y, weights = rows(3, K), rows(3, k, 1)
    experts = rows(3 * k, K, 2).reshape(3, k, K)
    out = moe_combine(y, experts, weights)
    assert np.array_equal(out, moe_combine_ref(y, experts, weights))
    plain = y + np.einsum("tk,tkc->tc", weights.astype(np.float64), experts)
    assert np.abs(out - plain).max() < 10 * RELATIVE_TOLERANCE
    assert np.array_equal(moe_combine(y[2:], experts[2:], weights[2:]), out[2:])


def test_moe_combine_may_be_split_at_will() -> None:
    y, weights, experts = rows(2, 2048), rows(2, 2, 1), rows(4, 2048, 2)
    expected = moe_combine_ref(y, experts.reshape(2, 2, 2048), weights)
    arguments = moe_combine_op(
        **strided("experts", experts), top_k=2, **strided("weights", weights), K=2048,
        **strided("y", y),
    )  # fmt: skip
    run(moe_combine_kernel, arguments, 4, [(3, 4), (0, 2), (2, 3)])
    assert np.array_equal(y, expected)


REFUSED: list[Callable[[], object]] = [
    lambda: rmsnorm(rows(1, 8), rows(1, 9)[0], 1e-5),
    lambda: swiglu(rows(1, 8), rows(2, 8)),
    lambda: moe_route(rows(1, 8), 9, norm_topk=False),
    lambda: moe_combine(rows(1, 8), rows(2, 8).reshape(1, 2, 8), rows(1, 3)),
]


@pytest.mark.parametrize("call", REFUSED)
def test_shapes_that_do_not_fit_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match="fit|needs|cannot choose"):
        call()


def digests() -> dict[str, str]:
    """A hash of every kernel's output on seeded inputs."""
    x, up, weight = rows(3, 1100, size=9.0), rows(3, 1100, 1), rows(1, 1100, 2)[0]
    q = np.zeros((3, 33 * 44), np.uint8)
    whole = np.ascontiguousarray(x[:, :1056])
    run(quantize_kernel, quantize_op(**strided("x", whole), K=1056, **strided("q", q)), 6)
    outputs = {
        "rmsnorm": rmsnorm(x, weight, 1e-6),
        "swiglu": swiglu(x, up),
        "quantize": q,
        "moe_route": moe_route(x, 8, norm_topk=True)[1],
        "moe_combine": moe_combine(x[:1], up[None, :2], weight[None, :2]),
    }
    return {name: hashlib.sha256(a.tobytes()).hexdigest() for name, a in outputs.items()}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="an x86 target")
def test_a_cpu_without_fma_gives_the_same_bits() -> None:
    program = "import json, test_elementwise as t; print(json.dumps(t.digests()))"
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    environment = dict(
        os.environ, NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES="+sse2",
        PYTHONPATH=os.pathsep.join(folders),
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == digests()
