"""What the machine grants, from budgets in words to cgroups, and kernels compiled apart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgert import compiling, machine
from edgert.budget import resolve_budget
from edgert.compiling import KernelSet, compile_apart, is_compiled
from edgert.errors import EdgertError, InputError
from edgert.units import GIB, MIB
from tests.command import environment

# ------------------------------------------------------------------------ budgets


@pytest.mark.parametrize(
    ("asked", "nbytes"),
    [
        (None, 3 * GIB), (600 * MIB, 600 * MIB), (1, 1), ("600MiB", 600 * MIB), ("600M", 600 * MIB),
        ("1.5GiB", 3 * GIB // 2), ("800MB", 800_000_000), ("4096", 4096), (" 2 GiB ", 2 * GIB),
        ("50%", 2 * GIB), ("100%", 4 * GIB), (" 12.5 % ", GIB // 2), ("0.0000001%", 4),
        ("0.00000000001%", 1),
    ],
)  # fmt: skip
def test_a_budget_in_any_words(asked: int | str | None, nbytes: int) -> None:
    assert resolve_budget(asked, 4 * GIB, 3 * GIB) == nbytes


def test_a_budget_nobody_gave_is_no_more_than_is_of_use() -> None:
    assert resolve_budget(None, 2 * GIB, 3 * GIB) == 2 * GIB


@pytest.mark.parametrize("asked", ["", "much", "5 apples", "-1GiB", "%", "x%", "0%", "-3%", "nan%",
                                   "inf%", 0, -5, "0"])  # fmt: skip
def test_a_budget_that_is_none(asked: int | str) -> None:
    with pytest.raises(InputError):
        resolve_budget(asked, 4 * GIB, 3 * GIB)


# ------------------------------------------------------------------------ cgroups


class Cgroups:
    """A made-up /sys/fs/cgroup and /proc/self/cgroup."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "cgroup"
        self.root.mkdir()
        self.lines = folder / "self"

    def place(self, *lines: str) -> None:
        self.lines.write_text("".join(f"{line}\n" for line in lines))

    def write(self, path: str, **values: object) -> None:
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (folder / name.replace("__", ".", 1)).write_text(f"{value}\n")


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cgroups]:
    fake = Cgroups(tmp_path)
    read = Path.read_text

    def read_text(path: Path, *args: Any, **options: Any) -> str:
        return read(fake.lines if str(path) == "/proc/self/cgroup" else path, *args, **options)

    monkeypatch.setattr(machine, "_CGROUP", fake.root)
    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    yield fake


def memory(mib: int | str, used: int = 0, inactive: int = 0) -> dict[str, object]:
    """The v2 files of a group."""
    limit = mib if isinstance(mib, str) else mib * MIB
    return {
        "memory__max": limit, "memory__current": used * MIB,
        "memory__stat": f"anon 1\ninactive_file {inactive * MIB}",
    }  # fmt: skip


def test_v2_the_tightest_ancestor_counts(cgroups: Cgroups) -> None:
    cgroups.place("0::/user/app")
    (cgroups.root / "cgroup.controllers").write_text("cpu memory\n")
    cgroups.write("user", **memory(512, used=100, inactive=40), cpu__max="250000 100000")
    cgroups.write("user/app", **memory("max", used=90), cpu__max="max 100000")
    assert machine.cgroup_limit_bytes() == 512 * MIB
    assert machine._cgroup_free_bytes() == (512 - 100 + 40) * MIB
    assert machine.default_threads() == 2
    cgroups.write("user/app", **memory(300, used=290), cpu__max="50000 100000")
    assert machine.cgroup_limit_bytes() == 300 * MIB
    assert machine._cgroup_free_bytes() == 10 * MIB
    assert machine.default_threads() == 1


def test_v2_without_limits(cgroups: Cgroups) -> None:
    cgroups.place("0::/")
    (cgroups.root / "cgroup.controllers").write_text("cpu memory\n")
    assert machine.cgroup_limit_bytes() is None
    assert machine._cgroup_free_bytes() is None
    assert machine.default_threads() == 8


