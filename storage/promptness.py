"""Threads that wait for a device must run as soon as it answers, also where all cores compute.

Owns: asking the scheduler for that. Must not know what the threads do.

Linux lets whoever has a core keep it for a slice of a millisecond or more; since 6.12 a thread that
asked for shorter slices preempts it when it wakes, and gets no more of the core on the whole. Older
systems take no notice. From the router to the first read of an expert, 2 threads computing on 2
cores: 0.92 and 0.90 ms without it, 0.74 and 0.55 with it (medians of 246 layers, in turn).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

__all__ = ["wake_promptly"]

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_SLICE_NS = 100_000  # the shortest that is allowed


def wake_promptly() -> bool:
    """Give the calling thread the shortest slices; False where the system has no such thing."""
    number = _SCHED_SETATTR.get(platform.machine()) if sys.platform == "linux" else None
    if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    # struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period
    attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, os.nice(0), 0, _SLICE_NS, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(number, 0, attributes, 0) == 0)
