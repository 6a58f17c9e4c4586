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

__all__ = ["main"]

_THREADS = 6
_REQUEST = 2 * 2**20
# The kernel's throttle lets 0.1 s of reads through at once: counted, they made 0.5 GB/s 0.62.
_WARM_SECONDS = 0.2


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

    def work() -> None:
        buffer = mmap.mmap(-1, _REQUEST)
        while not ended.is_set():
            with lock:
                counted[0] += 1
                number = counted[0]
            got = os.preadv(fd, [buffer], number * stride % places * _REQUEST)
            with lock:
                read[0] += got

    threads = [threading.Thread(target=work, daemon=True) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    time.sleep(_WARM_SECONDS)
    first, begin = read[0], time.perf_counter()
    time.sleep(seconds)
    rate = (read[0] - first) / (time.perf_counter() - begin)
    ended.set()
    for thread in threads:
        thread.join()
    print(int(rate))


if __name__ == "__main__":
    main(sys.argv[1:])
