"""Writes GGUF files for tests: sound ones, split ones and, on request, wrong ones.

    write_gguf(path, {"general.architecture": "llama"}, {"w": (BY_NAME["F32"], (2, 4), data)})

Value types follow the Python value: bool, int (uint32 where it fits, else int32, int64, uint64),
float (float32), str, a list of str, ints or floats, a NumPy scalar or array (its own type), or
`Raw` for anything else. Metadata and tensors may be given as pairs, to write a name twice.
Shapes are in NumPy order; the file gets them reversed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgert.quant.formats import BY_NAME, QuantFormat

TYPE_OF = {
    "uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6,
    "bool": 7, "uint64": 10, "int64": 11, "float64": 12,
}  # fmt: skip
STRING, ARRAY = 8, 9

Tensor = tuple[QuantFormat, Sequence[int], Any]  # data: bytes or an array of the right size
Metadata = Mapping[str, Any] | Iterable[tuple[str, Any]]
Tensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Raw:
    """A value written as it is: any type id, any bytes."""

    type_id: int
    payload: bytes


def _pairs(items: Any) -> list[tuple[str, Any]]:
    return list(items.items()) if isinstance(items, Mapping) else list(items)


def text(value: str | bytes, endian: str = "<") -> bytes:
    """A length and a text."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(endian + "Q", len(raw)) + raw


def _int_dtype(low: int, high: int) -> str:
    for name in ("uint32", "int32", "int64", "uint64"):
        info = np.iinfo(name)
        if info.min <= low and high <= info.max:
            return name
    raise ValueError((low, high))


def _array(value: Any) -> np.ndarray | None:
    """A list of numbers or an array as an array; None for texts."""
    if isinstance(value, np.ndarray):
        return value
    if value and isinstance(value[0], str):
        return None
    if all(isinstance(v, bool) for v in value):
        return np.array(value, bool)
    if all(isinstance(v, int) for v in value):
        return np.array(value, _int_dtype(min(value), max(value)))
    return np.array(value, np.float32)


def value_bytes(value: Any, endian: str = "<") -> bytes:
    """Type id and bytes of one metadata value."""
    u32, u64 = endian + "I", endian + "Q"
    if isinstance(value, Raw):
        return struct.pack(u32, value.type_id) + value.payload
    if isinstance(value, str):
        return struct.pack(u32, STRING) + text(value, endian)
    if isinstance(value, (list, tuple, np.ndarray)):
        head = struct.pack(u32, ARRAY)
        array = _array(value)
        if array is None:
            body = b"".join(text(v, endian) for v in value)
            return head + struct.pack(u32, STRING) + struct.pack(u64, len(value)) + body
        type_id = TYPE_OF[array.dtype.name]
        raw = array.astype(array.dtype.newbyteorder(endian)).tobytes()
        return head + struct.pack(u32, type_id) + struct.pack(u64, array.size) + raw
    if isinstance(value, np.generic):
        scalar = value
    elif isinstance(value, bool):
        scalar = np.bool_(value)
    elif isinstance(value, int):
        scalar = np.dtype(_int_dtype(value, value)).type(value)
    else:
        scalar = np.float32(value)
    raw = scalar.astype(scalar.dtype.newbyteorder(endian)).tobytes()
    return struct.pack(u32, TYPE_OF[scalar.dtype.name]) + raw


def gguf_bytes(
    metadata: Metadata = (),
    tensors: Tensors = (),
    *,
    version: int = 3,
    alignment: int = 32,
    endian: str = "<",
    magic: bytes = b"GGUF",
    n_tensors: int | None = None,
    n_keys: int | None = None,
    n_dims: Mapping[str, int] | None = None,
    dims: Mapping[str, Sequence[int]] | None = None,
    type_ids: Mapping[str, int] | None = None,
    offsets: Mapping[str, int] | None = None,
    with_data: bool = True,
) -> bytes:
    """A whole file. The keyword arguments replace, by tensor name, what would be right.

    `alignment` other than 32 is also written as `general.alignment`, unless the metadata has it.
    """
    keys = _pairs(metadata)
    table = _pairs(tensors)
    if alignment != 32 and all(k != "general.alignment" for k, _ in keys):
        keys.append(("general.alignment", alignment))
    u32, u64 = endian + "I", endian + "Q"
    count = len(table) if n_tensors is None else n_tensors
    out = [magic, struct.pack(u32, version), struct.pack(u64, count)]
    out.append(struct.pack(u64, len(keys) if n_keys is None else n_keys))
    for key, value in keys:
        out += [text(key, endian), value_bytes(value, endian)]
    data = bytearray()
    for name, (fmt, shape, content) in table:
        raw = content.tobytes() if isinstance(content, np.ndarray) else bytes(content)
        sizes = (dims or {}).get(name, tuple(reversed(tuple(shape))))
        offset = (offsets or {}).get(name, len(data))
        out.append(text(name, endian))
        out.append(struct.pack(u32, (n_dims or {}).get(name, len(sizes))))
        out += [struct.pack(u64, size) for size in sizes]
        out.append(struct.pack(u32, (type_ids or {}).get(name, fmt.type_id)))
        out.append(struct.pack(u64, offset))
        data += raw + bytes(-len(raw) % alignment)
    head = b"".join(out)
    if not table:
        return head
    head += bytes(-len(head) % alignment)
    return head + bytes(data) if with_data else head


def write_gguf(
    path: str | Path, metadata: Metadata = (), tensors: Tensors = (), **how: Any
) -> Path:
    """Write `gguf_bytes(metadata, tensors, **how)` to `path`, and return the path."""
    path = Path(path)
    path.write_bytes(gguf_bytes(metadata, tensors, **how))
    return path


def write_split(
    folder: str | Path, stem: str, metadata: Mapping[str, Any], parts: Sequence[Tensors], **how: Any
) -> list[Path]:
    """A split model: one file for each entry of `parts`, metadata in the first. Their paths."""
    total = sum(len(_pairs(p)) for p in parts)
    paths = []
    for i, tensors in enumerate(parts):
        split = {
            "split.no": np.uint16(i),
            "split.count": np.uint16(len(parts)),
            "split.tensors.count": np.int32(total),
        }
        path = Path(folder) / f"{stem}-{i + 1:05}-of-{len(parts):05}.gguf"
        paths.append(write_gguf(path, ({**metadata, **split} if i == 0 else split), tensors, **how))
    return paths


def f32(*shape: int) -> Tensor:
    """An F32 tensor of ones."""
    return BY_NAME["F32"], shape, np.ones(shape, np.float32)


# One small file that has something of everything.
SMALL_KEYS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "flag": True,
    "eps": 1e-5,
    "tokens": ["a", "é", "", "▁story"],
    "scores": np.array([0.5, -1.0, 0.0, 2.0], np.float32),
    "general.alignment": 32,
}
SMALL_TENSORS: dict[str, Tensor] = {
    "a.weight": f32(2, 4),
    "b.weight": (BY_NAME["Q8_0"], (3, 64), bytes(3 * 2 * 34)),
    "c": f32(5),
}
