"""`quantize_experts`: a mixture of experts made smaller, the experts alone, to a size.

Owns: the order of calibrating, choosing, packing and measuring. Must not know how any is done.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.errors import InputError
from edgert.evaluation import CHUNK_TOKENS, Perplexity, bundled_text, perplexity, text_chunks
from edgert.expert_widths import ExpertActivity, choose_widths, measure_options, observe
from edgert.opening import load, open_model
from edgert.pack import check_output, pack_model
from edgert.quant.formats import QuantFormat
from edgert.storage.backend import FileBackend
from edgert.units import parse_bytes

__all__ = ["QuantizedExperts", "quantize_experts"]

Progress = Callable[[str, int, int], object]  # what, done, to do


@dataclass(frozen=True, slots=True)
class QuantizedExperts:
    """What was made of a model."""

    formats: dict[str, list[str]]  # by tensor, of each expert
    experts_bytes: int
    bits_per_weight: float  # of the experts
    used_experts: int  # of all in all layers: those that the calibration text came to
    calibration_tokens: int
    before: Perplexity  # on the part of the text that did not calibrate
    after: Perplexity


def quantize_experts(
    source: str | Path,
    out: str | Path,
    experts_budget: float | int | str,
    *,
    text: str | None = None,
    force: bool = False,
    on_progress: Progress | None = None,
    **options: Any,
) -> QuantizedExperts:
    """Write the MoE model `source` as the pack `out` with its experts in fewer bits: lossy.

    `experts_budget`: bits a weight as 3.2 or "3.2bpw", or the bytes of all experts as "1.5GiB".
    Gate, up and down of each expert get the plane format, or keep their own, that costs least at
    that total (expert_widths.py); everything else keeps its bits. `text`, by default the stories
    that come with edgert, is cut into chunks of 512 tokens (or the context): every second one from
    the first on calibrates, the others measure perplexity before and after. `options` are those of
    `load`; the matrices beside the experts must fit the budget.

    Raises `InputError` (no experts, a text of fewer than two chunks, a size that cannot be reached)
    and as `load` and `pack_model` do.
    """
    opened = open_model(source)
    manifest = opened.manifest
    tensors = {n: t for n, t in manifest.tensors.items() if n.endswith("_exps.weight")}
    weights = sum(t.parameters for t in tensors.values())
    if not weights:
        raise InputError(f"{source} has no experts to give widths to")
    budget = _budget_bytes(experts_budget, weights)
    check_output(manifest, Path(out), force)
    text = bundled_text() if text is None else text

    def tell(what: str) -> Callable[[int, int], object] | None:
        return on_progress and (lambda done, total: on_progress(what, done, total))

    activity = ExpertActivity.empty(opened.spec)  # in the budget: counted with the process
    with load(source, on_progress=on_progress, **options) as engine:
        size = min(CHUNK_TOKENS, engine.plan.context_length)
        bos = engine.tokenizer.bos_id if engine.tokenizer.add_bos else None
        chunks = text_chunks(engine.tokenize(text), size, bos)
        if len(chunks) < 2:
            raise InputError(f"the text is one chunk of {size} tokens; give one of two or more")
        calibrating = chunks[::2]
        scored = [token for chunk in chunks[1::2] for token in chunk]
        observe(engine, calibrating, activity)
        before = perplexity(engine, scored, chunk_tokens=size)
    backend = FileBackend(manifest.files, file_bytes=manifest.file_bytes)
    try:
        measured = measure_options(manifest, backend, activity, tell("measure"))
    finally:
        backend.close()
    chosen = choose_widths(measured, budget)
    formats: dict[str, list[QuantFormat]] = {}
    for (name, _), option in chosen.items():
        formats.setdefault(name, []).append(option.format)
    importance = {}
    for name in formats:
        layer, part = re.findall(r"blk\.(\d+)\.ffn_(\w+)_exps", name)[0]
        importance[name] = activity.squares(int(layer), part)
    pack_model(
        source, out, force=force, formats=formats, importance=importance, on_progress=on_progress
    )
    with load(out, on_progress=on_progress, **options) as engine:
        after = perplexity(engine, scored, chunk_tokens=size)
    nbytes = sum(option.nbytes for option in chosen.values())
    return QuantizedExperts(
        {name: [fmt.name for fmt in each] for name, each in formats.items()}, nbytes,
        8 * nbytes / weights, int((activity.uses > 0).sum()), sum(map(len, calibrating)),
        before, after,
    )  # fmt: skip


def _budget_bytes(budget: float | int | str, weights: int) -> int:
    """The bytes of all experts."""
    bits = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*bpw\s*", budget) if isinstance(budget, str) else None
    if isinstance(budget, str) and not bits:
        return parse_bytes(budget)
    value = float(bits[1]) if bits else float(budget)
    if not 0 < value <= 32:
        raise InputError(f"--experts-budget is {budget}; bits a weight are above 0 and at most 32")
    return int(value * weights / 8)
