"""Where every byte will live, decided before the first weight is read.

Owns: the budget arithmetic. `plan_memory` is pure: spec, manifest and options in, a frozen `Plan`
out, or `BudgetError` with the smallest budget that works. What the plan prints is what the engine
allocates. Must not know how bytes are read or used.

Regions: the process itself, the KV cache, activations, vectors and tables, resident tiles of the
matrices, the ring of slots for the streamed ones, slots for routed experts, read staging, reserve.

Which tiles stay. A dense pass reads its streamed tiles in one order for ever, so a cache that
evicts never hits and the best is to keep what fits. Resident tiles are spread evenly between the
streamed ones: the disk then sees an even demand and a short ring is enough. The output head comes
first, so that a pass never ends in streamed tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgert.device_profile import DeviceProfile
from edgert.errors import BudgetError, ContextError
from edgert.models.spec import ModelSpec
from edgert.plan_nested import keep_bases
from edgert.plan_parts import Need, Sizes, TilePlan, measure, need_of
from edgert.plan_policy import (
    USUAL,
    ExpertLoad,
    fastest_expert_pass,
    fastest_pass,
    rates_of,
    requests_for,
)
from edgert.plan_records import Plan, PlanOptions, Region
from edgert.plan_regions import Held, Kept, Shape, record, total_bytes
from edgert.plan_resident import choose_resident
from edgert.storage.manifest import Manifest
from edgert.units import MIB

__all__ = ["Layout", "Plan", "PlanOptions", "Region", "plan_memory"]

# Each takes some 400 bytes of the process in a plan: 8 GB in tiles of 128 KiB would be 25 MB, for a
# smallest budget that is 1 MiB lower.
_MOST_TILES = 1 << 14
_CONTEXTS = (4096, 2048, 1024, 512, 256)
_COMFORT = 6  # activations, ring and staging may take 1/6 of what is left beside the process
_CONTEXT_SHARE = 8  # and a KV cache nobody asked for 1/8
_SHORT = 1024  # tokens of context below which one that nobody asked for is not cut for wide bases
_RING_TILES = 3  # no ring turns with fewer: they are kept, whatever it takes
_ENOUGH_TOKENS = 16  # a pass of fewer is only worth its memory when weights are streamed anyway

# From comfortable to frugal. Of six threads four read and two repack (storage/README.md). At 1 GB/s
# tiles of 1 MiB do as well as larger ones; of a disk at 2.1 GB/s ten slots of 1 MiB reached 83 % in
# the median, ten of 1.5 MiB 95 and twelve of 2 MiB 97, in 16, 24 and 36 MiB (8B Q4_0 at 75 %).
_SHAPES = (
    Shape(256, 10, 3 * MIB // 2, 6), Shape(128, 10, 3 * MIB // 2, 6),
    Shape(64, 10, 3 * MIB // 2, 6),
    Shape(32, 12, MIB // 2, 4), Shape(16, 8, MIB // 4, 4), Shape(8, 6, MIB // 4, 3),
    Shape(1, 4, MIB // 8, 2),
)  # fmt: skip


# Of a nested tile half is read, or less: larger ones make up for it. 4 GB at 60 %, without drafts,
# disk at 2.0 to 2.4 GB/s: 1.11 tok/s with 8 slots of 2.5 MiB, 0.86 and 0.91 with ten of 1.5, 1.17
# and 1.04 with ten of 3 MiB, in 30. The ring then has 16 slots for halves.
_NESTED_SLOTS, _NESTED_GROWTH = 8, 5 / 3
# Where bases fit but for some MiB. With tiles of 512 KiB, of which 64 and 256 are read, the readers
# took 0.24 of two cores (4 GB at 45 %, 3 bits, 1 GB/s).
_NESTED_TIGHT = Shape(48, 8, 3 * MIB // 2, 5)


def plan_memory(
    spec: ModelSpec,
    manifest: Manifest,
    options: PlanOptions,
    process_bytes: int,
    needs: dict[int, Need] | None = None,
    profile: DeviceProfile | None = None,
    chances: npt.NDArray[np.float64] | None = None,
) -> Plan:
    """Lay out every byte edgert will hold. Pure.

    `process_bytes`: interpreter, libraries, compiled kernels and tokenizer, as measured or
    expected. `needs` keeps what was measured of this model for a second plan with the same threads
    and KV cache type. `profile` decides how long a pass and how large a read pay where weights are
    streamed; without one, the rates of a usual small machine do. `chances`: how likely a token uses
    each expert, (layers, experts), where that is known. Raises `BudgetError` with the
    table of the smallest plan when the budget cannot hold it, `ContextError` when more context is
    asked for than the model was made for.
    """
    longest = spec.max_position_embeddings
    asked = options.context_length
    if asked is not None and asked > longest:
        raise ContextError(
            asked, longest, f"a context of {asked:,} tokens is more than this model was made for: "
            f"{longest:,}; lower --ctx-size to that or less"
        )  # fmt: skip
    contexts = _choices(options.context_length, _CONTEXTS, longest)
    fixed = options.prefill_tokens
    shapes = [
        replace(shape, tokens=min(shape.tokens if fixed is None else fixed, longest))
        for shape in _suited(_SHAPES, profile, manifest)
    ]
    needs = {} if needs is None else needs
    given = process_bytes + options.checksum_bytes
    layout = Layout(spec, manifest, options, given, needs, chances)
    nothing = replace(options, budget_bytes=0)
    smallest = Layout(spec, manifest, nothing, given, needs)
    full_bytes = layout.bytes_of(contexts[0], shapes[0], everything=True)
    ways = (False, True)  # to hold matrices in as little as possible: streamed, or resident
    least = [smallest.bytes_of(contexts[-1], shapes[-1], keep_dense=way) for way in ways]
    floor_bytes = min(least)
    if options.budget_bytes < floor_bytes:
        hint = "" if options.context_length is None else "a shorter --ctx-size needs less"
        keep_dense = least[1] < least[0]
        frugal = smallest.plan(contexts[-1], shapes[-1], keep_dense=keep_dense)
        table = replace(frugal, budget_bytes=options.budget_bytes).table()
        raise BudgetError(options.budget_bytes, floor_bytes, table, hint)
    chosen = _choose(layout, contexts, shapes, profile)
    assert chosen.total_bytes <= options.budget_bytes
    return replace(chosen, floor_bytes=floor_bytes, full_bytes=full_bytes)


def _choices(asked: int | None, usual: Sequence[int], most: int) -> list[int]:
    if asked is not None:
        return [asked]
    return sorted({min(value, most) for value in usual}, reverse=True)


def _suited(
    shapes: Sequence[Shape], profile: DeviceProfile | None, manifest: Manifest
) -> list[Shape]:
    """The shapes with the requests that the device wants, and not too many tiles."""
    tile_bytes, readers = requests_for(profile)
    least = manifest.tensor_bytes // _MOST_TILES
    slots = _SHAPES[0].slots
    if manifest.base_bits:
        tile_bytes, slots = int(tile_bytes * _NESTED_GROWTH), _NESTED_SLOTS
        shapes = sorted((*shapes, _NESTED_TIGHT), key=lambda shape: -shape.tokens)
    return [
        replace(shape, tile_bytes=tile_bytes, readers=readers, slots=slots)
        if (shape.tile_bytes, shape.readers) == USUAL
        else replace(shape, tile_bytes=max(shape.tile_bytes, least))
        for shape in shapes
    ]


def _choose(
    layout: Layout,
    contexts: Sequence[int],
    shapes: Sequence[Shape],
    profile: DeviceProfile | None,
) -> Plan:
    """The most comfortable plan that fits: everything resident if at all possible.

    Candidates are compared by their sums; tiles are laid out for the one that is taken. (Laying
    out every candidate of an 8B model took 5 to 6 s.)
    """
    budget = layout.options.budget_bytes
    room = budget - layout.given_bytes
    widths = sorted(layout.need(shapes[0].tile_bytes).bases, reverse=True)
    for everything, bits in ((True, 0), *((False, bits) for bits in (*widths, 0))):
        for context in contexts:
            if bits and bits != widths[-1] and _SHORT > context != contexts[0]:
                continue  # rather fewer bits
            for shape in shapes:
                sums = layout.sums(context, shape, everything, bits)
                modest = sums.comfort_bytes <= room // _COMFORT
                modest &= context == contexts[-1] or sums.kv_bytes <= room // _CONTEXT_SHARE
                if sums.total_bytes > budget or not (
                    modest or (everything and shape.tokens >= _ENOUGH_TOKENS)
                ):
                    continue
                if not everything:
                    shape = layout.with_fastest_pass(context, shape, profile, bits)
                plan = layout.plan(context, shape, everything=everything)
                if plan.total_bytes <= budget:
                    return plan
    return layout.plan(contexts[-1], layout.with_fastest_pass(contexts[-1], shapes[-1], profile))


@dataclass(frozen=True, slots=True)
class _Sums:
    """What a candidate would take, without its layout."""

    total_bytes: int  # at least
    kv_bytes: int
    comfort_bytes: int  # activations, ring and staging
    streamed_bytes: int  # about; in memory


class Layout:
    """Lays out one model for given sizes. Pure; what is measured once is kept."""

    def __init__(
        self,
        spec: ModelSpec,
        manifest: Manifest,
        options: PlanOptions,
        given_bytes: int,
        needs: dict[int, Need],
        chances: npt.NDArray[np.float64] | None = None,
    ) -> None:
        self.spec = spec
        self.manifest = manifest
        self.options = options
        self.given_bytes = given_bytes  # the process and checksums
        self._needs = needs
        self._chances = chances
        self._sizes: dict[tuple[int, int, int], Sizes] = {}

    def need(self, tile_bytes: int) -> Need:
        """The model cut into tiles of about `tile_bytes`."""
        if tile_bytes not in self._needs:
            threads, kv = self.options.threads, self.options.kv_cache_type
            self._needs[tile_bytes] = need_of(self.spec, self.manifest, threads, kv, tile_bytes)
        return self._needs[tile_bytes]

    def sizes(self, context: int, shape: Shape) -> Sizes:
        """What depends on context and pass."""
        key = (context, shape.tokens, shape.tile_bytes)
        if key not in self._sizes:
            self._sizes[key] = measure(self.need(shape.tile_bytes), context, shape.tokens)
        return self._sizes[key]

    def sums(self, context: int, shape: Shape, everything: bool, bits: int = 0) -> _Sums:
        """What `plan` takes for these sizes, or a little less; with a base of `bits` of all."""
        need = self.need(shape.tile_bytes)
        sizes = self.sizes(context, shape)
        reading = shape.readers * need.staging_bytes + need.row_bytes
        fixed = self.given_bytes + sizes.kv_bytes + sizes.activation_bytes + sizes.table_bytes
        fixed += need.vector_bytes + reading
        slots = need.expert_count if everything else min(need.expert_count, need.experts_per_token)
        fixed += need.slots_bytes(slots) + (need.embedding_bytes if everything else 0)
        window = base = 0
        if everything or fixed + need.tile_bytes <= self.options.budget_bytes:
            fixed += need.tile_bytes
        else:
            window = shape.slots * need.slot_bytes + (reading if need.experts else 0)
            base = need.bases[bits] if bits else 0
        comfort = sizes.activation_bytes + reading + window
        total = fixed + window + base
        left = self.options.budget_bytes - total + base
        streamed = max(need.tile_bytes - left, 0) if window else 0
        return _Sums(total, sizes.kv_bytes, comfort, streamed)

    def with_fastest_pass(
        self, context: int, shape: Shape, profile: DeviceProfile | None, bits: int = 0
    ) -> Shape:
        """The shape with as many tokens in a pass as pay; unchanged where the caller chose them."""
        need = self.need(shape.tile_bytes)
        if self.options.prefill_tokens is not None:
            return shape

        def streamed(tokens: int) -> int | None:
            found = self.sums(context, replace(shape, tokens=tokens), False, bits)
            return found.streamed_bytes if found.total_bytes <= self.options.budget_bytes else None

        def left(tokens: int) -> tuple[int, float] | None:
            found = self.sums(context, replace(shape, tokens=tokens), everything=False)
            room = self.options.budget_bytes - found.total_bytes
            slots = need.slots_within(need.slots_bytes(need.experts_per_token) + room)
            return (slots, found.streamed_bytes) if room >= 0 else None

        rates = rates_of(profile, self.options.threads)
        most = min(context, self.spec.max_position_embeddings)
        if need.experts:
            tokens = fastest_expert_pass(left, self._expert_load(need), rates)
        else:
            tokens = fastest_pass(streamed, need.tile_bytes, need.weights, rates)
        return shape if tokens is None else replace(shape, tokens=min(tokens, most))

    def _expert_load(self, need: Need) -> ExpertLoad:
        layers, k = len(need.experts), self.spec.num_experts_per_tok
        each = need.slots_bytes(need.expert_count) // need.expert_count
        return ExpertLoad.of(layers, self.spec.num_experts, k, each, self._chances)

    def bytes_of(
        self, context: int, shape: Shape, *, everything: bool = False, keep_dense: bool = False
    ) -> int:
        """What `plan` takes with everything resident, or where the budget is nothing."""
        need = self.need(shape.tile_bytes)
        ring = min(shape.slots, need.n_tiles - 1)
        if everything:
            held = Held(need.tile_bytes, 0, need.expert_count, True)
        elif keep_dense or need.n_tiles < _RING_TILES:
            held = Held(need.tile_bytes, 0, _least_experts(need), False)
        else:
            held = Held(0, ring, _least_experts(need), False)
        sizes = self.sizes(context, shape)
        return total_bytes(need, self.options, self.given_bytes, shape, sizes, held)

    def plan(
        self, context: int, shape: Shape, *, everything: bool = False, keep_dense: bool = False
    ) -> Plan:
        """The plan of these sizes. With `everything` all weights are resident whatever it takes,
        with `keep_dense` all but routed experts; without, they fill the budget, and the plan has
        its smallest size when that is too little.
        """
        need = self.need(shape.tile_bytes)
        sizes, tiles = self.sizes(context, shape), need.tiles
        if everything:
            kept = Kept(tiles, (True,) * len(tiles), None, 0, need.expert_count, True)
        else:
            reading = shape.readers * need.staging_bytes
            fixed = self.given_bytes + sizes.kv_bytes + sizes.activation_bytes + sizes.table_bytes
            fixed += need.vector_bytes + need.row_bytes + reading
            room = self.options.budget_bytes - fixed
            kept = _keep(need, tiles, room, shape.slots, reading, keep_dense)
        return record(need, self.options, self.given_bytes, shape, sizes, context, kept)


def _least_experts(need: Need) -> int:
    """Slots for experts without which no layer can be computed."""
    return min(need.expert_count, need.experts_per_token)


def _keep(
    need: Need, tiles: tuple[TilePlan, ...], room: int, slots: int, reading: int, keep_dense: bool
) -> Kept:
    """What stays in `room` bytes: tiles of the matrices first, then as many experts as fit."""
    window = slots * need.slot_bytes + (reading if need.experts else 0)
    least = _least_experts(need)
    room -= need.slots_bytes(least)
    bases = None
    if keep_dense or need.tile_bytes <= room:
        resident = (True,) * len(tiles)
    elif need.bases and (bases := keep_bases(tiles, room - window, slots)):
        resident = tuple(base is None for base in bases)
    else:
        resident = choose_resident(tiles, max(room - window, 0), slots)
    streamed = resident.count(False)
    if streamed < _RING_TILES:
        resident, bases, streamed = (True,) * len(tiles), None, 0
    slots = min(slots, max(streamed - 1, 0))
    room -= sum(t.nbytes for t, keep in zip(tiles, resident, strict=True) if keep)
    room -= window if streamed else 0
    experts = need.slots_within(need.slots_bytes(least) + max(room, 0))
    return Kept(tiles, resident, bases, slots, experts, False)
