"""How many experts a pass will have to read, from what is known of the model's routing.

Owns: replaying the latest routing of a profile under a plan's slots. Pure. Must not know seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from edgert.expert_profile import ExpertProfile
from edgert.expert_simulation import replay_steps, steps_of, tokens_of
from edgert.storage.expert_cache import SlotSizes
from edgert.storage.expert_policy import choose_policy, hottest

__all__ = ["forecast_misses"]

_LEAST_TOKENS = 16  # of routing; fewer say nothing
_STEPS = 1536  # tokens x layers replayed for single tokens, half of them as the prompt


def forecast_misses(
    profile: ExpertProfile | None,
    slots: int,
    prefill_tokens: int,
    slot_sizes: SlotSizes | None = None,
) -> Callable[[int], float] | None:
    """A function from the tokens of a pass to the experts it will miss; None without a profile.

    The sample of the profile is replayed through the engine's own policy, begun as an engine
    begins: the hottest experts loaded, a prompt in passes of `prefill_tokens`, then token after
    token. Misses of a long pass are those of the prompt's passes, of one token those after them.
    `slot_sizes` where experts have several.
    """
    if profile is None or len(profile.sample) < _LEAST_TOKENS:
        return None
    shape = profile.uses.shape
    uses, k = profile.uses.astype(np.float64), profile.identity.k

    @cache
    def missed(tokens: int) -> float:
        # Few of single tokens: an engine asks while it opens, and a step takes 60 us.
        most = max(_LEAST_TOKENS, _STEPS // shape[0]) if tokens == 1 else len(profile.sample)
        sample = profile.sample[-most:]
        prompt = len(sample) // 2 if tokens == 1 else len(sample)
        size = prefill_tokens if tokens == 1 else tokens
        sizes = [size] * (prompt // size) + [prompt % size] * (prompt % size > 0)
        sizes += [1] * (len(sample) - prompt)
        passes = np.array(sizes, np.int32)
        steps, each = list(steps_of(sample, passes, shape[1])), list(tokens_of(sample, passes))
        policy = choose_policy(slots, shape, k, uses)
        first = hottest(uses, slots)
        hits = list(
            replay_steps(steps, shape, slots, policy, first, sizes=slot_sizes, tokens=each)
        )
        counted = len(sample) - prompt if tokens == 1 else max(prompt // size, 1)
        # Of single tokens those at the end, of long passes the whole ones at the beginning.
        last = len(steps) if tokens == 1 else counted * shape[0]
        part = slice(last - counted * shape[0], last)
        return (sum(map(len, steps[part])) - sum(hits[part])) / counted

    return missed
