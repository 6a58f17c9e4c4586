"""Packing against the disk: python -m tests.bench_pack MODEL FOLDER [NESTED [TURNS]].

In turns, each in MB of the pack a second: writing as many bytes, past the page cache, with an
fsync at the end; reading the model, writing and reading that back at once, with nothing computed,
which is what packing asks of the disk; and `pack_model`. Medians, and the most memory held.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

import edgert
from edgert.machine import peak_bytes
from edgert.storage.arena import Arena
from edgert.units import MIB

STEP = 4 * MIB
AHEAD = 32 * MIB  # how far the model is read before it is written


def disk(model: Path, out: Path, nbytes: int, alone: bool) -> None:
    """Write `nbytes` to `out`; unless `alone`, read `model` and `out` back meanwhile."""
    target = os.open(out, os.O_WRONLY | os.O_DIRECT | os.O_CREAT)
    source, back = (os.open(path, os.O_RDONLY | os.O_DIRECT) for path in (model, out))
    moved = threading.Condition()
    done = {"read": nbytes if alone else 0, "written": 0}

    def step(move: Callable[[int], object], waits: str, ahead: int, counts: str) -> None:
        for at in range(0, nbytes, STEP):
            with moved:
                while done[waits] + ahead < min(at + STEP, nbytes):
                    moved.wait()
            move(at)
            with moved:
                done[counts] = at + STEP
                moved.notify_all()

    arena = Arena(3 * STEP)
    data, a, b = (arena.take(name, STEP, 4096) for name in ("written", "read", "read back"))
    data[:] = np.frombuffer(os.urandom(STEP), np.uint8)
    works = [(lambda at: os.pwrite(target, data, at), "read", 0, "written")]
    if not alone:
        works.append((lambda at: os.preadv(source, [a], at), "written", AHEAD, "read"))
        works.append((lambda at: os.preadv(back, [b], at), "written", 0, "back"))
    threads = [threading.Thread(target=step, args=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.fsync(target)
    for fd in (source, back, target):
        os.close(fd)
    arena.close()
    out.unlink()


def main(model: str, folder: str, nested: str = "4+4", turns: str = "4") -> None:
    source, out = Path(model), Path(folder) / "bench_pack.edgert"
    nbytes = source.stat().st_size // STEP * STEP
    works: dict[str, Callable[[], object]] = {
        "written": lambda: disk(source, out, nbytes, True),
        "read, written and read back": lambda: disk(source, out, nbytes, False),
        "packed": lambda: edgert.pack_model(source, out, nested=nested, force=True),
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(int(turns)):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            found[name].append(nbytes / 1e6 / (time.perf_counter() - begin))
            out.unlink(missing_ok=True)
    packed = median(found["packed"])
    for name, rates in found.items():
        shown = ", ".join(f"{rate:.0f}" for rate in rates)
        print(f"{name}: {median(rates):.0f} MB/s ({shown}); packing {packed / median(rates):.2f}")
    print(f"peak {peak_bytes() / MIB:.0f} MiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
