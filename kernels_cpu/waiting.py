"""How the threads of a team wait: for each other, for weights, and not at all once stopped.

Owns: the barrier, the waits for a value and for an order, the stop check, and how much a thread
takes at once, which is how long the others may have to wait for it. Must not know what is waited
for.

Spin for some 40 us, then sleep in naps: a pure spin costs a scheduler quantum (4 ms) per op as soon
as another program takes a core. Not `sched_yield`: it gives the core away for a whole quantum, and
who sleeps gets it back at once. Milliseconds a token of a 1B model, 2 threads on 2 cores:

    busy programs            0      1      2
    spin, yield, nap        16.8   22.7   203
    spin, nap               16.5   32.4   38.4
    llama.cpp               18.3   42.3   36.1
"""

from __future__ import annotations

from edgert.kernels_cpu import rows
from edgert.kernels_cpu.atomic import (
    arg,
    atomic_add,
    await_notice,
    load_acquire,
    load_int,
    now_ns,
    pause,
    sleep_us,
    store_int,
    store_release,
    yield_cpu,
)
from edgert.kernels_cpu.jit import inline

__all__ = ["NAP_US", "await_order", "await_value", "barrier", "chunk_of", "relax", "stopped"]

SPIN = 2000  # pauses before sleeping
NAP_US = 50  # the timer slack of Linux: asking for less is not shorter
# While weights are on their way: a tile takes 0.5-2 ms, and the ring holds several, so that looking
# more often reads nothing earlier.
WEIGHTS_NAP_US = 200
LINGER_NS = 500_000  # how long an idle thread yields before it sleeps: Python between two tokens


@inline
def stopped(control: int, streams: int) -> bool:
    """True when the caller cancelled or a reader thread failed: leave at once."""
    if load_acquire(control + rows.C_STOP * rows.CELL) != 0:
        return True
    failed = load_int(streams + 8 * rows.S_FAILED)
    if failed != 0 and load_acquire(failed) != 0:
        return True
    failed = load_int(streams + 8 * rows.S_EXPERT_FAILED)
    return bool(failed != 0 and load_acquire(failed) != 0)


@inline
def chunk_of(op: int, units: int, threads: int) -> int:
    """Units to take at once: four turns a thread, so that one that lost its core costs little."""
    chunk: int = max(1, min(arg(op, rows.CHUNK), units // (4 * threads)))
    return chunk


@inline
def relax(spins: int, nap_us: int) -> None:
    """One step of waiting, given the number of steps so far."""
    if spins < SPIN:
        pause()
    else:
        sleep_us(nap_us)


@inline
def barrier(control: int, streams: int, threads: int) -> bool:
    """Wait for the whole team. False when the run was stopped meanwhile."""
    generation_at = control + rows.C_GENERATION * rows.CELL
    generation = load_acquire(generation_at)
    if atomic_add(control + rows.C_COUNT * rows.CELL, 1) == threads - 1:
        store_release(control + rows.C_COUNT * rows.CELL, 0)
        store_release(generation_at, generation + 1)
        return True
    spins = 0
    while load_acquire(generation_at) == generation:
        relax(spins, NAP_US)
        spins += 1
        if spins & 63 == 0 and stopped(control, streams):
            return False
    return True


@inline
def await_value(address: int, value: int, tid: int, control: int, streams: int) -> bool:
    """Wait until the int64 at `address` is `value` or more; thread 0 counts the time as a stall.

    False when the run was stopped meanwhile.
    """
    if load_acquire(address) >= value:
        return True
    begin = now_ns()
    spins = 0
    while load_acquire(address) < value:
        relax(spins, WEIGHTS_NAP_US)
        spins += 1
        if stopped(control, streams):
            return False
    if tid == 0:
        cell = control + rows.C_STALL_NS * rows.CELL
        store_int(cell, load_int(cell) + now_ns() - begin)
    return True


@inline
def await_order(control: int, number: int, fd: int) -> None:
    """Wait until walk `number` is ordered: yield for a while, then sleep on the pipe `fd`.

    Here it is right to yield: the core is wanted by the Python between two tokens. Spinning for
    300 us instead made 329 us of an empty walk of 40.

    Asleep it costs nothing. Whoever orders wakes as many as `C_ASLEEP` says; a message too many
    only makes a later sleeper look once more. Nobody sleeps before the whole team is through with
    the walk before: one that was stopped may end here before another thread has woken up for it,
    whose message it would take.
    """
    ordered_at = control + rows.C_ORDERED * rows.CELL
    ended_at = control + rows.C_ENDED * rows.CELL
    asleep_at = control + rows.C_ASLEEP * rows.CELL
    end = now_ns() + LINGER_NS
    while load_acquire(ordered_at) < number:
        if now_ns() < end or load_acquire(ended_at) < number - 1:
            yield_cpu()
        else:
            atomic_add(asleep_at, 1)
            if load_acquire(ordered_at) < number:
                await_notice(fd)
            atomic_add(asleep_at, -1)
