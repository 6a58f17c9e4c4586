"""Dense weights: tiles read in a cycle that is known for ever, ahead of the code that uses them.

Owns: which tile goes into which slot, and when. Must not know what a tile is for; `place` (given
by the engine) turns the bytes of the file into the bytes of the slot.

The hand-over is made for compiled code that holds no GIL: int64 arrays at stable addresses and a
pipe. A slot is filled, `address` and `slot_of` of its tile are written, then `ready`; the consumer
spins on `ready`, computes, and writes the slot's number to `free_fd`. Readers take a free slot
first and a tile second, so the next tile in the order always has a slot and nothing can wait in
a circle. They run ahead over the ends of passes until no slot is free, and then sleep in `read`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgert.storage.backend import Backend
from edgert.storage.manifest import Extent
from edgert.storage.reader import Bytes, ReaderTeam, parts_bytes
from edgert.storage.window import Window

__all__ = ["Place", "Streamer", "Tile", "staging_bytes"]

# A pipe holds at least 16 KiB (macOS; 64 KiB on Linux): room for all slot numbers at once plus
# the wake-up calls, so that a write never blocks the compiled code.
_SLOTS_MAX = 2000
_WAKE = (-1).to_bytes(8, "little", signed=True)


@dataclass(frozen=True, slots=True)
class Tile:
    """The rows of a tensor (or of several) that one slot holds."""

    index: int  # position in the cycle
    parts: tuple[Extent, ...]  # what to read, in the order `place` gets it
    nbytes: int  # bytes in the slot after placing
    raw_bytes: int = 0  # of the slot before them, where the parts stay just as they were read


Place = Callable[[Tile, list[Bytes], Bytes], None]


def staging_bytes(tiles: Sequence[Tile], alignment: int) -> int:
    """Bytes of one reader's staging buffer: the largest need of any tile."""
    return max((parts_bytes(t.parts, alignment) for t in tiles), default=0)


