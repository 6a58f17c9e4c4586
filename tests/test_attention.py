"""Rotary embedding, the KV cache and attention against their twins and plain float64 formulas."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgert.errors import InputError
from edgert.kernels_cpu import abi
from edgert.kernels_cpu.attention import (
    attention,
    attention_kernel,
    attention_op,
    attention_scratch_bytes,
    attention_units,
    context_parts,
    partials_bytes,
)
from edgert.kernels_cpu.attention_ref import SPAN, attention_ref
from edgert.kernels_cpu.kv_cache import KvLayout, kv_cache_bytes
from edgert.kernels_cpu.rope import (
    rope_and_store,
    rope_and_store_ref,
    rope_table,
)

# Largest |difference| to float64 arithmetic on the same cache, values of size 1. Measured 4e-7.
ATTENTION_TOLERANCE = 2e-6
ROPE_TOLERANCE = 1e-6
# n_heads, n_kv, head_dim: a real tiny model, MHA, uneven groups, padded rows, wide heads.
SHAPES = [(8, 4, 8), (4, 4, 64), (7, 1, 80), (8, 2, 128), (6, 3, 96), (2, 1, 256)]


def make_cache(layout: KvLayout, written: int, fill: int = 0xFF, seed: int = 1) -> Any:
    """A layer with `written` random positions, the rest bytes `fill` (0xFF is NaN)."""
    rng = np.random.default_rng(seed)
    layer = np.full(layout.layer_bytes, fill, np.uint8)
    keys, values = layout.keys(layer), layout.values(layer)
    for p in range(written):
        shape = (layout.num_key_value_heads, layout.head_dim)
        keys[:, p // 64, :, p % 64] = rng.standard_normal(shape)
        values[:, p, : layout.head_dim] = rng.standard_normal(shape)
    return keys, values


def random_queries(T: int, n_heads: int, head_dim: int, seed: int = 2) -> Any:
    return np.random.default_rng(seed).standard_normal((T, n_heads, head_dim)).astype(np.float32)


def plain_attention(
    q: Any, keys: Any, values: Any, position: int, scale: float, window: int = 0, sinks: Any = None
) -> Any:
    T, n_heads, D = q.shape
    shared = n_heads // keys.shape[0]
    out = np.empty(q.shape)
    for t in range(T):
        n = position + t + 1
        seen = slice(max(n - window, 0) if window else 0, n)
        for h in range(n_heads):
            k = keys[h // shared].transpose(0, 2, 1).reshape(-1, D)[seen].astype(np.float64)
            v = values[h // shared, seen, :D].astype(np.float64)
            s = k @ q[t, h].astype(np.float64) * scale
            p = np.exp(s - s.max())
            sink = 0.0 if sinks is None else np.exp(float(sinks[h]) - s.max())
            out[t, h] = p @ v / (p.sum() + sink)
    return out


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("position", "T"), [(0, 1), (62, 1), (63, 1), (64, 1), (60, 9), (199, 1)])
def test_attention_equals_its_twin_and_the_formula(
    shape: tuple[int, int, int], kv_type: str, position: int, T: int
) -> None:
    n_heads, n_kv, D = shape
    keys, values = make_cache(KvLayout(n_kv, D, 256, kv_type), position + T)
    q = random_queries(T, n_heads, D)
    out = attention(q, keys, values, position, D**-0.5)
    assert np.array_equal(out, attention_ref(q, keys, values, position, D**-0.5))
    plain = plain_attention(q, keys, values, position, D**-0.5)
    assert np.abs(out - plain).max() < ATTENTION_TOLERANCE


@pytest.mark.parametrize("n_kv", [1, 2, 8])
def test_a_long_prefill_equals_its_twin(n_kv: int) -> None:
    keys, values = make_cache(KvLayout(n_kv, 16, 200, "f16"), 200)
    q = random_queries(200, 8, 16)
    out = attention(q, keys, values, 0, 0.25)
    assert np.array_equal(out, attention_ref(q, keys, values, 0, 0.25))


def test_what_was_never_written_does_not_matter() -> None:
    layout = KvLayout(2, 64, 192, "f16")
    q = random_queries(5, 4, 64)
    outs = [attention(q, *make_cache(layout, 70, fill), 65, 0.1) for fill in (0x00, 0xFF, 0x7B)]
    assert np.isfinite(outs[0]).all()
    assert np.array_equal(outs[0], outs[1]) and np.array_equal(outs[0], outs[2])


def test_later_tokens_of_a_chunk_do_not_matter() -> None:
    """An infinite or NaN key or value at a position is felt from that position on only."""
    layout = KvLayout(2, 32, 128, "f32")
    q = random_queries(70, 4, 32)
    keys, values = make_cache(layout, 70)
    before = attention(q, keys, values, 0, 0.2)
    keys[:, 66 // 64, :, 66 % 64] = np.nan
    values[:, 66] = np.inf
    after = attention(q, keys, values, 0, 0.2)
    assert np.array_equal(before[:66], after[:66])
    assert not np.isfinite(after[66:]).any()


def run_model(chunk: int, kv_type: str, T: int = 200) -> Any:
    """Rotate, store and attend `T` tokens in chunks: what a layer does with a prompt."""
    n_heads, n_kv, D = 6, 2, 40
    layout = KvLayout(n_kv, D, T, kv_type)
    layer = np.full(layout.layer_bytes, 0xFF, np.uint8)
    keys, values = layout.keys(layer), layout.values(layer)
    table = rope_table(10000.0, 24, 1.0, None, T)
    q, k, v = (random_queries(T, n, D, seed) for n, seed in ((n_heads, 3), (n_kv, 4), (n_kv, 5)))
    weights = [random_queries(1, 1, D, seed)[0, 0] for seed in (6, 7)]
    out = []
    for p in range(0, T, chunk):
        part = slice(p, p + chunk)
        rotated = rope_and_store(
            q[part], k[part], v[part], keys, values, p, table, style="neox", qk_norm="head",
            q_weight=weights[0], k_weight=weights[1], eps=1e-6,
        )  # fmt: skip
        out.append(attention(rotated, keys, values, p, D**-0.5))
    return np.concatenate(out), layer


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_chunking_never_changes_a_bit(kv_type: str) -> None:
    whole, cache = run_model(200, kv_type)
    assert np.isfinite(whole).all()
    for chunk in (1, 7, 63, 64, 65):
        part, part_cache = run_model(chunk, kv_type)
        assert np.array_equal(whole, part), chunk
        assert np.array_equal(cache, part_cache), chunk


def test_the_split_into_units_and_the_thread_do_not_matter() -> None:
    """Any ranges in any order, scratch of a thread only, and nothing written outside either."""
    n_heads, n_kv, D, T, position = 6, 3, 24, 37, 50
    layout = KvLayout(n_kv, D, 128, "f16")
    keys, values = make_cache(layout, position + T)
    q = random_queries(T, n_heads, D).reshape(T, -1)
    size = attention_scratch_bytes(n_heads, n_kv, D)
    assert size % 64 == 0
    units = attention_units(n_kv, T)
    rng = np.random.default_rng(0)
    outs = []
    for _ in range(4):
        out = np.full((T, n_heads * D + 16), 7, np.float32)
        scratch = np.full(size + 64, 0xFF, np.uint8)
        arguments = attention_op(
            q=abi.address_of(q), q_stride=abi.row_stride(q), out=abi.address_of(out),
            out_stride=abi.row_stride(out), keys=abi.address_of(keys),
            values=abi.address_of(values), n_heads=n_heads, layout=layout, scale=0.2,
            scratch=abi.address_of(scratch), scratch_stride=size,
        )  # fmt: skip
        cuts = [0, *sorted(rng.choice(np.arange(1, units), 9, replace=False).tolist()), units]
        order = rng.permutation(list(zip(cuts[:-1], cuts[1:], strict=True))).tolist()
        abi.run_op(
            attention_kernel("f16"), arguments, units, n_tokens=T, position=position, order=order
        )
        assert (out[:, n_heads * D :] == 7).all() and (scratch[size:] == 0xFF).all()
        outs.append(out[:, : n_heads * D])
    assert all(np.array_equal(outs[0], out) for out in outs[1:])
    expected = attention(q.reshape(T, n_heads, D), keys, values, position, 0.2)
    assert np.array_equal(outs[0].reshape(expected.shape), expected)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [0, 1, 5, 63, 64, 65, 200, 600])
def test_windows_and_sinks_equal_their_twin_and_the_formula(window: int, sinks: bool) -> None:
    """A chunk over the edges of blocks and of a span, as a whole and one by one, bit for bit."""
    n_heads, n_kv, D, position, T = 4, 2, 24, SPAN - 70, 75
    keys, values = make_cache(KvLayout(n_kv, D, SPAN + 64, "f16"), position + T)
    q = random_queries(T, n_heads, D)
    given: Any = {"window": window, "sinks": None}
    if sinks:
        given["sinks"] = np.array([-30.0, 0.5, 3.0, 100.0], np.float32)
    out = attention(q, keys, values, position, 0.2, **given)
    assert np.array_equal(out, attention_ref(q, keys, values, position, 0.2, **given))
    plain = plain_attention(q, keys, values, position, 0.2, **given)
    assert np.abs(out - plain).max() < ATTENTION_TOLERANCE
    for t in range(T):
        one = attention(q[t : t + 1], keys, values, position + t, 0.2, **given, parts=1 + t % 3)
        assert np.array_equal(one[0], out[t])


@pytest.mark.parametrize("window", [40, 130])
def test_what_lies_before_a_window_does_not_matter(window: int) -> None:
    """NaN and infinity before the first token's window are not felt, nor read by later ones."""
    layout = KvLayout(1, 32, 256, "f32")
    q = random_queries(20, 3, 32)
    keys, values = make_cache(layout, 220)
    before = attention(q, keys, values, 200, 0.2, window=window)
    first = 200 - window  # the last position that token 0 does not see
    for p in range(first + 1):
        keys[:, p // 64, :, p % 64] = np.nan
        values[:, p] = np.inf
    assert np.array_equal(before, attention(q, keys, values, 200, 0.2, window=window))
    values[:, first + 7] = np.nan  # seen by the first seven
    after = attention(q, keys, values, 200, 0.2, window=window)
    assert np.isnan(after[:7]).all() and np.array_equal(before[7:], after[7:])


@pytest.mark.parametrize("position", [SPAN - 1, SPAN, 3 * SPAN + 100, 5 * SPAN - 1])
@pytest.mark.parametrize(("n_heads", "n_kv", "D"), [(5, 1, 40), (8, 4, 16), (32, 1, 16)])
def test_a_context_cut_into_parts_gives_the_same_bits(
    n_heads: int, n_kv: int, D: int, position: int
) -> None:
    """Units in any order, in any number of parts, over and over with the same scratch."""
    layout = KvLayout(n_kv, D, 5 * SPAN, "f16")
    keys, values = make_cache(layout, position + 1)
    q = random_queries(1, n_heads, D)
    expected = attention(q, keys, values, position, 0.2)
    assert np.array_equal(expected, attention_ref(q, keys, values, position, 0.2))
    rng = np.random.default_rng(0)
    for parts in (2, 3, 5, 8):
        size = partials_bytes(n_heads, n_kv, D, layout.context, parts)
        partials = np.zeros(size + 64, np.uint8)
        partials[n_kv * 64 :] = 0xFF
        scratch = np.full(attention_scratch_bytes(n_heads, n_kv, D), 0xFF, np.uint8)
        out = np.empty((1, n_heads * D), np.float32)
        arguments = attention_op(
            q=abi.address_of(q), q_stride=0, out=abi.address_of(out), out_stride=0,
            keys=abi.address_of(keys), values=abi.address_of(values), n_heads=n_heads,
            layout=layout, scale=0.2, scratch=abi.address_of(scratch), scratch_stride=0,
            parts=parts, partials=abi.address_of(partials),
        )  # fmt: skip
        units = attention_units(n_kv, 1, parts)
        for _ in range(3):
            out[:] = np.nan
            order = [(u, u + 1) for u in rng.permutation(units).tolist()]
            abi.run_op(attention_kernel("f16"), arguments, units, position=position, order=order)
            assert np.array_equal(out.reshape(expected.shape), expected), parts
        assert not partials[: n_kv * 64].any() and (partials[size:] == 0xFF).all()
        chunk = attention(random_queries(9, n_heads, D), keys, values, position - 8, 0.2)
        cut = attention(random_queries(9, n_heads, D), keys, values, position - 8, 0.2, parts=parts)
        assert np.array_equal(chunk, cut)


def test_a_context_is_cut_only_for_threads_without_a_head() -> None:
    assert {context_parts(n, 1) for n in (1, 3, 8)} == {1}
    assert [context_parts(n, 2) for n in (1, 2, 3, 4, 5, 8)] == [4, 1, 2, 1, 1, 1]
    assert [context_parts(n, 4) for n in (1, 2, 4, 6, 8)] == [8, 4, 1, 2, 1]
    assert partials_bytes(32, 4, 64, 8192, 1) == 0
    assert partials_bytes(8, 1, 128, 8192, 8) == 64 + 8 * 8 * (4 * 128 + 128)


def test_attention_refuses_what_does_not_fit() -> None:
    keys, values = make_cache(KvLayout(2, 16, 64, "f16"), 1)
    with pytest.raises(InputError, match="multiple of the KV heads"):
        attention(random_queries(1, 3, 16), keys, values, 0, 1.0)
    with pytest.raises(InputError, match="head_dim 32"):
        attention(random_queries(1, 4, 32), keys, values, 0, 1.0)
    with pytest.raises(InputError, match="positions 60 to 65"):
        attention(random_queries(5, 4, 16), keys, values, 60, 1.0)
    with pytest.raises(InputError, match="a sink for each of 4 heads"):
        attention(random_queries(1, 4, 16), keys, values, 0, 1.0, sinks=np.zeros(2, np.float32))
    with pytest.raises(InputError, match="a window of -1"):
        attention(random_queries(1, 4, 16), keys, values, 0, 1.0, window=-1)


def test_the_layout_counts_every_byte() -> None:
    layout = KvLayout(8, 80, 1000, "f16")
    assert (layout.rounded_context, layout.value_width) == (1024, 80)
    assert layout.layer_bytes == 2 * 8 * 1024 * 80 * 2
    assert kv_cache_bytes(32, 8, 80, 1000, "f16") == 32 * layout.layer_bytes
    padded = KvLayout(4, 8, 64, "f32")
    assert padded.layer_bytes == 4 * 64 * (8 + 16) * 4 and padded.layer_bytes % 64 == 0
    with pytest.raises(InputError, match="'q8_0' is not known; use f16 or f32"):
        KvLayout(1, 64, 64, "q8_0")
    with pytest.raises(InputError, match="at least 1"):
        KvLayout(1, 64, 0, "f16")


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
@pytest.mark.parametrize("style", ["norm", "neox"])
@pytest.mark.parametrize("qk_norm", [None, "head", "full"])
@pytest.mark.parametrize(
    "shape", [(8, 4, 8, 8), (4, 2, 80, 40), (4, 1, 64, 64), (2, 2, 128, 128), (3, 3, 24, 6)]
)
def test_rope_and_store_equals_its_twin(
    shape: tuple[int, int, int, int], qk_norm: str | None, style: str, kv_type: str
) -> None:
    n_heads, n_kv, D, rope_dim = shape
    layout = KvLayout(n_kv, D, 130, kv_type)
    table = rope_table(1e4, rope_dim, 1.0, None, 130)
    q, k, v = (random_queries(7, n, D, s) for n, s in ((n_heads, 1), (n_kv, 2), (n_kv, 3)))
    v[0, 0, 0], v[1, 0, 0], v[2, 0, 0] = 1e9, 3e-6, -1e-9  # infinite, subnormal, zero as halves
    sizes = (D, D) if qk_norm == "head" else (n_heads * D, n_kv * D)
    weights = [random_queries(1, 1, n, 4)[0, 0] for n in sizes] if qk_norm else [None, None]
    results = []
    for function in (rope_and_store, rope_and_store_ref):
        layer = np.full(layout.layer_bytes, 0x55, np.uint8)
        rotated = function(
            q, k, v, layout.keys(layer), layout.values(layer), 61, table, style=style,
            qk_norm=qk_norm, q_weight=weights[0], k_weight=weights[1], eps=1e-6,
        )  # fmt: skip
        keys, values = layout.keys(layer), layout.values(layer)[..., :D]
        results.append([rotated, keys.view(np.uint8), np.ascontiguousarray(values).view(np.uint8)])
    for compiled, twin in zip(*results, strict=True):
        assert np.array_equal(compiled, twin)


@pytest.mark.parametrize("style", ["norm", "neox"])
def test_rope_is_a_rotation_of_the_named_pairs(style: str) -> None:
    D, rope_dim, theta = 20, 12, 500.0
    table = rope_table(theta, rope_dim, 1.0, None, 64)
    layout = KvLayout(1, D, 64, "f32")
    layer = np.zeros(layout.layer_bytes, np.uint8)
    q, k, v = (random_queries(5, 1, D, s) for s in (1, 2, 3))
    out = rope_and_store(
        q, k, v, layout.keys(layer), layout.values(layer), 30, table, style=style
    )  # fmt: skip
    stored = layout.keys(layer)[0, 0].T[30:35]
    half = rope_dim // 2
    first = np.arange(half) * 2 if style == "norm" else np.arange(half)
    second = first + (1 if style == "norm" else half)
    angle = np.arange(30, 35)[:, None] * theta ** (-2 * np.arange(half) / rope_dim)
    for x, y in ((q[:, 0], out[:, 0]), (k[:, 0], stored)):
        turned = (x[:, first] + 1j * x[:, second]) * np.exp(1j * angle)
        assert np.abs(y[:, first] - turned.real).max() < ROPE_TOLERANCE
        assert np.abs(y[:, second] - turned.imag).max() < ROPE_TOLERANCE
        assert np.array_equal(y[:, rope_dim:], x[:, rope_dim:])
    assert np.array_equal(layout.values(layer)[0, 30:35, :D], v[:, 0])


def test_rope_table_takes_scale_and_factors() -> None:
    factors = np.array([1.0, 2.0, 4.0, 8.0], np.float32)
    table = rope_table(100.0, 8, 0.5, factors, 10)
    angle = 7 * 0.5 / (100.0 ** (np.arange(4) * 2 / 8) * factors)
    assert table.shape == (10, 4, 2) and table.dtype == np.float32
    assert np.array_equal(table[7, :, 0], np.cos(angle).astype(np.float32))
    assert np.array_equal(table[7, :, 1], np.sin(angle).astype(np.float32))
    with pytest.raises(InputError, match="must be pairs"):
        rope_table(100.0, 8, 1.0, factors[:3], 10)
    with pytest.raises(InputError, match="must be pairs"):
        rope_table(100.0, 7, 1.0, None, 10)


def test_rope_refuses_what_does_not_fit() -> None:
    layout = KvLayout(1, 8, 64, "f32")
    layer = np.zeros(layout.layer_bytes, np.uint8)
    cache = layout.keys(layer), layout.values(layer)
    x = random_queries(2, 1, 8)
    with pytest.raises(InputError, match="do not fit"):
        rope_and_store(x, x, x[:1], *cache, 0, rope_table(1e4, 8, 1.0, None, 64), style="norm")
    with pytest.raises(InputError, match="positions 9 to 11"):
        rope_and_store(x, x, x, *cache, 9, rope_table(1e4, 8, 1.0, None, 10), style="norm")


def digests() -> dict[str, str]:
    """A hash of what a prompt leaves behind, cache and outputs, for both cache types."""
    found = {}
    for kv_type in ("f16", "f32"):
        out, layer = run_model(33, kv_type, 100)
        found[kv_type] = hashlib.sha256(out.tobytes() + layer.tobytes()).hexdigest()
    return found


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="an x86 target")
def test_a_cpu_without_fma_and_f16c_gives_the_same_bits() -> None:
    program = "import json, test_attention as t; print(json.dumps(t.digests()))"
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
