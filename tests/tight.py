"""Engines under budgets that are tight to the byte.

A plan counts the memory of the process as it is measured, which differs from run to run and is
large under pytest. Here it is a constant, so that a budget means the same plan every time and a
model of 3 MB can be made to stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import edgert
from edgert.opening import open_model
from edgert.plan import Plan, PlanOptions, plan_memory
from edgert.units import MIB

PROCESS = 100 * MIB


@contextmanager
def fixed_process(nbytes: int = PROCESS) -> Iterator[None]:
    """Within it, plans count `nbytes` for the process, on a machine that was never profiled."""
    with (
        mock.patch("edgert.loading.process_bytes", lambda opened, *, measured: nbytes),
        mock.patch("edgert.loading.load_profile", lambda files, threads: None),
    ):
        yield


def plan_of(path: Path, budget: int, **options: Any) -> Plan:
    """The plan of a model for a budget in bytes, two threads unless said otherwise."""
    opened = open_model(path)
    wanted = PlanOptions(budget, **({"threads": 2} | options))
    return plan_memory(opened.spec, opened.manifest, wanted, PROCESS)


@lru_cache
def _floor(path: Path, options: tuple[tuple[str, Any], ...]) -> int:
    return plan_of(path, 2**62, **dict(options)).floor_bytes


def floor_of(path: Path, **options: Any) -> int:
    """The smallest budget that works, in bytes."""
    return _floor(path, tuple(sorted(options.items())))


def tight(
    path: Path, spare: int | None = 0, *, backend: Any = None, timeline: Any = None, **options: Any
) -> edgert.Engine:
    """An engine with `spare` bytes more than it cannot do without; None: all it can use."""
    options = {"threads": 2, "context_length": 256} | options
    sizes = {k: v for k, v in options.items() if k != "verify_checksums"}
    budget = 2**62 if spare is None else floor_of(path, **sizes) + spare
    with fixed_process():
        return edgert.load(
            path, memory_budget=budget, backend=backend, timeline=timeline, **options
        )
