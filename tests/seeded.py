"""Random numbers that are the same on every machine and with every version of NumPy.

A counter run through the SplitMix64 finaliser (Steele, Lea, Flood 2014): the n-th number depends
on the seed and n alone, in integer arithmetic.
"""

from __future__ import annotations

import hashlib

import numpy as np

from edgert.quant.formats import QuantFormat
from edgert.quant.packing import Array, layout, pack, unpack


def bits64(key: str, count: int) -> Array:
    """`count` random uint64 of the stream called `key`."""
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(key: str, shape: tuple[int, ...], low: float = -1.0, high: float = 1.0) -> Array:
    """float32 uniform in [low, high) of the stream `key`."""
    numbers = (bits64(key, int(np.prod(shape))) >> np.uint64(40)).astype(np.float32)
    unit = numbers * np.float32(2**-24)
    return (np.float32(low) + unit * np.float32(high - low)).reshape(shape)


def random_blocks(fmt: QuantFormat, key: str, count: int) -> Array:
    """Blocks whose every bit is random but for the scales, which are finite and of both signs.

    Shapes: -> uint8 [count * block_bytes].
    """
    raw = bits64(key, -(-count * fmt.block_bytes // 8)).view(np.uint8)[: count * fmt.block_bytes]
    if fmt.is_float:
        values = uniform(key, (count,), -4, 4)
        halves = {"F32": values, "F16": values.astype("<f2"), "BF16": values.view("<u2")[1::2]}
        return np.ascontiguousarray(halves[fmt.name]).view(np.uint8)
    fields = unpack(fmt, raw)
    for part in layout(fmt):
        if part.kind == "f16":
            wide = uniform(f"{key} {part.name}", (count, 1), -0.01, 0.01)
            fields[part.name] = wide.astype(np.float16)
        if part.name == "exponent":
            fields[part.name] = 118 + fields[part.name] % 8
    return pack(fmt, fields)
