"""How fast a model will be that drafts with what is in memory of it.

Owns: the arithmetic from a prediction of plain decoding and an acceptance to one with drafts. Pure.
Must not know how a pass is predicted (prediction.py) nor how drafts are made.

    tokens a verification   E(k) = 1 + a + ... + a^k       a: a drafted token is right, k drafted
    its seconds             k D + V(k + 1)

D is a token computed with the bits in memory: as long as one with all weights in memory, by the
share of their bytes. V(n) is a pass of n tokens: a plain one, or longer where the arithmetic of n
tokens is. What is drafted beside a pass (draft_walk.py) comes on top, where drafts are often right
as a whole: 1.7 times what is said here (4 GB at 60 %, 4 bits, greedy, disk free, of which 0.88 were
assumed right and 0.97 were).
"""

from __future__ import annotations

from dataclasses import dataclass

from edgert.plan import Plan
from edgert.prediction import Prediction

__all__ = ["DraftForecast", "draft_bits", "forecast_drafting"]

# Acceptance by bits of 8, where nothing was learnt: of stories260K, greedy, 8 tokens a draft, 3.0,
# 5.3 and 7.1 tokens came out of a verification. It is a small model; larger ones are more tolerant.
ASSUMED = {3.0: 0.67, 4.0: 0.86, 5.0: 0.945, 8.0: 1.0}
_MOST = 15  # tokens of a draft


@dataclass(frozen=True, slots=True)
class DraftForecast:
    """What drafting will do for a plan."""

    decode_tok_s: float
    drafted_tokens: int  # for each verification
    tokens_per_pass: float
    draft_seconds: float  # for one token
    pass_seconds: float  # of a verification
    acceptance: float  # how often a drafted token is right
    is_learnt: bool  # False: an assumption


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
    draft = weights * in_memory + terms.attention + terms.overhead
    each = plain.prefill.compute / plain.prompt_tokens  # arithmetic of one more token
    best: DraftForecast | None = None
    for k in range(1, min(_MOST, plan.prefill_tokens - 1, plan.logit_rows - 1) + 1):
        expected = sum(chance**i for i in range(k + 1))
        seconds = max(terms.total, weights + (k + 1) * each + terms.overhead)
        rate = expected / (k * draft + seconds)
        if best is None or rate > best.decode_tok_s:
            best = DraftForecast(rate, k, expected, draft, seconds, chance, learnt is not None)
    return best
