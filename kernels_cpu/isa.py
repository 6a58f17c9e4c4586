"""Which instruction set the kernels are compiled for.

The variants differ only in how an exact integer dot product is spelled; results are equal to the
bit. The choice follows the features of Numba's target, so `NUMBA_CPU_NAME` and
`NUMBA_CPU_FEATURES` restrict it. Nothing is executed to find out: an instruction that the
target lacks would abort the process.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgert.kernels_cpu.compiler import target_key

__all__ = ["AVX2", "AVX512_VNNI", "ISA", "PORTABLE", "Isa", "detect"]


@dataclass(frozen=True, slots=True)
class Isa:
    """One variant of the kernels. `lanes`: float32 lanes that batch kernels keep in a register."""

    name: str
    lanes: int
    needs: frozenset[str]  # LLVM feature names


AVX512_VNNI = Isa(
    "avx512-vnni", 16, frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni", "fma", "f16c"})
)
AVX2 = Isa("avx2", 8, frozenset({"avx2", "fma", "f16c"}))
PORTABLE = Isa("portable", 8, frozenset())


def detect(features: str | None = None) -> Isa:
    """The best variant for LLVM's `features` ("+avx2,-avx512f,..."), by default Numba's target."""
    if features is None:
        features = target_key()[2]
    present = {f[1:] for f in features.split(",") if f.startswith("+")}
    return next(isa for isa in (AVX512_VNNI, AVX2, PORTABLE) if isa.needs <= present)


ISA = detect()
