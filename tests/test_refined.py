"""Products of Q8_0 in parts: the bits of the ordinary kernel, and which tiles are computed so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import edgert
from edgert import tile_memory
from edgert.errors import UnsupportedError
from edgert.kernels_cpu import activations, layout
from edgert.kernels_cpu.matmul import matmul_kernel, takes_parts
from edgert.kernels_cpu.matmul_refined import KERNELS
from edgert.kernels_cpu.nested import move_bits, tiles_of
from edgert.quant.formats import BY_NAME
from edgert.units import KIB
from tests.test_nested import parts_of, rows_of, tiles_from
from tests.tight import tight
from tests.tiny import prompt_of

Q8_0 = BY_NAME["Q8_0"]
_F32 = npt.NDArray[np.float32]
_U8 = npt.NDArray[np.uint8]
by_split = pytest.mark.parametrize("split", KERNELS, ids=lambda s: "+".join(map(str, s)))


def in_parts(split: tuple[int, ...], tiles: _U8) -> list[_U8]:
    """The base and the other parts of tiles of Q8_0."""
    parts = parts_of(Q8_0, split, tiles.nbytes // 544)
    move_bits(tiles.nbytes // 544, [tiles_of(Q8_0, tiles)], parts)
    return [part.data for part in parts]


def product(
    call: Any, w: int, x: _U8, y: _F32, K: int, first: int = 0, *, add: bool = False, bias: int = 0
) -> _F32:
    """`y` with the product from tile `first` on, by a matmul kernel."""
    index = np.arange(len(x), dtype=np.int64)
    call(
        w, x.ctypes.data, x.strides[0], y.ctypes.data, y.strides[0], K, first, y.shape[1] // 16,
        len(x), index.ctypes.data, index.ctypes.data, int(add), bias,
    )  # fmt: skip
    return y


def both(split: tuple[int, ...], tiles: _U8, x: _U8, K: int, **how: Any) -> tuple[_U8, _U8]:
    """The bits of the product of parts, and of the ordinary kernel's."""
    rows = tiles.nbytes // layout.tile_bytes(Q8_0, K) * 16
    parts = in_parts(split, tiles)
    w = np.array([part.ctypes.data for part in parts], np.int64)
    start = np.random.default_rng(4).standard_normal((len(x), rows)).astype(np.float32)
    found = product(matmul_kernel(Q8_0, split), w.ctypes.data, x, start.copy(), K, **how)
    wanted = product(matmul_kernel(Q8_0), tiles.ctypes.data, x, start.copy(), K, **how)
    return found.view(np.uint8), wanted.view(np.uint8)


@by_split
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (16, 3), (65, 7)])
def test_the_bits_are_those_of_the_ordinary_kernel(
    split: tuple[int, ...], rows: int, blocks: int
) -> None:
    """For every number of tokens of a pack, and several packs."""
    K, rng = 32 * blocks, np.random.default_rng(rows)
    tiles = tiles_from(Q8_0, rows_of(Q8_0, rows, K, blocks), K)
    x = rng.standard_normal((19, K)).astype(np.float32)
    x[:, 0] *= 20
    quantised = activations.quantize_ref(x)
    for n in (*range(1, 10), 19):
        found, wanted = both(split, tiles, quantised[:n], K)
        assert np.array_equal(found, wanted)


@by_split
def test_from_any_tile_on_added_and_with_bias(split: tuple[int, ...]) -> None:
    K = 96
    tiles = tiles_from(Q8_0, rows_of(Q8_0, 64, K, 2), K)
    x = activations.quantize_ref(np.random.default_rng(3).standard_normal((5, K), np.float32))
    bias = np.random.default_rng(5).standard_normal(64).astype(np.float32)
    for how in ({"first": 3}, {"first": 1, "add": True}, {"bias": bias.ctypes.data, "add": True}):
        found, wanted = both(split, tiles, x, K, **how)
        assert np.array_equal(found, wanted)


@by_split
def test_extreme_codes_and_hostile_scales(split: tuple[int, ...]) -> None:
    K = 64
    raw = np.random.default_rng(5).integers(0, 256, (33, Q8_0.row_bytes(K)), dtype=np.uint8)
    raw[3:6] = 0xFF
    raw[6:9, 2:34], raw[9:12, 2:34] = 128, 127
    tiles = tiles_from(Q8_0, raw, K)
    for sign in (1, -1):
        x = activations.quantize_ref(np.full((9, K), sign * 127, np.float32))
        for n in (1, 9):
            found, wanted = (bits.view(np.float32) for bits in both(split, tiles, x[:n], K))
            same = found.view(np.uint32) == wanted.view(np.uint32)
            assert np.all(same | (np.isnan(found) & np.isnan(wanted)))
            assert np.isfinite(wanted[:, 6:12]).any()


def test_only_some_splits_have_a_kernel() -> None:
    assert takes_parts(Q8_0, (4, 4)) and not takes_parts(Q8_0, (3, 5))
    assert not takes_parts(BY_NAME["Q4_0"], (4, 4)) and not takes_parts(Q8_0, ())
    with pytest.raises(UnsupportedError, match=r"no matmul kernel for Q8_0 in parts of 3\+5 bits"):
        matmul_kernel(Q8_0, (3, 5))


@pytest.mark.parametrize(
    ("nested", "how"),
    [("4+4", "place_addresses"), ("3+1+4", "place_addresses"), ("5+3", "place_addresses"),
     ("3+5", "place_refined")],
)  # fmt: skip
def test_streamed_tiles_are_computed_from_parts(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: str, how: str
) -> None:
    """Nothing is put together in a slot where there is a kernel for parts; the logits are equal."""
    placed: list[str] = []
    for name in ("place_refined", "place_addresses"):
        true = getattr(tile_memory, name)
        monkeypatch.setattr(
            tile_memory, name, lambda *a, n=name, place=true: (placed.append(n), place(*a))
        )
    path, tokens = tmp_path / "m.edgert", prompt_of("llama", 20)
    edgert.pack_model(tiny_gguf, path, nested=nested)
    with tight(tiny_gguf, None) as whole:
        wanted = edgert.logits_hash(whole.logits(tokens))
    for spare in (600, 850):
        with tight(path, spare * KIB, prefill_tokens=9) as engine:
            assert engine.plan.streamed_bytes
            assert edgert.logits_hash(engine.logits(tokens)) == wanted
    assert engine.plan.can_draft and set(placed) == {how}
