"""How fast a model will be that drafts with what is in memory of it.

Owns: the arithmetic from a prediction of plain decoding and an acceptance to one with drafts. Pure.
Must not know how a pass is predicted (prediction.py) nor how drafts are made.

With a the chance that a drafted token is right, a pass that verifies k of them gives

    E(k) = 1 + a + ... + a^k      tokens.

It takes P(k): the S bytes that it reads at R', what the disk delivers while the cores work (a
slower one loses nothing), or what it computes, V(k), if that is more. The time between the two goes
into drafts beside the pass (draft_walk.py), r(k) = (S / R' - V(k)) / D of them, D being a token
computed with the bits in memory: as long as one with all weights, by the share of their bytes. Of
them the first guesses the token that the pass itself gives; if the pass was right as a whole and
this one too, with chance a^(k+1), the other r - 1 are there when it ends. Else k are drafted anew,
in k D seconds. So passes come in runs, and the speed is what a run gives on average by what it
takes (renewal reward):

                    tokens    seconds                  goes on with chance
    first pass      E(k)      k D + P(k)               a^(k+1)
    each other      E(h)      (h - r + 1) D + P(h)     a^(h+1)          h = max(j, r - 1)

k and j are those that give most tokens a second, as the engine looks for them (speculation.py).

From the profile, by way of the prediction: R', V, D. Learnt of the model, or assumed: a.
DESIGN.md compares it with runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

from edgert.plan import Plan
from edgert.prediction import Prediction

__all__ = ["Costs", "DraftForecast", "cycle", "draft_bits", "forecast_drafting"]

# Acceptance by bits of 8, where nothing was learnt: of stories260K, greedy, 56 of at most 60 with 4
# bits and 28 of at most 35 with 3, each pass counted up to its first wrong one; of 5 bits by way of
# a study of drafts of 8 tokens. (Drafts end at unsure tokens: of all, .86 and .67 are right.)
ASSUMED = {3.0: 0.80, 4.0: 0.93, 5.0: 0.97, 8.0: 1.0}
_MOST = 15  # tokens of a draft
# Of what the idle disk gives, while two cores verify, draft and serve reads: 1.2 to 1.4 GB/s of 1.8
# to 2.5. (The profile reads beside cores that only read memory.)
_WORKING_SHARE = 0.65
_FAR, _SELDOM = 64, 1e-4  # passes of a run that are looked at, and how likely the last is at least
_UNLIKELY = 0.1  # guesses beside a pass that are right less often are not made (model_drafter.py)


@dataclass(frozen=True, slots=True)
class DraftForecast:
    """What drafting will do for a plan."""

    decode_tok_s: float
    drafted_tokens: int  # before a pass for which none was ready
    tokens_per_pass: float  # on average
    draft_seconds: float  # for one token
    pass_seconds: float  # of a verification, on average
    acceptance: float  # how often a drafted token is right
    is_learnt: bool  # False: an assumption
    ready_share: float = 0.0  # passes whose drafts were made beside the one before


def draft_bits(plan: Plan) -> float:
    """Bits of 8 in memory of a weight, on average over the matrices."""
    total = sum(t.nbytes for t in plan.tiles)
    return sum(t.nbytes * (t.base.bits if t.base else 8) for t in plan.tiles) / total


def assumed_acceptance(bits: float) -> float:
    """Between the widths that were measured."""
    widths = sorted(ASSUMED)
    bits = min(max(bits, widths[0]), widths[-1])
    low = max(w for w in widths if w <= bits)
    high = min(w for w in widths if w >= bits)
    share = (bits - low) / (high - low) if high > low else 0.0
    return ASSUMED[low] + share * (ASSUMED[high] - ASSUMED[low])


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of drafts and passes, and what is drafted beside one."""

    draft: float
    weights: float  # of a pass, for the cores
    token: float  # more for each token of it
    overhead: float
    flash: float  # of a pass, with cores that work

    def passes(self, k: int, chance: float) -> tuple[float, int]:
        """Seconds of a pass that verifies `k` tokens, and how many are drafted beside it."""
        computing = self.weights + (k + 1) * self.token + self.overhead
        room = max(self.flash - computing, 0.0)
        likely = log(_UNLIKELY) / log(chance) - k if chance < 1 else _MOST + 1
        made = int(max(min(room / self.draft, likely, _MOST + 1), 0))
        return computing + room, made


def forecast_drafting(
    plan: Plan, plain: Prediction, learnt: float | None = None
) -> DraftForecast | None:
    """The best number of drafted tokens and what comes of it; None for a plan that cannot draft.

    `learnt`: the acceptance of this model, if it drafted before.
    """
    if not plan.can_draft:
        return None
    chance = assumed_acceptance(draft_bits(plan)) if learnt is None else learnt
    in_memory = sum(t.memory_bytes for t in plan.tiles) / sum(t.nbytes for t in plan.tiles)
    terms = plain.decode
    weights = terms.memory + terms.compute
    rate = plain.device_bytes_per_s
    most_read = _WORKING_SHARE * max(plain.profiled_bytes_per_s, rate)
    busy = min(plain.busy_share, most_read / rate)
    costs = Costs(
        draft=weights * in_memory + terms.attention + terms.overhead,
        weights=weights,
        token=plain.prefill.compute / plain.prompt_tokens,
        overhead=terms.overhead,
        flash=terms.flash / busy,
    )
    most = min(_MOST, plan.prefill_tokens - 1, plan.logit_rows - 1)
    found = [
        cycle(costs, chance, k, j, learnt is not None)
        for k in range(1, most + 1)
        for j in range(k + 1)
    ]
    return max(found, key=lambda forecast: forecast.decode_tok_s, default=None)


def cycle(costs: Costs, chance: float, k: int, j: int, is_learnt: bool) -> DraftForecast:
    """What comes of drafting `k` tokens from nothing, and on to `j` where some are ready."""
    tokens = seconds = passing = passes = 0.0
    reached, verified, drafted = 1.0, k, k
    for _ in range(_FAR):  # passes, until one is not right as a whole
        took, made = costs.passes(verified, chance)
        passes += reached
        passing += reached * took
        seconds += reached * (drafted * costs.draft + took)
        tokens += reached * sum(chance**i for i in range(verified + 1))
        reached *= chance ** (verified + 1)
        if made < 2 or reached < _SELDOM:
            break
        verified = max(j, min(made - 1, _MOST))
        drafted = max(verified - made + 1, 0)
    each = tokens / passes, costs.draft, passing / passes
    return DraftForecast(tokens / seconds, k, *each, chance, is_learnt, 1 - 1 / passes)
