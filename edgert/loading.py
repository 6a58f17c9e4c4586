"""How much a model's process holds, and the plan that follows.

Owns: the memory of the process itself, measured or expected, and turning options into a plan. Must
not know how weights are read or text is made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from edgert.budget import resolve_budget, within_cgroup
from edgert.config import LoadOptions
from edgert.device_profile import DeviceProfile, load_profile
from edgert.errors import BudgetError, InputError, ModelError, UnsupportedError
from edgert.expert_profile import ExpertProfile, identity_of, load_expert_profile
from edgert.kernels_cpu.compiler import can_be_left_out, left_out
from edgert.machine import (
    available_bytes,
    default_threads,
    release_cache,
    resident_bytes,
    trim_heap,
)
from edgert.opening import Opened
from edgert.plan import Plan, PlanOptions, plan_memory
from edgert.plan_parts import Need
from edgert.storage.arena import absent_bytes
from edgert.storage.checksums import checksum_bytes
from edgert.units import MIB

__all__ = ["at_quality", "known_experts", "make_plan", "planner", "process_bytes"]

# What the process itself holds beside the arena: interpreter, NumPy, tokenizer, compiled kernels,
# and what they allocate while running. Measured 48 MiB after loading, and 109 where Numba and LLVM
# are in it; 59 in the worst case seen, an 8B in a small group. The plan takes the larger of this
# and what is measured, plus the growth allowed for.
PROCESS_BYTES = 60 * MIB
COMPILER_BYTES = 60 * MIB
GROWTH_BYTES = 16 * MIB
TOKEN_BYTES = 200  # of one vocabulary entry: 14 MB kept for 152k tokens, 53 MB while it is built


def process_bytes(opened: Opened, *, measured: bool) -> int:
    """What the process holds beside the arena; `measured` once everything is loaded.

    Engines that are open already are part of it, with all that they may use.
    """
    expected = PROCESS_BYTES + TOKEN_BYTES * opened.spec.vocab_size
    if not (left_out() if measured else can_be_left_out()):
        expected += COMPILER_BYTES
    if measured:
        trim_heap()
        release_cache()
        expected = max(expected, resident_bytes() + absent_bytes())
    return expected + GROWTH_BYTES


def known_experts(opened: Opened) -> ExpertProfile | None:
    """What earlier runs learnt of the model's experts. Raises `ModelError` for another model's."""
    if not opened.spec.is_moe:
        return None
    return load_expert_profile(identity_of(opened.spec, opened.manifest))


def planner(
    opened: Opened,
    options: LoadOptions,
    process: int,
    profile: DeviceProfile | None,
    known: ExpertProfile | None = None,
    needs: dict[int, Need] | None = None,
) -> Callable[[int], Plan]:
    """A function from a budget in bytes to the plan for these options.

    `needs` keeps what was measured of the model, also for another process or profile.
    """
    chances = None if known is None else known.chances
    needs = {} if needs is None else needs
    checksums = checksum_bytes(opened.manifest) if options.verify_checksums else 0

    def plan_for(budget: int) -> Plan:
        wanted = PlanOptions(
            budget_bytes=budget,
            threads=options.threads or default_threads(),
            context_length=options.context_length,
            prefill_tokens=options.prefill_tokens,
            kv_cache_type=options.kv_cache_type,
            checksum_bytes=checksums,
        )
        try:
            return plan_memory(
                opened.spec, opened.manifest, wanted, process, needs, profile, chances
            )
        except (ModelError, UnsupportedError) as error:
            raise type(error)(f"{opened.path}: {error}") from None

    return plan_for


def at_quality(
    opened: Opened, options: LoadOptions, process: int, *, here: bool = False
) -> tuple[Opened, LoadOptions]:
    """The model that `options.quality_bits` asks for, and the options to load it with.

    "auto" takes the widest that needs no streaming, or else the narrowest; a share of the budget is
    then one of the whole model. `here`: as of `make_plan`. Raises `InputError` for bits that the
    model does not have.
    """
    bits, manifest = options.quality_bits, opened.manifest
    if bits is None or bits == 8:
        return opened, options
    if not manifest.base_bits:
        raise InputError(
            f"{opened.path} is not nested, so it has no top {bits} bits; make it one with "
            "edgert pack --nested"
        )
    models = {b: replace(opened, manifest=manifest.base(b)) for b in manifest.base_bits}
    if bits != "auto":
        if bits not in models:
            has = ", ".join(map(str, models))
            raise InputError(f"{opened.path} has {has} top bits or all of them (8), not {bits}")
        return models[int(bits)], options
    full = planner(opened, options, process, None)(sys.maxsize).full_bytes
    budget = resolve_budget(options.memory_budget, full, available_bytes())
    budget = within_cgroup(budget) if here else budget
    options = replace(options, memory_budget=budget)
    for model in (opened, *reversed(models.values())):
        with suppress(BudgetError):
            if not planner(model, options, process, None)(budget).streamed_bytes:
                break
    return model, options


def make_plan(opened: Opened, options: LoadOptions, process: int, *, here: bool = False) -> Plan:
    """The plan for these options. Raises `BudgetError`, `ContextError`, `ModelError`.

    `here`: for this process, whose cgroup may have less than was asked for.
    """
    profile = load_profile(opened.manifest.files, options.threads or default_threads())
    known = known_experts(opened)
    needs: dict[int, Need] = {}
    plan_for = planner(opened, options, process, profile, known, needs)
    asked = options.memory_budget
    needs_full = asked is None or (isinstance(asked, str) and "%" in asked)
    full = plan_for(sys.maxsize).full_bytes if needs_full else 0
    budget = resolve_budget(asked, full, available_bytes())
    if not here:
        return plan_for(budget)
    budget = within_cgroup(budget)
    plan = plan_for(budget)
    # What planning leaves in the process counts too: some MiB, of packs of 4 and 8 GB.
    held = process_bytes(opened, measured=True)
    if held <= process:
        return plan
    del plan  # its memory serves the next one
    return planner(opened, options, held, profile, known, needs)(budget)
