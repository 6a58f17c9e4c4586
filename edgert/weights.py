"""The weights of an open model: resident ones in the arena, streamed ones on their way.

Owns: executing a plan's placement: loading vectors, resident tiles and token rows, and running the
streamers. Gives the graph its matrices by name. Must not know what follows what in a forward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu import rows
from edgert.kernels_cpu.layout import TILE_ROWS, matrix_bytes, repack, tile_bytes
from edgert.kernels_cpu.program import Experts, Matrix, Segment
from edgert.plan import Plan
from edgert.plan_parts import Need, TilePlan, expert_parts
from edgert.quant.reference import dequantize_ref
from edgert.storage.arena import Arena
from edgert.storage.backend import Backend, aligned_range
from edgert.storage.device import measure_read_rate
from edgert.storage.expert_streamer import ExpertStreamer
from edgert.storage.manifest import Extent, Manifest
from edgert.storage.streamer import Streamer, Tile
from edgert.storage.window import Window
from edgert.units import align_up

__all__ = ["Weights"]

Progress = Callable[[int, int], object]  # bytes done, bytes to do
_Bytes = npt.NDArray[np.uint8]
_PAGE = 4096


class Weights:
    """All weights of one model under one plan. `open` before use, `close` after; not reusable."""

    def __init__(
        self, backend: Backend, manifest: Manifest, need: Need, plan: Plan, arena: Arena
    ) -> None:
        self._backend = backend
        self._manifest = manifest
        self._need = need
        self._plan = plan
        self._vectors: dict[str, npt.NDArray[np.float32]] = {}
        self._lock = threading.Lock()
        self.read_bytes = 0  # of everything but the streamers: loading, token rows
        self.streamer: Streamer | None = None
        self.experts: ExpertStreamer | None = None
        self._staging = [
            arena.take(f"staging {i}", plan.staging_bytes, _PAGE)
            for i in range(plan.staging_buffers)
        ]
        self._resident = arena.take("resident", plan.region("resident").nbytes, 64)
        self._embedding: _Bytes | None = None
        entry = manifest.tensors["token_embd.weight"]
        row_bytes = entry.format.row_bytes(entry.shape[1])
        self._row = arena.take("token row", align_up(row_bytes + 2 * _PAGE, _PAGE), _PAGE)
        if plan.embedding_resident:
            self._embedding = arena.take("embedding", entry.extent.nbytes, 64)
        self._vector_space = arena.take("vectors", need.vector_bytes, 64)
        self._window = arena.take("window", plan.slots * plan.slot_bytes, _PAGE)
        slots = plan.expert_slots * plan.expert_slot_bytes
        self._expert_window = arena.take("experts", slots, _PAGE)
        self._offsets: dict[tuple[str, int], int] = {}

    # ---- opening -------------------------------------------------------------------------------

    def open(self, progress: Progress | None = None) -> None:
        """Read everything resident, then start the streamers. Raises `StorageError`."""
        self._load_vectors()
        resident = [t for t in self._plan.tiles if t.stream_index < 0]
        total = sum(t.extent.nbytes for t in resident)
        offset = done = 0
        for tile in resident:
            self._offsets[tile.tensor, tile.first_row] = offset
            offset += tile.nbytes
        free = SimpleQueue[_Bytes]()
        for buffer in self._staging[: self._plan.reader_threads]:
            free.put(buffer)
        with ThreadPoolExecutor(self._plan.reader_threads, "edgert-load") as pool:
            for nbytes in pool.map(lambda tile: self._load_tile(tile, free), resident):
                done += nbytes
                if progress:
                    progress(done, total)
        if self._embedding is not None:
            self._load_embedding(self._embedding)
        self._start_streamers()

    def measure_device(self, seconds: float) -> float:
        """Bytes per second the device delivers to the reader threads, with their own buffers."""
        return measure_read_rate(
            self._backend,
            request_bytes=self._plan.staging_bytes,
            threads=self._plan.reader_threads,
            seconds=seconds,
            staging=self._staging,
        )

    def _load_tile(self, tile: TilePlan, free: SimpleQueue[_Bytes]) -> int:
        """Read and place one resident tile; its bytes in the file."""
        staging = free.get()
        try:
            at = self._offsets[tile.tensor, tile.first_row]
            self._place_tile(tile, self._read(tile.extent, staging), self._resident[at:])
        finally:
            free.put(staging)
        return tile.extent.nbytes

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

    def _load_embedding(self, space: _Bytes) -> None:
        extent = self._manifest.tensors["token_embd.weight"].extent
        step = self._plan.staging_bytes - 2 * _PAGE
        for at in range(0, extent.nbytes, step):
            part = Extent(extent.file_index, extent.offset + at, min(step, extent.nbytes - at))
            space[at : at + part.nbytes] = self._read(part)

    def _place_tile(self, tile: TilePlan, raw: _Bytes, out: _Bytes) -> None:
        entry = self._manifest.tensors[tile.tensor]
        if entry.layout == "tiles":
            out[: tile.nbytes] = raw
        else:
            repack(entry.format, raw, tile.rows, entry.shape[1], out[: tile.nbytes])

    def _start_streamers(self) -> None:
        plan = self._plan
        streamed = [t for t in plan.tiles if t.stream_index >= 0]
        if streamed:
            self.streamer = Streamer(
                self._backend,
                [Tile(t.stream_index, (t.extent,), t.nbytes) for t in streamed],
                Window(self._window, plan.slot_bytes),
                self._staging[: plan.reader_threads],
                lambda tile, raw, slot: self._place_tile(streamed[tile.index], raw[0], slot),
            )
            self.streamer.start()
        if plan.expert_slots:
            spec = self._need.spec
            self.experts = ExpertStreamer(
                self._backend,
                lambda layer, expert: expert_parts(
                    self._need.experts[layer], self._manifest, expert
                ),
                (spec.num_hidden_layers, spec.num_experts),
                Window(self._expert_window, plan.expert_slot_bytes),
                self._staging[-plan.reader_threads :],
                self._place_expert,
            )
            self.experts.start()

    def _place_expert(self, layer: int, expert: int, raw: list[_Bytes], slot: _Bytes) -> None:
        record = self._need.experts[layer]
        if record.is_packed:
            slot[: record.nbytes] = raw[0]
            return
        starts = (0, record.up_offset, record.down_offset)
        for name, fmt, part, start in zip(record.tensors, record.formats, raw, starts, strict=True):
            entry = self._manifest.tensors[name]
            n_rows, columns = entry.shape[1:]
            out = slot[start : start + matrix_bytes(fmt, n_rows, columns)]
            if entry.layout == "tiles":
                out[:] = part
            else:
                repack(fmt, part, n_rows, columns, out)

    # ---- what the graph asks for ---------------------------------------------------------------

    def vector(self, name: str) -> int:
        """Address of a float32 vector, zero-padded to whole groups of 16."""
        return int(self._vectors[name].ctypes.data)

    def vector_values(self, name: str) -> npt.NDArray[np.float32]:
        """The values of a vector, for tables computed once."""
        length = self._need.needs[name].shape[-1]
        return self._vectors[name][:length]

    def matrix(self, name: str) -> Matrix:
        """A matrix as its segments; neighbouring resident tiles are one segment."""
        entry = self._manifest.tensors[name]
        base = int(self._resident.ctypes.data)
        segments: list[Segment] = []
        for tile in (t for t in self._plan.tiles if t.tensor == name):
            tiles = -(-tile.rows // TILE_ROWS)
            if tile.stream_index >= 0:
                segments.append(Segment(tiles, 0, tile.stream_index))
                continue
            address = base + self._offsets[name, tile.first_row]
            last = segments[-1] if segments else None
            nbytes = tile_bytes(entry.format, entry.shape[1])
            if last and last.stream_index < 0 and last.address + last.tiles * nbytes == address:
                segments[-1] = Segment(last.tiles + tiles, last.address)
            else:
                segments.append(Segment(tiles, address))
        return Matrix(entry.format, entry.shape[1], tuple(segments))

    def expert_record(self, layer: int) -> Experts:
        """Formats and offsets of a layer's experts."""
        record, spec = self._need.experts[layer], self._need.spec
        return Experts(
            *record.formats, spec.hidden_size, spec.moe_intermediate_size, record.up_offset,
            record.down_offset,
        )  # fmt: skip

    def token_rows(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """The embeddings of `tokens`: float32 (n_tokens, hidden), read from flash row by row
        unless they are resident.
        """
        entry = self._manifest.tensors["token_embd.weight"]
        row_bytes = entry.format.row_bytes(entry.shape[1])
        if self._embedding is not None:
            table = self._embedding.reshape(entry.shape[0], row_bytes)
            return dequantize_ref(entry.format, table[list(tokens)])
        raw = np.empty((len(tokens), row_bytes), np.uint8)
        seen: dict[int, int] = {}
        for i, token in enumerate(tokens):
            if token in seen:
                raw[i] = raw[seen[token]]
                continue
            seen[token] = i
            raw[i] = self._read(entry.rows(token, token + 1), self._row)
        return dequantize_ref(entry.format, raw)

    def describe(self, streams: npt.NDArray[np.int64], work: dict[str, int]) -> None:
        """Write the addresses compiled code needs into the stream descriptor.

        `work` names the routing buffers of the run state.
        """
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
        return int(sum(s.busy_ns for s in self._streams))

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
