"""The device profile: kept, believed while it is true, measured again where it is not."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgert import device_profile, profiling
from edgert.device_profile import (
    DAYS,
    KEPT_FILES,
    SMALL_READ,
    load_profile,
    note_drift,
    profile_path,
    save_profile,
)
from edgert.errors import StorageError
from edgert.kernels_cpu import cache as kernel_cache
from edgert.opening import open_model
from edgert.storage.backend import FileBackend
from edgert.units import KIB, MIB
from tests.device import PROFILE, profile


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of profiles; compiled kernels stay where they are."""
    monkeypatch.setattr(device_profile, "cache_root", lambda: tmp_path / "cache" / "kernels")
    return tmp_path / "cache"


@pytest.fixture
def files(tiny_gguf: Path) -> list[Path]:
    return [tiny_gguf]


def test_what_is_saved_is_loaded(files: list[Path]) -> None:
    assert load_profile(files, 2) is None
    assert save_profile(PROFILE, files)
    assert load_profile(files, 2) == PROFILE
    assert load_profile(files, 3) is None, "measured with two threads"


def _damaged(**changes: Any) -> str:
    return json.dumps({"version": 2, "profile": PROFILE.to_dict() | changes})


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "[]", "7", "{}", '{"version": 1}', '{"version": 2, "profile": []}',
        json.dumps({"version": 1, "profile": PROFILE.to_dict()}),
        _damaged(memory_bytes_per_s=-1.0), _damaged(memory_bytes_per_s=math.nan),
        _damaged(busy_read_bytes_per_s=math.inf), _damaged(op_seconds="fast"),
        _damaged(reads=[]), _damaged(reads=[{"request_bytes": 1}]), _damaged(reads=7),
        _damaged(kernels={"Q4_0": {"token_bytes_per_s": 1e9}}), _damaged(kernels=[1]),
        _damaged(kernels={"Q4_0": {"token_bytes_per_s": 0.0, "batch_macs_per_s": 1.0,
                                   "repack_bytes_per_s": 1.0}}),
        _damaged(threads=4), _damaged(measured_at=None), "\udcff",
    ],
)  # fmt: skip
def test_nonsense_counts_as_nothing(text: str, files: list[Path]) -> None:
    path = profile_path(files, 2)
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert load_profile(files, 2) is None
    assert save_profile(PROFILE, files) and load_profile(files, 2) == PROFILE


def test_an_old_profile_is_not_believed(files: list[Path]) -> None:
    save_profile(PROFILE, files)
    day = 86_400
    assert load_profile(files, 2, now=PROFILE.measured_at + (DAYS - 1) * day) == PROFILE
    assert load_profile(files, 2, now=PROFILE.measured_at + (DAYS + 1) * day) is None
    assert load_profile(files, 2, now=PROFILE.measured_at - day) is None, "from the future"


