"""Which width each matrix of experts gets: measured errors, and the choice under a total size.

Owns: what the experts did with a calibration text, what each format would cost them, the choice.
Must not know how a pack is made (pack.py) or a text is scored (evaluation.py).

Widths are chosen layer by layer and for gate, up and down each: the experts of a layer share them,
as a tensor of a pack has one format. (EdgeMoE, arXiv 2308.14352, gives each expert its own.) What
counts is how much a layer adds to the residual stream, how often each expert is used, and the
columns its inputs are large in:

    cost(tensor, format) = share(layer) * sum_e n_e sum_col x2[col] (w - w')^2
                                        / sum_e n_e sum_col x2[col] w^2

n_e = uses of expert e and one, x2 = mean square of the tensor's input, share = that of what the
experts add in the mean square of the residual stream: geometric mean of the stream behind the layer
and behind the last. On the bundled model (experts at 2.75 bits, perplexity of 8,160 tokens of
TinyStories, 6.99 in Q8_0) that gave 7.30, the first alone 7.38, the second 7.53, neither 7.42.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgert.engine import Engine
from edgert.errors import InputError
from edgert.expert_look import ExpertLook, watch_experts
from edgert.kernels_cpu.matmul import takes_quantized_input
from edgert.kernels_cpu.plane_fit import quantize_planes
from edgert.quant.formats import PLANES, QuantFormat
from edgert.quant.reference import dequantize_ref
from edgert.storage.backend import Backend, aligned_range
from edgert.storage.manifest import Manifest, TensorEntry

__all__ = ["Choice", "ExpertActivity", "Option", "choose_widths", "measure_options", "observe"]

_PARTS = ("gate", "up", "down")
_TOKENS_AT_ONCE = 16
_SAMPLED_ROWS = 32  # of each expert's matrix, to measure errors on

_F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ExpertActivity:
    """What the experts did with a text."""

    uses: _F64  # [layers, experts]
    into: _F64  # [layers, hidden]: mean squares of what gate and up read
    inner: _F64  # [layers, ffn]: of what down reads
    share: _F64  # [layers]

    def squares(self, layer: int, part: str) -> _F64:
        """Mean squares of the input of gate, up or down."""
        found: _F64 = (self.inner if part == "down" else self.into)[layer]
        return found


@dataclass(frozen=True, slots=True)
class Option:
    """A format a tensor may get."""

    format: QuantFormat
    nbytes: int
    cost: float  # of the error; 0 for the weights as they are


Choice = dict[str, Option]  # by tensor


def observe(engine: Engine, chunks: Sequence[Sequence[int]]) -> ExpertActivity:
    """Run chunks of tokens, each from position 0, and sum up what the experts see.

    Raises as `watch_experts` does.
    """
    spec, eps = engine.spec, engine.spec.rms_norm_eps
    layers = spec.num_hidden_layers
    uses = np.zeros((layers, spec.num_experts))
    into = np.zeros((layers, spec.hidden_size))
    inner = np.zeros((layers, spec.moe_intermediate_size))
    added, after = np.zeros(layers), np.zeros(layers)
    norms = [engine.weights.vector_values(f"blk.{i}.ffn_norm.weight") for i in range(layers)]

    def add(look: ExpertLook) -> None:
        at = look.layer
        uses[at] += np.bincount(look.ids.reshape(-1), minlength=spec.num_experts)
        for first in range(0, len(look.x), _TOKENS_AT_ONCE):  # small temporaries: not in the plan
            few = slice(first, first + _TOKENS_AT_ONCE)
            x, gate = look.x[few], look.gate[few]
            squares = np.square(x)
            scale = squares.mean(1, keepdims=True) + np.float32(eps)
            into[at] += (squares / scale).sum(0) * np.square(norms[at])
            act = gate / (1 + np.exp(-np.maximum(gate, np.float32(-80)))) * look.up[few]
            inner[at] += np.square(act).sum((0, 1))
            out = (look.weights[few][:, None, :] @ look.out[few])[:, 0]
            added[at] += np.square(out).sum()
            after[at] += np.square(x + out).sum()

    for chunk in chunks:
        watch_experts(engine, chunk, add)
    tokens = sum(map(len, chunks))
    inner /= tokens * spec.num_experts_per_tok
    share = added / np.sqrt(np.maximum(after * after[-1], 1e-300))
    return ExpertActivity(uses, into / tokens, inner, share)


def measure_options(
    manifest: Manifest,
    backend: Backend,
    activity: ExpertActivity,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, list[Option]]:
    """For each tensor of experts what it may become, the smallest first; measured on some rows of
    each expert. Holds one expert's sample at a time.
    """
    layers, found = len(activity.uses), dict[str, list[Option]]()
    for layer in range(layers):
        for part in _PARTS:
            entry = manifest.tensors[f"blk.{layer}.ffn_{part}_exps.weight"]
            squares = activity.squares(layer, part)
            options = _options(entry, backend, activity.uses[layer] + 1, squares)
            share = float(activity.share[layer])
            found[entry.name] = [
                Option(fmt, fmt.nbytes(entry.shape), share * error) for fmt, error in options
            ]
        if progress:
            progress(layer + 1, layers)
    return found


def _options(
    entry: TensorEntry, backend: Backend, uses: _F64, squares: _F64
) -> list[tuple[QuantFormat, float]]:
    """Formats and relative weighted errors; the tensor's own format has none."""
    columns = entry.shape[-1]
    formats = [f for f in PLANES.values() if columns % f.block_size == 0]
    formats = [f for f in formats if f.bits_per_weight < entry.format.bits_per_weight]
    errors, total = np.zeros(len(formats)), 0.0
    for expert, count in enumerate(uses):
        w = _sample(entry, backend, expert)
        total += count * float(np.square(w).sum(0) @ squares)
        for i, fmt in enumerate(formats):
            raw = quantize_planes(fmt, w, squares.astype(np.float32))
            errors[i] += count * float(np.square(dequantize_ref(fmt, raw) - w).sum(0) @ squares)
    found: list[tuple[QuantFormat, float]] = [
        (fmt, float(error) / max(total, 1e-300)) for fmt, error in zip(formats, errors, strict=True)
    ]
    if takes_quantized_input(entry.format) or not formats:
        found.append((entry.format, 0.0))
    return sorted(found, key=lambda pair: (pair[0].bits_per_weight, pair[1]))


