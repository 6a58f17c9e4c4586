"""How fast a plan will run, before it runs: an analytic model of one pass.

Owns: the arithmetic from a plan, a model and a device profile to tokens a second. Pure. Must not
know how anything is measured.

A pass has two resources at work at once. The cores need `compute` seconds (C) for all its weights,
and the disk `flash` seconds (F = S / R) for the S bytes that are not resident at its rate R. With
perfect overlap a pass would take the longer of the two, as in a roofline. Two measured effects take
from each other, both linear in the time they share:

    disk bound     F + C (1 - R' / R)     R': what the disk delivers while all cores compute; on a
                                          virtual disk half, since its driver needs a core too
    compute bound  C + F' L               L: share of memory's rate that reading takes, for the
                                          F' = S / R' seconds that reads take beside computing;
                                          and S / (cores x repack rate) for placing what was read

The pass takes the larger one. They meet where both resources are always busy.

*Experts* are asked for when the router of their layer has chosen. Until then the disk rests, in
each of the N layers that miss any; at last one part is placed, unless it lies in the file as in its
slot, and threads wake for it. A layer that uses u experts, each missing with chance q, misses none
with (1 - q)^u. With M experts missing in a layer, and B under way at a time, (1 - B / M) of the
lesser of their reading and the arithmetic X of experts is hidden:

    C + N (wake + latency + placing + wave) + r - (1 - B / M) min(X, r),  r = S / (R `_DEMAND`)

and at least S / R. A disk that is held to R on the average, as by a control group, gives more in
the time of a layer: there the profile's burst takes the place of R.

C is a sum of named terms: every weight is read from memory once (`memory`) or multiplied
(`compute`), whichever takes longer for its format; the KV cache is read (`attention`); ops have
barriers (`overhead`).

Measured by the profile: R, R', L, burst and latency of the disk, the rates of each format's kernels
and of its repacking, memory, one op, one small read. Assumed: `TOKEN_SECONDS` for sampling and
text. Not counted: arithmetic of attention over a long prompt, and caches that hold a small model
whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgert.device_profile import DeviceProfile, drifted
from edgert.models.spec import ModelSpec
from edgert.plan import Plan
from edgert.plan_policy import ExpertLoad
from edgert.storage.manifest import Manifest

__all__ = ["PROMPT_TOKENS", "Prediction", "Terms", "predict"]

Limit = Literal["flash", "memory", "compute"]
Misses = Callable[[int], float]  # tokens of a pass -> experts that have to be read for it
PROMPT_TOKENS = 256  # of the prompt that is predicted where none is named
TOKEN_SECONDS = 0.4e-3  # sampler, text and Python for each token: 0.3 to 0.5 ms measured
_LAYER_OPS = 13  # ops of a dense layer that end in a barrier
# What is read on demand reaches a share of the disk's rate: the last parts of a layer are under way
# alone, beside cores that compute (fitted to 25 and 60 % of one model, tried on others: DESIGN.md).
_DEMAND = 0.8
_WAKE_SECONDS = 0.26e-3  # from a router to the first read (storage/README.md)
# Threads woken for an expert that has come, and their barriers: beside the waits of a token went
# 20 ms and 0.5 for each of 11 to 90 experts missing (16 layers, 2 cores).
_WAVE_SECONDS = 0.5e-3
_REPEATED = 0.5  # share of a prompt's tokens that occurred before: their rows are read once


@dataclass(frozen=True, slots=True)
class Terms:
    """What a pass would take for each reason alone, in seconds."""

    flash: float  # reading what is not resident
    memory: float  # reading weights of which memory is the limit
    compute: float  # multiplying weights of which arithmetic is the limit
    attention: float  # reading keys and values
    repack: float  # placing what was read, on all cores
    contention: float  # what reading and computing take from each other
    overhead: float  # barriers, token rows, sampling
    total: float  # of the pass: not the sum, since reading and computing overlap


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a plan will do on a device."""

    decode_tok_s: float
    prefill_tok_s: float
    first_token_seconds: float  # of a prompt of `prompt_tokens`
    prompt_tokens: int
    limit: Limit  # of decoding
    decode: Terms
    prefill: Terms  # of the whole prompt
    device_bytes_per_s: float  # the rate of the disk it was made with
    hit_rate: float | None  # of experts while decoding; None for a dense model
    even_routing: bool  # True: that is a guess, as if all experts were chosen equally often
    busy_share: float = 1.0  # of that rate, while all cores compute
    profiled_bytes_per_s: float = 0.0  # of the disk when it was profiled

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Work:
    """Weights of one format: bytes in memory and their number."""

    nbytes: float
    weights: float


