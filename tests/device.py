"""A device profile of round figures, for tests that must not depend on the machine."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from edgert.device_profile import SMALL_READ, DeviceProfile, KernelRate, ReadRate
from edgert.quant.formats import BY_NAME
from edgert.units import KIB, MIB

PROFILE = DeviceProfile(
    threads=2, measured_at=time.time(), direct=True, sample_bytes=2**40,
    reads=(ReadRate(SMALL_READ, 1, 40e6), ReadRate(256 * KIB, 4, 0.9e9), ReadRate(MIB, 1, 1e9),
           ReadRate(MIB, 4, 2e9), ReadRate(MIB, 6, 2e9), ReadRate(2 * MIB, 6, 2e9)),
    burst_bytes_per_s=2e9, busy_read_bytes_per_s=1e9, busy_memory_share=0.9,
    memory_bytes_per_s=32e9, op_seconds=1e-6,
    kernels={name: KernelRate(32e9, 300e9, 8e9) for name in BY_NAME},
)  # fmt: skip


def profile(disk: float = 2e9, **changes: Any) -> DeviceProfile:
    """`PROFILE` with a disk of another rate, and other changes."""
    rates = tuple(replace(r, bytes_per_s=r.bytes_per_s * disk / 2e9) for r in PROFILE.reads)
    return replace(PROFILE, **({"reads": rates} | changes))
