"""The routed experts of a layer, walked by the thread team: sort, resolve, compute in waves.

Owns: grouping (token, choice) pairs by expert, finding resident experts without leaving compiled
code, asking for the missing ones, and computing whatever has arrived while the rest is on its way;
also the hint which experts a later layer may want.
Must not know how a record is read or which one is evicted (storage/expert_streamer.py).

    gate, up = W_gate[e] h[t], W_up[e] h[t]    act = silu(gate) * up    out[t, j] = W_down[e] act

Each (token, choice) pair has its own output row, summed in router order afterwards (moe.py), so the
order in which experts arrive never reaches the result.
"""

from __future__ import annotations

from edgert.kernels_cpu import rows
from edgert.kernels_cpu.atomic import (
    arg,
    atomic_add,
    call_matmul,
    call_op,
    full_fence,
    load_acquire,
    load_int,
    notify,
    now_ns,
    store_int,
    store_release,
)
from edgert.kernels_cpu.jit import inline
from edgert.kernels_cpu.recording import record
from edgert.kernels_cpu.waiting import NAP_US, barrier, chunk_of, relax, stopped

__all__ = ["group_pairs", "post_hint", "run_experts"]


@inline
def group_pairs(op: int, frame: int, streams: int) -> None:
    """Sort the layer's (token, choice) pairs by expert, resolve hits, ask for the misses.

    One thread. Group g gets (first pair, pair count) at S_GROUPS; pairs get their token and their
    id token * k + j, ascending within a group. An expert is one group however many tokens chose it.
    """
    layer = arg(op, rows.G_LAYER)
    ids = arg(op, rows.G_IDS)
    k = arg(op, rows.G_TOP_K)
    n_experts = arg(op, rows.G_N_EXPERTS)
    tokens = arg(frame, rows.F_N_TOKENS)
    pairs = tokens * k
    board = arg(streams, rows.S_BOARD)
    expert_at = board + 8 * rows.BOARD_ARRAYS
    state_at = expert_at + 8 * n_experts
    address_at = state_at + 8 * n_experts
    table = arg(streams, rows.S_SLOT_ADDRESS) + 8 * layer * n_experts
    used = arg(streams, rows.S_LAST_USED) + 8 * layer * n_experts
    group_at = arg(streams, rows.S_GROUPS)
    token_at = arg(streams, rows.S_PAIR_TOKEN)
    pair_at = arg(streams, rows.S_PAIR_ID)
    clock = arg(streams, rows.S_CLOCK) + 1
    store_int(streams + 8 * rows.S_CLOCK, clock)
    store_int(board + 8 * rows.BOARD_TOKENS, tokens)  # before the stamps, which say it is so
    groups = 0
    filled = 0
    for e in range(n_experts):
        first = filled
        for p in range(pairs):
            if arg(ids, p) == e:
                store_int(token_at + 8 * filled, p // k)
                store_int(pair_at + 8 * filled, p)
                filled += 1
        if filled > first:
            store_int(group_at + 16 * groups, first)
            store_int(group_at + 16 * groups + 8, filled - first)
            store_int(expert_at + 8 * groups, e)
            store_int(used + 8 * e, clock)
            groups += 1
    # All are stamped before any is looked up: who evicts one meanwhile sees it, and takes it back.
    full_fence()
    for g in range(groups):
        store_int(address_at + 8 * g, arg(table, arg(expert_at, g)))
    store_int(board + 8 * rows.BOARD_LAYER, layer)
    store_int(board + 8 * rows.BOARD_GROUPS, groups)
    # States come last: the loader acts on a wanted state only, and reads the rest after it.
    misses = 0
    for g in range(groups):
        if arg(address_at, g) != 0:
            store_release(state_at + 8 * g, rows.READY)
        else:
            misses += 1
    if misses > 0:
        for g in range(groups):
            if arg(address_at, g) == 0:
                store_release(state_at + 8 * g, rows.WANTED)
        notify(arg(streams, rows.S_REQUEST_FD), layer)
    store_int(streams + 8 * rows.S_HITS, arg(streams, rows.S_HITS) + groups - misses)
    store_int(streams + 8 * rows.S_MISSES, arg(streams, rows.S_MISSES) + misses)


@inline
def post_hint(op: int, frame: int, streams: int) -> None:
    """Route as a later layer would, and tell the reader threads which experts it may want.

    One thread. First choices of all tokens come first, then second choices and so on. A hint is
    never waited for, and nothing computed depends on it.
    """
    tokens = arg(frame, rows.F_N_TOKENS)
    call_op(arg(op, rows.FN), op, frame, 0, tokens, 0)
    layer = arg(op, rows.H_LAYER)
    ids = arg(op, rows.H_IDS)
    k = arg(op, rows.H_TOP_K)
    table = arg(streams, rows.S_SLOT_ADDRESS) + 8 * layer * arg(op, rows.H_N_EXPERTS)
    board = arg(streams, rows.S_HINTS)
    expert_at = board + 8 * rows.HINT_EXPERTS
    store_release(board + 8 * rows.HINT_COUNT, 0)
    count = 0
    missing = 0
    for j in range(k):
        for t in range(tokens):
            expert = arg(ids, t * k + j)
            same = 0
            for i in range(count):
                same += arg(expert_at, i) == expert
            if same == 0 and count < rows.HINT_MAX:
                store_int(expert_at + 8 * count, expert)
                count += 1
                missing += arg(table, expert) == 0
    store_int(board + 8 * rows.HINT_LAYER, layer)
    store_int(board + 8 * rows.HINT_DUE, arg(streams, rows.S_CLOCK) + 1)
    store_release(board + 8 * rows.HINT_COUNT, count)
    if missing > 0:
        notify(arg(streams, rows.S_REQUEST_FD), layer)


@inline
def collect_wave(streams: int, n_experts: int, counters: int) -> int:
    """Gather every group that is ready and not yet computed; return how many.

    One thread. Fills S_WAVE (count, pairs, then the groups) and S_WAVE_PAIRS (their pair ids).
    """
    board = arg(streams, rows.S_BOARD)
    state_at = board + 8 * (rows.BOARD_ARRAYS + n_experts)
    group_at = arg(streams, rows.S_GROUPS)
    pair_at = arg(streams, rows.S_PAIR_ID)
    wave = arg(streams, rows.S_WAVE)
    wave_pairs = arg(streams, rows.S_WAVE_PAIRS)
    count = 0
    pairs = 0
    for g in range(arg(board, rows.BOARD_GROUPS)):
        if load_acquire(state_at + 8 * g) == rows.READY:
            store_int(wave + 16 + 8 * count, g)
            count += 1
            first = arg(group_at, 2 * g)
            for p in range(first, first + arg(group_at, 2 * g + 1)):
                store_int(wave_pairs + 8 * pairs, arg(pair_at, p))
                pairs += 1
    store_int(wave, count)
    store_int(wave + 8, pairs)
    for phase in range(3):
        store_int(counters + phase * rows.CELL, 0)
    return count


@inline
def finish_wave(streams: int, n_experts: int) -> int:
    """Mark the wave's groups done, which frees their slots; return how many groups are left."""
    board = arg(streams, rows.S_BOARD)
    state_at = board + 8 * (rows.BOARD_ARRAYS + n_experts)
    wave = arg(streams, rows.S_WAVE)
    for i in range(arg(wave, 0)):
        store_release(state_at + 8 * arg(wave, 2 + i), rows.DONE)
    wanted = 0
    left = 0
    for g in range(arg(board, rows.BOARD_GROUPS)):
        state = load_acquire(state_at + 8 * g)
        if state == rows.WANTED:
            wanted += 1
        if state != rows.DONE:
            left += 1
    if wanted > 0:
        notify(arg(streams, rows.S_REQUEST_FD), 0)
    return left


@inline
def multiply_wave(
    op: int, streams: int, cell: int, gate_up: bool, n_experts: int, threads: int
) -> None:
    """One thread's share of the wave's products: gate and up (`gate_up` True), or down.

    Units are row tiles, group by group, gate before up, handed out in chunks: long ones, which
    read like one stream (8 of 64 experts of 2048 x 1024, 2 threads: 12.4 ms a token, and 17.0 in
    chunks of 4 tiles).
    """
    expert_at = arg(streams, rows.S_BOARD) + 8 * rows.BOARD_ARRAYS
    address_at = expert_at + 16 * n_experts
    group_at = arg(streams, rows.S_GROUPS)
    wave = arg(streams, rows.S_WAVE)
    tiles = arg(op, rows.E_FF_TILES) if gate_up else arg(op, rows.E_HIDDEN_TILES)
    per_group = 2 * tiles if gate_up else tiles
    units = arg(wave, 0) * per_group
    chunk = chunk_of(op, units, threads)
    while True:
        unit = atomic_add(cell, chunk)
        if unit >= units:
            return
        last = min(unit + chunk, units)
        while unit < last:
            i = unit // per_group
            within = unit - i * per_group
            part = within // tiles
            start = within - part * tiles
            stop = min(start + last - unit, tiles)
            g = arg(wave, 2 + i)
            first = arg(group_at, 2 * g)
            n = arg(group_at, 2 * g + 1)
            pair_ids = arg(streams, rows.S_PAIR_ID) + 8 * first
            record = arg(address_at, g)
            shape = arg(op, rows.E_TABLE) + arg(op, rows.E_TABLE_STRIDE) * arg(expert_at, g)
            if gate_up:
                tokens = arg(streams, rows.S_PAIR_TOKEN) + 8 * first
                if part == 0:
                    call_matmul(
                        arg(shape, rows.X_GATE_FN), record, arg(op, rows.E_GATE_X),
                        arg(op, rows.E_GATE_X_STRIDE), arg(op, rows.E_GATE),
                        arg(op, rows.E_FF_STRIDE), arg(op, rows.E_HIDDEN), start, stop, n, tokens,
                        pair_ids, 0, 0,
                    )  # fmt: skip
                else:
                    call_matmul(
                        arg(shape, rows.X_UP_FN), record + arg(shape, rows.X_UP_OFFSET),
                        arg(op, rows.E_UP_X), arg(op, rows.E_UP_X_STRIDE), arg(op, rows.E_UP),
                        arg(op, rows.E_FF_STRIDE), arg(op, rows.E_HIDDEN), start, stop, n, tokens,
                        pair_ids, 0, 0,
                    )  # fmt: skip
            else:
                call_matmul(
                    arg(shape, rows.X_DOWN_FN), record + arg(shape, rows.X_DOWN_OFFSET),
                    arg(op, rows.E_ACT), arg(op, rows.E_ACT_STRIDE), arg(op, rows.E_OUT),
                    arg(op, rows.E_OUT_STRIDE), arg(op, rows.E_FF), start, stop, n, pair_ids,
                    pair_ids, 0, 0,
                )  # fmt: skip
            unit += stop - start


@inline
def activate_wave(op: int, frame: int, streams: int, cell: int, tid: int) -> None:
    """One thread's share of silu(gate) * up over the wave's pairs."""
    units = arg(arg(streams, rows.S_WAVE), 1) * arg(op, rows.E_SWIGLU_UNITS)
    while True:
        unit = atomic_add(cell, 1)
        if unit >= units:
            return
        call_op(arg(op, rows.E_SWIGLU_FN), arg(op, rows.E_SWIGLU_OP), frame, unit, unit + 1, tid)


@inline
def run_experts(
    op: int, frame: int, counters: int, tid: int, threads: int, control: int, streams: int, row: int
) -> bool:
    """Compute every group of the layer, resident ones first, in waves of whatever has arrived.

    Needs three counter cells of its own at the row's COUNTER; `row` is its number, for the
    timeline. False when the run was stopped.
    """
    timeline = arg(streams, rows.S_TIMELINE)
    arrived = ready = done = 0
    n_experts = arg(op, rows.E_N_EXPERTS)
    cells = counters + arg(op, rows.COUNTER)
    left_at = control + rows.C_LEFT * rows.CELL
    while True:
        if timeline != 0:
            arrived = now_ns()
        if tid == 0:
            begin = now_ns()
            spins = 0
            while collect_wave(streams, n_experts, cells) == 0:
                relax(spins, NAP_US)
                spins += 1
                if stopped(control, streams):
                    return False
            if spins > 0:
                stall = control + rows.C_STALL_NS * rows.CELL
                store_int(stall, load_int(stall) + now_ns() - begin)
        if not barrier(control, streams, threads):
            return False
        if timeline != 0:
            ready = now_ns()
        multiply_wave(op, streams, cells, True, n_experts, threads)
        if not barrier(control, streams, threads):
            return False
        activate_wave(op, frame, streams, cells + rows.CELL, tid)
        if not barrier(control, streams, threads):
            return False
        multiply_wave(op, streams, cells + 2 * rows.CELL, False, n_experts, threads)
        if timeline != 0:
            done = now_ns()
        if not barrier(control, streams, threads):
            return False
        if tid == 0:
            store_int(left_at, finish_wave(streams, n_experts))
        if not barrier(control, streams, threads):
            return False
        if timeline != 0:
            record(timeline, row, tid, arrived, ready, done)
        if load_acquire(left_at) == 0:
            return True
