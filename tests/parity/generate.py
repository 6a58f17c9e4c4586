"""Runs llama.cpp on every tiny model and writes what it says: one `<family>.npz` for each.

Run from the repository root with llama-cpp-python installed (the `llamacpp` extra); families may
be named, all is the default:

    python -m tests.parity.generate [FAMILY ...]

For each format F an archive holds: `F/digest` (of the model's tensors), `F/greedy` (GREEDY tokens
that llama.cpp chose after the prompt), `F/margins` (its best logit less the second, at each),
`F/logits` (float32 [len(KEPT), vocab], at the positions KEPT of prompt + greedy[:-1]) and
`F/distance` (RMS distance of llama.cpp's logits at every position to the reference model, which
runs in float64 on the dequantised weights). KV cache in float32, no flash attention, one thread.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

from edgert.models.reference import ReferenceModel
from edgert.quant.packing import Array
from tests.gguf_file import write_gguf
from tests.tiny import FAMILIES, build, formats_of, prompt_of, router_margins, spec_of

PROMPT = 160  # tokens
GREEDY = 16  # tokens
POSITIONS = PROMPT + GREEDY - 1
KEPT = (0, 1, 47, PROMPT - 1, POSITIONS - 1)


def llamacpp_logits(path: Path, prompt: list[int]) -> tuple[Array, list[int]]:
    """Logits float32 [POSITIONS, vocab] of prompt and greedy continuation, and the latter."""
    from llama_cpp import Llama

    llama = Llama(
        str(path), n_ctx=256, n_batch=256, n_ubatch=256, n_threads=1, n_threads_batch=1,
        logits_all=True, type_k=0, type_v=0, flash_attn=False, verbose=False,
    )  # fmt: skip
    llama.eval(prompt)
    greedy: list[int] = []
    while True:
        greedy.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        if len(greedy) == GREEDY:
            break
        llama.eval(greedy[-1:])
    logits = llama.scores[: llama.n_tokens].astype(np.float32)
    llama.close()
    return logits, greedy


def rms_rows(a: Array, b: Array) -> Array:
    """sqrt(mean over the vocabulary of (a - b)^2): [positions, vocab] twice -> [positions]."""
    return np.sqrt(np.mean(np.square(a.astype(np.float64) - b), axis=1))


def parity_of(family: str, format_name: str, folder: Path) -> tuple[dict[str, Array], str]:
    """The arrays of one model, and a line that says how it went."""
    model, prompt = build(family, format_name), prompt_of(family, PROMPT)
    path = folder / "tiny.gguf"
    write_gguf(path, model.metadata, model.tensors)
    logits, greedy = llamacpp_logits(path, prompt)
    spec = spec_of(model)
    tokens = prompt + greedy[:-1]
    truth = ReferenceModel(spec, model.weights, np.float64).logits(tokens)
    best = -np.sort(-logits[PROMPT - 1 :], axis=1)[:, :2]
    distance = rms_rows(logits, truth).astype(np.float32)
    arrays = {
        "digest": np.array(model.digest),
        "greedy": np.array(greedy, np.int32),
        "margins": best[:, 0] - best[:, 1],
        "logits": logits[list(KEPT)],
        "distance": distance,
    }
    line = (
        f"{family:17} {format_name:7} rms distance {np.sqrt(np.mean(distance**2)):.2e}"
        f" / logits {np.sqrt(np.mean(truth.astype(np.float64) ** 2)):.2f}"
    )
    if spec.is_moe:
        line += f"  smallest router margin {min(router_margins(model, tokens)):.2f}"
    return {f"{format_name}/{name}": a for name, a in arrays.items()}, line


def main(families: list[str]) -> None:
    """Write the archives beside this program."""
    print(f"llama-cpp-python {version('llama-cpp-python')}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        for family in families or FAMILIES:
            arrays: dict[str, Array] = {}
            for name in formats_of(family):
                found, line = parity_of(family, name, Path(folder))
                arrays |= found
                print(line, flush=True)
            np.savez_compressed(Path(__file__).parent / f"{family}.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1:])
