"""Which width each matrix of experts gets: measured errors, and the choice under a total size.

Owns: what the experts did with a calibration text, what each format would cost them, the choice.
Must not know how a pack is made (pack.py) or a text is scored (evaluation.py).

Gate, up and down of every single expert are chosen apart (EdgeMoE, arXiv 2308.14352, gives one
width to each expert). What counts is how much a layer adds to the residual stream, how much of that
is the expert's, and the columns that its own inputs are large in:

    cost(matrix, format) = share(layer) * p_e / sum_e p_e * error^2
    error = sum_col x2[col] (w - w')^2 / sum_col x2[col] w^2

p_e = sum of squares of what the router multiplied the expert's outputs by (as if used once more),
x2 = mean squares of the matrix' inputs, share = that of what the experts add in the mean square of
the residual stream: geometric mean of the stream behind the layer and behind the last. Errors are
squared because large ones harm out of proportion (quant/README.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
import numpy.typing as npt

from edgert.engine import Engine
from edgert.errors import InputError
from edgert.expert_look import ExpertLook, watch_experts
from edgert.kernels_cpu.matmul import takes_quantized_input
from edgert.kernels_cpu.plane_fit import quantize_planes
from edgert.models.spec import ModelSpec
from edgert.quant.formats import PLANES, QuantFormat
from edgert.quant.reference import dequantize_ref
from edgert.storage.backend import Backend, aligned_range
from edgert.storage.manifest import Manifest, TensorEntry

__all__ = ["Choice", "ExpertActivity", "Option", "choose_widths", "measure_options", "observe"]

_PARTS = ("gate", "up", "down")
_TOKENS_AT_ONCE = 16
_OF_ALL = 16  # inputs of all experts that count for each one
_SAMPLED_ROWS = 32  # of each expert's matrix, to measure errors on

_F64 = npt.NDArray[np.float64]
_F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ExpertActivity:
    """What the experts did with a text: sums, until `observe` has divided them."""

    uses: _F64  # [layers, experts]
    weights: _F64  # [layers, experts]: squares of what the router multiplies their outputs by
    into: _F32  # [layers, experts, hidden]: mean squares of what gate and up read
    inner: _F32  # [layers, experts, ffn]: of what down reads
    share: _F64  # [layers]

    @classmethod
    def empty(cls, spec: ModelSpec) -> ExpertActivity:
        """All zero, its pages taken: an engine that is opened afterwards counts them."""
        experts = spec.num_hidden_layers, spec.num_experts
        found = cls(
            np.zeros(experts), np.zeros(experts),
            np.empty((*experts, spec.hidden_size), np.float32),
            np.empty((*experts, spec.moe_intermediate_size), np.float32),
            np.zeros(experts[0]),
        )  # fmt: skip
        found.into.fill(0)
        found.inner.fill(0)
        return found

    def squares(self, layer: int, part: str) -> _F32:
        """Mean squares of the input of gate, up or down: [experts, columns]."""
        found: _F32 = (self.inner if part == "down" else self.into)[layer]
        return found

    def shares(self, layer: int) -> _F64:
        """What the error of each expert counts, [experts]; as if each were used once more."""
        more = self.weights[layer] + self.weights[layer].sum() / max(self.uses[layer].sum(), 1.0)
        found: _F64 = self.share[layer] * more / max(float(more.sum()), 1e-300)
        return found


@dataclass(frozen=True, slots=True)
class Option:
    """A format that a matrix of an expert may get."""

    format: QuantFormat
    nbytes: int
    cost: float  # of the error; 0 for the weights as they are


ExpertMatrix = tuple[str, int]  # the tensor's name, the expert
Choice = dict[ExpertMatrix, Option]


def observe(
    engine: Engine, chunks: Sequence[Sequence[int]], empty: ExpertActivity | None = None
) -> ExpertActivity:
    """Run chunks of tokens, each from position 0, and sum up what the experts see, in `empty`.

    Raises as `watch_experts` does.
    """
    spec, eps = engine.spec, engine.spec.rms_norm_eps
    found = ExpertActivity.empty(spec) if empty is None else empty
    layers = spec.num_hidden_layers
    added, after = np.zeros(layers), np.zeros(layers)
    norms = [engine.weights.vector_values(f"blk.{i}.ffn_norm.weight") for i in range(layers)]

    def add(look: ExpertLook) -> None:
        at = look.layer
        for first in range(0, len(look.x), _TOKENS_AT_ONCE):  # small temporaries: not in the plan
            few = slice(first, first + _TOKENS_AT_ONCE)
            x, gate, ids = look.x[few], look.gate[few], look.ids[few]
            squares = np.square(x)
            scale = squares.mean(1, keepdims=True) + np.float32(eps)
            squares = squares / scale * np.square(norms[at])
            act = gate / (1 + np.exp(-np.maximum(gate, np.float32(-80)))) * look.up[few]
            np.add.at(found.uses[at], ids, 1)
            np.add.at(found.weights[at], ids, np.square(look.weights[few]))
            for j in range(ids.shape[1]):
                np.add.at(found.into[at], ids[:, j], squares)
                np.add.at(found.inner[at], ids[:, j], np.square(act[:, j]))
            out = (look.weights[few][:, None, :] @ look.out[few])[:, 0]
            added[at] += np.square(out).sum()
            after[at] += np.square(x + out).sum()

    for chunk in chunks:
        watch_experts(engine, chunk, add)
    found.share[:] = added / np.sqrt(np.maximum(after * after[-1], 1e-300))
    for layer in range(layers):
        for sums in (found.into[layer], found.inner[layer]):
            _to_means(sums, found.uses[layer])
    return found


def _to_means(sums: _F32, uses: _F64) -> None:
    """Sums [experts, columns] become means, as if each expert had had as many of all experts'
    inputs as `_OF_ALL` besides: who is used little is judged by what others see.
    """
    of_all = sums.sum(0, dtype=np.float64) / max(uses.sum(), 1.0)
    for expert, count in enumerate(uses.tolist()):
        sums[expert] = (sums[expert] + _OF_ALL * of_all) / (count + _OF_ALL)


def measure_options(
    manifest: Manifest,
    backend: Backend,
    activity: ExpertActivity,
    progress: Callable[[int, int], object] | None = None,
) -> dict[ExpertMatrix, list[Option]]:
    """For each matrix of each expert what it may become, the smallest first; measured on some of
    its rows. Holds one sample at a time.
    """
    layers, found = len(activity.uses), dict[ExpertMatrix, list[Option]]()
    for layer in range(layers):
        shares = activity.shares(layer)
        for part in _PARTS:
            entry = manifest.tensors[f"blk.{layer}.ffn_{part}_exps.weight"]
            squares = activity.squares(layer, part)
            for expert, share in enumerate(shares.tolist()):
                weights = _sample(entry, backend, expert)
                found[entry.name, expert] = [
                    Option(fmt, fmt.nbytes(entry.shape[1:]), share * error**2)
                    for fmt, error in _errors(entry, weights, squares[expert])
                ]
        if progress:
            progress(layer + 1, layers)
    return found


def _errors(entry: TensorEntry, w: _F32, squares: _F32) -> list[tuple[QuantFormat, float]]:
    """Formats and relative weighted errors; the tensor's own format has none."""
    columns = entry.shape[-1]
    formats = [f for f in PLANES.values() if columns % f.block_size == 0]
    formats = [f for f in formats if f.bits_per_weight < entry.format.bits_per_weight]
    total = max(float(np.square(w).sum(0) @ squares), 1e-300)
    found: list[tuple[QuantFormat, float]] = []
    for fmt in formats:
        raw = quantize_planes(fmt, w, squares)
        found.append((fmt, float(np.square(dequantize_ref(fmt, raw) - w).sum(0) @ squares) / total))
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


