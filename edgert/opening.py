"""Opening a model: check the header, compile apart, and only then load what computes.

Owns: `load`, `plan_model` and `warmup`, and the order in them. Imports neither NumPy-heavy code nor
Numba before it needs them: a cold kernel cache is filled by child processes while this one is
still small (compiling.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.compiling import KernelSet, compile_apart, is_compiled
from edgert.config import LoadOptions
from edgert.errors import EdgertError, FormatError, ModelError, UnsupportedError
from edgert.kernels_cpu.cache import cache_root, writable
from edgert.models.spec import ModelSpec, spec_from_manifest
from edgert.models.tensors import TensorNeed, check_tensors
from edgert.quant.formats import QuantFormat
from edgert.storage.checksums import checksum_bytes
from edgert.storage.gguf import read_gguf
from edgert.storage.manifest import Manifest
from edgert.storage.model_file import read_magic
from edgert.storage.pack import MAGIC, read_pack
from edgert.units import parse_bytes

if TYPE_CHECKING:
    from edgert.draft_model import DraftModel
    from edgert.engine import Engine
    from edgert.plan import Plan
    from edgert.storage.backend import Backend
    from edgert.timeline import Timeline

__all__ = ["Opened", "load", "open_model", "plan_model", "read_manifest", "warmup"]

Progress = Callable[[str, int, int], object]  # what, done, to do


@dataclass(frozen=True, slots=True)
class Opened:
    """A checked header: nothing but metadata has been read."""

    path: Path
    manifest: Manifest
    spec: ModelSpec

    def without_vocabulary(self) -> Opened:
        """The same without the lists of the vocabulary, which a tokenizer has taken over."""
        metadata = self.manifest.metadata
        few = {k: v for k, v in metadata.items() if isinstance(v, str | int | float)}
        return replace(self, manifest=replace(self.manifest, metadata=few))

    def kernel_set(self, kv_cache_type: str) -> KernelSet:
        """The kernels this model needs."""
        formats: set[QuantFormat] = {
            f for t in self.manifest.tensors.values() if len(t.shape) > 1 for f in t.formats
        }
        formats |= {t.base_format(b) for t in self.manifest.tensors.values() for b in t.base_bits}
        names = tuple(f.name for f in sorted(formats, key=lambda f: (f.type_id, f.name)))
        splits = {
            f"{t.format.name}:{'+'.join(map(str, t.split(b)))}"
            for t in self.manifest.tensors.values()
            for b in t.base_bits
        }
        return KernelSet(names, kv_cache_type, self.spec.is_moe, tuple(sorted(splits)))


def read_manifest(path: str | Path) -> Manifest:
    """The index of a GGUF model or an `.edgert` pack, told apart by how the file begins.

    Reads no weight. Raises `ModelError`, `FormatError` and `UnsupportedError`, as `read_gguf`.
    """
    is_pack = read_magic(Path(path), len(MAGIC)) == MAGIC
    return read_pack(path) if is_pack else read_gguf(path)


def open_model(path: str | Path | None = None) -> Opened:
    """Read and check the header of a model, the bundled one by default.

    Raises `ModelError` or `UnsupportedError`, which name the file.
    """
    import edgert

    path = Path(edgert.bundled_model() if path is None else path)
    manifest = read_manifest(path)
    try:
        spec = spec_from_manifest(manifest.metadata, manifest.tensors)
        needs = check_tensors(spec, manifest.tensors)
        _check_layouts(needs, manifest)
    except FormatError:
        raise
    except (ModelError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from None
    return Opened(path, manifest, spec)


def _check_layouts(needs: dict[str, TensorNeed], manifest: Manifest) -> None:
    """What is read row by row must be there in rows."""
    for need in needs.values():
        if need.kind in ("vector", "embedding") and manifest.tensors[need.name].layout != "rows":
            raise ModelError(f"tensor {need.name!r} is in tiles, but is read in rows")


def load(
    path: str | Path | None = None,
    *,
    memory_budget: int | str | None = None,
    context_length: int | None = None,
    threads: int | None = None,
    kv_cache_type: str = "f16",
    prefill_tokens: int | None = None,
    quality_bits: int | str | None = None,
    verify_checksums: bool = False,
    draft_model: str | Path | None = None,
    on_progress: Progress | None = None,
    backend: Callable[[Sequence[Path]], Backend] | None = None,
    timeline: Timeline | None = None,
) -> Engine:
    """Open a GGUF model or an `.edgert` pack within `memory_budget`; by default the bundled one.

    `memory_budget`: bytes, "1.5GiB", or "50%" of what the whole model needs in memory; None is what
    the machine or the enclosing cgroup has free; above the cgroup's limit it is that limit, with a
    warning. It covers the whole process. `context_length`: tokens of prompt and answer; `threads`:
    by default the cores this process may use; `kv_cache_type`: "f16" or "f32"; `prefill_tokens`:
    most tokens of one pass. None lets the plan choose. `quality_bits`: use only these top bits of
    the matrices of a nested pack, which is lossy; "auto" takes as many as fit without streaming,
    all 8 where they do. `verify_checksums`: compare all that is ever read of a pack with its
    checksums; what does not match ends the loading or the pass with a `FormatError` that names the
    tensor. `draft_model`: a smaller model with the same vocabulary, whose guesses this one verifies
    (so its file is not); inside the same budget, in memory as a whole. `on_progress(what, done,
    to_do)` is called while compiling and loading. `backend` opens the files: another one than
    `FileBackend` serves tests and embedders. `timeline` records what the engine does.

    Raises `BudgetError` before any weight is read, `ModelError`, `UnsupportedError`, `InputError`,
    `StorageError`.
    """
    options = LoadOptions(
        memory_budget, context_length, threads, kv_cache_type, prefill_tokens, quality_bits,
        verify_checksums,
    )  # fmt: skip
    opened = open_model(path)
    if verify_checksums:
        checksum_bytes(opened.manifest)  # raises where there are none
    wanted = opened.kernel_set(kv_cache_type)
    for name, done, total in compile_apart(wanted, _bytes_of(memory_budget)):
        if on_progress:
            on_progress(f"compile {name}", done, total)

    from edgert.engine import Engine
    from edgert.kernels import compile_here
    from edgert.loading import at_quality, make_plan, process_bytes
    from edgert.storage.backend import FileBackend
    from edgert.tokenizer import Tokenizer

    draft = _open_draft(draft_model, opened, options)
    try:
        tokenizer = Tokenizer.from_manifest(opened.manifest.metadata)
        opened = opened.without_vocabulary()
        for _ in compile_here(wanted):
            pass
        process = process_bytes(opened, measured=True)
        opened, options = at_quality(opened, options, process, here=True)
        plan = make_plan(opened, options, process, here=True)
        manifest = opened.manifest
        if backend is None:
            files: Backend = FileBackend(manifest.files, file_bytes=manifest.file_bytes)
        else:
            files = backend(manifest.files)
        return Engine(opened, tokenizer, plan, files, on_progress, timeline, draft)
    except BaseException:
        if draft is not None:
            draft.close()
        raise


def _open_draft(path: str | Path | None, model: Opened, options: LoadOptions) -> DraftModel | None:
    """The draft model, if there is one, open."""
    if path is None:
        return None
    from edgert.draft_model import open_draft_model

    budget = _bytes_of(options.memory_budget)
    return open_draft_model(path, model, budget, options.threads, options.context_length)


def _bytes_of(budget: int | str | None) -> int | None:
    """The budget in bytes where it is one, and not a share of something not known yet."""
    if isinstance(budget, str):
        return None if budget.strip().endswith("%") else parse_bytes(budget)
    return budget


def plan_model(
    path: str | Path | None = None, *, draft_model: str | Path | None = None, **options: Any
) -> Plan:
    """The plan of a model without loading it: reads the header and no weight.

    Takes the options of `load` that decide a plan, and raises as `load` does.
    """
    from edgert.loading import at_quality, make_plan, process_bytes

    opened, chosen = open_model(path), LoadOptions(**options)
    process = process_bytes(opened, measured=False)
    process += planned_draft_bytes(draft_model, opened, chosen)
    opened, chosen = at_quality(opened, chosen, process)
    return make_plan(opened, chosen, process)


def planned_draft_bytes(path: str | Path | None, model: Opened, options: LoadOptions) -> int:
    """What a draft model, if there is one, adds to the process of `model`."""
    from edgert.draft_model import draft_bytes

    if path is None:
        return 0
    budget = _bytes_of(options.memory_budget)
    return draft_bytes(path, model, budget, options.threads, options.context_length)


def warmup(path: str | Path | None = None) -> Iterator[tuple[str, int, int]]:
    """Compile every kernel a model needs into the user's cache: (name, done, to do) as it goes.

    What is there already is left out. Raises `EdgertError` when the cache cannot be written.
    """
    opened = open_model(path)
    wanted = [opened.kernel_set(kv_cache_type) for kv_cache_type in ("f16", "f32")]
    if not all(map(is_compiled, wanted)) and not writable(cache_root()):
        raise EdgertError(
            f"the cache folder {cache_root()} cannot be written: kernels would be compiled at "
            "every start; make it writable or set NUMBA_CACHE_DIR"
        )
    for kernels in wanted:
        yield from compile_apart(kernels, None)
