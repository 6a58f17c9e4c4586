"""Writes golden_blocks.json: two blocks of every format and what libggml decodes them to.

Run from the repository root with llama-cpp-python installed (the `llamacpp` extra):

    python -m tests.parity.golden_blocks
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from pathlib import Path

import numpy as np

from edgert.quant.formats import BY_NAME, QuantFormat
from edgert.quant.packing import Array
from tests.seeded import random_blocks

_FLOATS = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}


def libggml_decode(library: ctypes.CDLL, fmt: QuantFormat, raw: Array) -> Array:
    """What libggml's own dequantisation makes of the blocks: uint8 [n] -> float32 [weights]."""
    if fmt.name == "F32":
        return raw.view("<f4")
    out = np.empty(raw.size // fmt.block_bytes * fmt.block_size, np.float32)
    symbol = "dequantize_row_" + fmt.name.replace("K", "k").lower().replace("_k", "_K")
    decode = getattr(library, _FLOATS.get(fmt.name, symbol))
    decode(ctypes.c_void_p(raw.ctypes.data), ctypes.c_void_p(out.ctypes.data),
           ctypes.c_int64(out.size))  # fmt: skip
    return out


def main() -> None:
    """Write the file beside this program."""
    import llama_cpp

    [path] = (Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so")
    library = ctypes.CDLL(str(path))
    golden = {}
    for fmt in BY_NAME.values():
        raw = random_blocks(fmt, f"golden {fmt.name}", 16 if fmt.is_float else 2)
        weights = libggml_decode(library, fmt, raw)
        golden[fmt.name] = {
            "blocks": raw.tobytes().hex(),
            "some_weights": weights[:: max(1, weights.size // 8)].tolist(),
            "weights_sha256": hashlib.sha256(weights.astype("<f4").tobytes()).hexdigest(),
        }
    target = Path(__file__).parent / "golden_blocks.json"
    target.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
