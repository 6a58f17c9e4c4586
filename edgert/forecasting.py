"""A plan with what it will do, and the same over a range of budgets.

Owns: bringing plan, device profile and prediction together for `edgert plan`. Must not know how
any of them comes about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgert.acceptance_file import load_acceptance
from edgert.budget import resolve_budget
from edgert.config import LoadOptions
from edgert.device_profile import DeviceProfile
from edgert.draft_forecast import DraftForecast, forecast_drafting
from edgert.expert_forecast import forecast_misses
from edgert.expert_profile import ExpertProfile, profile_file
from edgert.loading import known_experts, planner, process_bytes
from edgert.machine import available_bytes, default_threads
from edgert.opening import Opened, open_model, planned_draft_bytes
from edgert.plan import Plan
from edgert.prediction import Prediction, predict

__all__ = ["Forecast", "forecast", "profile_device"]

Progress = Callable[[str, int, int], object]  # what, done, to do
POINTS = 8


@dataclass(frozen=True, slots=True)
class Point:
    """One budget of the curve."""

    budget_bytes: int
    resident_bytes: int
    streamed_bytes: int
    prefill_tok_s: float
    decode_tok_s: float  # without drafts
    draft_tok_s: float  # with those the model makes itself; 0 where it cannot
    limit: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """A plan, what it will do on this machine, and what other budgets would."""

    plan: Plan
    prediction: Prediction
    curve: tuple[Point, ...]  # from the smallest budget that works to the whole model
    drafting: DraftForecast | None  # where the plan lets the model draft for itself
    routing: ExpertProfile | None  # what is known of the model's experts
    profile_kept: bool  # False: the cache folder cannot be written, so it is measured each time
    draft_model_bytes: int = 0  # of a draft model, inside the region "process"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, beside those of the plan."""
        return {
            "prediction": self.prediction.to_dict(),
            "curve": [asdict(point) for point in self.curve],
            "draft_model_bytes": self.draft_model_bytes,
            "drafting": None if self.drafting is None else asdict(self.drafting),
            "routing": None if self.routing is None else {
                "file": str(profile_file(self.routing.identity)),
                "tokens": self.routing.tokens,
            },
        }  # fmt: skip


def profile_device(
    path: str | Path | None = None,
    *,
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> tuple[DeviceProfile, bool]:
    """The rates of this machine for a model: kept ones, else measured in some three seconds.

    True beside them when they could be kept. `on_progress(what, done, to_do)` is called only where
    something has to be measured. Raises `StorageError`, and as `load` does.
    """
    return _profile(open_model(path), threads, on_progress)


def _profile(
    opened: Opened, threads: int | None, on_progress: Progress | None
) -> tuple[DeviceProfile, bool]:
    from edgert.profiling import ensure_profile  # loads Numba

    return ensure_profile(opened, threads or default_threads(), on_progress)


def forecast(
    path: str | Path | None = None,
    *,
    draft_model: str | Path | None = None,
    on_progress: Progress | None = None,
    **options: Any,
) -> Forecast:
    """Plan a model, predict its speed on this machine, and do so over its range of budgets.

    Takes the options of `load` that decide a plan. Measures the machine if that was never done for
    this disk and these kernels. Raises as `load` does; a budget that cannot work at once.
    """
    opened, chosen = open_model(path), LoadOptions(**options)
    process = process_bytes(opened, measured=False)
    draft_bytes = planned_draft_bytes(draft_model, opened, chosen)
    process += draft_bytes
    whole = planner(opened, chosen, process, None)
    full = whole(2**62).full_bytes
    budget = resolve_budget(chosen.memory_budget, full, available_bytes())
    floor = whole(budget).floor_bytes
    profile, kept = _profile(opened, chosen.threads, on_progress)
    known = known_experts(opened)
    plan_for = planner(opened, chosen, process, profile, known)

    def predicted(plan: Plan) -> Prediction:
        misses = forecast_misses(known, plan.expert_slots, plan.prefill_tokens, plan.expert_sizes)
        chances = known.chances if known else None
        found = predict(plan, opened.spec, opened.manifest, profile, misses=misses, chances=chances)
        assert found is not None, "the profile was measured for this model"
        return found

    def drafting(plan: Plan, plain: Prediction) -> DraftForecast | None:
        known = load_acceptance(opened.manifest.files, plan)
        return forecast_drafting(plan, plain, known.mean if known.learnt else None)

    def point(nbytes: int) -> Point:
        plan = plan_for(nbytes)
        found = predicted(plan)
        drafts = drafting(plan, found)
        return Point(
            nbytes, plan.resident_bytes, plan.streamed_bytes, found.prefill_tok_s,
            found.decode_tok_s, drafts.decode_tok_s if drafts else 0.0, found.limit,
        )  # fmt: skip

    plan = plan_for(budget)
    budgets = sorted({floor + (full - floor) * i // (POINTS - 1) for i in range(POINTS)})
    found = predicted(plan)
    drafts = drafting(plan, found)
    curve = tuple(map(point, budgets))
    return Forecast(plan, found, curve, drafts, known, kept, draft_bytes)