def _sample(entry: TensorEntry, backend: Backend, expert: int) -> npt.NDArray[np.float32]:
    """Some rows of an expert's matrix, other ones for each expert: float32 [rows, columns]."""
    rows, columns = entry.shape[1:]
    count = min(_SAMPLED_ROWS, rows)
    first = expert * rows + (expert * 37 * count) % (rows - count + 1)
    extent = entry.rows(first, first + count)
    offset, nbytes, skip = aligned_range(extent, backend.alignment)
    room = np.empty(nbytes + backend.alignment, np.uint8)
    room = room[-room.ctypes.data % backend.alignment :][:nbytes]
    backend.read_into(extent.file_index, offset, room.data)
    raw = room[skip : skip + extent.nbytes]
    weights: npt.NDArray[np.float32] = dequantize_ref(entry.format, raw).reshape(count, columns)
    return weights


def choose_widths(options: Mapping[str, Sequence[Option]], budget_bytes: int) -> Choice:
    """The options whose sizes sum to at most `budget_bytes`, chosen greedily. Pure.

    Begins with the smallest of each tensor and takes the step, of any length, that saves most cost
    for its bytes, until none fits; of equal ones the first. Raises `InputError` with the smallest
    size that works.
    """
    chosen = {name: found[0] for name, found in options.items()}
    left = budget_bytes - sum(option.nbytes for option in chosen.values())
    if left < 0:
        least = budget_bytes - left
        weights = sum(8 * o.nbytes / o.format.bits_per_weight for o in chosen.values())
        raise InputError(
            f"the experts take {least:,} bytes at least, {8 * least / weights:.2f}bpw, more than "
            f"the {budget_bytes:,} given with --experts-budget"
        )
    while True:
        best, step = 0.0, None
        for name, found in options.items():
            now = chosen[name]
            for option in found:
                more = option.nbytes - now.nbytes
                gain = now.cost - option.cost
                if more <= left and gain > 0 and gain > best * max(more, 1):
                    best, step = gain / max(more, 1), (name, option)
        if step is None:
            return chosen
        left -= step[1].nbytes - chosen[step[0]].nbytes
        chosen[step[0]] = step[1]
