"""The top bits of quantised blocks as blocks of their own: what a nested pack drafts with.

Owns: `base_ref`, the definition of a base. Must not know: kernels, files, parts.
"""

from __future__ import annotations

import numpy as np

from edgert.quant.formats import CODE_BITS, BaseFormat, QuantFormat
from edgert.quant.packing import Array, pack, unpack

__all__ = ["base_ref", "codes_ref"]


def codes_ref(fmt: QuantFormat, raw: Array) -> Array:
    """The n-bit codes, 0 to 2^n - 1, of blocks of a format that can be nested.

    Shapes: raw uint8 [..., blocks * block_bytes] -> uint8 [..., blocks, block_size].
    """
    fields = unpack(fmt, raw)
    if "high" in fields:
        return np.asarray(fields["low"] | fields["high"] << np.uint8(4))
    codes = fields["codes"]
    return codes.view(np.uint8) ^ np.uint8(128) if fmt.name == "Q8_0" else codes


def base_ref(fmt: BaseFormat, raw: Array) -> Array:
    """The base of blocks of `fmt.of`: their scales, and u = code >> (n - bits).

    Shapes: raw uint8 [..., blocks * of.block_bytes] -> uint8 [..., blocks * block_bytes].
    """
    codes = codes_ref(fmt.of, raw) >> np.uint8(CODE_BITS[fmt.of.name] - fmt.bits)
    low_bits = {3: 2, 5: 4}.get(fmt.bits, fmt.bits)
    low, high = codes & np.uint8(2**low_bits - 1), codes >> np.uint8(low_bits)
    return pack(fmt, unpack(fmt.of, raw) | {"codes": codes, "low": low, "high": high})
