"""Tiles in memory: where each lies, how it gets there, and what compiled code is told of it.

Owns: the resident region: tiles, and bases of nested ones. Must not know who reads nor when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from edgert.elastic import Unit, units_of
from edgert.kernels_cpu.layout import TILE_ROWS, tile_bytes
from edgert.kernels_cpu.matmul import takes_parts
from edgert.kernels_cpu.program import Experts, Matrix, Segment
from edgert.models.graph import WeightSource
from edgert.placing import place_addresses, place_base, place_refined, place_rows
from edgert.plan import Plan
from edgert.plan_parts import TilePlan
from edgert.quant.formats import QuantFormat
from edgert.storage.manifest import Extent, Manifest, TensorEntry
from edgert.storage.reader import parts_bytes
from edgert.storage.streamer import Tile
from edgert.timeline import Span, place_in_file
from edgert.units import align_up

__all__ = ["DraftWeights", "TileMemory"]

_Bytes = npt.NDArray[np.uint8]
_ADDRESS_BYTES = 8


class TileMemory:
    """The resident region of an engine, laid out for good by the plan it was opened with."""

    def __init__(self, manifest: Manifest, opened: Plan, region: _Bytes, span: Span) -> None:
        self._manifest = manifest
        self._opened = opened
        self._region = region
        self._address = int(region.ctypes.data)
        self._span = span
        self._units = units_of(opened)
        self._sorted: tuple[Plan, dict[str, list[TilePlan]]] | None = None
        self._offsets: dict[tuple[str, int, bool, bool], int] = {}
        offset = 0
        for unit in self._units:
            tile = opened.tiles[unit.tile]
            self._offsets[tile.tensor, tile.first_row, tile.is_head, unit.is_base] = offset
            offset += unit.nbytes

    # ---- filling -------------------------------------------------------------------------------

    def units(self, plan: Plan) -> Iterator[tuple[Unit, TilePlan]]:
        """What a plan has in memory, with the tiles as they were when the engine was opened."""
        left = plan.region("resident").nbytes
        for unit in self._units:
            left -= unit.nbytes
            if left < 0:
                return
            yield unit, self._opened.tiles[unit.tile]

    def room(self, units: Sequence[tuple[Unit, TilePlan]]) -> _Bytes:
        """The bytes of `units`, some of a plan's that follow each other."""
        begin = self._at(units[0][1], units[0][0].is_base) if units else 0
        return self._region[begin : begin + sum(unit.nbytes for unit, _ in units)]

    def parts(self, unit: Unit, tile: TilePlan) -> Sequence[Extent]:
        """What is to be read for a unit."""
        return tile.extents[: tile.base.parts] if unit.is_base and tile.base else tile.extents

    def place(self, unit: Unit, tile: TilePlan, raw: Sequence[_Bytes]) -> None:
        """Write a unit to its place; `raw` is what `parts` names."""
        at = self._at(tile, unit.is_base)
        out = self._region[at : at + unit.nbytes]
        entry = self._manifest.tensors[tile.tensor]
        with self._span("place resident", _in_file(tile), unit.nbytes):
            if unit.is_base and tile.base:
                place_base(entry, tile.base.bits, tile.rows, raw, out)
            else:
                place_rows(entry, tile.rows, raw, out)

    def place_streamed(self, tile: TilePlan, raw: Sequence[_Bytes], slot: _Bytes) -> None:
        """Write a tile to its slot; `raw` is what its `reads` name."""
        entry = self._manifest.tensors[tile.tensor]
        with self._span("place tile", _in_file(tile), slot.nbytes):
            if tile.base is None:
                place_rows(entry, tile.rows, raw, slot)
                return
            at = self._at(tile, True)
            if _split(entry, tile):
                place_addresses(self._address + at, raw, slot)
                return
            base = self._region[at : at + tile.base.nbytes]
            place_refined(entry, tile.base.bits, tile.rows, base, raw, slot)

    def streamed(self, tile: TilePlan, alignment: int) -> Tile:
        """How a tile is streamed: put together in its slot, or in parts that stay as they are."""
        if not _split(self._manifest.tensors[tile.tensor], tile):
            return Tile(tile.stream_index, tile.reads, tile.nbytes)
        raw = align_up(parts_bytes(tile.reads, alignment), _ADDRESS_BYTES)
        return Tile(tile.stream_index, tile.reads, (1 + len(tile.reads)) * _ADDRESS_BYTES, raw)

    def _at(self, tile: TilePlan, is_base: bool) -> int:
        return self._offsets[tile.tensor, tile.first_row, tile.is_head, is_base]

    # ---- what compiled code is told ------------------------------------------------------------

    def matrix(self, plan: Plan, name: str) -> Matrix:
        """A matrix as its segments; neighbouring resident tiles are one segment."""

        def of(entry: TensorEntry, tile: TilePlan) -> Segment:
            tiles = -(-tile.rows // TILE_ROWS)
            if tile.stream_index >= 0:
                return Segment(tiles, 0, tile.stream_index, split=_split(entry, tile))
            return Segment(tiles, self._address + self._at(tile, False))

        return self._matrix(plan, name, of)

    def draft_matrix(self, plan: Plan, name: str) -> Matrix:
        """A matrix as what is in memory of it: whole tiles, else their bases."""

        def of(entry: TensorEntry, tile: TilePlan) -> Segment:
            fmt = entry.base_format(tile.base.bits) if tile.base else None
            at = self._address + self._at(tile, tile.base is not None)
            return Segment(-(-tile.rows // TILE_ROWS), at, format=fmt)

        return self._matrix(plan, name, of)

    def _matrix(
        self, plan: Plan, name: str, segment_of: Callable[[TensorEntry, TilePlan], Segment]
    ) -> Matrix:
        entry = self._manifest.tensors[name]
        segments: list[Segment] = []
        for tile in self._tiles_of(plan)[name]:
            segment = segment_of(entry, tile)
            last = segments[-1] if segments else None
            if last and _end(last, entry) == (segment.address, segment.format):
                segments[-1] = Segment(last.tiles + segment.tiles, last.address, format=last.format)
            else:
                segments.append(segment)
        return Matrix(entry.format, entry.shape[1], tuple(segments), name)

    def _tiles_of(self, plan: Plan) -> dict[str, list[TilePlan]]:
        """The tiles of each tensor, sorted once a plan: one of 8 GB has up to 16,000."""
        if self._sorted is not None and self._sorted[0] is plan:
            return self._sorted[1]
        found: dict[str, list[TilePlan]] = {}
        for tile in plan.tiles:
            found.setdefault(tile.tensor, []).append(tile)
        self._sorted = plan, found
        return found


def _end(segment: Segment, entry: TensorEntry) -> tuple[int, QuantFormat | None]:
    """Where the next tile of the same matrix and format would be; nowhere behind a streamed one."""
    if segment.stream_index >= 0:
        return -1, None
    fmt = segment.format or entry.format
    return segment.address + segment.tiles * tile_bytes(fmt, entry.shape[1]), segment.format


def _split(entry: TensorEntry, tile: TilePlan) -> tuple[int, ...]:
    """Bits of base and parts of a streamed tile that is computed from them; empty for others."""
    split = entry.split(tile.base.bits) if tile.base else ()
    return split if takes_parts(entry.format, split) else ()


def _in_file(tile: TilePlan) -> int:
    return place_in_file(tile.extents[0].file_index, tile.extents[0].offset)


class DraftWeights:
    """The weights a model drafts with: everything but the matrices is the same."""

    def __init__(self, weights: WeightSource, tiles: TileMemory, plan: Plan) -> None:
        self._weights = weights
        self._tiles = tiles
        self._plan = plan

    def vector(self, name: str) -> int:
        """As `WeightSource.vector`."""
        return self._weights.vector(name)

    def matrix(self, name: str) -> Matrix:
        """As `WeightSource.matrix`: what is in memory of it."""
        return self._tiles.draft_matrix(self._plan, name)

    def experts_of(self, layer: int) -> Experts:
        """As `WeightSource.experts_of`."""
        return self._weights.experts_of(layer)