def predict(
    plan: Plan,
    spec: ModelSpec,
    manifest: Manifest,
    profile: DeviceProfile,
    device_bytes_per_s: float = 0.0,
    misses: Misses | None = None,
    chances: npt.NDArray[np.float64] | None = None,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    position: int | None = None,
) -> Prediction | None:
    """Predict a plan on a device; None when the kernels of a format were not measured.

    `device_bytes_per_s`: the rate of the disk as measured now, in place of the profile's.
    `position`: where decoding is predicted, by default just behind the prompt. `misses`: experts to
    be read for a pass of so many tokens, from the model's profile (expert_forecast.py); `chances`
    of it: that a token uses an expert.
    """
    formats = {f.name for t in manifest.tensors.values() if len(t.shape) > 1 for f in t.formats}
    if not profile.covers(sorted(formats)):
        return None
    model = _Model(plan, spec, manifest, profile, device_bytes_per_s, misses, chances)
    prompt_tokens = max(1, min(prompt_tokens, plan.context_length - 1))
    decode = model.run_pass(1, prompt_tokens if position is None else position)
    passes = [
        model.run_pass(min(plan.prefill_tokens, prompt_tokens - start), start)
        for start in range(0, prompt_tokens, plan.prefill_tokens)
    ]
    prefill = Terms(*(sum(values) for values in zip(*map(_values, passes), strict=True)))
    return Prediction(
        decode_tok_s=1 / decode.total,
        prefill_tok_s=prompt_tokens / prefill.total,
        first_token_seconds=prefill.total,
        prompt_tokens=prompt_tokens,
        limit=_limit(decode),
        decode=decode,
        prefill=prefill,
        device_bytes_per_s=model.rate,
        hit_rate=model.hit_rate,
        even_routing=model.missing > 0 and misses is None,
        busy_share=model.busy_rate / model.rate,
        profiled_bytes_per_s=model.profiled_rate,
    )


def _values(terms: Terms) -> tuple[float, ...]:
    return tuple(asdict(terms).values())


def _limit(terms: Terms) -> Limit:
    if terms.flash > terms.memory + terms.compute + terms.attention:
        return "flash"
    return "memory" if terms.memory + terms.attention >= terms.compute else "compute"


