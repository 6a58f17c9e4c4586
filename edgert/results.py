"""What a run gives back: token events, a completion, and the figures of the run.

Owns: these records and the hash of logits. Must not know how they come about.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from edgert.machine import CgroupMemory

__all__ = [
    "Completion",
    "DraftStats",
    "ExpertStats",
    "FinishReason",
    "MemoryReport",
    "PassStats",
    "RunStats",
    "TokenEvent",
    "logits_hash",
]

FinishReason = Literal["stop", "length", "cancelled"]


def logits_hash(logits: npt.NDArray[np.float32]) -> str:
    """16 hex digits of SHA-256 over the logits as little-endian float32: equal bits, equal hash."""
    return hashlib.sha256(np.ascontiguousarray(logits, "<f4").tobytes()).hexdigest()[:16]


@dataclass(slots=True)
class PassStats:
    """What passes cost, summed since the engine was opened."""

    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stall_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class DraftStats:
    """What one drafter guessed during a generation."""

    drafter: str
    passes: int  # that verified its guesses
    drafted_tokens: int
    accepted_tokens: int  # of those, right
    seconds: float  # spent on guessing


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """What became of the experts that layers asked for, and of those read ahead of that."""

    hits: int  # in their slots when asked for, those read ahead in time too
    misses: int
    ahead_useful: int  # of the hits, read ahead
    ahead_late: int  # of the misses, being read ahead when asked for
    ahead_wasted: int  # read ahead, whole or in part, and not asked for

    def since(self, before: ExpertStats) -> ExpertStats:
        """What came after `before`."""
        return ExpertStats(*(a - b for a, b in zip(astuple(self), astuple(before), strict=True)))


@dataclass(frozen=True, slots=True)
class RunStats:
    """The figures of one generation. Rates are 0 where nothing was done."""

    prompt_tokens: int  # of the prompt, reused ones included
    reused_tokens: int  # of those, already in the KV cache
    generated_tokens: int
    drafted_tokens: int  # guessed, and verified several in a pass
    accepted_tokens: int  # of those, right
    drafts: tuple[DraftStats, ...]  # the same for each drafter that guessed
    decode_passes: int  # tokens a pass: those generated, less the first, by this
    prefill_seconds: float
    decode_seconds: float
    prefill_tok_s: float
    decode_tok_s: float
    read_bytes: int  # from flash, prefill and decode
    decode_read_bytes: int
    read_bytes_per_token: float  # while decoding
    read_bytes_per_s: float  # while decoding
    disk_busy_share: float  # of decode time with a read of streamed weights under way
    device_bytes_per_s: float  # of `Engine.measure_device` beside this run; 0: not measured
    predicted_tok_s: float  # of decoding, from the device profile; 0 when unknown
    experts: ExpertStats | None  # while decoding; None: a dense model
    stall_share: float  # of decode time that compute waited for weights
    resident_bytes: int  # weights in memory
    peak_bytes: int  # of the whole process
    page_cache_bytes: int  # of the model's files, more than when it was opened
    logits_hash: str  # of the last logits
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token: the text that became certain with it (maybe none yet).

    `token` is None on a last event that only ends the text: end of text, or cancelled.
    """

    text: str
    token: int | None
    index: int  # 0 for the first generated token; one that ends the text without being shown counts
    finish_reason: FinishReason | None = None  # set on the last event only


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: RunStats


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Planned against real memory, in bytes; see accounting.py for how they compare."""

    budget_bytes: int
    planned: dict[str, int]  # region -> bytes it may hold
    held: dict[str, int]  # region -> bytes of it that are in memory; they add up to the next
    resident_bytes: int  # of the process now
    peak_bytes: int  # of the process so far
    anonymous_bytes: int  # of the resident ones: what is in no file; 0 where unknown
    file_bytes: int  # of libraries and other files, mapped; 0 where unknown
    shared_bytes: int  # of shared memory; 0 where unknown
    cgroup: CgroupMemory | None  # None outside of one
    page_cache_bytes: int  # of the model's files, more than when it was opened

    @property
    def difference_bytes(self) -> int:
        """What the cgroup is charged beside page cache, less what is resident beside mapped files.

        At most `accounting.AGREEMENT_BYTES` either way where the cgroup holds this process alone.
        """
        if self.cgroup is None:
            return 0
        charged = self.cgroup.usage_bytes - self.cgroup.file_bytes
        return charged - (self.resident_bytes - self.file_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"difference_bytes": self.difference_bytes}
