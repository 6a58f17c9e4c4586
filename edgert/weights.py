"""The weights of an open model: resident ones in the arena, streamed ones on their way.

Owns: executing a plan's placement: loading vectors, resident tiles and token rows, and running the
streamers. Gives the graph its matrices by name. Must not know what follows what in a forward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.elastic import Rooms, Unit, elastic_bytes
from edgert.kernels_cpu import rows
from edgert.kernels_cpu.layout import TILE_ROWS
from edgert.kernels_cpu.program import Experts, ExpertShape, Matrix
from edgert.models.graph import WeightSource
from edgert.placing import place_part, room_of
from edgert.plan import Plan
from edgert.plan_parts import Need, TilePlan
from edgert.quant.reference import dequantize_ref
from edgert.storage.arena import Arena
from edgert.storage.backend import Backend, aligned_range
from edgert.storage.checksums import CheckedBackend
from edgert.storage.device import measure_read_rate
from edgert.storage.expert_policy import policy_for
from edgert.storage.expert_streamer import ExpertStreamer
from edgert.storage.manifest import Extent, Manifest
from edgert.storage.pages import being_touched
from edgert.storage.reader import ReaderTeam
from edgert.storage.streamer import Streamer
from edgert.storage.window import Window
from edgert.tile_memory import DraftWeights, TileMemory
from edgert.timeline import Span, no_span
from edgert.units import align_up

__all__ = ["Weights"]

_EMBED_ROWS = 16  # dequantised at once

Progress = Callable[[int, int], object]  # bytes done, bytes to do
_Bytes = npt.NDArray[np.uint8]
_PAGE = 4096
_BURST_SECONDS = 0.1


class Weights:
    """All weights of one model under one plan. `open` before use, `close` after; not reusable."""

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        need: Need,
        plan: Plan,
        arena: Arena,
        rooms: Rooms | None = None,
        span: Span = no_span,
    ) -> None:
        """`rooms`: addresses to keep so that `resize` can follow other plans."""
        self._span = span
        self._manifest = manifest
        self._need = need
        self._plan = plan
        self._arena = arena
        self._vectors: dict[str, npt.NDArray[np.float32]] = {}
        self._lock = threading.Lock()
        self.read_bytes = 0  # of everything but the streamers: loading, token rows
        self._busy_ns = 0  # of streamers that were replaced
        self.streamer: Streamer | None = None
        self.experts: ExpertStreamer | None = None
        sizes = elastic_bytes(plan)
        spaces = {
            name: arena.take(name, nbytes, _PAGE, room=getattr(rooms, name) if rooms else nbytes)
            for name, nbytes in sizes.items()
        }
        self._embedding = spaces["embedding"]
        self._window, self._expert_window = spaces["window"], spaces["experts"]
        self._staging = [
            arena.take(f"staging {i}", plan.staging_bytes, _PAGE)
            for i in range(plan.reader_threads)
        ]
        more = spaces["staging"]  # of the ring, where experts have their own readers beside it
        self._ring_staging = [
            more[i : i + plan.staging_bytes] for i in range(0, more.nbytes, plan.staging_bytes)
        ] or self._staging
        entry = manifest.tensors["token_embd.weight"]
        row_bytes = entry.format.row_bytes(entry.shape[1])
        self._row = arena.take("token row", align_up(row_bytes + 2 * _PAGE, _PAGE), _PAGE)
        self._vector_space = arena.take("vectors", need.vector_bytes, 64)
        checksums = arena.take("checksums", plan.region("checksums").nbytes)
        self._backend = backend
        if checksums.nbytes:
            self._backend = CheckedBackend(backend, manifest, checksums.view(np.uint32))
        self._tiles = TileMemory(manifest, plan, spaces["resident"], span)

    # ---- opening -------------------------------------------------------------------------------

    def open(self, progress: Progress | None = None) -> None:
        """Read everything resident, then start the streamers. Raises `StorageError`."""
        self._load_vectors()
        self._load_tiles(list(self._tiles.units(self._plan)), progress)
        if self._plan.embedding_resident:
            self._load_embedding(progress)
        self._make_streamers()
        self.reset()

    def measure_device(self, seconds: float) -> float:
        """Bytes per second the device delivers to the reader threads, with their own buffers.

        The streamers stand still from here on, until `reset`.
        """
        for stream in self._streams:
            stream.halt()
        rates = [
            measure_read_rate(
                self._backend,
                request_bytes=self._plan.staging_bytes,
                threads=self._plan.reader_threads,
                seconds=length,
                staging=self._staging,
            )
            # A throttled disk grants a burst after a rest: the first tenth does not count.
            for length in (_BURST_SECONDS, seconds)
        ]
        return rates[1]

    def _load_tiles(
        self, units: Sequence[tuple[Unit, TilePlan]], progress: Progress | None
    ) -> None:
        """Read and place what is to be resident."""
        team = ReaderTeam(self._backend, self._staging, "edgert-load")
        placed = SimpleQueue[int]()
        left = iter(units)

        def take() -> tuple[Sequence[Extent], tuple[Unit, TilePlan]] | None:
            with team.lock:
                unit = None if team.stopping else next(left, None)
            return None if unit is None else (self._tiles.parts(*unit), unit)

        def place(unit: tuple[Unit, TilePlan], raw: list[_Bytes]) -> None:
            self._tiles.place(*unit, raw)
            placed.put(unit[0].nbytes)

        total, done, count = sum(unit.nbytes for unit, _ in units), 0, 0
        try:
            with being_touched(self._tiles.room(units)):
                team.start_pipeline(take, place)
                while count < len(units) and not team.failed[0]:
                    with suppress(Empty):  # a failure is looked for now and then
                        done += placed.get(timeout=0.1)
                        count += 1
                        if progress:
                            progress(done, total)
        finally:
            team.stopping = True
            team.join()
            self.read_bytes += team.read_bytes
        team.raise_if_failed()

    def _read(self, extent: Extent, into: _Bytes | None = None) -> _Bytes:
        """The exact bytes of an extent, as a view that lasts until the next read."""
        staging = self._staging[0] if into is None else into
        offset, nbytes, skip = aligned_range(extent, self._backend.alignment)
        self._backend.read_into(extent.file_index, offset, staging[:nbytes].data)
        with self._lock:
            self.read_bytes += nbytes
        return staging[skip : skip + extent.nbytes]

    def _load_vectors(self) -> None:
        at = 0
        for need in self._need.needs.values():
            if need.kind != "vector":
                continue
            entry = self._manifest.tensors[need.name]
            length = need.shape[-1]
            nbytes = align_up(4 * align_up(length, TILE_ROWS), 64)
            vector = self._vector_space[at : at + nbytes].view(np.float32)
            vector[:length] = dequantize_ref(entry.format, self._read(entry.extent))
            self._vectors[need.name] = vector
            at += nbytes

    def _load_embedding(self, progress: Progress | None) -> None:
        extent = self._manifest.tensors["token_embd.weight"].extent
        step = self._plan.staging_bytes - 2 * _PAGE
        for at in range(0, extent.nbytes, step):
            part = Extent(extent.file_index, extent.offset + at, min(step, extent.nbytes - at))
            self._embedding[at : at + part.nbytes] = self._read(part)
            if progress:
                progress(at + part.nbytes, extent.nbytes)

    def _make_streamers(self) -> None:
        """Both streamers of the plan as it is; `reset` sets them going."""
        plan = self._plan
        self.streamer = self._dense_streamer(plan)
        if plan.expert_slots:
            spec, records = self._need.spec, self._need.experts
            shape = (spec.num_hidden_layers, spec.num_experts)
            self.experts = ExpertStreamer(
                self._backend,
                lambda layer, expert: records[layer].extents(expert),
                shape, self._slots_of(plan), self._staging, self._place_expert,
                policy_for("auto", shape, spec.num_experts_per_tok),
                record_bytes=self._need.record_bytes, room=self._expert_room,
            )  # fmt: skip

    def _dense_streamer(self, plan: Plan) -> Streamer | None:
        streamed = [t for t in plan.tiles if t.stream_index >= 0]
        if not streamed:
            return None
        return Streamer(
            self._backend,
            [self._tiles.streamed(t, self._backend.alignment) for t in streamed],
            Window(self._window[: plan.slots * plan.slot_bytes], plan.slot_bytes),
            self._ring_staging,
            lambda tile, raw, slot: self._tiles.place_streamed(streamed[tile.index], raw, slot),
        )

    def _slots_of(self, plan: Plan) -> Window:
        sizes = self._need.slot_sizes[: plan.expert_slots]
        return Window(self._expert_window[: sizes.sum()], sizes)

    # ---- another plan --------------------------------------------------------------------------

    def under(self, plan: Plan) -> Weights:
        """The same weights as `matrix` will give them under another plan."""
        other = copy(self)
        other._plan = plan
        return other

    def resize(self, plan: Plan, progress: Progress | None = None) -> None:
        """Keep in memory what `plan` says, made by `elastic.resized` from the plan of opening.

        Between two passes only; `describe` again after it, and `reset` before the next pass. Reads
        what becomes resident; `progress` may raise to end that. After any error all is as it was.
        """
        before, old = self._plan, self.streamer
        new = self._dense_streamer(plan)
        for stream in self._streams:
            stream.halt()
        arena_bytes = self._arena.nbytes
        more = sum(elastic_bytes(plan).values()) - sum(elastic_bytes(before).values())
        try:
            self._move_ends(plan, arena_bytes + more)
            had = sum(1 for _ in self._tiles.units(before))
            self._load_tiles(list(self._tiles.units(plan))[had:], progress)
            if plan.embedding_resident and not before.embedding_resident:
                self._load_embedding(progress)
        except BaseException:
            # Only a larger budget reads, and it takes no weight away that a smaller one has.
            self._move_ends(before, arena_bytes)
            if new is not None:
                new.close()
            raise
        self._plan, self.streamer = plan, new
        if old is not None:
            old.close()
            self.read_bytes += old.read_bytes
            self._busy_ns += old.busy_ns

    def _move_ends(self, plan: Plan, arena_bytes: int) -> None:
        """Give the elastic regions the sizes of `plan`: first those that shrink."""
        have = {r.name: r.nbytes for r in self._arena.regions}
        sizes = elastic_bytes(plan)
        self._arena.nbytes = max(self._arena.nbytes, arena_bytes)
        for name in sorted(sizes, key=lambda name: sizes[name] - have[name]):
            self._arena.resize(name, sizes[name])
        self._arena.nbytes = arena_bytes
        if self.experts is not None:
            self.experts.resize(self._slots_of(plan))

    def _place_expert(self, layer: int, expert: int, part: int, raw: _Bytes, slot: _Bytes) -> None:
        with self._span("place expert", layer, expert):
            record = self._need.experts[layer].record(expert)
            place_part(record.parts[part], self._manifest, raw, slot)

    def _expert_room(self, layer: int, expert: int, part: int, slot: _Bytes) -> _Bytes | None:
        record = self._need.experts[layer].record(expert)
        return room_of(record.parts[part], record.nbytes, expert, slot)

    # ---- what the graph asks for ---------------------------------------------------------------

    def vector(self, name: str) -> int:
        """Address of a float32 vector, zero-padded to whole groups of 16."""
        return int(self._vectors[name].ctypes.data)

    def vector_values(self, name: str) -> npt.NDArray[np.float32]:
        """The values of a vector, for tables computed once."""
        length = self._need.needs[name].shape[-1]
        return self._vectors[name][:length]

    def matrix(self, name: str) -> Matrix:
        """A matrix as its segments."""
        return self._tiles.matrix(self._plan, name)

    def for_drafting(self) -> WeightSource | None:
        """The weights to draft with, or None where something is not in memory at all."""
        return DraftWeights(self, self._tiles, self._plan) if self._plan.can_draft else None

    def experts_of(self, layer: int) -> Experts:
        """Formats and offsets of a layer's experts."""
        spec = self._need.spec
        records = tuple(
            ExpertShape(*record.formats, record.up_offset, record.down_offset)
            for record in self._need.experts[layer].records
        )
        return Experts(spec.hidden_size, spec.moe_intermediate_size, records)

    def embed(self, tokens: Sequence[int], out: npt.NDArray[np.float32]) -> None:
        """Write the embeddings of `tokens` to the first rows of `out`, float32 (n, >= hidden): read
        from flash row by row, unless they are resident.
        """
        entry = self._manifest.tensors["token_embd.weight"]
        row_bytes, hidden = entry.format.row_bytes(entry.shape[1]), entry.shape[1]
        table = self._embedding[: entry.extent.nbytes].reshape(-1, row_bytes)
        first = {token: i for i, token in reversed([*enumerate(tokens)])}
        new = sorted(first.values())
        # A few at a time: of 512 rows of 4096 the temporaries are 18 MiB, in no plan.
        for some in (new[i : i + _EMBED_ROWS] for i in range(0, len(new), _EMBED_ROWS)):
            raw = np.empty((len(some), row_bytes), np.uint8)
            for row, i in zip(raw, some, strict=True):
                token = tokens[i]
                if self._plan.embedding_resident:
                    row[:] = table[token]
                else:
                    row[:] = self._read(entry.rows(token, token + 1), self._row)
            out[some, :hidden] = dequantize_ref(entry.format, raw)
        for i, token in enumerate(tokens):
            if first[token] < i:
                out[i, :hidden] = out[first[token], :hidden]

    def describe(self, streams: npt.NDArray[np.int64], work: dict[str, int]) -> None:
        """Write the addresses compiled code needs into the stream descriptor.

        `work` names the routing buffers of the run state.
        """
        counters = [rows.S_HITS, rows.S_MISSES, rows.S_CLOCK]  # stamps go on where they were
        kept = streams[counters]
        streams[:] = 0  # nothing may look at the flags of a ring that is gone
        streams[counters] = kept
        if self.streamer is not None:
            s = self.streamer
            streams[rows.S_READY] = s.ready.ctypes.data
            streams[rows.S_ADDRESS] = s.address.ctypes.data
            streams[rows.S_SLOT_OF] = s.slot_of.ctypes.data
            streams[rows.S_FREE_FD] = s.free_fd
            streams[rows.S_FAILED] = s.failed.ctypes.data
        if self.experts is not None:
            e = self.experts
            streams[rows.S_BOARD] = e.board.ctypes.data
            streams[rows.S_SLOT_ADDRESS] = e.slot_address.ctypes.data
            streams[rows.S_LAST_USED] = e.last_used.ctypes.data
            streams[rows.S_REQUEST_FD] = e.request_fd
            streams[rows.S_EXPERT_FAILED] = e.failed.ctypes.data
            streams[rows.S_HINTS] = e.prefetcher.board.ctypes.data
            streams[rows.S_GROUPS] = work["groups"]
            streams[rows.S_PAIR_TOKEN] = work["pair_token"]
            streams[rows.S_PAIR_ID] = work["pair_id"]
            streams[rows.S_WAVE] = work["wave"]
            streams[rows.S_WAVE_PAIRS] = work["wave_pairs"]

    # ---- running -------------------------------------------------------------------------------

    @property
    def _streams(self) -> list[Any]:
        return [s for s in (self.streamer, self.experts) if s is not None]

    @property
    def total_read_bytes(self) -> int:
        """Bytes read from flash so far by everything."""
        return int(self.read_bytes + sum(s.read_bytes for s in self._streams))

    @property
    def busy_ns(self) -> int:
        """Time during which a streamer had at least one read under way."""
        return int(self._busy_ns + sum(s.busy_ns for s in self._streams))

    def raise_if_failed(self) -> None:
        """Raise what a reader thread met."""
        for stream in self._streams:
            stream.raise_if_failed()

    def reset(self) -> None:
        """After a stopped or failed pass: the streamers begin again at the first tile."""
        for stream in self._streams:
            stream.reset()

    def close(self) -> None:
        """Stop the streamers. Idempotent."""
        for stream in self._streams:
            stream.close()
        self._vectors.clear()