class _Model:
    """The model's work and the device's rates, for passes of any number of tokens."""

    def __init__(
        self,
        plan: Plan,
        spec: ModelSpec,
        manifest: Manifest,
        profile: DeviceProfile,
        device_bytes_per_s: float,
        misses: Misses | None,
        chances: npt.NDArray[np.float64] | None,
    ) -> None:
        self.plan, self.spec, self.profile = plan, spec, profile
        self.dense: dict[str, _Work] = {}
        self.head: dict[str, _Work] = {}
        self.experts: dict[str, _Work] = {}
        for tile in plan.tiles:
            entry = manifest.tensors[tile.tensor]
            group = self.head if tile.is_head else self.dense
            _add(group, entry.format.name, tile.nbytes, tile.rows * entry.shape[-1])
        for entry in manifest.tensors.values():
            if len(entry.shape) == 3:
                each = entry.parameters // entry.shape[0]
                for fmt, extent in entry.matrices:
                    _add(self.experts, fmt.name, extent.nbytes, each)
                if not entry.matrices:
                    _add(self.experts, entry.format.name, entry.nbytes, entry.parameters)
        count = spec.num_hidden_layers * spec.num_experts if spec.is_moe else 0
        self.missing = 1 - plan.expert_slots / count if count else 0.0  # share of experts
        layers, k = spec.num_hidden_layers, spec.num_experts_per_tok
        load = ExpertLoad.of(layers, max(spec.num_experts, 1), k, plan.expert_bytes, chances)
        self.load = load if count else None
        self.misses = misses or (lambda tokens: load.missed(tokens, plan.expert_slots))
        repack = min(r.repack_bytes_per_s for r in profile.kernels.values()) * plan.threads
        self.profiled_rate = profile.read_bytes_per_s(plan.staging_bytes, plan.reader_threads)
        self.repack = repack
        self.rate = min(device_bytes_per_s or self.profiled_rate, repack)
        self.busy_rate = min(profile.busy_read_bytes_per_s, self.rate)
        # A disk that is faster than when it was measured also answers sooner.
        self.latency = profile.latency_seconds * min(self.profiled_rate / self.rate, 1.0)
        stacks = [t for t in manifest.tensors.values() if len(t.shape) == 3]
        placed = any(entry.layout == "rows" for entry in stacks)
        self.placing = plan.staging_bytes * plan.threads / repack if placed else 0.0
        burst = min(profile.burst_bytes_per_s, repack)
        self.burst_rate = burst if burst > self.rate and drifted(self.rate, burst) else self.rate

    def run_pass(self, tokens: int, position: int) -> Terms:
        """What a pass of `tokens` tokens costs whose first is at `position`."""
        plan, profile, spec = self.plan, self.profile, self.spec
        memory = compute = experts = 0.0
        used = self._experts_used(tokens)
        for group, share, times in (
            (self.dense, 1.0, tokens),
            (self.head, 1.0, 1),
            (self.experts, used, tokens * self._active_share / used if used else 0),
        ):
            for name, work in group.items():
                rate = profile.kernels[name]
                read = share * work.nbytes / rate.token_bytes_per_s
                multiply = share * times * work.weights / rate.batch_macs_per_s
                limited = rate.token_bytes_per_s < 0.8 * profile.memory_bytes_per_s
                experts += max(read, multiply) if group is self.experts else 0.0
                if multiply > read or limited:
                    compute += max(read, multiply)
                else:
                    memory += read
        misses = self.misses(tokens) if self.missing else 0.0
        streamed = plan.streamed_bytes + misses * plan.expert_bytes
        kv = plan.region("KV cache").nbytes / plan.context_length * (position + tokens)
        attention = kv / profile.memory_bytes_per_s
        rows = 0.0 if plan.embedding_resident else 1 + (tokens - 1) * _REPEATED
        overhead = TOKEN_SECONDS + rows * profile.read_seconds
        overhead += spec.num_hidden_layers * _LAYER_OPS * profile.op_seconds
        cores = memory + compute + attention
        flash, repack = streamed / self.rate, streamed / self.repack
        disk_bound = flash + cores * (1 - self.busy_rate / self.rate if streamed else 0.0)
        taken = (1 - profile.busy_memory_share) / profile.busy_read_bytes_per_s
        compute_bound = cores + streamed * taken + repack
        longest = max(disk_bound, compute_bound)
        if misses:
            chosen = used * spec.num_experts
            longest = max(flash, self._on_demand(misses, chosen, streamed, cores, experts))
        contention = longest - max(flash, cores)
        return Terms(
            flash, memory, compute, attention, repack, contention, overhead, longest + overhead
        )

    def _on_demand(
        self, misses: float, chosen: float, streamed: float, cores: float, experts: float
    ) -> float:
        """Seconds of a pass that reads experts once they are chosen, from a disk that rests before.

        `chosen`: experts that a layer uses. `cores`: seconds of the cores, `experts` of them for
        experts.
        """
        plan, layers = self.plan, self.spec.num_hidden_layers
        missing: float = layers * (1 - max(1 - misses / (layers * chosen), 0.0) ** chosen)
        wait: float = _WAKE_SECONDS + self.latency + self.placing + _WAVE_SECONDS
        reading = streamed / (self.burst_rate * _DEMAND)
        under_way = plan.reader_threads * plan.staging_bytes / plan.expert_bytes  # experts
        hidden = max(1 - under_way * missing / misses, 0.0) * min(experts, reading)
        return cores + missing * wait + reading - hidden

    @property
    def hit_rate(self) -> float | None:
        """Share of the experts of one token that are in memory."""
        if not self.experts:
            return None
        used = self.spec.num_hidden_layers * self.spec.num_experts_per_tok
        return 1 - self.misses(1) / used if self.missing else 1.0

    @property
    def _active_share(self) -> float:
        """Share of the experts that one token computes."""
        return self.spec.num_experts_per_tok / self.spec.num_experts if self.experts else 0.0

    def _experts_used(self, tokens: int) -> float:
        """Share of the experts that `tokens` tokens need."""
        return self.load.used(tokens) / len(self.load.chances) if self.load else 0.0


def _add(group: dict[str, _Work], name: str, nbytes: float, weights: float) -> None:
    before = group.get(name, _Work(0, 0))
    group[name] = _Work(before.nbytes + nbytes, before.weights + weights)