def test_other_kernels_or_another_disk_have_a_profile_of_their_own(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = profile_path(files, 2)
    assert profile_path([Path("/proc/self/status")], 2) != here
    monkeypatch.setattr(kernel_cache, "sources_digest", lambda: "other sources")
    assert profile_path(files, 2) != here


def test_a_folder_that_cannot_be_written_keeps_nothing(cache: Path, files: list[Path]) -> None:
    cache.write_text("a file where the folder would be")
    assert not save_profile(PROFILE, files)
    assert load_profile(files, 2) is None
    note_drift(PROFILE, files, 1e6)  # no error either


def test_old_files_are_deleted(files: list[Path]) -> None:
    folder = profile_path(files, 2).parent
    folder.mkdir(parents=True)
    for i in range(KEPT_FILES + 5):
        (folder / f"{i}.json").write_text("")
        os.utime(folder / f"{i}.json", (i, i))
    save_profile(PROFILE, files)
    assert len(list(folder.iterdir())) == KEPT_FILES
    assert load_profile(files, 2) == PROFILE and not (folder / "0.json").exists()


@pytest.mark.parametrize(
    ("rate", "due"), [(2e9, False), (1.6e9, False), (2.4e9, False), (1.4e9, True), (2.6e9, True)]
)
def test_a_disk_that_changed_is_due(rate: float, due: bool, files: list[Path]) -> None:
    """Disk slower or faster than profiled: noted by the run, measured by the next `plan`."""
    save_profile(PROFILE, files)
    note_drift(PROFILE, files, rate)
    found = load_profile(files, 2)
    assert found is not None and found.disk_drifted == due
    assert found.covers_disk(2**30) != due


def test_a_small_file_says_little_of_a_disk() -> None:
    small = replace(PROFILE, sample_bytes=4 * MIB)
    assert small.covers_disk(4 * MIB) and small.covers_disk(8 * MIB)
    assert not small.covers_disk(4096 * MIB)
    assert replace(PROFILE, sample_bytes=256 * MIB).covers_disk(2**40)


def test_rates_of_reads() -> None:
    assert PROFILE.read_bytes_per_s(MIB, 4) == PROFILE.read_bytes_per_s(16 * MIB, 32) == 2e9
    assert PROFILE.read_bytes_per_s(256 * KIB, 4) == 2e9, "the median of what is no smaller"
    assert PROFILE.read_seconds == pytest.approx(SMALL_READ / 40e6)
    assert profile(disk=1e9).disk_bytes_per_s == 1e9


# ------------------------------------------------------------------------ measuring


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_SECONDS", 0.005)
    monkeypatch.setattr(profiling, "_ARENA_BYTES", 64 * MIB)


def test_what_is_measured_and_that_it_is_measured_once(
    quick: None, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, said = open_model(tiny_gguf), []
    found, kept = profiling.ensure_profile(opened, 2, lambda what, *_: said.append(what))
    assert kept and said[-1].startswith("measuring")
    assert found.covers(opened.kernel_set("f16").formats)
    assert found.covers_disk(tiny_gguf.stat().st_size) and found.threads == 2
    assert {(r.request_bytes, r.readers) for r in found.reads} >= {(SMALL_READ, 1), (MIB, 4)}
    assert 0 < found.busy_memory_share <= 1 and 0 < found.op_seconds < 1
    assert type(found).from_dict(json.loads(json.dumps(found.to_dict()))) == found
    monkeypatch.setattr(profiling, "_Bench", None)  # what cannot be called is not called
    assert profiling.ensure_profile(opened, 2) == (found, True)


def test_only_what_is_missing_is_measured(quick: None, tiny_gguf: Path) -> None:
    opened = open_model(tiny_gguf)
    formats = opened.kernel_set("f16").formats
    partly = {n: r for n, r in PROFILE.kernels.items() if n != formats[0]}
    save_profile(replace(PROFILE, kernels=partly), opened.manifest.files)
    found, _ = profiling.ensure_profile(opened, 2)
    assert found.reads == PROFILE.reads and found.kernels.items() >= partly.items()
    assert found.kernels[formats[0]] != PROFILE.kernels[formats[0]]
    save_profile(replace(PROFILE, disk_drifted=True), opened.manifest.files)
    found, _ = profiling.ensure_profile(opened, 2)
    assert found.reads != PROFILE.reads and found.kernels == PROFILE.kernels


def test_a_disk_without_direct_reads(
    quick: None, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "FileBackend", partial(FileBackend, direct=False))
    found, _ = profiling.ensure_profile(open_model(tiny_gguf), 2)
    assert not found.direct and found.disk_bytes_per_s > 0


def test_a_disk_that_fails(quick: None, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(FileBackend):
        def read_into(self, file_index: int, offset: int, view: memoryview) -> None:
            raise StorageError(self.paths[0], offset, len(view), "broken")

    monkeypatch.setattr(profiling, "FileBackend", Broken)
    with pytest.raises(StorageError, match="broken"):
        profiling.ensure_profile(open_model(tiny_gguf), 2)
    assert load_profile([tiny_gguf], 2) is None
