"""`edgert doctor`: facts of this machine, and what it says of machines that are worse."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import edgert as library
from edgert import diagnosis, machine
from edgert.cli.doctor import _profile_lines
from edgert.kernels_cpu.compiler import target_key
from edgert.kernels_cpu.isa import ISA
from edgert.units import MIB
from tests.command import edgert, inside
from tests.device import PROFILE

AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+sse4.2,+ssse3,+movbe",
}


def problems(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(p["severity"], p["what"]) for p in found["problems"]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_READ_BYTES", 64 * MIB)
    monkeypatch.setattr(diagnosis, "_DISK_SECONDS", 0.05)


def test_this_machine(tiny_gguf: Path) -> None:
    run = inside("doctor", tiny_gguf, "--json")
    assert run.returncode == 0, run.stdout
    found = json.loads(run.stdout)
    assert found["versions"]["edgert"] == library.__version__
    assert found["cpu"]["variant"] == ISA.name and found["cpu"]["missing_for"][ISA.name] == []
    assert all(f"+{name}" in target_key()[2] for name in found["cpu"]["features"])
    assert 1 <= found["threads"]["default"] <= found["threads"]["cores"]
    assert found["memory"]["read_bytes_per_s"] > 1e8
    assert found["disk"]["read_bytes_per_s"] > 0
    assert found["disk"]["model_bytes"] == tiny_gguf.stat().st_size
    assert found["cache"]["writable"] and found["cache"]["current_kernels"] > 0
    assert not [p for p in found["problems"] if p["severity"] == "error"]


def test_for_people(tiny_gguf: Path) -> None:
    lines = inside("doctor", tiny_gguf).stdout.splitlines()
    topics = [re.split("  +", line)[0] for line in lines[: lines.index("")]]
    assert topics[:10] == ["versions", "cpu", "features", "kernels", "threads", "memory",
                           "memory rate", "disk rate", "kernel cache", "profile"]  # fmt: skip


def test_the_profile_is_shown_and_measured_again_where_it_is_wrong(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def ensure(opened: Any, threads: int, *, fresh: bool) -> tuple[Any, bool]:
        asked.append(fresh)
        return PROFILE, True

    facts = {"memory": {"read_bytes_per_s": 32e9}, "disk": {"read_bytes_per_s": 2e9},
             "threads": {"default": 2}}  # fmt: skip
    monkeypatch.setattr("edgert.device_profile.load_profile", lambda files, threads: PROFILE)
    monkeypatch.setattr("edgert.profiling.ensure_profile", ensure)
    monkeypatch.setattr("edgert.compiling.is_compiled", lambda wanted: True)
    found = diagnosis._profile(facts, tiny_gguf)
    assert found is not None and found["kernels"]["Q8_0"]["batch_macs_per_s"] == 300e9
    facts["disk"]["read_bytes_per_s"] = 1e9
    diagnosis._profile(facts, tiny_gguf)
    assert asked == [False, True]
    shown = _profile_lines(found)
    assert list(shown)[:3] == ["profile", "reads", "reads, busy"] and "kernel Q8_0" in shown
    facts["disk"]["read_bytes_per_s"] = 0.0
    assert diagnosis._profile(facts, tiny_gguf) is None


def test_a_cache_that_cannot_be_written(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = edgert("doctor", tiny_gguf, env={"NUMBA_CACHE_DIR": str(tmp_path / "file" / "x")})
    assert run.returncode == 1 and run.stderr == ""
    problem, remedy = run.stdout.splitlines()[-2:]
    assert problem.startswith("error: the cache folder ") and "cannot be written" in problem
    assert "NUMBA_CACHE_DIR" in remedy and "edgert warmup" in remedy


@pytest.mark.parametrize("name", ["no.gguf", "bad.gguf"])
def test_a_model_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    run = inside("doctor", tmp_path / name, "--json")
    found = json.loads(run.stdout)
    assert run.returncode == 1 and found["disk"]["read_bytes_per_s"] is None
    ((severity, what),) = problems(found)
    assert severity == "error" and name in what


@pytest.mark.skipif(ISA.name == "portable", reason="nothing is left to take away")
@pytest.mark.parametrize(
    "env", [{"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}, AVX2], ids=["sse2", "avx2"]
)
def test_features_that_are_kept_from_the_kernels(env: dict[str, str], tiny_gguf: Path) -> None:
    run = edgert("doctor", tiny_gguf, "--json", env=env)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["cpu"]["variant"] == ("avx2" if env is AVX2 else "portable")
    if found["cpu"]["unused_features"]:
        ((severity, what),) = problems(found)
        assert severity == "warning" and found["cpu"]["unused_features"][0] in what


def test_kernels_that_do_not_work(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("LLVM has no such target")

    monkeypatch.setattr(diagnosis, "_try_kernels", fail)
    found = library.diagnose(tiny_gguf)
    assert problems(found) == [("error", "the kernels do not work: LLVM has no such target")]
    assert "threads" in found and "disk" in found


@pytest.mark.parametrize(
    ("quota", "allowed", "default", "reason"),
    [
        (None, 8, 8, "all cores"),
        (None, 3, 3, "CPU affinity"),
        (2.5, 8, 2, "CPU quota of the control group"),
        (8.0, 3, 3, "CPU affinity"),
        (0.5, 8, 1, "CPU quota of the control group"),
    ],
)
def test_where_the_number_of_threads_comes_from(
    quota: float | None, allowed: int, default: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.setattr(machine, "allowed_cores", lambda: allowed)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    said: list[tuple[str, ...]] = []
    found = diagnosis._threads(lambda *problem: said.append(problem))
    assert (found["default"], found["from"]) == (default, reason)
    assert bool(said) == (quota == 0.5)


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 100 * MIB)
    said: list[tuple[str, ...]] = []
    found = diagnosis._memory(lambda *problem: said.append(problem), 2)
    assert found["read_bytes_per_s"] is None and said[0][0] == "warning"
    assert "100.0 MiB" in said[0][1]


@pytest.mark.parametrize(
    ("direct", "rate", "words"),
    [(True, 3e9, None), (True, 90e6, "delivers 90 MB/s"), (False, 3e9, "without direct reads")],
)
def test_disks(
    direct: bool, rate: float, words: str | None, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgert.storage import backend, device

    monkeypatch.setattr(backend.FileBackend, "direct", direct)
    monkeypatch.setattr(device, "measure_read_rate", lambda *_args, **_options: rate)
    said: list[tuple[str, ...]] = []
    assert diagnosis._disk(lambda *p: said.append(p), tiny_gguf)["read_bytes_per_s"] == rate
    assert [words in what for _, what, _ in said if words] == ([True] if words else [])
