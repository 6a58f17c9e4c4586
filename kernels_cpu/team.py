"""The thread team's walk: N threads run one list of operations after another in compiled code.

Owns: handing out units, waiting for streamed weights and giving their slots back. Must not know
what the kernels compute, nor Python objects: everything here is an address or a number.

Every thread executes the same rows in order. A row's units are handed out in chunks by an atomic
counter (measured: dynamic chunks read memory at 57-64 GB/s where a static split reads 43-47). A row
flagged BARRIER ends with one; rows that only share inputs carry none. A matrix row whose tile is
streamed waits for it first, and the thread that finishes the tile's last unit hands the slot back
to the reader threads through a pipe.
"""

from __future__ import annotations

from edgert.kernels_cpu import rows
from edgert.kernels_cpu.atomic import (
    arg,
    atomic_add,
    call_matmul,
    call_op,
    load_acquire,
    load_int,
    notify,
    now_ns,
    store_int,
    store_release,
)
from edgert.kernels_cpu.experts import group_pairs, post_hint, run_experts
from edgert.kernels_cpu.jit import inline, kernel, void
from edgert.kernels_cpu.recording import record
from edgert.kernels_cpu.waiting import await_order, await_value, barrier, chunk_of, stopped

__all__ = ["begin_walk_kernel", "serve_kernel"]


@inline
def run_call(op: int, frame: int, counters: int, tid: int, threads: int) -> None:
    """Take units of an op kernel until none is left."""
    units = arg(op, rows.UNITS)
    if arg(op, rows.FLAGS) & rows.PER_TOKEN:
        units *= arg(frame, rows.F_N_TOKENS)
    chunk = chunk_of(op, units, threads)
    function = arg(op, rows.FN)
    cell = counters + arg(op, rows.COUNTER)
    while True:
        start = atomic_add(cell, chunk)
        if start >= units:
            return
        call_op(function, op, frame, start, min(start + chunk, units), tid)


@inline
def await_tile(op: int, frame: int, tid: int, control: int, streams: int) -> bool:
    """Wait for the weights of a matrix product if they are streamed. False when stopped."""
    tile = arg(op, rows.TILE)
    if tile < 0:
        return True
    ready = arg(streams, rows.S_READY) + 8 * tile
    return await_value(ready, arg(frame, rows.F_PASS) + 1, tid, control, streams)


@inline
def run_matmul(op: int, frame: int, counters: int, threads: int, streams: int) -> None:
    """Take row tiles of a matrix product whose weights are there until none is left."""
    units = arg(op, rows.UNITS)
    chunk = chunk_of(op, units, threads)
    function = arg(op, rows.FN)
    cell = counters + arg(op, rows.COUNTER)
    xi = arg(op, rows.M_XI)
    n = arg(frame, rows.F_N_TOKENS)
    if arg(op, rows.FLAGS) & rows.LOGITS:
        n = arg(frame, rows.F_N_LOGITS)
        xi += 8 * arg(frame, rows.F_FIRST_LOGIT)
    weight = arg(op, rows.WEIGHT)
    tile = arg(op, rows.TILE)
    if tile >= 0:
        weight = load_int(arg(streams, rows.S_ADDRESS) + 8 * tile)
    while True:
        start = atomic_add(cell, chunk)
        if start >= units:
            return
        stop = min(start + chunk, units)
        call_matmul(
            function, weight, arg(op, rows.M_X), arg(op, rows.M_X_STRIDE), arg(op, rows.M_Y),
            arg(op, rows.M_Y_STRIDE), arg(op, rows.M_K), start, stop, n, xi, arg(op, rows.M_YI),
            arg(op, rows.M_MODE), arg(op, rows.M_BIAS),
        )  # fmt: skip
        if tile >= 0 and atomic_add(cell + 8, stop - start) + stop - start == units:
            slot = load_int(arg(streams, rows.S_SLOT_OF) + 8 * tile)
            notify(arg(streams, rows.S_FREE_FD), slot)


@inline
def walk(
    tid: int, threads: int, control: int, frame: int, ops: int, n_ops: int, counters: int,
    streams: int,
) -> None:  # fmt: skip
    """Walk rows `ops[0:n_ops]` as thread `tid` of `threads`; the rest are addresses.

    Returns when all rows are done or the run was stopped (`waiting.stopped`); the caller looks.
    """
    timeline = arg(streams, rows.S_TIMELINE)
    begin = ready = done = 0
    for i in range(n_ops):
        op = ops + 8 * rows.OP_FIELDS * i
        if stopped(control, streams):
            return
        if arg(op, rows.FLAGS) & rows.AHEAD and arg(frame, rows.F_HINTS) == 0:
            continue
        if timeline != 0:
            begin = ready = now_ns()
        kind = arg(op, rows.KIND)
        if kind == rows.CALL:
            run_call(op, frame, counters, tid, threads)
        elif kind == rows.MATMUL:
            if not await_tile(op, frame, tid, control, streams):
                return
            if timeline != 0:
                ready = now_ns()
            run_matmul(op, frame, counters, threads, streams)
        elif kind == rows.GROUP:
            if tid == 0:
                group_pairs(op, frame, streams)
        elif kind == rows.HINT:
            if tid == 0:
                post_hint(op, frame, streams)
        else:
            if not run_experts(op, frame, counters, tid, threads, control, streams, i):
                return
            if timeline != 0:  # its waves have records of their own
                begin = ready = now_ns()
        if timeline != 0:
            done = now_ns()
        if arg(op, rows.FLAGS) & rows.BARRIER and not barrier(control, streams, threads):
            return
        if timeline != 0:
            record(timeline, i, tid, begin, ready, done)


@kernel(void("iiiiii"))
def serve_kernel(
    tid: int, threads: int, control: int, order: int, order_fd: int, ended_fd: int
) -> None:
    """The life of thread `tid`: walk program after program until told to return.

    `order` is the address of int64[ORDER_FIELDS]. The last thread through with a walk counts it in
    `C_ENDED` and writes to `ended_fd`: nothing in between enters Python.
    """
    number = 0
    through_at = control + rows.C_THROUGH * rows.CELL
    while True:
        number += 1
        await_order(control, number, order_fd)
        n_ops = arg(order, rows.O_N_ROWS)
        if n_ops < 0:
            return
        frame = arg(order, rows.O_FRAME)
        walkers = arg(frame, rows.F_THREADS)
        if walkers <= 0 or walkers > threads:
            walkers = threads
        if tid < walkers:
            walk(
                tid, walkers, control, frame, arg(order, rows.O_ROWS), n_ops,
                arg(order, rows.O_COUNTERS), arg(order, rows.O_STREAMS),
            )  # fmt: skip
        if atomic_add(through_at, 1) == threads - 1:
            store_int(through_at, 0)
            store_release(control + rows.C_ENDED * rows.CELL, number)
            notify(ended_fd, number)


@kernel(void("ii"))
def begin_walk_kernel(control: int, order_fd: int) -> None:
    """Let the threads walk what the order says, waking those asleep."""
    atomic_add(control + rows.C_ORDERED * rows.CELL, 1)
    for _ in range(load_acquire(control + rows.C_ASLEEP * rows.CELL)):
        notify(order_fd, 0)
