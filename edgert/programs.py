"""What passes run on: buffers in the arena, and programs over them.

Owns: taking the run state from the arena, and which programs there are. Must not know who walks
them (forward.py) nor what is in them (models/graph.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu.program import Program, Rows
from edgert.models.graph import Graph, build_program
from edgert.models.run_state import run_state_buffers
from edgert.plan import Plan
from edgert.plan_parts import Need, scratch_bytes
from edgert.storage.arena import Arena

if TYPE_CHECKING:
    from edgert.draft_walk import DraftWalk
    from edgert.weights import Weights

__all__ = ["Programs", "build_programs", "take_buffers"]


@dataclass(frozen=True, slots=True)
class Programs:
    """The programs of one plan."""

    full: Program  # all bits of all weights
    draft: Program | None  # what is in memory of them; None where that is not all matrices
    inner_rows: tuple[npt.NDArray[np.int64], ...]  # that they refer to: must live as long


def build_programs(graph: Graph, weights: Weights, drafts: DraftWalk | None = None) -> Programs:
    """The programs over the weights as their plan places them."""
    full, inner = build_program(graph, weights)
    drafting = weights.for_drafting()
    if drafting is None or drafts is None:
        return Programs(full, None, (inner,))
    draft, more = build_program(drafts.graph, drafting)
    return Programs(full, draft, (inner, more))


def take_buffers(
    arena: Arena, plan: Plan, need: Need, *, drafting: bool = False
) -> dict[str, tuple[Rows, npt.NDArray[np.float32]]]:
    """The run state in the arena: address and stride of each buffer, and a float32 view.

    `drafting`: that of the draft program, for one token.
    """
    found = {}
    for buffer in run_state_buffers(
        need.spec, need.inputs, tokens=1 if drafting else plan.prefill_tokens,
        logit_rows=1 if drafting else plan.logit_rows,
        scratch_bytes=scratch_bytes(need.spec, plan.threads, plan.context_length),
    ):  # fmt: skip
        name = f"draft {buffer.name}" if drafting else buffer.name
        space = arena.take(name, buffer.nbytes, 64)
        floats = space[: buffer.rows * buffer.stride].view(np.float32)
        place = Rows(int(space.ctypes.data), buffer.stride)
        found[buffer.name] = (place, floats.reshape(buffer.rows, -1))
        if buffer.name == "index":
            space.view(np.int64)[:] = np.arange(space.nbytes // 8)
    return found
