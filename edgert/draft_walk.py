"""Walking the draft program: over one token, or in slices between the parts of a pass.

Owns: the draft program's own activations, and what runs while a pass waits for weights. Must not
know how a token is guessed nor what comes of it.

A pass over streamed weights leaves most of the cores' time unused, so it is walked in parts, and
while the next tiles are not there yet, a slice of the draft program runs: the model drafts on, as
if all tokens that are being verified were right. The first token so walked is the last one of the
pass. Its base keys and values go where the pass writes the full ones: in each layer the draft must
be first, and is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu import rows
from edgert.kernels_cpu.program import Program, Rows
from edgert.models.graph import Graph
from edgert.programs import Programs
from edgert.threads import ThreadTeam
from edgert.timeline import Span, no_span
from edgert.weights import Weights

__all__ = ["Ahead", "DraftWalk"]

_F32 = npt.NDArray[np.float32]
_FREE = 1 << 20  # layers by which a draft leads that no longer writes where the pass does
_DONE = 1 << 30
_NOWHERE = (-1, -1, 0)  # token, position, rows done
_PART = 4  # of a ring: tiles that a pass computes before it looks again whether to draft


@dataclass(slots=True)
class Ahead:
    """Guesses to make behind `text`, whose last tokens a pass verifies meanwhile."""

    text: list[int]
    guess: Callable[[_F32], int | None]  # from logits; None: enough
    guessed: list[int] = field(default_factory=list)
    walked: int = 0  # of those, with keys and values behind the text's


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of the full program between which drafting may go on."""

    program: Program
    layer: int
    tile: int  # the last streamed one; -1: none


class DraftWalk:
    """The draft program over buffers of its own for one token. One walk at a time."""

    def __init__(
        self,
        graph: Graph,
        buffers: Mapping[str, tuple[Rows, _F32]],
        team: ThreadTeam,
        weights: Weights,
        span: Span = no_span,
    ) -> None:
        """`graph` is that of the full program, whose KV cache is used; `buffers` as `take_buffers`
        gives them for drafting.
        """
        self.graph = replace(graph, buffers={name: place for name, (place, _) in buffers.items()})
        self._team = team
        self._weights = weights
        self._x = buffers["x"][1]
        self._logits = buffers["logits"][1][0, : graph.spec.vocab_size]
        self._span = span
        self._full: Program | None = None
        self._program: Program | None = None
        self._slices: list[Program] = []
        self._parts: list[_Part] = []
        self._context = 0
        self._left = _NOWHERE  # a walk beside a pass whose end it did not see

    def use(self, programs: Programs, slots: int, context: int) -> None:
        """Walk these from now on; `slots` of the ring, `context` tokens of KV cache."""
        self._full, self._program = programs.full, programs.draft
        self._context, self._slices, self._left = context, [], _NOWHERE
        if programs.draft is not None:
            ends = _layer_ends(programs.draft)
            self._slices = [programs.draft.part(*pair) for pair in pairwise([0, *ends])]
            self._parts = _parts(programs.full, max(slots // _PART, 2))

    @property
    def can_walk(self) -> bool:
        """True when there is a draft program."""
        return self._program is not None

    def walk(self, token: int, position: int) -> _F32:
        """Logits after `token`, a copy; nonsense if the team was stopped. Raises `StorageError`.

        Goes on where a walk of the same token beside the last pass was left.
        """
        assert self._program is not None
        streams, program = self._team.streams, self._program
        left, self._left = self._left, _NOWHERE
        if left[:2] == (token, position):
            program = program.part(left[2], len(program.rows))
        else:
            self._embed(token, position)
        timeline, streams[rows.S_TIMELINE] = int(streams[rows.S_TIMELINE]), 0
        try:  # its rows have no names in the timeline
            with self._span("draft", position):
                self._run(program, position)
        finally:
            streams[rows.S_TIMELINE] = timeline
        return self._logits.copy()

    def walk_full(self, ahead: Ahead | None) -> None:
        """Walk the full program with the frame as it is, drafting while a part's tiles are awaited.

        Raises `StorageError`; ends early where the team was stopped.
        """
        frame, streamer = self._team.frame, self._weights.streamer
        assert self._full is not None
        self._left = _NOWHERE
        is_traced = self._team.streams[rows.S_TIMELINE]  # records are of whole programs
        if ahead is None or streamer is None or is_traced:
            self._team.run(self._full)
            return
        mine, ready = frame.copy(), streamer.ready
        wanted = int(mine[rows.F_PASS]) + 1
        drafting = self._drafting(ahead)
        lead = 0
        for part in self._parts:
            while lead <= part.layer or (
                lead < _DONE and part.tile >= 0 and ready[part.tile] != wanted
            ):
                lead = next(drafting, _DONE)
            frame[:] = mine
            self._team.run(part.program)
            self._weights.raise_if_failed()
            if self._team.stopped:
                return

    def _drafting(self, ahead: Ahead) -> Iterator[int]:
        """Slice after slice; the layers done where the pass will write, or `_FREE`."""
        token, position, is_free = ahead.text[-1], len(ahead.text) - 1, False
        while position < self._context:
            self._embed(token, position)
            done = 0  # rows
            for layer, part in enumerate(self._slices):
                self._run(part, position)
                if self._team.stopped:
                    return
                done += len(part.rows)
                if is_free:
                    self._left = token, position, done
                yield _FREE if is_free else layer + 1
            self._left = _NOWHERE
            ahead.walked += is_free
            is_free = True
            found = ahead.guess(self._logits.copy())
            if found is None:
                return
            ahead.guessed.append(found)
            token, position = found, position + 1

    def _embed(self, token: int, position: int) -> None:
        with self._span("embed", 1, position):
            self._weights.embed([token], self._x)

    def _run(self, program: Program, position: int) -> None:
        frame = self._team.frame
        frame[rows.F_N_TOKENS] = frame[rows.F_N_LOGITS] = 1
        frame[rows.F_POSITION], frame[rows.F_FIRST_LOGIT] = position, 0
        self._team.run(program)
        self._weights.raise_if_failed()


def _layer_of(name: str) -> str:
    """`blk.3` of `blk.3.attn_q`, `output` of what follows the layers."""
    return ".".join(name.split(".")[: 2 if name.startswith("blk.") else 1])


def _layer_ends(program: Program) -> list[int]:
    """Where the rows of each layer end, and those of the head."""
    layers = [_layer_of(name) for name in program.names]
    ends = [i for i in range(1, len(layers)) if layers[i] != layers[i - 1]]
    return [*ends, len(layers)]


def _parts(program: Program, most: int) -> list[_Part]:
    """The program cut at layers, and behind every `most` streamed tiles."""
    found, begin = list[_Part](), 0
    tiles = program.rows[:, rows.TILE]
    for layer, layer_end in enumerate(_layer_ends(program)):
        streamed = [i for i in range(begin, layer_end) if tiles[i] >= 0]
        ends = [i + 1 for i in streamed[most - 1 :: most] if i + 1 < layer_end]
        for end in (*ends, layer_end):
            tile = max((int(tiles[i]) for i in streamed if begin <= i < end), default=-1)
            found.append(_Part(program.part(begin, end), layer, tile))
            begin = end
    return found
