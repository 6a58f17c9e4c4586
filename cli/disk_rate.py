"""How fast direct reads of a file go, measured by a process that holds nothing else.

Owns: the outside view of a disk: what `edgert stress` compares a run with comes from here and not
from the engine, and is taken in the run's own control group. Must not know the engine: run as a
program, `python disk_rate.py FILE SECONDS`, it needs the standard library alone and prints bytes
per second, 0 where the file system takes no direct reads.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from collections.abc import Sequence

__all__ = ["main", "slope"]

_THREADS = 6
_REQUEST = 2 * 2**20
# The kernel's throttle lets 0.1 s of reads through at once, first of all and then in steps, so the
# rate is the slope of the line through many looks at the count: the difference between two of them
# made 1.0 GB/s 0.86, and with the start in it 0.5 GB/s 0.62.
_WARM_SECONDS = 0.2
_LOOK_SECONDS = 0.004


def main(arguments: list[str]) -> None:
    """Read for so many seconds and print the rate."""
    path, seconds = arguments[0], float(arguments[1])
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        os.preadv(fd, [mmap.mmap(-1, 4096)], 0)
    except (OSError, AttributeError):
        print(0)
        return
    places = max(os.fstat(fd).st_size // _REQUEST, 1)
    stride = max(int(places * 0.618), 1)  # far apart, so that nothing reads ahead for us
    lock, counted, read, ended = threading.Lock(), [0], [0], threading.Event()
    memory = memoryview(_huge_pages(_THREADS * _REQUEST))

    def work(thread: int) -> None:
        buffer = memory[thread * _REQUEST : (thread + 1) * _REQUEST]
        while not ended.is_set():
            with lock:
                counted[0] += 1
                number = counted[0]
            got = os.preadv(fd, [buffer], number * stride % places * _REQUEST)
            with lock:
                read[0] += got

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(_THREADS)]
    for thread in threads:
        thread.start()
    time.sleep(_WARM_SECONDS)
    begin = time.perf_counter()
    looks = [(0.0, read[0])]
    while looks[-1][0] < seconds:
        time.sleep(_LOOK_SECONDS)
        looks.append((time.perf_counter() - begin, read[0]))
    ended.set()
    for thread in threads:
        thread.join()
    print(int(slope(looks)))


def _huge_pages(nbytes: int) -> mmap.mmap:
    """Memory as the engine has it: into pages of 4 KiB a disk of 1.9 GB/s delivered 0.9.

    Private, as shared memory has no huge pages by default; zeroed here, so that no read has to.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    memory.write(bytes(nbytes))
    return memory


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line with the least squares through (x, y)."""
    x0, y0 = (sum(point[axis] for point in points) / len(points) for axis in (0, 1))
    return sum((x - x0) * (y - y0) for x, y in points) / sum((x - x0) ** 2 for x, _ in points)


if __name__ == "__main__":
    main(sys.argv[1:])
