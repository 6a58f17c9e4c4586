"""Prints how far the engine and llama.cpp are from the truth, for every tiny model.

    python -m tests.parity.report [FAMILY-FORMAT ...]

One line each: RMS of the logits, llama.cpp's RMS distance to the reference model, the engine's,
and their ratio, which tests/test_parity.py limits.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import edgert
from edgert.quant.metrics import rms_error
from tests.gguf_file import write_gguf
from tests.test_parity import CASES, case_of


def main(cases: list[str]) -> None:
    """Run the engine on each case."""
    print(f"{'model':24} {'logits':>7} {'llama.cpp':>10} {'edgert':>10} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for which in cases or CASES:
            case = case_of(which)
            path = write_gguf(Path(folder) / "tiny.gguf", case.model.metadata, case.model.tensors)
            try:
                with edgert.load(path, kv_cache_type="f32") as engine:
                    ours = rms_error(engine.logits(case.tokens), case.truth)
            except edgert.EdgertError as error:
                print(f"{which:24} {error}", flush=True)
                continue
            theirs = case.llamacpp_rms
            print(
                f"{which:24} {case.size:7.3f} {theirs:10.3e} {ours:10.3e} {ours / theirs:6.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