def test_v1_controllers_have_their_own_trees(cgroups: Cgroups) -> None:
    cgroups.place("9:memory:/box", "4:cpu,cpuacct:/box", "1:name=systemd:/x", "0::/y")
    used = dict(memory__usage_in_bytes=100 * MIB, memory__stat=f"total_inactive_file {8 * MIB}")
    cgroups.write("memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=5 * GIB)
    cgroups.write("memory/box", memory__limit_in_bytes=256 * MIB, **used)
    cgroups.write("cpu/box", cpu__cfs_quota_us=300000, cpu__cfs_period_us=100000)
    assert machine.cgroup_limit_bytes() == 256 * MIB
    assert machine._cgroup_free_bytes() == (256 - 100 + 8) * MIB
    assert machine.default_threads() == 3
    assert machine.cpu_quota() == 3.0
    cgroups.write("cpu", cpu__cfs_quota_us=150000, cpu__cfs_period_us=100000)
    assert machine.cpu_quota() == 1.5 and machine.default_threads() == 1
    cgroups.write("cpu", cpu__cfs_quota_us=-1)
    cgroups.write("cpu/box", cpu__cfs_quota_us=-1)
    assert machine.cpu_quota() is None and machine.default_threads() == 8


def test_v1_controllers_that_share_a_folder(cgroups: Cgroups) -> None:
    cgroups.place("4:cpu,cpuacct:/box")
    cgroups.write("cpu,cpuacct/box", cpu__cfs_quota_us=400000, cpu__cfs_period_us=100000)
    assert machine.default_threads() == 4


def test_affinity_and_quota_whichever_is_less(
    cgroups: Cgroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    cgroups.place("0::/a")
    (cgroups.root / "cgroup.controllers").write_text("cpu\n")
    cgroups.write("a", cpu__max="600000 100000")
    assert (machine.allowed_cores(), machine.default_threads()) == (8, 6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 7})
    assert (machine.allowed_cores(), machine.default_threads()) == (3, 3)
    monkeypatch.delattr(os, "sched_getaffinity")  # not everywhere
    assert machine.allowed_cores() == os.cpu_count()


def test_v1_in_a_container_the_path_is_the_hosts(cgroups: Cgroups) -> None:
    """The group's own folder is mounted as the root; the path in it does not exist."""
    cgroups.place("9:memory:/docker/0123", "4:cpu,cpuacct:/docker/0123")
    cgroups.write("memory", memory__limit_in_bytes=64 * MIB)
    cgroups.write("cpu", cpu__cfs_quota_us=150000, cpu__cfs_period_us=100000)
    assert machine.cgroup_limit_bytes() == 64 * MIB
    assert machine.default_threads() == 1


@pytest.mark.parametrize("text", ["", "garbage", "max max", "x 100000", "100000 0"])
def test_files_that_make_no_sense_are_no_limit(cgroups: Cgroups, text: str) -> None:
    cgroups.place("0::/a")
    (cgroups.root / "cgroup.controllers").write_text("")
    cgroups.write("a", memory__max=text, cpu__max=text)
    assert machine.cgroup_limit_bytes() is None
    assert machine.default_threads() == 8


def test_no_cgroups_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def read_text(path: Path, *args: Any, **options: Any) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert machine.cgroup_limit_bytes() is None
    assert machine.default_threads() >= 1


def test_what_is_free_leaves_a_margin(cgroups: Cgroups, monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(available=7 * GIB)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(machine, "resident_bytes", lambda: GIB)
    cgroups.place("0::/a")
    (cgroups.root / "cgroup.controllers").write_text("")
    assert machine.available_bytes() == 8 * GIB - int(0.1 * 8 * GIB)
    free.available = 0
    assert machine.available_bytes() == GIB - GIB // 4
    free.available = 7 * GIB
    cgroups.write("a", **memory(2048, used=1024))
    assert machine.available_bytes() == int(2 * GIB * 0.95)
    assert machine.available_bytes() < machine.cgroup_limit_bytes()  # type: ignore[operator]


def test_this_process_is_measured() -> None:
    before = machine.resident_bytes()
    block = bytearray(64 * MIB)
    assert machine.resident_bytes() - before > 48 * MIB
    assert machine.peak_bytes() >= machine.resident_bytes() - 4 * MIB
    del block
    machine.trim_heap()
    machine.release_cache()
    assert machine.resident_bytes() - before < 32 * MIB


# ------------------------------------------------------------------------ compiling


SET = KernelSet(("F32",), "f16", False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache" / "kernels").mkdir(parents=True)
    return tmp_path / "cache"


def test_a_kernel_set_survives_its_text() -> None:
    nested = KernelSet(("Q8_0", "B4"), "f16", False, ("Q8_0:3+1+4", "Q8_0:4+4"))
    for wanted in (SET, KernelSet(("F32", "Q8_0"), "f32", True), nested):
        assert KernelSet.parse(str(wanted)) == wanted


@pytest.mark.parametrize("content", ["", "/nowhere/at/all", "\0"])
def test_a_note_without_a_cache_is_no_cache(cache: Path, content: str) -> None:
    stamp = compiling._stamp(SET)
    assert stamp.is_relative_to(cache) and stamp != compiling._stamp(KernelSet((), "f16", False))
    stamp.write_text(content)
    assert not is_compiled(SET)
    stamp.write_text(str(cache))
    assert is_compiled(SET)


@pytest.mark.parametrize(
    ("budget", "free", "rounds"),
    [
        (None, 64 * GIB, [4]), (None, GIB, [2]), (None, 0, [1]), (2 * GIB, 64 * GIB, [4]),
        (600 * MIB, 64 * GIB, [1]), (200 * MIB, 64 * GIB, [1] * 6),
    ],
)  # fmt: skip
def test_as_many_children_as_memory_allows_and_one_kernel_each_in_a_small_budget(
    cache: Path, monkeypatch: pytest.MonkeyPatch, budget: int | None, free: int, rounds: list[int]
) -> None:
    started: list[list[tuple[int, int, int]]] = []

    def one_round(wanted: KernelSet, parts: list[tuple[int, int, int]]) -> Any:
        started.append(parts)
        numbers = sorted(n for first, stop, step in parts for n in range(6)[first:stop:step])
        for number in numbers:
            yield f"kernel {number}", number, 6
        return str(cache), 6

    monkeypatch.setattr(compiling, "_round", one_round)
    monkeypatch.setattr(compiling, "available_bytes", lambda: free)
    monkeypatch.setattr(compiling, "default_threads", lambda: 8)
    seen = list(compile_apart(SET, budget))
    assert seen == [(f"kernel {i}", i, 6) for i in range(6)], "each kernel once"
    assert [len(parts) for parts in started] == rounds
    assert is_compiled(SET) and list(compile_apart(SET, budget)) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal")
@pytest.mark.parametrize("most", [2, 0])
def test_children_that_are_killed_go_one_by_one_and_then_give_up(
    cache: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """`most` kernels at once are too many for memory; with 0 even one is."""
    script = """if True:
        import os, signal, sys
        first, stop, step, most = map(int, sys.argv[1:])
        for number in range(6)[first:stop:step]:
            if most <= number - first:
                os.kill(os.getpid(), signal.SIGKILL)
            print("kernel", number, number, 6, flush=True)
        print("=", os.environ["NUMBA_CACHE_DIR"], 6, 6, flush=True)
    """

    def start(wanted: KernelSet, part: tuple[int, int, int]) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, *map(str, (*part, most))]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(compiling, "_start", start)
    monkeypatch.setattr(compiling, "_children", lambda budget: 1)
    if most:
        names = [name for name, _, _ in compile_apart(SET, None)]
        assert names[-6:] == [f"kernel {i}" for i in range(6)], "each in a child of its own"
        assert is_compiled(SET)
    else:
        with pytest.raises(EdgertError, match="220.0 MiB; run edgert warmup"):
            list(compile_apart(SET, None))
        assert not is_compiled(SET)


def test_a_child_that_fails_leaves_no_note(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One of two children ends with an error: what the other did is kept, but not called whole."""
    script = "import sys; print('a', sys.argv[1], 4, flush=True); sys.exit(int(sys.argv[1]))"

    def start(wanted: KernelSet, part: tuple[int, int, int]) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, str(part[0])]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(compiling, "_start", start)
    monkeypatch.setattr(compiling, "_children", lambda budget: 2)
    assert list(compile_apart(SET, None)) == [("a", 0, 4), ("a", 1, 4)]
    assert not is_compiled(SET)


def test_children_end_with_whoever_wanted_them(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []

    def start(wanted: KernelSet, part: tuple[int, int, int]) -> subprocess.Popen[str]:
        script = "import time; print('a', 0, 4, flush=True); time.sleep(100)"
        command = [sys.executable, "-c", script]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    monkeypatch.setattr(compiling, "_start", start)
    monkeypatch.setattr(compiling, "_children", lambda budget: 2)
    steps = compile_apart(SET, None)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert len(started) == 2 and all(child.returncode for child in started)


@pytest.mark.parametrize("error", [None, OSError("no process"), ValueError("no such")])
def test_a_child_that_cannot_be_is_no_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def fail(*args: object, **options: object) -> Any:
        assert error is not None
        raise error

    if error is None:
        monkeypatch.setattr(sys, "executable", "/opt/app/frozen")
    monkeypatch.setattr(subprocess, "Popen", fail)
    assert list(compile_apart(SET, 100 * MIB)) == []
    assert not is_compiled(SET)


COMPILE = """
import sys, time
from edgert.compiling import KernelSet, compile_apart, is_compiled
wanted = KernelSet(("F32",), "f16", False)
print(is_compiled(wanted))
print(len(list(compile_apart(wanted, None))))
print(is_compiled(wanted), "numba" in sys.modules)
"""


def compile_in(folder: Path, code: str = COMPILE) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=170,
        env=environment(NUMBA_CACHE_DIR=str(folder)),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_a_cold_cache_is_filled_by_a_child_and_a_warm_one_starts_none(tmp_path: Path) -> None:
    cold = compile_in(tmp_path / "cache")
    assert cold[0] == "False" and int(cold[1]) >= 8 and cold[2:] == ["True", "False"]
    before = sorted((tmp_path / "cache").rglob("*"))
    forbid = "import subprocess\nsubprocess.Popen = None\n"
    assert compile_in(tmp_path / "cache", forbid + COMPILE) == ["True", "0", "True", "False"]
    assert sorted((tmp_path / "cache").rglob("*")) == before


def test_a_cache_that_cannot_be_written_is_filled_once_elsewhere(tmp_path: Path) -> None:
    """Its place is below a file. Children fill a temporary folder, not this process."""
    (tmp_path / "file").write_text("")
    code = """
from edgert.compiling import KernelSet, compile_apart, is_compiled
wanted = KernelSet(("F32",), "f16", False)
compiled = len(list(compile_apart(wanted, None)))
print(compiled, is_compiled(wanted))
from edgert.kernels import compile_here
from edgert.kernels_cpu.jit import cache_folder
import numba
numba.cfunc = None
print(len(list(compile_here(wanted))), cache_folder())
"""
    compiled, ready, loaded, folder = compile_in(tmp_path / "file" / "cache", code)
    assert compiled == loaded and ready == "True"
    assert "edgert-kernels-" in folder and not Path(folder).exists()
    assert not Path(folder).is_relative_to(tmp_path / "file")