class Streamer:
    """Fills the slots of `window` with `tiles`, cyclically, by way of the buffers of `staging`.

    `place(tile, raw, slot)` gets the exact bytes of each part and `tile.nbytes` bytes of the slot;
    it runs in a thread of the team and should release the GIL. Needs 2 <= slots < tiles. The parts
    of a tile with `raw_bytes` are read into its slot, and `raw` stays valid as long as the tile.

    For the consumer, all int64 and indexed by tile: `ready` (p+1 when the tile's bytes of pass p
    are in its slot), `address`, `slot_of`; `failed[0]` is 1 after an error; `free_fd` takes the
    number of a slot, 8 bytes little-endian, when its tile is done with. One consumer at a time.
    """

    def __init__(
        self,
        backend: Backend,
        tiles: Sequence[Tile],
        window: Window,
        staging: Sequence[Bytes],
        place: Place,
    ) -> None:
        n_tiles = len(tiles)
        assert 2 <= window.n_slots < n_tiles, (window.n_slots, n_tiles)
        assert window.n_slots <= _SLOTS_MAX, window.n_slots
        assert [t.index for t in tiles] == list(range(n_tiles))
        assert max(t.raw_bytes + t.nbytes for t in tiles) <= window.slot_bytes
        need = staging_bytes(tiles, backend.alignment)
        assert all(s.nbytes >= need for s in staging), need
        self.tiles = tuple(tiles)
        self.ready: npt.NDArray[np.int64] = np.zeros(n_tiles, np.int64)
        self.address: npt.NDArray[np.int64] = np.zeros(n_tiles, np.int64)
        self.slot_of: npt.NDArray[np.int64] = np.full(n_tiles, -1, np.int64)
        self.tiles_loaded = 0
        self._window = window
        self._place = place
        self._team = ReaderTeam(backend, staging, "edgert-stream")
        self._sequence = 0  # tiles taken: tile i of pass p is number p * n_tiles + i
        self._filling = [False] * window.n_slots
        self._free_read, self.free_fd = os.pipe()
        self._closed = False

    @property
    def failed(self) -> npt.NDArray[np.int64]:
        """int64[1]: 1 after an error in a reader, until `reset`."""
        return self._team.failed

    @property
    def read_bytes(self) -> int:
        """Bytes asked from the backend so far, alignment included."""
        return self._team.read_bytes

    @property
    def read_ns(self) -> int:
        """Time spent in reads, summed over the threads."""
        return self._team.read_ns

    @property
    def busy_ns(self) -> int:
        """Time during which at least one read was under way."""
        return self._team.busy_ns

    def start(self) -> None:
        """Begin reading, at tile 0 of pass 0."""
        assert not self._closed and not self._team.running
        self._team.start_pipeline(self._take, self._fill, self._room)
        for slot in range(self._window.n_slots):
            os.write(self.free_fd, slot.to_bytes(8, "little"))

    def raise_if_failed(self) -> None:
        """Raise the error a reader met (`StorageError` with file and offset for a failed read)."""
        self._team.raise_if_failed()

    def reset(self) -> None:
        """After a cancelled or failed pass: forget what was read and begin again.

        Waits for reads under way. The consumer must have stopped: it writes to `free_fd` no more
        until this returns. Afterwards tile 0 of pass 0 is next, and no error is pending.
        """
        assert not self._closed
        self.halt()
        self._drain()
        self._team.clear()
        self.ready[:] = 0
        self.address[:] = 0
        self.slot_of[:] = -1
        self._sequence = 0
        self._filling = [False] * self._window.n_slots
        self.start()

    def close(self) -> None:
        """Stop the readers and close the pipe. Idempotent. The consumer must have stopped."""
        if self._closed:
            return
        self.halt()
        self._closed = True
        os.close(self._free_read)
        os.close(self.free_fd)

    def halt(self) -> None:
        """Stop and join the threads; a read under way is finished first. `reset` begins again."""
        self._team.stopping = True
        if self._team.running:
            for _ in range(self._team.n_readers):
                os.write(self.free_fd, _WAKE)
        self._team.join()

    def _drain(self) -> None:
        """Empty the pipe. No thread is reading from it."""
        os.set_blocking(self._free_read, False)
        try:
            while os.read(self._free_read, 4096):
                pass
        except BlockingIOError:
            pass
        finally:
            os.set_blocking(self._free_read, True)

    def _take(self) -> tuple[Sequence[Extent], tuple[Tile, int, int]] | None:
        """What to read next, once a slot is free: its extents, and the tile, slot and pass."""
        # Pipes are locked while read and every message has 8 bytes: none is ever split.
        message = os.read(self._free_read, 8)
        if self._team.stopping:
            return None
        slot = int.from_bytes(message, "little", signed=True)
        with self._team.lock:
            tile, turn = self._next_tile(slot)
        return tile.parts, (tile, slot, turn)

    def _fill(self, job: tuple[Tile, int, int], raw: list[Bytes]) -> None:
        """Place what was read and publish it."""
        tile, slot, turn = job
        start = tile.raw_bytes
        self._place(tile, raw, self._window.view(slot)[start : start + tile.nbytes])
        self._publish(tile, slot, turn)

    def _room(self, job: tuple[Tile, int, int]) -> Bytes | None:
        """Where the parts of a tile are to stay, if they do."""
        tile, slot, _ = job
        return self._window.view(slot)[: tile.raw_bytes] if tile.raw_bytes else None

    def _next_tile(self, slot: int) -> tuple[Tile, int]:
        """The next tile of the cycle and its pass, for a slot that was handed back."""
        assert 0 <= slot < self._window.n_slots, f"slot {slot} does not exist"
        assert not self._filling[slot], f"slot {slot} was handed back while it was being filled"
        turn, index = divmod(self._sequence, len(self.tiles))
        self._sequence += 1
        self._filling[slot] = True
        return self.tiles[index], turn

    def _publish(self, tile: Tile, slot: int, turn: int) -> None:
        index = tile.index
        with self._team.lock:
            self.address[index] = self._window.address(slot) + tile.raw_bytes
            self.slot_of[index] = slot
            self._filling[slot] = False
            self.tiles_loaded += 1
            self._team.fence()
            self.ready[index] = turn + 1
