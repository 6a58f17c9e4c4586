"""The routed experts of an open engine: what was chosen, hits, and which policy evicts.

Owns: looking at what a pass left behind. Must not know how experts are read or computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError
from edgert.forward import Forward
from edgert.kernels_cpu import rows
from edgert.models.spec import ModelSpec
from edgert.storage.expert_policy import POLICIES, policy_for
from edgert.weights import Weights

__all__ = ["ExpertControl"]


class ExpertControl:
    """`Engine.experts` of a model that has any. Every method may be called between passes."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        forward: Forward,
        streams: npt.NDArray[np.int64],
        buffers: Mapping[str, npt.NDArray[np.float32]],
    ) -> None:
        self._spec = spec
        self._weights = weights
        self._forward = forward
        self._streams = streams
        self.buffers = buffers  # of the run state, for those who look into a pass (expert_look.py)
        self._chosen = [
            buffers[f"expert_ids {layer}"].view(np.int64)[:, : spec.num_experts_per_tok]
            for layer in range(spec.num_hidden_layers)
        ]

    @property
    def counts(self) -> tuple[int, int]:
        """Experts found in their slots and experts read, over all layers of all passes."""
        hits, misses = self._streams[[rows.S_HITS, rows.S_MISSES]].tolist()
        return hits, misses

    def set_policy(self, name: str) -> None:
        """Evict by a policy of `edgert simulate`; "auto" is the one chosen at opening.

        It changes which experts are read again, never a bit of any output. Raises `InputError`.
        """
        if name not in ("auto", *POLICIES):
            names = ", ".join(("auto", *POLICIES))
            raise InputError(f"there is no expert policy {name!r}; choose from {names}")
        spec, streamer = self._spec, self._weights.experts
        assert streamer is not None
        shape = (spec.num_hidden_layers, spec.num_experts)
        with self._forward.lock:
            streamer.set_policy(policy_for(name, shape, spec.num_experts_per_tok))

    def record(self, sink: Callable[[npt.NDArray[np.int16]], object] | None) -> None:
        """Give `sink` what every pass chose from now on; None ends that.

        int16 [tokens, layers, k] in router order, the sink's own memory.
        """

        def read(tokens: int) -> None:
            assert sink is not None
            sink(np.stack([ids[:tokens] for ids in self._chosen], axis=1).astype(np.int16))

        with self._forward.lock:
            self._forward.on_pass = None if sink is None else read
