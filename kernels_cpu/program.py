"""The program of a forward pass: op rows, built once, walked once a call by the thread team.

Owns: turning "multiply this matrix", "run this kernel" into rows of integers. Must not know models:
what follows what is models/graph.py's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgert.kernels_cpu import rows
from edgert.kernels_cpu.jit import Kernel
from edgert.kernels_cpu.layout import TILE_ROWS
from edgert.kernels_cpu.matmul import matmul_kernel
from edgert.quant.formats import QuantFormat

__all__ = ["ExpertShape", "Experts", "Matrix", "Program", "ProgramBuilder", "Rows", "Segment"]


CHUNK_MAX = 64  # units handed out at once at most


@dataclass(frozen=True, slots=True)
class Rows:
    """A buffer of rows: address of the first and bytes between two."""

    address: int
    stride: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive 16-row tiles of a matrix that lie together: resident at `address`, or streamed
    as tile number `stream_index` (then `address` is 0 and known only when it arrives).
    """

    tiles: int
    address: int
    stream_index: int = -1
    format: QuantFormat | None = None  # of these tiles, where it is not the matrix's
    split: tuple[int, ...] = ()  # bits of base and parts, where tiles are computed from those


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix (rows M, columns K) as its segments from the top row down."""

    format: QuantFormat
    columns: int
    segments: tuple[Segment, ...]
    name: str = ""


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Formats of an expert, and where up and down begin in its record."""

    gate_format: QuantFormat
    up_format: QuantFormat
    down_format: QuantFormat
    up_offset: int
    down_offset: int


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of a layer. They are alike, or at least read their inputs alike."""

    hidden_size: int
    intermediate_size: int
    shapes: tuple[ExpertShape, ...]  # one for all, or one for each


@dataclass(frozen=True, slots=True)
class Program:
    """Op rows int64 [n_ops, OP_FIELDS] and the bytes of counters they use."""

    rows: npt.NDArray[np.int64]
    counter_bytes: int
    kernels: tuple[Kernel, ...]  # kept alive: rows hold their addresses
    names: tuple[str, ...]  # of each row, for people
    tables: tuple[npt.NDArray[np.int64], ...] = ()  # of experts; kept alive as well

    def part(self, first: int, end: int) -> Program:
        """Rows `first` to `end` alone; the row before each must be a barrier."""
        return replace(self, rows=self.rows[first:end], names=self.names[first:end])


class ProgramBuilder:
    """Collects rows in execution order; `finish` gives the program.

    `section` begins the names of the rows that follow.
    """

    def __init__(self) -> None:
        self.section = ""
        self._names: list[str] = []
        self._rows: list[npt.NDArray[np.int64]] = []
        self._kernels: list[Kernel] = []
        self._tables: list[npt.NDArray[np.int64]] = []
        self._cells = 0

    def _row(
        self, kind: int, kernel: Kernel | None, name: str, cells: int = 1
    ) -> npt.NDArray[np.int64]:
        row = np.zeros(rows.OP_FIELDS, np.int64)
        row[rows.KIND] = kind
        row[rows.TILE] = -1
        row[rows.COUNTER] = self._cells * rows.CELL
        if kernel is not None:
            row[rows.FN] = kernel.address
            self._kernels.append(kernel)
        self._cells += cells
        self._rows.append(row)
        self._names.append(name)
        return row

    def barrier(self) -> None:
        """The next rows may read what the rows so far wrote."""
        self._rows[-1][rows.FLAGS] |= rows.BARRIER

    def call(
        self, kernel: Kernel, arguments: Sequence[int], units: int, chunk: int = CHUNK_MAX
    ) -> None:
        """Run an op kernel over `units` units for every token, at most `chunk` at a time."""
        row = self._row(rows.CALL, kernel, self.section + kernel.name)
        row[rows.UNITS] = units
        row[rows.CHUNK] = chunk
        row[rows.FLAGS] = rows.PER_TOKEN
        row[8 : 8 + len(arguments)] = arguments

    def matmul(
        self,
        matrix: Matrix,
        x: Rows,
        y: Rows,
        index: int,
        *,
        add: bool = False,
        bias: int = 0,
        logits: bool = False,
    ) -> None:
        """y[t] = W x[t] (+ bias), or y[t] += with `add`, for all tokens or those wanting logits.

        `index` is the address of 0, 1, 2, ... as int64, as long as tokens there can be.
        """
        first = 0
        for segment in matrix.segments:
            kernel = matmul_kernel(segment.format or matrix.format, segment.split)
            row = self._row(rows.MATMUL, kernel, matrix.name)
            row[rows.UNITS] = segment.tiles
            row[rows.CHUNK] = CHUNK_MAX
            row[rows.FLAGS] = rows.LOGITS if logits else 0
            row[rows.TILE] = segment.stream_index
            row[rows.WEIGHT] = segment.address
            row[rows.M_X], row[rows.M_X_STRIDE] = x.address, x.stride
            row[rows.M_Y] = y.address + 4 * TILE_ROWS * first
            row[rows.M_Y_STRIDE] = y.stride
            row[rows.M_K] = matrix.columns
            row[rows.M_XI] = row[rows.M_YI] = index
            row[rows.M_MODE] = int(add)
            row[rows.M_BIAS] = bias + 4 * TILE_ROWS * first if bias else 0
            first += segment.tiles

    def group(self, layer: int, expert_ids: int, top_k: int, n_experts: int) -> None:
        """Sort the layer's routed (token, choice) pairs by expert and ask for missing experts."""
        row = self._row(rows.GROUP, None, self.section + "group_pairs")
        row[rows.G_LAYER], row[rows.G_IDS] = layer, expert_ids
        row[rows.G_TOP_K], row[rows.G_N_EXPERTS] = top_k, n_experts

    def hint(
        self, kernel: Kernel, arguments: Sequence[int], layer: int, expert_ids: int, top_k: int,
        n_experts: int,
    ) -> None:  # fmt: skip
        """Route by `kernel` and post what it chose as a hint for `layer`."""
        row = self._row(rows.HINT, kernel, self.section + "hint")
        row[8 : 8 + len(arguments)] = arguments
        row[rows.H_LAYER], row[rows.H_IDS] = layer, expert_ids
        row[rows.H_TOP_K], row[rows.H_N_EXPERTS] = top_k, n_experts

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Rows added within serve a hint: passes without hints leave them out."""
        first = len(self._rows)
        yield
        for row in self._rows[first:]:
            row[rows.FLAGS] |= rows.AHEAD

    def experts(
        self,
        experts: Experts,
        n_experts: int,
        inputs: tuple[Rows, Rows, Rows],
        outputs: tuple[Rows, Rows, Rows],
        swiglu: tuple[Kernel, int, int],
    ) -> None:
        """Gate, up, activation and down of every routed pair.

        `inputs` are read by gate, up and down; `outputs` written by them. `swiglu` is its kernel,
        the address of its op row and the units of one pair.
        """
        row = self._row(rows.EXPERTS, None, self.section + "experts", cells=3)
        self._kernels.append(swiglu[0])
        table = self._table(experts.shapes)
        (gate_x, up_x, act), (gate_y, up_y, out) = inputs, outputs
        assert gate_y.stride == up_y.stride
        ff_tiles = -(-experts.intermediate_size // TILE_ROWS)
        hidden_tiles = -(-experts.hidden_size // TILE_ROWS)
        fields = {
            rows.E_N_EXPERTS: n_experts, rows.E_TABLE: int(table.ctypes.data),
            rows.E_TABLE_STRIDE: table.strides[0] if len(table) > 1 else 0,
            rows.E_GATE_X: gate_x.address,
            rows.E_GATE_X_STRIDE: gate_x.stride, rows.E_UP_X: up_x.address,
            rows.E_UP_X_STRIDE: up_x.stride, rows.E_GATE: gate_y.address, rows.E_UP: up_y.address,
            rows.E_FF_STRIDE: gate_y.stride, rows.E_ACT: act.address, rows.E_ACT_STRIDE: act.stride,
            rows.E_OUT: out.address, rows.E_OUT_STRIDE: out.stride,
            rows.E_HIDDEN: experts.hidden_size, rows.E_FF: experts.intermediate_size,
            rows.E_FF_TILES: ff_tiles, rows.E_HIDDEN_TILES: hidden_tiles,
            rows.E_SWIGLU_FN: swiglu[0].address, rows.E_SWIGLU_OP: swiglu[1],
            rows.E_SWIGLU_UNITS: swiglu[2], rows.CHUNK: CHUNK_MAX,
        }  # fmt: skip
        for field, value in fields.items():
            row[field] = value

    def _table(self, shapes: Sequence[ExpertShape]) -> npt.NDArray[np.int64]:
        """What compiled code looks up of an expert: kernels, and places in the record."""
        table = np.zeros((len(shapes), rows.X_FIELDS), np.int64)
        for row, shape in zip(table, shapes, strict=True):
            formats = (shape.gate_format, shape.up_format, shape.down_format)
            kernels = [matmul_kernel(fmt) for fmt in formats]
            row[rows.X_GATE_FN], row[rows.X_UP_FN], row[rows.X_DOWN_FN] = (
                kernel.address for kernel in kernels
            )
            row[rows.X_UP_OFFSET], row[rows.X_DOWN_OFFSET] = shape.up_offset, shape.down_offset
            self._kernels += kernels
        self._tables.append(table)
        return table

    def finish(self) -> Program:
        """The program; the last row always ends with a barrier."""
        self.barrier()
        return Program(
            np.stack(self._rows), self._cells * rows.CELL, tuple(self._kernels),
            tuple(self._names), tuple(self._tables),
        )  # fmt: skip
