"""From what a person asks for to a budget in bytes.

Owns: sizes, shares and the default. Must not know how a budget is spent.
"""

from __future__ import annotations

import logging

from edgert.errors import InputError
from edgert.machine import cgroup_limit_bytes
from edgert.units import parse_bytes

__all__ = ["resolve_budget", "within_cgroup"]

_LOG = logging.getLogger(__name__)


def resolve_budget(asked: int | str | None, full_bytes: int, available: int) -> int:
    """The budget in bytes: a number, a size such as "1.5GiB", or "50%" of `full_bytes`.

    `full_bytes` is the budget at which the whole model is in memory, so "100%" always suffices.
    None means what is free (`available`), but no more than the model can use. Raises `InputError`
    for anything that is no size.
    """
    if asked is None:
        return min(available, full_bytes)
    if isinstance(asked, str) and asked.strip().endswith("%"):
        return max(1, int(full_bytes * _share(asked)))
    nbytes = parse_bytes(asked) if isinstance(asked, str) else int(asked)
    if nbytes < 1:
        raise InputError(f"a memory budget of {asked} is not a size; give one like 1.5GiB or 50%")
    return nbytes


def within_cgroup(budget: int) -> int:
    """The budget, or the limit of the enclosing cgroup with a warning where that is smaller."""
    limit = cgroup_limit_bytes()
    if limit is None or budget < limit + 4096:  # limits are whole pages
        return budget
    asked, granted = budget / 2**20, limit / 2**20
    _LOG.warning(
        "the cgroup's limit of %.1f MiB counts, not the budget of %.1f MiB", granted, asked
    )
    return limit


def _share(text: str) -> float:
    try:
        share = float(text.strip()[:-1]) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 100:
        raise InputError(f"{text!r} is not a share of the model; write one like 50%")
    return share
