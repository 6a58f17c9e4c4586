"""The KV cache of one layer as bytes: where the key and the value of a position lie.

    keys    [n_kv, context / 64, head_dim, 64 positions]     lanes are positions
    values  [n_kv, context, head_dim rounded up to 16]       lanes are dimensions

Scores of 16 positions then need no sum across lanes, a block of 64 positions of one head is one
sequential stream in both parts, and the context is rounded up to whole blocks.

Owns: sizes, strides and NumPy views of this layout. Must not know: how attention walks it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError
from edgert.units import align_up

__all__ = ["BLOCK", "LANES", "KvLayout", "kv_cache_bytes"]

BLOCK = 64  # positions per block, at absolute multiples of 64
LANES = 16

_TYPES = ("f16", "f32")


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Sizes of the cache of one layer; `context` may be any length, `kv_type` is "f16" or "f32"."""

    num_key_value_heads: int
    head_dim: int
    context: int
    kv_type: str

    def __post_init__(self) -> None:
        if self.kv_type not in _TYPES:
            raise InputError(f"KV cache type {self.kv_type!r} is not known; use f16 or f32")
        if min(self.num_key_value_heads, self.head_dim, self.context) < 1:
            raise InputError(
                f"a KV cache of {self.num_key_value_heads} heads x {self.head_dim} x "
                f"{self.context} positions is empty; all three must be at least 1"
            )

    @property
    def dtype(self) -> np.dtype[np.floating]:
        """NumPy type of one element."""
        return np.dtype(np.float16 if self.kv_type == "f16" else np.float32)

    @property
    def rounded_context(self) -> int:
        """Positions there is room for: whole blocks."""
        return align_up(self.context, BLOCK)

    @property
    def value_width(self) -> int:
        """Elements of one value row, padded to whole vectors."""
        return align_up(self.head_dim, LANES)

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys of one layer."""
        return self._positions * self.head_dim * self.dtype.itemsize

    @property
    def value_bytes(self) -> int:
        """Bytes of the values of one layer."""
        return self._positions * self.value_width * self.dtype.itemsize

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer: keys, then values; a multiple of 64."""
        return self.key_bytes + self.value_bytes

    @property
    def _positions(self) -> int:
        return self.num_key_value_heads * self.rounded_context

    def keys(self, layer: npt.NDArray[np.uint8]) -> npt.NDArray[np.floating]:
        """View of the keys in the bytes of a layer: [n_kv, context / 64, head_dim, 64]."""
        shape = (self.num_key_value_heads, self.rounded_context // BLOCK, self.head_dim, BLOCK)
        return layer[: self.key_bytes].view(self.dtype).reshape(shape)

    def values(self, layer: npt.NDArray[np.uint8]) -> npt.NDArray[np.floating]:
        """View of the values in the bytes of a layer: [n_kv, context, head_dim padded to 16]."""
        shape = (self.num_key_value_heads, self.rounded_context, self.value_width)
        return layer[self.key_bytes : self.layer_bytes].view(self.dtype).reshape(shape)


def kv_cache_bytes(
    num_hidden_layers: int, num_key_value_heads: int, head_dim: int, context: int, kv_type: str
) -> int:
    """Bytes of the KV cache of a whole model; layers follow each other without gaps."""
    layout = KvLayout(num_key_value_heads, head_dim, context, kv_type)
    return num_hidden_layers * layout.layer_bytes
