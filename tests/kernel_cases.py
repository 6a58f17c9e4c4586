"""Seeded weights and activations for kernel tests; run as a program it prints hashes of results."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from edgert.quant.formats import BY_NAME, FORMATS, QuantFormat

_SCALES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,),
    "IQ4_XS": (0,), "MXFP4": (), "B4": (0,), "B4_Q6_K": (0,), "B3_Q4_K": (0, 2),
}  # fmt: skip
COMPARED = ("Q8_0", "Q4_0", "Q4_K", "Q6_K", "F16", "IQ4_NL", "B4", "B4_Q6_K", "B3_Q4_K")


def random_raw(
    fmt: QuantFormat, rows: int, K: int, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """GGUF rows (rows, row_bytes) with random bits and scales of ordinary size."""
    if fmt.is_float:
        w = rng.standard_normal((rows, K)).astype(np.float32)
        if fmt.name == "F16":
            return w.astype("<f2").view(np.uint8)
        if fmt.name == "BF16":
            return np.ascontiguousarray((w.view("<u4") >> 16).astype("<u2")).view(np.uint8)
        return w.view(np.uint8)
    raw = rng.integers(0, 256, (rows, fmt.row_bytes(K)), dtype=np.uint8)
    blocks = raw.reshape(rows, -1, fmt.block_bytes)
    for offset in _SCALES[fmt.name]:
        scale = (0.1 * rng.standard_normal(blocks.shape[:2])).astype("<f2")
        blocks[..., offset : offset + 2] = scale[..., None].view(np.uint8)
    if fmt.name == "MXFP4":
        blocks[..., 0] = rng.integers(110, 140, blocks.shape[:2])
    return raw


def tiles_of(fmt: QuantFormat, raw: npt.NDArray[np.uint8], K: int) -> npt.NDArray[np.uint8]:
    """The tiles of GGUF rows (rows, row_bytes), by the compiled mover."""
    from edgert.kernels_cpu import layout

    tiles = np.full(layout.matrix_bytes(fmt, len(raw), K), 0xA5, np.uint8)
    layout.repack(fmt, np.ascontiguousarray(raw), len(raw), K, tiles)
    return tiles


def random_activations(T: int, K: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """(T, K) float32 with a few outliers, as a model has."""
    x = rng.standard_normal((T, K)).astype(np.float32)
    x[:, :: max(K // 8, 1)] *= 20
    return x


def product_of_parts(
    split: tuple[int, ...], raw: npt.NDArray[np.uint8], x: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Rows of Q8_0 times x (6, K) by the kernel for parts of so many bits."""
    from edgert.kernels_cpu import activations, matmul, nested

    fmt, rows, K = FORMATS["Q8_0"], len(raw), x.shape[1]
    tiles = tiles_of(fmt, raw, K)
    n_blocks, parts, low = tiles.nbytes // 544, [], 8
    for bits in split:
        low -= bits
        room = np.empty(nested.part_bytes(fmt, bits, low + bits == 8, n_blocks), np.uint8)
        parts.append(nested.part_of(fmt, bits, low, room))
    nested.move_bits(n_blocks, [nested.tiles_of(fmt, tiles)], parts)
    w = np.array([part.data.ctypes.data for part in parts], np.int64)
    q, y, index = activations.quantize(x), np.zeros((len(x), rows), np.float32), np.arange(len(x))
    matmul.matmul_kernel(fmt, split)(
        w.ctypes.data, q.ctypes.data, q.strides[0], y.ctypes.data, y.strides[0], K, 0, rows // 16,
        len(x), index.ctypes.data, index.ctypes.data, 0, 0,
    )  # fmt: skip
    return y


def main() -> None:
    """Print the instruction set, then hashes of each format's tiles and of the results of some."""
    from edgert.kernels_cpu import isa, matmul
    from edgert.kernels_cpu.matmul_refined import KERNELS

    print(isa.ISA.name)
    for name, fmt in BY_NAME.items():
        raw = random_raw(fmt, 23, 512, np.random.default_rng(12))
        print(f"{name}-tiles:{hashlib.sha256(tiles_of(fmt, raw, 512).tobytes()).hexdigest()[:16]}")
    for name in COMPARED:
        fmt, rng = FORMATS[name], np.random.default_rng(11)
        raw, x = random_raw(fmt, 40, 512, rng), random_activations(6, 512, rng)
        y = matmul.matmul(fmt, tiles_of(fmt, raw, 512), x, 40)
        print(f"{name}:{hashlib.sha256(y.tobytes()).hexdigest()[:16]}")
    for split in KERNELS:
        y = product_of_parts(split, random_raw(FORMATS["Q8_0"], 48, 512, rng), x)
        print(f"Q8_0:{split}:{hashlib.sha256(y.tobytes()).hexdigest()[:16]}".replace(" ", ""))


if __name__ == "__main__":
    main()
