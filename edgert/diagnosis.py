"""What `edgert doctor` tells: the machine as edgert sees it, and what is wrong with it.

Owns: gathering facts and judging them. Must not know how they are printed. Missing CPU features are
facts, never errors; each problem says what to do, and only what keeps edgert from working is an
"error", all else a "warning".
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from edgert import machine
from edgert.errors import EdgertError
from edgert.kernels_cpu.cache import KEY_LENGTH, cache_root, writable
from edgert.units import MIB, format_bytes

__all__ = ["diagnose"]

_PACKAGES = ("edgert", "numpy", "numba", "llvmlite", "tokenizers", "llama-cpp-python")
_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512vbmi",
    "avx512bf16", "gfni", "avxvnni", "neon", "dotprod", "i8mm", "sve",
)  # fmt: skip
_READ_BYTES = 512 * MIB
_SLOW_DISK = 200e6  # bytes a second: below it a streamed model is hardly of use
_DISK_SECONDS = 0.5

Facts = dict[str, Any]


def diagnose(path: str | Path | None = None) -> Facts:
    """Facts by topic, as JSON values: versions, cpu, threads, memory, disk, cache,
    profile, experts, problems.

    `path`: the model whose folder is measured, by default the bundled one. Takes about two seconds,
    and three more where the device profile is measured.
    Each problem is {"severity": "error" or "warning", "what": text, "do": text}.
    """
    problems: list[Facts] = []

    def problem(severity: str, what: str, do: str) -> None:
        problems.append({"severity": severity, "what": what, "do": do})

    found: Facts = {"versions": _versions()}
    for topic, look in (("cache", _cache), ("threads", _threads), ("cpu", _cpu)):
        found[topic] = look(problem)
    found["memory"] = _memory(problem, found["threads"]["default"])
    found["disk"] = _disk(problem, path)
    found["profile"] = _profile(found, path)
    found["experts"] = _experts(path)
    found["problems"] = problems
    return found


_Problem = Callable[[str, str, str], None]


def _versions() -> Facts:
    found: Facts = {"python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cpu(problem: _Problem) -> Facts:
    """Features, the variant of the kernels, and whether they compile and compute."""
    found: Facts = {"name": _cpu_name(), "machine": platform.machine()}
    try:
        import llvmlite.binding as llvm

        from edgert.kernels_cpu.compiler import target_key
        from edgert.kernels_cpu.isa import AVX2, AVX512_VNNI, ISA

        target = {f[1:] for f in target_key()[2].split(",") if f.startswith("+")}
        host = {name for name, has in llvm.get_host_cpu_features().items() if has}
        found |= {
            "features": [name for name in _FEATURES if name in target],
            "unused_features": [name for name in _FEATURES if name in host - target],
            "variant": ISA.name,
            "missing_for": {isa.name: sorted(isa.needs - target) for isa in (AVX512_VNNI, AVX2)},
        }
        _try_kernels()
    except Exception as error:
        problem(
            "error",
            f"the kernels do not work: {error or type(error).__name__}",
            "install edgert in a fresh environment, with the versions of Numba and llvmlite that "
            "pip chooses",
        )
        return found
    if found["unused_features"]:
        problem(
            "warning",
            f"the CPU has {', '.join(found['unused_features'])}, which the kernels may not use",
            "unset NUMBA_CPU_NAME and NUMBA_CPU_FEATURES",
        )
    elif platform.machine().lower() in ("x86_64", "amd64") and found["variant"] == "portable":
        problem(
            "warning",
            f"the CPU lacks {', '.join(found['missing_for']['avx2'])}: results are right, but slow",
            "use a machine with AVX2 (2013 and later) where speed matters",
        )
    return found


def _try_kernels() -> None:
    """Compile or load a kernel, run it, compare it with its twin. Raises what is wrong."""
    import numpy as np

    from edgert.kernels_cpu import activations

    x = np.linspace(-3, 5, 64, dtype=np.float32).reshape(1, 64)
    if not (activations.quantize(x) == activations.quantize_ref(x)).all():
        raise EdgertError("a kernel computes something else than its reference")


def _threads(problem: _Problem) -> Facts:
    cores, quota, default = machine.allowed_cores(), machine.cpu_quota(), machine.default_threads()
    limited = quota is not None and int(quota) < cores
    if quota is not None and quota < 1:
        problem(
            "warning",
            f"the control group grants {quota:.2g} of a core: compute threads are stopped for "
            f"{100 * (1 - quota):.0f} % of the time",
            "raise its CPU limit (docker run --cpus, or cpu.max)",
        )
    total = os.cpu_count() or 1
    reason = "CPU affinity" if cores < total else "all cores"
    return {
        "default": default,
        "from": "CPU quota of the control group" if limited else reason,
        "cores": total,
        "allowed_cores": cores,
        "cpu_quota": quota,
    }


def _memory(problem: _Problem, threads: int) -> Facts:
    found: Facts = {
        "total_bytes": int(psutil.virtual_memory().total),
        "cgroup_limit_bytes": machine.cgroup_limit_bytes(),
        "available_bytes": machine.available_bytes(),
        "process_bytes": machine.resident_bytes(),
        "read_bytes_per_s": None,
        "read_bytes_per_s_one_thread": None,
    }
    free = found["available_bytes"]
    if free < 256 * MIB:
        problem(
            "warning",
            f"only {format_bytes(max(free, 0))} of memory can be used",
            "end other programs or raise the memory limit of the control group",
        )
    nbytes = min(_READ_BYTES, max(free, 0) // 4)
    if nbytes >= 64 * MIB:
        try:
            from edgert.bench_harness import measure_memory

            found["read_bytes_per_s"] = measure_memory(threads, nbytes)
            found["read_bytes_per_s_one_thread"] = measure_memory(1, nbytes)
        except Exception:  # kernels that do not work are reported by `_cpu`
            pass
    return found


def _disk(problem: _Problem, path: str | Path | None) -> Facts:
    """The rate of direct reads where the model lies, of its own bytes."""
    from edgert.opening import open_model
    from edgert.storage.backend import FileBackend
    from edgert.storage.device import measure_read_rate

    try:
        opened = open_model(path)
        backend = FileBackend(opened.manifest.files)
        try:
            direct = backend.direct
            rate = measure_read_rate(backend, seconds=_DISK_SECONDS)
        finally:
            backend.close()
    except EdgertError as error:
        problem("error", str(error), "name a model that can be read")
        return {"model": None if path is None else str(path), "read_bytes_per_s": None}
    folder = opened.path.resolve().parent
    if not direct:
        problem(
            "warning",
            f"{folder} is on a file system without direct reads: streaming goes through the page "
            "cache, which counts as memory",
            "move the model to a local disk",
        )
    elif rate < _SLOW_DISK:
        problem(
            "warning",
            f"{folder} delivers {rate / 1e6:.0f} MB/s",
            "move the model to a faster disk, or give a budget that holds it whole",
        )
    return {
        "model": str(opened.path),
        "folder": str(folder),
        "direct": direct,
        "read_bytes_per_s": rate,
        "model_bytes": sum(opened.manifest.file_bytes),
    }


def _profile(found: Facts, path: str | Path | None) -> Facts | None:
    """The device profile, measured again when memory or the disk no longer do what it says."""
    from edgert.compiling import is_compiled
    from edgert.device_profile import drifted, load_profile, profile_path
    from edgert.opening import open_model

    memory, disk = found["memory"]["read_bytes_per_s"], found["disk"]["read_bytes_per_s"]
    if not memory or not disk:
        return None
    try:
        from edgert.profiling import ensure_profile

        opened, threads = open_model(path), found["threads"]["default"]
        if not is_compiled(opened.kernel_set("f16")):  # half a minute: not what was asked for
            return None
        kept = load_profile(opened.manifest.files, threads)
        stale = kept is not None and (
            drifted(kept.memory_bytes_per_s, memory) or drifted(kept.disk_bytes_per_s, disk)
        )
        profile, saved = ensure_profile(opened, threads, fresh=stale)
    except Exception:  # kernels that do not work are reported by `_cpu`, a bad file by `_disk`
        return None
    where = str(profile_path(opened.manifest.files, threads)) if saved else None
    return {"file": where, **profile.to_dict(), "disk_bytes_per_s": profile.disk_bytes_per_s}


def _experts(path: str | Path | None) -> Facts | None:
    """What is known of the routing of the model; None for a dense one."""
    from edgert.expert_profile import ENVIRONMENT, identity_of, load_expert_profile, profile_file
    from edgert.opening import open_model

    try:
        opened = open_model(path)
        if not opened.spec.is_moe:
            return None
        identity = identity_of(opened.spec, opened.manifest)
        file, known = profile_file(identity), load_expert_profile(identity)
    except EdgertError as error:  # a bad model is reported by `_disk`
        return {"file": os.environ.get(ENVIRONMENT), "tokens": 0.0, "refused": str(error)}
    return {
        "file": None if file is None else str(file),
        "tokens": 0.0 if known is None else known.tokens,
        "refused": None,
    }


def _cache(problem: _Problem) -> Facts:
    """The folder of compiled kernels. Looked at before any kernel may choose another folder."""
    try:
        from edgert.kernels_cpu.jit import cache_key

        key = cache_key()
    except Exception:  # `_cpu` says what is wrong with Numba
        key = ""
    root = cache_root()
    can_write = writable(root)
    files = [p for p in root.rglob("*") if p.is_file()] if root.is_dir() else []
    kernels = [p for p in files if p.suffix == ".code"]
    current = sum(p.parent.name == key for p in kernels)
    keys = {p.parent.name for p in kernels if len(p.parent.name) == KEY_LENGTH}
    if not can_write:
        problem(
            "warning" if current else "error",
            f"the cache folder {root} cannot be written: kernels are compiled at every start",
            "make it writable, or name another one with NUMBA_CACHE_DIR, then run edgert warmup",
        )
    return {
        "folder": str(root),
        "writable": can_write,
        "bytes": sum(p.stat().st_size for p in files),
        "kernels": len(kernels),
        "key": key,
        "current_kernels": current,
        "stale_keys": len(keys - {key}),
    }