def choose_widths(options: Mapping[ExpertMatrix, Sequence[Option]], budget_bytes: int) -> Choice:
    """The options whose sizes sum to at most `budget_bytes`, chosen greedily. Pure.

    Begins with the smallest of each matrix and takes the step, of any length, that saves most cost
    for its bytes, until none fits; of equal ones the first. Raises `InputError` with the smallest
    size that works.
    """
    chosen = {key: found[0] for key, found in options.items()}
    left = budget_bytes - sum(option.nbytes for option in chosen.values())
    if left < 0:
        least = budget_bytes - left
        weights = sum(8 * o.nbytes / o.format.bits_per_weight for o in chosen.values())
        raise InputError(
            f"the experts take {least:,} bytes at least, {8 * least / weights:.2f}bpw, more than "
            f"the {budget_bytes:,} given with --experts-budget"
        )
    # The best step of each matrix, the best of all first. What is left only falls, so a step that
    # no longer fits never will again, and no matrix' best step becomes better but by its own.
    first = (_step(options, chosen, at, key, left) for at, key in enumerate(options))
    steps = [step for step in first if step is not None]
    heapify(steps)
    while steps:
        _, at, key, option = heappop(steps)
        more = option.nbytes - chosen[key].nbytes
        if more <= left:
            left -= more
            chosen[key] = option
        if step := _step(options, chosen, at, key, left):
            heappush(steps, step)
    return chosen


def _step(
    options: Mapping[ExpertMatrix, Sequence[Option]],
    chosen: Choice,
    at: int,
    key: ExpertMatrix,
    left: int,
) -> tuple[float, int, ExpertMatrix, Option] | None:
    """The step of one matrix, number `at`, that saves most for its bytes; None if none fits."""
    best, now, found = 0.0, chosen[key], None
    for option in options[key]:
        more = max(option.nbytes - now.nbytes, 1)
        gain = (now.cost - option.cost) / more
        if option.nbytes - now.nbytes <= left and gain > best:
            best, found = gain, option
    return None if found is None else (-best, at, key, found)
