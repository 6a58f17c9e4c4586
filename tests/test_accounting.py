"""Memory planned, held and charged: the figures agree, at any moment, within the stated bound."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
import edgert.storage.pages
from edgert.accounting import AGREEMENT_BYTES
from edgert.cli.cgroup import drop_page_cache
from edgert.quant.reference import dequantize_ref
from edgert.storage.pages import cached_bytes, cached_bytes_ref, resident_in
from tests.command import ROOT, environment
from tests.test_stress import DENSE, group, inflated
from tests.tight import tight

PAGE = mmap.PAGESIZE
MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")

# ----------------------------------------------------------------------------- pages


@linux
def test_resident_pages_are_counted_to_the_byte(rng: np.random.Generator) -> None:
    pages = 400
    with mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
        memory = np.frombuffer(mapping, np.uint8)
        address = memory.ctypes.data
        assert resident_in(address, pages * PAGE) == 0
        written = np.unique(rng.integers(0, pages, 90))
        memory[written * PAGE + 7] = 1
        held = np.zeros(pages * PAGE, bool)
        held.reshape(pages, PAGE)[written] = True
        assert resident_in(address, pages * PAGE) == len(written) * PAGE
        for _ in range(50):
            start, stop = sorted(rng.integers(0, pages * PAGE, 2).tolist())
            assert resident_in(address + start, stop - start) == held[start:stop].sum()
        del memory


@linux
def test_both_ways_to_count_the_page_cache_agree(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * MIB + 5))
    assert cached_bytes([path]) == cached_bytes_ref(path) == 3 * MIB + PAGE
    with path.open("rb") as file:
        os.fsync(file.fileno())
    drop_page_cache([path])
    assert cached_bytes([path]) == cached_bytes_ref(path)
    assert cached_bytes([tmp_path / "none"]) == 0


# ----------------------------------------------------------------------------- the report


def test_the_regions_hold_what_was_planned_and_add_up(tiny_gguf: Path) -> None:
    with tight(tiny_gguf, 600 * 1024) as engine:
        before = engine.memory()
        engine.generate("Once", max_tokens=8, temperature=0)
        after = engine.memory()
    for report in (before, after):
        assert sum(report.held.values()) == report.resident_bytes
        assert set(report.held) == set(report.planned)
        for name, nbytes in report.held.items():  # the process of these tests is pytest
            assert name == "process" or nbytes <= report.planned[name], name
        parts = report.anonymous_bytes + report.file_bytes + report.shared_bytes
        assert parts in (0, report.resident_bytes)
    assert after.held["window"] == after.planned["window"] > 0
    assert before.held["resident"] == before.planned["resident"] > 0


def test_a_closed_engine_has_no_memory_to_report(tiny_gguf: Path) -> None:
    engine = tight(tiny_gguf)
    engine.close()
    with pytest.raises(edgert.EdgertError, match="closed"):
        engine.memory()


MOMENTS = """
import json, sys, threading
import edgert
path, budget = sys.argv[1], int(sys.argv[2])
with edgert.load(path, memory_budget=budget, threads=2) as engine:
    found = {"loaded": engine.memory().to_dict()}
    def prefill(done, total):
        found[f"prefill {done}"] = engine.memory().to_dict()
    text = "Once upon a time there was a dog. " * 4
    for event in engine.generate(text, max_tokens=9, temperature=0, stream=True,
                                 on_prefill=prefill):
        if event.index in (0, 4):
            found[f"token {event.index}"] = engine.memory().to_dict()
    worker = threading.Thread(target=engine.logits, args=([1, 5, 9],))
    worker.start()
    found["in a pass"] = engine.memory().to_dict()
    worker.join()
    found["after"] = engine.memory().to_dict()
    found["stats"] = engine.last_stats.page_cache_bytes
print(json.dumps(found))
"""


def moments(path: Path, budget: int) -> dict[str, Any]:
    """The reports of a process in a group of its own with this limit; fails when one is wrong."""
    with group(budget) as limit:
        words = limit.command([sys.executable, "-c", MOMENTS, str(path), str(budget)])
        run = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        peak = limit.peak_bytes()
    found: dict[str, Any] = json.loads(run.stdout)
    assert found.pop("stats") <= AGREEMENT_BYTES
    for moment, report in found.items():
        check(report, moment)
    assert peak is None or peak <= budget
    return found


def check(report: dict[str, Any], moment: str) -> None:
    charged = report["cgroup"]
    for name, nbytes in report["held"].items():
        assert nbytes <= report["planned"][name], (moment, name)
    assert sum(report["held"].values()) == report["resident_bytes"]
    assert abs(report["difference_bytes"]) <= AGREEMENT_BYTES, moment
    assert charged["usage_bytes"] <= report["budget_bytes"], moment
    # Page cache beside what is mapped of libraries: what edgert caused.
    assert charged["file_bytes"] <= report["file_bytes"] + AGREEMENT_BYTES, moment
    assert report["page_cache_bytes"] <= AGREEMENT_BYTES, moment


@linux
def test_ledger_resident_size_and_cgroup_agree(tiny_gguf: Path) -> None:
    found = moments(tiny_gguf, 256 * MIB)
    assert len(found) >= 6


@pytest.fixture(params=["direct", "buffered"])
def large(request: pytest.FixtureRequest, shared_data: Path) -> Iterator[Path]:
    """A model of 1.9 GB on a disk, and on a file system in memory, which has no direct reads."""
    pytest.importorskip("gguf")
    path = inflated(shared_data, "dense-4096x8-Q8_0", *DENSE)
    if request.param == "direct":
        yield path
        return
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 2 * path.stat().st_size:
        pytest.skip("there is no file system in memory with room for the model")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(shutil.copy(path, folder))


@pytest.mark.stress
@pytest.mark.timeout(900)
def test_a_large_model_agrees_too(large: Path) -> None:
    drop_page_cache([large])
    found = moments(large, 700 * MIB)
    assert found["after"]["held"]["window"] > 0


# ----------------------------------------------------------------------------- what no region has


@pytest.mark.parametrize("spare", [0, None], ids=["rows from flash", "rows in memory"])
def test_embedding_a_long_pass_takes_no_more_than_a_row(tiny_gguf: Path, spare: int | None) -> None:
    """And a token that comes again is the same row."""
    with tight(tiny_gguf, spare) as engine:
        out = np.full((400, engine.spec.hidden_size), np.nan, np.float32)
        tokens = [token % engine.vocab_size for token in range(200)] * 2
        engine.weights.embed(tokens, out)
        tracemalloc.start()
        engine.weights.embed(tokens, out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < out.nbytes / 4
    assert np.array_equal(out[:200], out[200:]) and np.isfinite(out).all()
    table = edgert.read_manifest(tiny_gguf).tensors["token_embd.weight"]
    raw = tiny_gguf.read_bytes()[table.extent.offset :][: table.extent.nbytes]
    rows = np.frombuffer(raw, np.uint8).reshape(table.shape[0], -1)
    assert np.array_equal(out[:200], dequantize_ref(table.format, rows[tokens[:200]]))
