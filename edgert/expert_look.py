"""What the experts of each layer did with some tokens, for those who measure.

Owns: looking at the buffers of a pass that is walked in parts. Must not know what is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgert.engine import Engine
from edgert.errors import InputError

__all__ = ["ExpertLook", "watch_experts"]


@dataclass(frozen=True, slots=True)
class ExpertLook:
    """What the experts of one layer did with some tokens: views, true until the next look."""

    layer: int
    ids: npt.NDArray[np.int64]  # [tokens, k] the experts chosen
    weights: npt.NDArray[np.float32]  # [tokens, k] of their outputs in the sum
    x: npt.NDArray[np.float32]  # [tokens, hidden] before the norm in front of the experts
    gate: npt.NDArray[np.float32]  # [tokens, k, ffn]
    up: npt.NDArray[np.float32]  # [tokens, k, ffn]
    out: npt.NDArray[np.float32]  # [tokens, k, hidden]


def watch_experts(
    engine: Engine, tokens: Sequence[int], sink: Callable[[ExpertLook], object]
) -> None:
    """Compute `tokens` from the first on and give `sink` what each layer's experts did.

    Of each layer in turn, for as many tokens at a time as a pass has; no logits. Raises
    `InputError` for a model without experts and where other matrices are streamed, and as
    `Engine.logits` does.
    """
    if engine.experts is None:
        raise InputError(f"{engine.path.name} has no experts to look at")
    forward, spec, found = engine.forward, engine.spec, engine.experts.buffers
    if forward.plan.streamed_bytes:
        raise InputError(
            "the matrices beside the experts do not fit into the budget, and must here; give "
            "a larger one with --memory-budget"
        )
    ends = [forward.row_names.index(f"blk.{i}.experts") + 1 for i in range(spec.num_hidden_layers)]
    hidden, width, k = spec.hidden_size, spec.moe_intermediate_size, spec.num_experts_per_tok

    def look(layer: int, n: int) -> None:
        sink(
            ExpertLook(
                layer,
                found[f"expert_ids {layer}"].view(np.int64)[:n, :k],
                found["expert_weights"][:n, :k],
                found["x"][:n, :hidden],
                found["gate"][: n * k, :width].reshape(n, k, width),
                found["up"][: n * k, :width].reshape(n, k, width),
                found["expert_out"][: n * k, :hidden].reshape(n, k, hidden),
            )
        )

    forward.walk_in_parts(tokens, spec.vocab_size, ends, look)
