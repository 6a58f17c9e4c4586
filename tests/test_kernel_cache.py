"""Where compiled kernels are kept: hits, fallbacks, keys, processes at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgert.kernels_cpu import cache, jit

ROOT = Path(__file__).parents[1]
_USE_ONE_KERNEL = """
import numpy as np
from edgert.kernels_cpu import activations, jit
x = np.ones((1, 32), np.float32)
assert (activations.quantize(x) == activations.quantize_ref(x)).all()
print(jit.cache_folder())
"""


def start(folder: Path, before: str = "") -> subprocess.Popen[str]:
    env = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-B", "-c", before + _USE_ONE_KERNEL],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def folder_used(process: subprocess.Popen[str]) -> Path:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return Path(out.strip())


def stamps(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_second_process_compiles_and_writes_nothing(tmp_path: Path) -> None:
    used = folder_used(start(tmp_path))
    assert used.parent == tmp_path / "kernels" and len(used.name) == len(jit.cache_key())
    first = stamps(tmp_path)
    assert [p.name for p in first] == ["activations.quantize_rows.code"]
    assert folder_used(start(tmp_path)) == used
    assert stamps(tmp_path) == first


def test_processes_starting_at_once_leave_a_sound_cache(tmp_path: Path) -> None:
    racing = [start(tmp_path) for _ in range(3)]
    assert len({folder_used(process) for process in racing}) == 1
    first = stamps(tmp_path)
    assert len(first) == 1, "no half-written file is left"
    folder_used(start(tmp_path))
    assert stamps(tmp_path) == first


def test_a_folder_that_cannot_be_written_is_replaced_by_a_temporary_one(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    used = folder_used(start(blocked))
    assert used.parents[1].name.startswith("edgert-kernels-")
    assert not used.exists()
    assert list(tmp_path.rglob("*.code")) == []


def test_a_full_cache_that_cannot_be_written_is_used(tmp_path: Path) -> None:
    """As in an image made with `edgert warmup` and mounted read-only."""
    used = folder_used(start(tmp_path))
    forbid = "import tempfile\ntempfile.mkstemp = tempfile.mkdtemp = None\n"
    forbid += "import numba\nnumba.cfunc = None\n"
    assert folder_used(start(tmp_path, forbid)) == used


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "foreign"])
def test_a_damaged_file_is_compiled_anew(damage: str, tmp_path: Path) -> None:
    used = folder_used(start(tmp_path))
    (file,) = used.iterdir()
    sound = file.read_bytes()
    flipped = bytearray(sound)
    flipped[-100] ^= 1
    bad = {"cut": sound[:-7], "empty": b"", "flipped": bytes(flipped), "foreign": b"\x7fELF" * 99}
    file.write_bytes(bad[damage])
    assert cache.read_code(file) is None
    folder_used(start(tmp_path))
    assert file.read_bytes() == sound


def test_the_package_folder_stays_clean(tmp_path: Path) -> None:
    before = set((ROOT / "kernels_cpu").iterdir())
    folder_used(start(tmp_path))
    assert set((ROOT / "kernels_cpu").iterdir()) == before


def test_the_key_follows_every_kernel_source(tmp_path: Path) -> None:
    copy = tmp_path / "kernels_cpu"
    shutil.copytree(ROOT / "kernels_cpu", copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert jit.cache_key(copy) == jit.cache_key()
    keys = {jit.cache_key(copy)}
    for name in ("simd.py", "vmath.py"):
        (copy / name).write_text((copy / name).read_text() + "\n")
        keys.add(jit.cache_key(copy))
    (copy / "new.py").write_text("")
    keys.add(jit.cache_key(copy))
    assert len(keys) == 4


@pytest.mark.parametrize("n_folders", [3, 9])
def test_old_caches_are_pruned_and_young_ones_kept(n_folders: int, tmp_path: Path) -> None:
    for i in range(n_folders):
        folder = tmp_path / f"{i:020d}"
        folder.mkdir()
        old = time.time() - 2 * 86_400 - i
        os.utime(folder, (old, old))
    young, keep = tmp_path / ("a" * 20), tmp_path / ("b" * 20)
    other = tmp_path / "something else"
    for folder in (young, keep, other):
        folder.mkdir()
    cache.prune(tmp_path, keep)
    assert keep.exists() and young.exists() and other.exists()
    assert len(list(tmp_path.iterdir())) == 3 + min(n_folders, 2)
    assert (tmp_path / f"{0:020d}").exists()


def test_what_nothing_needs_is_pruned(tmp_path: Path) -> None:
    keep = tmp_path / ("b" * 20)
    keep.mkdir()
    for name, folder in (("ready-1", keep), ("ready-2", tmp_path / "gone")):
        (tmp_path / name).write_text(str(folder))
    for part in (keep / "young.part", tmp_path / "old.part"):
        part.write_text("")
    old = time.time() - 2 * 86_400
    os.utime(tmp_path / "old.part", (old, old))
    cache.prune(tmp_path, keep)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")}
    assert left == {keep.name, f"{keep.name}/young.part", "ready-1"}


def test_a_kernel_compiles_on_first_use() -> None:
    @jit.kernel(jit.void("iif"))
    def nothing(a: int, b: int, c: float) -> None:
        return None

    assert "nothing" in repr(nothing) and nothing._address == 0
    assert nothing.py_func(1, 2, 0.5) is None
    nothing(1, 2, 0.5)
    assert nothing.address == nothing.address != 0


def test_a_kernel_outside_the_package_is_known_by_its_source() -> None:
    def named(x: int) -> Any:
        @jit.kernel(jit.void("i"))
        def nothing(a: int) -> None:
            return None

        return nothing

    @jit.kernel(jit.void("i"))
    def nothing(a: int) -> None:
        return None

    names = {k._file_name() for k in (nothing, named(1), named(2))}
    assert len(names) == 2 and all(name.endswith(".code") for name in names)


def test_a_kernel_made_from_no_file_is_compiled_each_time(tmp_path: Path) -> None:
    code = """
from edgert.kernels_cpu import jit
@jit.kernel(jit.void("i"))
def nothing(a):
    return None
nothing(1)
print(jit.cache_folder())
"""
    assert not folder_used(start(tmp_path, code + "exit()\n")).exists()
