"""The routed experts of an open engine: choices, hits, policy, reading ahead, what is learnt.

Owns: looking at what a pass left behind, and loading before the first one the experts that the
model's profile names. Must not know how experts are read or computed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError
from edgert.expert_forecast import forecast_misses
from edgert.expert_profile import (
    ExpertLearner,
    ExpertProfile,
    identity_of,
    load_expert_profile,
    profile_file,
    save_expert_profile,
)
from edgert.forward import Forward
from edgert.kernels_cpu import rows
from edgert.models.spec import ModelSpec
from edgert.plan import Plan
from edgert.results import ExpertStats
from edgert.storage.expert_cache import that_fit
from edgert.storage.expert_policy import POLICIES, hottest, policy_for
from edgert.storage.expert_streamer import DONE, WANTED, ExpertStreamer
from edgert.storage.manifest import Manifest
from edgert.weights import Weights

__all__ = ["ExpertControl"]

_LEAST_TOKENS = 16  # a shorter run teaches nothing worth a file
_NAP_SECONDS = 0.0005


class ExpertControl:
    """`Engine.experts` of a model that has any. Every method may be called between passes."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        forward: Forward,
        streams: npt.NDArray[np.int64],
        buffers: Mapping[str, npt.NDArray[np.float32]],
        manifest: Manifest,
    ) -> None:
        self._spec = spec
        assert weights.experts is not None
        self._streamer = weights.experts
        self._forward = forward
        self._streams = streams
        self.buffers = buffers  # of the run state, for those who look into a pass (expert_look.py)
        self._chosen = [
            buffers[f"expert_ids {layer}"].view(np.int64)[:, : spec.num_experts_per_tok]
            for layer in range(spec.num_hidden_layers)
        ]
        self._streamer.slots.choices = self._chosen
        self._sink: Callable[[npt.NDArray[np.int16]], object] | None = None
        self._learner: ExpertLearner | None = None
        self._forecasts: dict[tuple[int, int], Callable[[int], float] | None] = {}
        self.profile: ExpertProfile | None = None  # what was known when the model was opened
        self._use_profile(manifest)

    def _use_profile(self, manifest: Manifest) -> None:
        """Load what is known of this model, begin with it, and learn on. Raises `ModelError`."""
        identity = identity_of(self._spec, manifest)
        if profile_file(identity) is None:
            return
        self.profile = load_expert_profile(identity)
        self._learner = ExpertLearner(identity)
        self._forward.on_pass = self._passed
        if self.profile is not None:
            self.set_policy("auto")
            first = hottest(self.profile.uses, self._streamer.n_slots)
            sizes = self._streamer.slots.sizes
            preload(self._streamer, first if sizes is None else that_fit(first, sizes))

    def close(self) -> None:
        """Keep what was learnt, beside what others have learnt meanwhile. No pass is under way."""
        learner, self._learner = self._learner, None
        if learner is not None and learner.seen >= _LEAST_TOKENS:
            known = load_expert_profile(learner.identity)
            save_expert_profile(learner.profile(known))

    def misses(self, plan: Plan) -> Callable[[int], float] | None:
        """Experts to be read for a pass of so many tokens under a plan, if the model is known."""
        key = plan.expert_slots, plan.prefill_tokens
        if key not in self._forecasts:
            self._forecasts[key] = forecast_misses(self.profile, *key, plan.expert_sizes)
        return self._forecasts[key]

    @property
    def counts(self) -> tuple[int, int]:
        """Experts found in their slots and experts read, over all layers of all passes."""
        hits, misses = self._streams[[rows.S_HITS, rows.S_MISSES]].tolist()
        return hits, misses

    def stats(self) -> ExpertStats:
        """The same, and what was read ahead, since the engine was opened."""
        ahead = self._streamer.prefetcher.counts
        return ExpertStats(*self.counts, ahead.useful, ahead.late, ahead.wasted)

    def set_prefetch(self, allowed: bool) -> None:
        """Read experts ahead of their layers, where that pays, or never. No bit of output changes.

        From the next pass on. An engine begins with never, unless EDGERT_PREFETCH is "on".
        """
        with self._forward.lock:
            self._streamer.prefetcher.allowed = allowed

    def set_policy(self, name: str) -> None:
        """Evict by a policy of `edgert simulate`; "auto" is the one chosen at opening.

        It changes which experts are read again, never a bit of any output. Raises `InputError`.
        """
        if name not in ("auto", *POLICIES):
            names = ", ".join(("auto", *POLICIES))
            raise InputError(f"there is no expert policy {name!r}; choose from {names}")
        spec = self._spec
        shape = (spec.num_hidden_layers, spec.num_experts)
        with self._forward.lock:
            uses = None if self.profile is None else self.profile.uses.astype(np.float64)
            self._streamer.set_policy(policy_for(name, shape, spec.num_experts_per_tok, uses))

    def record(self, sink: Callable[[npt.NDArray[np.int16]], object] | None) -> None:
        """Give `sink` what every pass chose from now on; None ends that.

        int16 [tokens, layers, k] in router order, the sink's own memory.
        """

        with self._forward.lock:
            self._sink = sink
            self._forward.on_pass = self._passed

    def _passed(self, tokens: int) -> None:
        """A pass of `tokens` tokens is over."""
        if self._sink is None and self._learner is None:
            return
        chosen = np.empty((tokens, len(self._chosen), self._spec.num_experts_per_tok), np.int16)
        for layer, ids in enumerate(self._chosen):  # np.stack takes 16 us a token, this 5
            chosen[:, layer] = ids[:tokens]
        if self._learner is not None:
            self._learner.add(chosen)
        if self._sink is not None:
            self._sink(chosen.copy())


def preload(streamer: ExpertStreamer, layers: list[npt.NDArray[np.int64]]) -> None:
    """Load `layers[layer]`, experts, into free slots: the part of a pass that only reads.

    Speaks to the streamer over its board, as compiled code does, before any pass. Raises
    `StorageError`.
    """
    for layer, experts in enumerate(layers):
        count = len(experts)
        if not count:
            continue
        streamer.board[rows.BOARD_LAYER] = layer
        streamer.expert[:count] = experts
        streamer.group_address[:count] = 0
        streamer.board[rows.BOARD_GROUPS] = count
        streamer.state[:count] = WANTED
        os.write(streamer.request_fd, bytes(8))
        while (streamer.state[:count] == WANTED).any():
            streamer.raise_if_failed()
            time.sleep(_NAP_SECONDS)
        streamer.state[:count] = DONE
        streamer.board[rows.BOARD_GROUPS] = 0
