"""Passes over streamed weights, files by turns: python -m tests.bench_passes BUDGET SECONDS FILE...

All files are open in one process, each with so much memory for itself. A pass computes one token,
without guesses, and its logits must be those of the first file's. Prints the median time, and the
rate in times of the first file's: the median of the ratios of neighbouring passes, and quartiles.
A virtual disk changes its rate by a third within seconds: generations of 5 and 6 tokens, each in a
process of its own, gave 0.82 to 1.01 for what this gives 1.02.
"""

from __future__ import annotations

import sys
import time
from statistics import median, quantiles

import numpy as np

import edgert
from edgert.storage.arena import promised_bytes
from edgert.units import parse_bytes

TEXT = [1, 4, 3, 2]


def main(budget: str, seconds: str, *paths: str) -> None:
    engines: list[edgert.Engine] = []
    for path in paths:
        nbytes = parse_bytes(budget) + promised_bytes()
        engines.append(edgert.load(path, memory_budget=nbytes, context_length=512))
    times: list[list[float]] = [[] for _ in engines]
    end, turn = time.perf_counter() + float(seconds), 0
    while time.perf_counter() < end or turn < 4:
        order = list(range(len(engines)))
        logits = {}
        for i in order if turn % 2 == 0 else order[::-1]:
            begin = time.perf_counter()
            found = engines[i].forward.evaluate([*TEXT, 5 + turn % 64], engines[i].vocab_size)
            times[i].append(time.perf_counter() - begin)
            logits[i] = found
        assert all(np.array_equal(logits[0], found) for found in logits.values())
        turn += 1
    for path, engine, seen in zip(paths, engines, times, strict=True):
        ratios = [first / mine for first, mine in zip(times[0][1:], seen[1:], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        print(
            f"{path}: {engine.plan.streamed_bytes / 1e6:.0f} MB read, {median(seen[1:]):.3f} s a "
            f"pass, {median(ratios):.3f} of the first's rate ({low:.2f} to {high:.2f})"
        )
        engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
