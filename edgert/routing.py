"""Which experts a run chose: the trace, its file, and reading those of others.

Owns: the format. Must not know how routing is recorded or what is made of it.

A trace file is an .npz of NumPy: scalars `layers`, `experts`, `k`, `record_bytes` (of the largest
expert in memory, 0 unknown), `choices` int16 [tokens, layers, k] in router order, and `passes`
int32, how many tokens each forward pass held (their sum is `tokens`); where experts have several
sizes also `record_sizes`, int64 [layers, experts].
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from edgert.errors import InputError, ModelError
from edgert.expert_sizes import slot_sizes, slots_within
from edgert.storage.expert_cache import SlotSizes

__all__ = ["Routing", "join_passes", "read_routing", "write_routing"]

Choices = npt.NDArray[np.int16]
_MAX_BYTES = 1 << 30  # of one array: what a few hours of decoding leave
_FIELDS = ("layers", "experts", "k", "choices", "passes")


@dataclass(frozen=True, slots=True)
class Routing:
    """The choices of one request after the other."""

    experts: int
    requests: tuple[Choices, ...]  # each [tokens, layers, k]
    passes: tuple[npt.NDArray[np.int32], ...]  # tokens of each pass, for each request
    record_bytes: int = 0
    record_sizes: npt.NDArray[np.int64] | None = None  # [layers, experts], where there are several

    @property
    def layers(self) -> int:
        """Layers with routed experts."""
        return int(self.requests[0].shape[1])

    @property
    def k(self) -> int:
        """Experts a token uses in a layer."""
        return int(self.requests[0].shape[2])

    @property
    def tokens(self) -> int:
        """Tokens of all requests."""
        return sum(len(choices) for choices in self.requests)

    def slot_sizes(self, slots: int) -> SlotSizes | None:
        """Sizes of the records and of an engine's first `slots` slots; None where all are alike."""
        if self.record_sizes is None:
            return None
        return SlotSizes.of(self.record_sizes, slot_sizes(self.record_sizes, self.k)[:slots])

    def slots_within(self, nbytes: int) -> int:
        """How many of an engine's slots fit in so many bytes; the size of a record is known."""
        if self.record_sizes is None:
            return min(nbytes // self.record_bytes, self.layers * self.experts)
        return slots_within(slot_sizes(self.record_sizes, self.k), nbytes)

    def uses(self) -> npt.NDArray[np.float64]:
        """How often each expert was chosen: float64 [layers, experts], a profile for policies."""
        found = np.zeros((self.layers, self.experts))
        for choices in self.requests:
            for layer in range(self.layers):
                found[layer] += np.bincount(choices[:, layer].reshape(-1), minlength=self.experts)
        return found


def join_passes(
    passes: Sequence[Choices],
    experts: int,
    record_bytes: int = 0,
    record_sizes: npt.NDArray[np.int64] | None = None,
) -> Routing:
    """The trace of one request from the choices of its passes, each [tokens, layers, k]."""
    if not passes:
        raise InputError("nothing was computed, so there is no routing to record")
    sizes = np.array([len(p) for p in passes], np.int32)
    return Routing(experts, (np.concatenate(passes),), (sizes,), record_bytes, record_sizes)


def write_routing(stream: IO[bytes], trace: Routing) -> None:
    """Write a trace of one request."""
    (choices,), (passes,) = trace.requests, trace.passes
    arrays: dict[str, Any] = dict(
        layers=trace.layers, experts=trace.experts, k=trace.k, record_bytes=trace.record_bytes,
        choices=choices, passes=passes,
    )  # fmt: skip
    if trace.record_sizes is not None:
        arrays["record_sizes"] = trace.record_sizes
    np.savez_compressed(stream, **arrays)


def read_routing(path: Path, *, array: str | None = None, experts: int | None = None) -> Routing:
    """Read a trace of `edgert trace`, or any .npz of integers that can be one.

    In a file of others every array [tokens, layers, k] is a request, and [tokens, requests, layers,
    k] is several; `array` takes one of them by name, `experts` says how many there are in a layer
    (else the largest number seen and one). Raises `ModelError`, `InputError`.
    """
    arrays = _arrays(path)
    if array is not None and array not in arrays:
        raise InputError(f"{path} has no array {array!r}; it has: {', '.join(arrays) or 'none'}")
    if array is None and set(_FIELDS) <= set(arrays):
        return _own(path, arrays, experts)
    chosen = arrays if array is None else {array: arrays[array]}
    requests: list[Choices] = []
    for name, values in chosen.items():
        whole = np.issubdtype(values.dtype, np.integer)
        if whole and values.ndim in (3, 4) and values.size:
            parts = [values] if values.ndim == 3 else [values[:, r] for r in range(values.shape[1])]
            requests += [_checked(path, name, part, experts) for part in parts]
    if not requests:
        kinds = ", ".join(f"{n} {v.dtype} {list(v.shape)}" for n, v in chosen.items()) or "nothing"
        raise ModelError(
            f"{path} is not a routing trace: no array of integers [tokens, layers, k] in it, but "
            f"{kinds}"
        )
    shapes = {choices.shape[1:] for choices in requests}
    if len(shapes) > 1:
        found = " and ".join(f"{layers} x {k}" for layers, k in sorted(shapes))
        raise InputError(
            f"{path} holds arrays of different layers x k: {found}; choose one by its name"
        )
    most = 1 + max(int(choices.max()) for choices in requests)
    singles = tuple(np.ones(len(choices), np.int32) for choices in requests)
    return Routing(experts or most, tuple(requests), singles)


def _arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    """Every array of an .npz, pickles refused."""
    try:
        with path.open("rb") as stream:  # ours: one that NumPy opened stays open after an error
            with zipfile.ZipFile(stream) as archive:
                largest = max((item.file_size for item in archive.infolist()), default=0)
            if largest > _MAX_BYTES:
                raise ModelError(f"{path} holds an array of {largest:,} bytes; at most 1 GiB")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as loaded:
                return {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ModelError(f"{path} is a folder; give the .npz file of a trace") from None
    except PermissionError:
        raise ModelError(f"{path} cannot be read: permission denied") from None
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} is not a routing trace (.npz): {error}") from None


def _own(path: Path, arrays: dict[str, npt.NDArray[np.generic]], experts: int | None) -> Routing:
    """A file of `edgert trace`, its parts checked against each other."""
    numbers = {}
    for name in ("layers", "experts", "k", "record_bytes"):
        value = arrays.get(name, np.zeros((), np.int64))
        if value.ndim or not np.issubdtype(value.dtype, np.integer):
            raise ModelError(f"{path}: {name} is not one whole number")
        numbers[name] = int(value)
    choices, passes = arrays["choices"], arrays["passes"]
    if choices.ndim != 3 or choices.shape[1:] != (numbers["layers"], numbers["k"]):
        raise ModelError(
            f"{path}: choices are {list(choices.shape)}, not [tokens, {numbers['layers']} layers, "
            f"{numbers['k']}]"
        )
    count = numbers["experts"] if experts is None else experts
    checked = _checked(path, "choices", choices, count)
    good = passes.ndim == 1 and np.issubdtype(passes.dtype, np.integer)
    sizes = passes.astype(np.int64) if good else np.zeros(1, np.int64)
    if (sizes < 1).any() or int(sizes.sum()) != len(choices):
        raise ModelError(f"{path}: the passes do not add up to its {len(choices)} tokens")
    return Routing(
        count, (checked,), (sizes.astype(np.int32),), max(numbers["record_bytes"], 0),
        _record_sizes(path, arrays.get("record_sizes"), (numbers["layers"], count)),
    )  # fmt: skip


def _record_sizes(
    path: Path, values: npt.NDArray[np.generic] | None, shape: tuple[int, int]
) -> npt.NDArray[np.int64] | None:
    """Sizes of experts, if a file has them."""
    if values is None:
        return None
    if values.shape != shape or not np.issubdtype(values.dtype, np.integer):
        raise ModelError(f"{path}: record_sizes are {values.dtype} {list(values.shape)}")
    sizes = values.astype(np.int64)
    if (sizes < 1).any():
        raise ModelError(f"{path}: record_sizes has {sizes.min():,} bytes for an expert")
    return sizes


def _checked(
    path: Path, name: str, values: npt.NDArray[np.generic], experts: int | None
) -> Choices:
    """Choices as int16, in range and without an expert twice in a layer of a token."""
    if not np.issubdtype(values.dtype, np.integer) or not values.size:
        raise ModelError(f"{path}: {name} holds no choices of experts")
    low, high = int(values.min()), int(values.max())
    most = 1 << 15 if experts is None else experts
    if low < 0 or high >= most:
        raise ModelError(f"{path}: {name} names expert {low if low < 0 else high} of {most}")
    choices: Choices = values.astype(np.int16)
    ordered = np.sort(choices, axis=2)
    if (ordered[:, :, 1:] == ordered[:, :, :-1]).any():
        raise ModelError(f"{path}: {name} is no routing: a token uses the same expert twice")
    return choices
