"""Replays recorded routing against a cache of expert slots, beside the best that could be done.

Owns: the cache in the simulation, and Belady's optimum. Must not know files or what a policy does:
evictions are those of the engine's own function, so the same trace gives the same hits.

*Belady* evicts what is used again last; no policy that has to load what it computes does better.
A policy may have a prefetcher, `auto+transitions`: what it names is taken to arrive in time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError
from edgert.expert_guesses import GUESSERS, Guesser, make_guesser
from edgert.routing import Choices, Routing
from edgert.storage.expert_cache import SlotSizes, admit, that_fit
from edgert.storage.expert_order import USUAL, Chosen, ExpertPolicy, Lru, Setting, Shape
from edgert.storage.expert_policy import POLICIES, choose_policy, hottest, make_policy

__all__ = ["SIMULATED", "Figure", "replay", "replay_steps", "simulate", "steps_of", "tokens_of"]

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]
SIMULATED = (*POLICIES, "auto", "belady")  # auto: the one the engine would choose


@dataclass(frozen=True, slots=True)
class Figure:
    """What one policy did with one number of slots. Rates are means over requests."""

    policy: str
    chosen: str  # what "auto" stands for here; else the policy's own name
    slots: int  # over all layers
    share: float  # of all experts
    below_working_set: bool  # fewer slots than a token uses
    hit_rate: float
    misses_per_token: float
    wasted_per_token: float  # experts read ahead that were not used


def simulate(
    trace: Routing,
    slots: Sequence[int],
    policies: Sequence[str] = SIMULATED,
    *,
    per_layer: bool = False,
    profile: _Floats | None = None,
    loaded: bool = False,
    setting: Setting = USUAL,
    progress: Callable[[int, int], object] | None = None,
) -> list[Figure]:
    """Every policy with every number of slots; each request begins with an empty cache, or with
    the hottest experts of `profile` if `loaded`, as an engine does that knows its model.

    `slots` count over all layers, at least k, and have the sizes of an engine's where experts have
    several (belady is then no bound, but a guess); with `per_layer` each layer has its own cache of
    `slots` / layers, as when layers were recorded apart. Raises `InputError`.
    """
    layers, k, every = trace.layers, trace.k, trace.layers * trace.experts
    least = layers * k if per_layer else k
    for count in slots:
        if not least <= count <= every:
            raise InputError(f"{count} slots: give from {least} to {every}, the number of experts")
        if per_layer and count % layers:
            raise InputError(f"{count} slots are no whole number for each of {layers} layers")
    for name in policies:
        policy, _, guesser = name.partition("+")
        if policy not in SIMULATED or (guesser and (guesser not in GUESSERS or policy == "belady")):
            raise InputError(
                f"there is no policy {name!r}; choose from {', '.join(SIMULATED)}, and add "
                f"{' or '.join('+' + g for g in GUESSERS)} to another than belady to read ahead"
            )
    if profile is not None and profile.shape != (layers, trace.experts):
        raise InputError(
            f"the profile is of {profile.shape[0]} layers of {profile.shape[1]} experts, the trace "
            f"of {layers} of {trace.experts}"
        )
    figures = []
    for count in slots:
        for name in policies:
            figures.append(_figure(trace, count, name, per_layer, profile, loaded, setting))
            if progress:
                progress(len(figures), len(slots) * len(policies))
    return figures


def _figure(
    trace: Routing, slots: int, name: str, per_layer: bool, profile: _Floats | None,
    loaded: bool, setting: Setting,
) -> Figure:  # fmt: skip
    """One policy with one number of slots."""
    parts = [[layer] for layer in range(trace.layers)] if per_layer else [[*range(trace.layers)]]
    shape, k, own = (len(parts[0]), trace.experts), trace.k, slots // len(parts)
    rates, misses, wasted, (name, _, ahead), full = [], 0, 0, name.partition("+"), name
    chosen = name
    for choices, passes in zip(trace.requests, trace.passes, strict=True):
        hits = uses = 0
        for part in parts:
            steps = list(steps_of(choices[:, part], passes, trace.experts))
            tokens = list(tokens_of(choices[:, part], passes))
            known = None if profile is None else profile[part]
            policy: ExpertPolicy
            if name == "belady":
                policy = _Belady(shape, steps)
            elif name == "auto":
                policy = choose_policy(own, shape, k, known, setting)
                chosen = policy.name
            else:
                policy = make_policy(name, own, shape, k, known, setting)
            first = hottest(known, own) if loaded and known is not None else ()
            guesser = make_guesser(ahead, *shape) if ahead else None
            sizes = None if per_layer else trace.slot_sizes(slots)
            hits += sum(replay_steps(steps, shape, own, policy, first, guesser, k, sizes, tokens))
            wasted += guesser.wasted if guesser else 0
            uses += sum(len(keys) for keys in steps)
        rates.append(hits / uses)
        misses += uses - hits
    return Figure(
        full, chosen, slots, slots / (trace.layers * trace.experts), slots < trace.layers * k,
        float(np.mean(rates)), misses / trace.tokens, wasted / trace.tokens,
    )  # fmt: skip


def steps_of(choices: Choices, passes: npt.NDArray[np.int32], experts: int) -> Iterator[_Ints]:
    """The keys of each layer of each pass, ascending, each once however many tokens chose it."""
    at = 0
    for size in passes.tolist():
        for layer in range(choices.shape[1]):
            yield np.unique(choices[at : at + size, layer]).astype(np.int64) + layer * experts
        at += size


def tokens_of(choices: Choices, passes: npt.NDArray[np.int32]) -> Iterator[Chosen | None]:
    """What the tokens of each pass chose, layer by layer; None for those of one token."""
    at = 0
    for size in passes.tolist():
        some = choices[at : at + size].astype(np.int64)
        yield None if size == 1 else list(some.transpose(1, 0, 2))
        at += size


def replay(
    steps: Sequence[_Ints],
    shape: Shape,
    slots: int,
    policy: ExpertPolicy,
    loaded: Sequence[_Ints] = (),
) -> int:
    """Hits of a policy over the layers in turn; see `replay_steps`."""
    return sum(replay_steps(steps, shape, slots, policy, loaded))


def replay_steps(
    steps: Sequence[_Ints],
    shape: Shape,
    slots: int,
    policy: ExpertPolicy,
    loaded: Sequence[_Ints] = (),
    guesser: Guesser | None = None,
    k: int = 0,
    sizes: SlotSizes | None = None,
    tokens: Sequence[Chosen | None] = (),
) -> Iterator[int]:
    """Hits of a policy in each step; `steps`: keys of the layers in turn, pass after pass.

    As `ExpertStreamer` does it: what a layer misses is admitted at once as far as there are slots
    it does not use itself, the rest when those that have arrived are computed. The cache is empty
    at first but for `loaded`: experts of each layer. Before each step `k` experts that `guesser`
    names are read ahead, into a quarter of the slots at most, as the engine does. `sizes`: of
    records and slots, where there are several. `tokens`: of each pass, where some have several.
    """
    stamps = np.zeros(shape[0] * shape[1], np.int64)
    slot_of = np.full(len(stamps), -1, np.int64)
    owner = np.full(slots, -1, np.int64)
    chosen: Chosen | None = None

    def put(wanted: Sequence[int], busy: npt.NDArray[np.bool_]) -> list[int]:
        plan = admit(policy, wanted, owner, stamps, busy, sizes, chosen)
        for item in plan.admitted:
            if item.evicted >= 0:
                slot_of[item.evicted] = -1
            slot_of[item.expert] = item.slot
            owner[item.slot] = item.expert
        return list(plan.waiting)

    if sizes is None:
        held = [e + layer * shape[1] for layer, part in enumerate(loaded) for e in part.tolist()]
        owner[: len(held)], slot_of[held] = held, np.arange(len(held))
    else:
        for layer, part in enumerate(that_fit(loaded, sizes)):
            put((part + layer * shape[1]).tolist(), np.zeros(slots, np.bool_))
    for clock, keys in enumerate(steps, 1):
        if guesser is not None:
            layer = (clock - 1) % shape[0]
            named = guesser.guess(layer, k) + layer * shape[1]
            busy = np.zeros(slots, np.bool_)
            busy[slot_of[named][slot_of[named] >= 0]] = True
            if clock > 1:  # the layer before is being computed
                busy[slot_of[steps[clock - 2]][slot_of[steps[clock - 2]] >= 0]] = True
            room = min(slots // 4, slots - int(np.count_nonzero(busy)))
            ahead = named[slot_of[named] < 0][:room]
            put(ahead.tolist(), busy)
            guesser.wasted += len(np.setdiff1d(ahead, keys))
            guesser.learn(layer, keys - layer * shape[1])
        chosen = tokens[(clock - 1) // shape[0]] if tokens else None
        stamps[keys] = clock
        resident = slot_of[keys]
        wanted = keys[resident < 0].tolist()
        yield len(keys) - len(wanted)
        busy = np.zeros(slots, np.bool_)
        busy[resident[resident >= 0]] = True
        while wanted:
            wanted = put(wanted, busy)
            busy[:] = False  # those before are computed
        if clock % shape[0] == 0:
            policy.observe(stamps, chosen)


class _Belady(Lru):
    """Evicts what is used again last; knows the future."""

    name = "belady"

    def __init__(self, shape: Shape, steps: Sequence[_Ints]) -> None:
        super().__init__(shape)
        self._steps = steps
        self._done = 0
        following = np.full(len(self.seen), len(steps) + 1, np.int64)
        self._next = following.copy()
        self._after: list[_Ints] = []
        for number in range(len(steps), 0, -1):
            keys = steps[number - 1]
            self._after.append(following[keys])
            following[keys] = number
        self._after.reverse()

    def observe(self, stamps: _Ints, chosen: Chosen | None = None) -> None:
        """Look up when what was used is used next."""
        now = int(stamps.max())
        for number in range(self._done, now):
            self._next[self._steps[number]] = self._after[number]
        self._done = now

    def ranks(self, owner: _Ints) -> _Floats:
        """The latest next use first."""
        return -self._next[owner].astype(np.float64)
