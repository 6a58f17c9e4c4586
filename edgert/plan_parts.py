"""What a plan is made of: the tiles of the matrices, and the sizes of the rest.

Owns: cutting matrices into tiles, measuring everything a plan must hold. Pure. Must not know the
budget's policy (plan.py), which tiles stay (plan_resident.py), nor how anything is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import gcd, lcm

import numpy as np
import numpy.typing as npt

from edgert.expert_records import LayerExperts, expert_records, record_sizes
from edgert.expert_sizes import slot_sizes, slots_within
from edgert.kernels_cpu.attention import attention_scratch_bytes, context_parts, partials_bytes
from edgert.kernels_cpu.kv_cache import KvLayout, kv_cache_bytes
from edgert.kernels_cpu.layout import TILE_ROWS, matrix_bytes, tile_bytes
from edgert.kernels_cpu.matmul import takes_parts, takes_quantized_input
from edgert.models.run_state import Inputs, inputs_of, run_state_buffers
from edgert.models.spec import ModelSpec
from edgert.models.tensors import TensorNeed, TensorRole, check_tensors
from edgert.quant.formats import QuantFormat
from edgert.storage.backend import ALIGNMENT
from edgert.storage.expert_cache import SlotSizes
from edgert.storage.manifest import Extent, Manifest, TensorEntry
from edgert.storage.reader import parts_bytes
from edgert.units import KIB, MIB, align_up, format_bytes

__all__ = [
    "Base",
    "Cut",
    "Need",
    "Sizes",
    "TilePlan",
    "at_least",
    "measure",
    "need_of",
    "resident_why",
    "ring_of",
]

_ADDRESS_BYTES = 64  # of a tile that is computed from its parts
LOGITS_BYTES = 4 * MIB  # most that the logits of one pass may take


@dataclass(frozen=True, slots=True)
class Base:
    """The first bits of a tile of a nested matrix: with them the model drafts."""

    bits: int
    parts: int  # of the tile's, the first ones
    nbytes: int  # in memory, in kernel layout
    slot_bytes: int  # of the ring, for the rest of such a tile


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Consecutive rows of a matrix that are read, placed and computed as one."""

    tensor: str
    first_row: int
    rows: int
    nbytes: int  # in memory, in kernel layout
    extents: tuple[Extent, ...]  # in the file: one, or one for each part of a nested matrix
    is_head: bool
    bases: tuple[Base, ...] = ()  # those it can have, narrow ones first
    stream_index: int = -1  # position in the cycle of streamed tiles; -1 is resident
    base: Base | None = None  # what is in memory of it while the rest is streamed

    @property
    def memory_bytes(self) -> int:
        """Bytes that stay in memory: all of it, its base, or none."""
        return self.nbytes if self.stream_index < 0 else self.base.nbytes if self.base else 0

    @property
    def reads(self) -> tuple[Extent, ...]:
        """What is read of it in every pass, or once where it is resident."""
        return self.extents[self.base.parts :] if self.base else self.extents

    @property
    def read_bytes(self) -> int:
        """Bytes of `reads`."""
        return sum(e.nbytes for e in self.reads)

    def placed(self, index: int, base: Base | None = None) -> TilePlan:
        """The same tile at a place of the cycle. (`dataclasses.replace` takes five times as long,
        and a plan of an 8B model has up to 30,000 tiles.)
        """
        return TilePlan(
            self.tensor, self.first_row, self.rows, self.nbytes, self.extents, self.is_head,
            self.bases, index, base,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cut:
    """A matrix in tiles that are alike but for their place: full ones, and perhaps a shorter last.

    A file of 4 GB has 16,000 tiles of the smallest size and some 250 matrices, so plans are
    compared without laying tiles out.
    """

    entry: TensorEntry
    kinds: tuple[tuple[int, TilePlan], ...]  # how many tiles of a size, and the first of them

    def tiles(self) -> Iterator[TilePlan]:
        """All of them, in order."""
        for count, like in self.kinds:
            for first in range(like.first_row, like.first_row + count * like.rows, like.rows):
                extents = self.entry.extents(first, first + like.rows)
                yield TilePlan(
                    like.tensor, first, like.rows, like.nbytes, extents, like.is_head, like.bases
                )

    def read_bytes(self) -> int:
        """The most that one read of a tile takes, in whole blocks of the disk."""
        most = 0
        for count, like in self.kinds:
            turns = lcm(*(ALIGNMENT // gcd(ALIGNMENT, e.nbytes) for e in like.extents))
            for i in range(min(count, turns)):  # then they lie in blocks as those before
                parts = [Extent(0, e.offset + i * e.nbytes, e.nbytes) for e in like.extents]
                most = max(most, parts_bytes(parts, ALIGNMENT))
        return most


@dataclass(frozen=True, slots=True)
class Need:
    """Everything of a model that does not depend on the budget."""

    spec: ModelSpec
    needs: dict[str, TensorNeed]
    inputs: Inputs
    cuts: tuple[Cut, ...]  # the matrices, in the order of the pass
    tile_bytes: int  # of all their tiles
    weights: int  # number of weights in them
    bases: dict[int, int]  # bits of a base -> bytes in memory when no tile has less
    experts: tuple[LayerExperts, ...]  # one a layer; empty for a dense model
    threads: int
    kv_cache_type: str
    slot_bytes: int
    staging_bytes: int  # of one reader
    vector_bytes: int
    row_bytes: int  # room to read one row of the embedding
    embedding_bytes: int
    record_bytes: npt.NDArray[np.int64] = field(repr=False)  # [layers, experts] of a slot
    slot_sizes: npt.NDArray[np.int64] = field(repr=False)  # with n slots for experts the first n
    expert_bytes: int  # of an expert in the file, on average
    weight_bytes: int

    @property
    def tiles(self) -> tuple[TilePlan, ...]:
        """Every tile, made anew: all but the tiles of a plan is known without them."""
        return tuple(tile for cut in self.cuts for tile in cut.tiles())

    @property
    def n_tiles(self) -> int:
        """Number of tiles."""
        return sum(count for cut in self.cuts for count, _ in cut.kinds)

    def slots_bytes(self, count: int) -> int:
        """Bytes of so many slots for experts."""
        return int(self.slot_sizes[:count].sum())

    def sizes(self, slots: int) -> SlotSizes | None:
        """Bytes of records and of so many slots; None where all are of one size."""
        return SlotSizes.of(self.record_bytes, self.slot_sizes[:slots])

    def slots_within(self, nbytes: int) -> int:
        """How many slots for experts fit in so many bytes."""
        return slots_within(self.slot_sizes, nbytes)

    @property
    def expert_count(self) -> int:
        """All experts of all layers."""
        return len(self.experts) * self.spec.num_experts

    @property
    def experts_per_token(self) -> int:
        """Experts one layer computes for one token."""
        return self.spec.num_experts_per_tok if self.experts else 0


@dataclass(frozen=True, slots=True)
class Sizes:
    """What depends on the context and the chunk."""

    kv_bytes: int
    kv_why: str
    activation_bytes: int
    table_bytes: int
    logit_rows: int


def head_tensor(spec: ModelSpec) -> str:
    """The name of the output head's tensor."""
    return "token_embd.weight" if spec.tie_word_embeddings else "output.weight"


def need_of(
    spec: ModelSpec, manifest: Manifest, threads: int, kv_cache_type: str, tile_bytes: int
) -> Need:
    """Cut a model into tiles and records, and measure what is fixed.

    Raises `ModelError` or `UnsupportedError` when the tensors are not those of the model.
    """
    needs = check_tensors(spec, manifest.tensors)
    cuts = [
        _cut(manifest, need.name, tile_bytes, is_head=need.role is TensorRole.LM_HEAD)
        for need in needs.values()
        if need.kind == "matrix"
    ]
    if spec.tie_word_embeddings:
        cuts.append(_cut(manifest, head_tensor(spec), tile_bytes, is_head=True))
    kinds = [pair for cut in cuts for pair in cut.kinds]
    experts = expert_records(spec, needs, manifest, tile_bytes)
    records = [record for layer in experts for record in layer.records]
    record_bytes = record_sizes(experts, spec)
    raw = [
        sum(part.extent.nbytes for part in layer.record(i).parts)
        for layer in experts
        for i in range(spec.num_experts)
    ]
    reads = [cut.read_bytes() for cut in cuts]
    reads += [p.extent.nbytes + 2 * ALIGNMENT for r in records for p in r.parts]
    quantized = {f.name for f in _formats(manifest) if takes_quantized_input(f)}
    vectors = sum(
        align_up(4 * align_up(n.shape[-1], TILE_ROWS), 64)
        for n in needs.values()
        if n.kind == "vector"
    )
    embedding = manifest.tensors["token_embd.weight"]
    row = embedding.format.row_bytes(embedding.shape[1])
    return Need(
        spec=spec, needs=needs, inputs=inputs_of(_by_role(needs, manifest, spec), quantized),
        cuts=tuple(cuts), bases={} if experts else base_sizes(kinds),
        tile_bytes=sum(n * t.nbytes for n, t in kinds),
        weights=sum(cut.entry.parameters for cut in cuts), experts=experts,
        threads=threads, kv_cache_type=kv_cache_type,
        slot_bytes=align_up(max(n for _, t in kinds for n in _slot_sizes(t)), ALIGNMENT),
        staging_bytes=align_up(max(reads), ALIGNMENT), vector_bytes=vectors,
        row_bytes=align_up(row + 2 * ALIGNMENT, ALIGNMENT),
        embedding_bytes=align_up(embedding.extent.nbytes, 64),
        record_bytes=record_bytes, slot_sizes=slot_sizes(record_bytes, spec.num_experts_per_tok),
        expert_bytes=sum(raw) // max(len(raw), 1),
        weight_bytes=manifest.tensor_bytes,
    )  # fmt: skip


def _slot_sizes(tile: TilePlan) -> list[int]:
    return [tile.nbytes, *(base.slot_bytes for base in tile.bases)]


def _formats(manifest: Manifest) -> set[QuantFormat]:
    return {f for t in manifest.tensors.values() for f in t.formats}


def _by_role(
    needs: dict[str, TensorNeed], manifest: Manifest, spec: ModelSpec
) -> dict[TensorRole, set[QuantFormat]]:
    found: dict[TensorRole, set[QuantFormat]] = {}
    for need in needs.values():
        if need.kind in ("matrix", "expert_matrix"):
            found.setdefault(need.role, set()).update(manifest.tensors[need.name].formats)
    if spec.tie_word_embeddings:
        found[TensorRole.LM_HEAD] = {manifest.tensors[head_tensor(spec)].format}
    return found


def _cut(manifest: Manifest, name: str, size: int, *, is_head: bool) -> Cut:
    """One matrix in tiles: whole groups of 16 rows of about `size` bytes."""
    entry = manifest.tensors[name]
    rows, columns = entry.shape
    group = tile_bytes(entry.format, columns)
    count = max(1, size // group)
    if entry.layout != "rows":  # of whole pages, so that nothing is read twice
        each = [e.nbytes for e in entry.extents(0, min(TILE_ROWS, rows))]
        even = lcm(*(ALIGNMENT // gcd(ALIGNMENT, nbytes) for nbytes in each))
        count = max(even, count // even * even)
    full, rest = divmod(rows, TILE_ROWS * count)
    kinds = [(full, _tile(entry, 0, TILE_ROWS * count, is_head))] if full else []
    kinds += [(1, _tile(entry, rows - rest, rest, is_head))] if rest else []
    return Cut(entry, tuple(kinds))


def _tile(entry: TensorEntry, first: int, rows: int, is_head: bool) -> TilePlan:
    """The tile of `rows` rows from `first` on."""
    columns = entry.shape[-1]
    whole, bases = matrix_bytes(entry.format, rows, columns), list[Base]()
    for bits in entry.base_bits:
        parts, kept = entry.base_parts(bits), matrix_bytes(entry.base_format(bits), rows, columns)
        slot = whole  # put together there, or, in parts, as it was read
        if takes_parts(entry.format, entry.split(bits)):
            slot = parts_bytes(entry.extents(0, rows)[parts:], ALIGNMENT) + _ADDRESS_BYTES
        bases.append(Base(bits, parts, kept, align_up(slot, ALIGNMENT)))
    extents = entry.extents(first, first + rows)
    return TilePlan(entry.name, first, rows, whole, extents, is_head, tuple(bases))


def measure(need: Need, context: int, tokens: int) -> Sizes:
    """The sizes that follow from a context length and the most tokens of a pass."""
    spec = need.spec
    layers, heads, dim = spec.num_hidden_layers, spec.num_key_value_heads, spec.head_dim
    kv = kv_cache_bytes(layers, heads, dim, context, need.kv_cache_type)
    per_token = KvLayout(heads, dim, 64, need.kv_cache_type).layer_bytes // 64 * layers
    rows = max(1, min(tokens, LOGITS_BYTES // (4 * align_up(spec.vocab_size, TILE_ROWS))))
    buffers = run_state_buffers(
        spec, need.inputs, tokens=tokens, logit_rows=rows,
        scratch_bytes=scratch_bytes(spec, need.threads, context),
    )  # fmt: skip
    if need.bases:  # the draft program has its own, for one token
        buffers += run_state_buffers(
            spec, need.inputs, tokens=1, logit_rows=1,
            scratch_bytes=scratch_bytes(spec, need.threads, context),
        )  # fmt: skip
    why = f"{context} tokens x {format_bytes(per_token)} ({need.kv_cache_type})"
    return Sizes(
        kv_bytes=kv,
        kv_why=why,
        activation_bytes=sum(align_up(b.nbytes, 64) for b in buffers) + 64 * KIB,
        table_bytes=align_up(4 * context * spec.rope_dim, 64),
        logit_rows=rows,
    )


def scratch_bytes(spec: ModelSpec, threads: int, context: int) -> int:
    """What the attention kernel needs beside its inputs, for all threads."""
    heads, kv_heads, dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    parts = context_parts(kv_heads, threads)
    each = attention_scratch_bytes(heads, kv_heads, dim)
    return partials_bytes(heads, kv_heads, dim, context, parts) + threads * each


def at_least(tile: TilePlan, bits: int) -> Base | None:
    """The narrowest base of a tile with `bits` bits or more; None where it must be kept whole."""
    return next((base for base in tile.bases if base.bits >= bits), None)


def ring_of(window: int, need: Need, tiles: Sequence[TilePlan]) -> tuple[int, int]:
    """Slots in `window` bytes for the streamed ones of `tiles`, and bytes of one.

    Where all have a base, a slot holds what is read beside it: twice as many, of half the size.
    """
    bases = [tile.base for tile in tiles if tile.stream_index >= 0]
    sizes = [base.slot_bytes for base in bases if base]
    size = max(sizes) if sizes and len(sizes) == len(bases) else need.slot_bytes
    return min(window // size, max(len(bases) - 1, 0)), size


def base_sizes(kinds: Sequence[tuple[int, TilePlan]]) -> dict[int, int]:
    """Bytes in memory with a base of each width for every tile that has it; empty without bases.

    `kinds`: how many tiles of a size there are, and one of them.
    """
    found = {base.bits: 0 for _, tile in kinds for base in tile.bases}
    for bits in found:
        pairs = [(n, at_least(tile, bits) or tile) for n, tile in kinds]
        found[bits] = sum(n * kept.nbytes for n, kept in pairs)
    return dict(sorted(found.items()))


def resident_why(tiles: Sequence[TilePlan]) -> str:
    """What of the tiles is in memory, for people."""
    whole = sum(tile.stream_index < 0 for tile in tiles)
    bases = Counter(tile.base.bits for tile in tiles if tile.base)
    rest = "".join(f", the top {bits} bits of {bases[bits]}" for bits in sorted(bases))
    return f"{whole} of {len(tiles)} matrix tiles{rest}"
