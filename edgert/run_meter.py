"""The figures of one generation, taken from the engine's counters.

Owns: when a counter is read and what follows from two readings. Must not know what is generated.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.machine import peak_bytes
from edgert.results import DraftStats, ExpertStats, RunStats, logits_hash
from edgert.speculation import Speculator

if TYPE_CHECKING:
    from edgert.engine import Engine

__all__ = ["RunMeter"]


class _Mark(NamedTuple):
    """The engine's counters at one moment."""

    seconds: float
    read_bytes: int
    busy_seconds: float
    stall_seconds: float
    passes: int
    experts: ExpertStats | None


class RunMeter:
    """Told of each pass and token; `stats` at any time, `end` once."""

    def __init__(self, engine: Engine, prompt_tokens: int, reused: int, seed: int) -> None:
        self._engine = engine
        self._prompt_tokens = prompt_tokens
        self._reused = reused
        self._seed = seed
        self._start = self._mark()
        self._decode = self._start
        self._final: RunStats | None = None
        self.generated = 0
        self.prefilled = False
        self._logits: npt.NDArray[np.float32] | None = None  # the last ones
        self._drafter = ""  # of the tokens verified last
        self._drafts: dict[str, list[float]] = {}  # fields of `DraftStats` by drafter

    def _mark(self) -> _Mark:
        weights, passes = self._engine.weights, self._engine.forward.stats
        experts = self._engine.experts
        return _Mark(
            time.perf_counter(), weights.total_read_bytes, weights.busy_ns / 1e9,
            passes.stall_seconds, passes.passes, None if experts is None else experts.stats(),
        )  # fmt: skip

    @contextmanager
    def drafting(self, speculator: Speculator) -> Iterator[None]:
        """Around the making of a draft."""
        begin = time.perf_counter()
        yield
        if speculator.drafter:
            self._of(speculator.drafter)[3] += time.perf_counter() - begin

    def _of(self, drafter: str) -> list[float]:
        return self._drafts.setdefault(drafter, [0, 0, 0, 0.0])

    def pass_done(self, logits: npt.NDArray[np.float32], drafter: str, drafted: int) -> None:
        """A pass has given logits [n_tokens, n_vocab], all but the first after drafted tokens."""
        self._drafter = drafter
        if drafted:
            counts = self._of(drafter)
            counts[0] += 1
            counts[1] += drafted
        self._logits = logits[0]
        if not self.prefilled:
            self.prefilled = True
            self._decode = self._mark()

    def token_sampled(self, logits: npt.NDArray[np.float32], accepted: bool) -> None:
        """A token was sampled from a row of logits; `accepted` if it was a drafted one."""
        self.generated += 1
        if accepted:
            self._of(self._drafter)[2] += 1
        self._logits = logits

    def end(self) -> RunStats:
        """The figures as they stay from now on."""
        self._final = self.stats()
        self._logits = None  # it may hold all rows of a pass
        return self._final

    def stats(self) -> RunStats:
        """The figures so far. Not for every token: 200 us, half of them for the peak's file."""
        if self._final is not None:
            return self._final
        now, start, begun = self._mark(), self._start, self._decode
        prefill, decode = begun.seconds - start.seconds, now.seconds - begun.seconds
        decoded = max(self.generated - 1, 0)  # the first token comes out of the prefill
        share = 1 / decode if decoded and decode > 0 else 0.0
        read = now.read_bytes - begun.read_bytes if decoded else 0
        plan, computed = self._engine.plan, self._prompt_tokens - self._reused
        drafts = tuple(
            DraftStats(name, int(passes), int(drafted), int(accepted), seconds)
            for name, (passes, drafted, accepted, seconds) in self._drafts.items()
        )
        return RunStats(
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused,
            generated_tokens=self.generated,
            drafted_tokens=sum(d.drafted_tokens for d in drafts),
            accepted_tokens=sum(d.accepted_tokens for d in drafts),
            drafts=drafts,
            decode_passes=now.passes - begun.passes,
            prefill_seconds=prefill,
            decode_seconds=decode,
            prefill_tok_s=computed / prefill if prefill > 0 else 0.0,
            decode_tok_s=decoded * share,
            read_bytes=now.read_bytes - start.read_bytes,
            decode_read_bytes=read,
            read_bytes_per_token=read / decoded if decoded else 0.0,
            read_bytes_per_s=read * share,
            disk_busy_share=(now.busy_seconds - begun.busy_seconds) * share,
            device_bytes_per_s=self._engine.device_bytes_per_s,
            predicted_tok_s=self._engine.predicted_tok_s,
            experts=now.experts and begun.experts and now.experts.since(begun.experts),
            stall_share=(now.stall_seconds - begun.stall_seconds) * share,
            resident_bytes=plan.resident_bytes,
            peak_bytes=peak_bytes(),
            page_cache_bytes=self._engine.page_cache_bytes,
            logits_hash="" if self._logits is None else logits_hash(self._logits),
            seed=self._seed,
        )
