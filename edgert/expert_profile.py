"""What edgert learns of a model's routing and keeps: one small file for each model.

Owns: the record, learning it from passes, its file, and when a file is not believed. Must not know
what follows from it: which experts to keep (storage/expert_policy.py), how fast a plan will be.

A profile belongs to a *fingerprint*: sizes of the files, name, format and place of every tensor,
and the head of the first router, in which models of one architecture differ. The file lies in the
user's cache folder; `EDGERT_EXPERT_PROFILE` names another one, or is "off". It is hostile until
checked. What it says changes time, never output.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import ModelError
from edgert.kept_files import keep_file, prune_files
from edgert.kernels_cpu.cache import cache_root
from edgert.models.spec import ModelSpec
from edgert.storage.manifest import Manifest

__all__ = [
    "ENVIRONMENT", "ExpertLearner", "ExpertProfile", "Identity", "identity_of",
    "load_expert_profile", "profile_file", "read_expert_profile", "save_expert_profile",
]  # fmt: skip

ENVIRONMENT = "EDGERT_EXPERT_PROFILE"  # a file, or "off"
KEPT_FILES = 16
SAMPLE_STEPS = 3072  # tokens x layers of routing kept as it was: replayed for predictions
MOST_TOKENS = 8192.0  # older uses fade, so that a profile follows what a model is used for
_MOST_BYTES = 32 << 20
_PENDING = 512  # tokens that wait to be counted
_EVEN_TOKENS = 16.0  # what is counted in fewer says little of what is used seldom
_VERSION = 2

_F32 = npt.NDArray[np.float32]
_Choices = npt.NDArray[np.int16]  # [tokens, layers, k]


@dataclass(frozen=True, slots=True)
class Identity:
    """Which model a profile belongs to."""

    fingerprint: str  # 20 hex digits
    model: str  # its name, for people
    layers: int
    experts: int
    k: int


@dataclass(frozen=True, slots=True)
class ExpertProfile:
    """Routing of one model, as used so far."""

    identity: Identity
    tokens: float  # behind the counts, faded ones by their share
    uses: _F32 = field(repr=False)  # [layers, experts]
    sample: _Choices = field(repr=False)  # [tokens, layers, k], the latest

    @property
    def chances(self) -> npt.NDArray[np.float64]:
        """How likely a token uses each expert, (layers, experts): beside what was counted,
        `_EVEN_TOKENS` tokens that use all alike.
        """
        layers, experts = self.uses.shape
        even = _EVEN_TOKENS * self.identity.k / experts
        uses = self.uses.astype(np.float64) + even
        found: npt.NDArray[np.float64] = np.minimum(uses / (self.tokens + _EVEN_TOKENS), 1.0)
        return found


def identity_of(spec: ModelSpec, manifest: Manifest) -> Identity:
    """The identity of a model with experts. Reads 4 KiB of its file."""
    digest = hashlib.sha256(repr((_VERSION, manifest.file_bytes)).encode())
    for entry in manifest.tensors.values():
        parts = entry.name, entry.format.name, entry.shape, entry.extent, entry.layout
        digest.update(repr(parts).encode())
    router = manifest.tensors["blk.0.ffn_gate_inp.weight"].extent
    with contextlib.suppress(OSError):  # no such file: a backend of its own
        digest.update(_head(manifest.files[router.file_index], router.offset))
    name = manifest.metadata.get("general.name")
    model = name if isinstance(name, str) and name else manifest.files[0].name
    return Identity(
        digest.hexdigest()[:20], model[:100], spec.num_hidden_layers, spec.num_experts,
        spec.num_experts_per_tok,
    )  # fmt: skip


def _head(path: Path, offset: int) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):  # read ahead would fill the page cache
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        data = os.pread(file, 4096, offset)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return data
    finally:
        os.close(file)


# ----------------------------------------------------------------------------- learning


class ExpertLearner:
    """Collects the choices of passes; `profile` adds them to what was known. Not thread-safe."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.tokens = 0  # counted
        self._uses = np.zeros((identity.layers, identity.experts), np.float32)
        self._pending: list[_Choices] = []
        self._waiting = 0
        self._sample = np.zeros((0, identity.layers, identity.k), np.int16)

    @property
    def seen(self) -> int:
        """Tokens seen, counted or not."""
        return self.tokens + self._waiting

    def add(self, choices: _Choices) -> None:
        """A pass, [tokens, layers, k]; kept, so the caller's own no more."""
        self._pending.append(choices)
        self._waiting += len(choices)
        if self._waiting >= _PENDING:
            self._count()

    def _count(self) -> None:
        if not self._pending:
            return
        choices = np.concatenate(self._pending)
        self._pending, self._waiting = [], 0
        layers, experts = self._uses.shape
        for layer in range(layers):
            self._uses[layer] += np.bincount(choices[:, layer].reshape(-1), minlength=experts)
        self.tokens += len(choices)
        kept = max(1, SAMPLE_STEPS // layers)
        self._sample = np.concatenate([self._sample, choices])[-kept:]

    def profile(self, known: ExpertProfile | None) -> ExpertProfile:
        """What is known now. `known` was learnt before, of the same model."""
        self._count()
        uses, tokens, sample = self._uses, float(self.tokens), self._sample
        if known is not None:
            fade = min(1.0, max(MOST_TOKENS - tokens, 0.0) / max(known.tokens, 1.0))
            uses = uses + np.float32(fade) * known.uses
            tokens += fade * known.tokens
            kept = max(1, SAMPLE_STEPS // self.identity.layers)
            sample = np.concatenate([known.sample, sample])[-kept:]
        return ExpertProfile(self.identity, tokens, uses, sample)


# ----------------------------------------------------------------------------- its file


def profile_file(identity: Identity) -> Path | None:
    """Where the profile of a model is kept; None where that is turned off."""
    given = os.environ.get(ENVIRONMENT, "")
    if given.lower() in ("off", "0", "no"):
        return None
    if given:
        return Path(given)
    return cache_root().parent / "experts" / f"{identity.fingerprint}.npz"


def load_expert_profile(identity: Identity) -> ExpertProfile | None:
    """The profile of a model, or None: never learnt, turned off, or damaged.

    A file that `EDGERT_EXPERT_PROFILE` names must be of this model: raises `ModelError` if not.
    """
    path = profile_file(identity)
    if path is None or not path.exists():
        return None
    try:
        return _of_model(path, read_expert_profile(path), identity)
    except ModelError as error:
        if os.environ.get(ENVIRONMENT):
            raise
        logging.getLogger("edgert").debug("%s; it is learnt anew", error)
        return None


def _of_model(path: Path, found: ExpertProfile, identity: Identity) -> ExpertProfile:
    other = found.identity
    if (other.fingerprint, *found.uses.shape, other.k) != (
        identity.fingerprint, identity.layers, identity.experts, identity.k,
    ):  # fmt: skip
        raise ModelError(
            f"{path} is the expert profile of another model: {other.model} (fingerprint "
            f"{other.fingerprint}), not {identity.model} ({identity.fingerprint}); name another "
            f"file in {ENVIRONMENT}, or unset it"
        )
    return found


def read_expert_profile(path: Path) -> ExpertProfile:
    """Read and check a profile. Raises `ModelError`."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES >> 20} MiB")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(item.file_size for item in archive.infolist()) > _MOST_BYTES:
                raise ValueError(f"it unpacks to more than {_MOST_BYTES >> 20} MiB")
        with np.load(io.BytesIO(data), allow_pickle=False) as loaded:
            return _checked({name: loaded[name] for name in loaded.files})
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ModelError(f"{path} is no expert profile that can be read: {why}") from None


def _checked(arrays: dict[str, npt.NDArray[Any]]) -> ExpertProfile:
    """The record in an .npz. Raises KeyError, TypeError or ValueError for nonsense."""
    version, k = (int(arrays[name]) for name in ("version", "k"))
    fingerprint, model = (str(arrays[name]) for name in ("fingerprint", "model"))
    uses, sample, tokens = arrays["uses"], arrays["sample"], float(arrays["tokens"])
    if version != _VERSION:
        raise ValueError(f"version {version}")
    if uses.ndim != 2 or not uses.size or uses.dtype != np.float32:
        raise ValueError("uses are not [layers, experts]")
    layers, experts = uses.shape
    counts = [uses.reshape(-1), np.array([tokens])]
    if not all(np.isfinite(c).all() and (c >= 0).all() for c in counts):
        raise ValueError("a count is negative or no number")
    if sample.ndim != 3 or sample.shape[1:] != (layers, k) or sample.dtype != np.int16:
        raise ValueError("the sample is not [tokens, layers, k]")
    if sample.size and not (0 <= int(sample.min()) and int(sample.max()) < experts):
        raise ValueError(f"the sample names an expert that is none of {experts}")
    if len(sample) > SAMPLE_STEPS or not 1 <= k <= experts:
        raise ValueError("the sample is too long, or k is no number of experts")
    identity = Identity(fingerprint[:64], model[:100], layers, experts, k)
    return ExpertProfile(identity, tokens, uses, sample)


def save_expert_profile(profile: ExpertProfile) -> bool:
    """Keep a profile; False where that is turned off or the folder cannot be written."""
    path, identity = profile_file(profile.identity), profile.identity
    if path is None:
        return False
    stream = io.BytesIO()
    np.savez_compressed(
        stream, version=_VERSION, fingerprint=identity.fingerprint, model=identity.model,
        k=identity.k, tokens=profile.tokens, uses=profile.uses, sample=profile.sample,
    )  # fmt: skip
    if not keep_file(path, stream.getbuffer()):
        return False
    if not os.environ.get(ENVIRONMENT):
        prune_files(path.parent, KEPT_FILES)  # of models not used lately
    return True
