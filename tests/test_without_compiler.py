"""Running without Numba and LLVM once kernels are compiled: the same tokens, in less memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgert
from edgert.kernels_cpu import compiler, jit, linking

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not linking.CAN_LINK, reason="this system lets LLVM link")

# A process that has left the compiler out, whatever the cache holds.
LEAVE_OUT = f"""
import sys
from edgert.kernels_cpu import compiler
compiler._compiled_for = lambda: {compiler.target_key()!r}
"""


def run(code: str, **settings: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | settings,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_kernel_module_can_be_imported() -> None:
    code = """
import importlib, pkgutil
import edgert.kernels_cpu
for module in pkgutil.iter_modules(edgert.kernels_cpu.__path__):
    importlib.import_module("edgert.kernels_cpu." + module.name)
import edgert.kernels, edgert.engine
assert not {"numba", "llvmlite"} & set(sys.modules)
"""
    run(LEAVE_OUT + code)


def test_the_target_is_that_of_the_cache() -> None:
    code = """
from edgert.kernels_cpu import isa, jit
print(isa.ISA.name, jit.cache_key())
"""
    from edgert.kernels_cpu.isa import ISA

    assert run(LEAVE_OUT + code) == f"{ISA.name} {jit.cache_key()}"


GENERATE = """
import sys
import edgert
for _ in edgert.warmup():
    pass
{before}
with edgert.load(context_length=128) as engine:
    print(engine.generate([1, 5, 9], max_tokens=12, temperature=0).tokens, end=" ")
    print("numba" in sys.modules, engine.plan.regions[0].nbytes >> 20)
"""


def test_the_same_tokens_in_less_memory() -> None:
    tokens, numba, process = run(GENERATE.format(before="")).rsplit(" ", 2)
    with_it = run(GENERATE.format(before="import numba")).rsplit(" ", 2)
    assert (numba, with_it[1]) == ("False", "True") and tokens == with_it[0]
    assert int(process) < int(with_it[2]) - 40, "LLVM and Numba hold more than 40 MiB"


def test_what_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Numba is left out where a note says for what kernels are compiled, and nothing needs it."""
    note = tmp_path / "note"
    monkeypatch.setattr(compiler, "target_note", lambda: note)
    decide = compiler._compiled_for.__wrapped__
    assert decide() is None, "Numba is in this process"
    monkeypatch.setattr(compiler, "_NUMBA_WAS_HERE", False)
    assert decide() is None, "nothing was compiled"
    note.write_text(f"{tmp_path}\ttriple\tcpu\t+one,-two")
    assert decide() == ("triple", "cpu", "+one,-two")
    for damaged in ("", f"{tmp_path}\ttriple", f"{tmp_path}/gone\ta\tb\tc"):
        note.write_text(damaged)
        assert decide() is None
    note.write_text(f"{tmp_path}\ttriple\tcpu\t+one,-two")
    monkeypatch.setattr(compiler, "can_start_python", lambda: False)
    assert decide() is None, "nothing could be compiled later"


WANTED = """
import numpy as np
from edgert.kernels_cpu import activations
x = np.ones((1, 32), np.float32)
assert (activations.quantize(x) == activations.quantize_ref(x)).all()
assert "numba" not in sys.modules
"""


def test_what_is_not_compiled_is_compiled_by_a_child(tmp_path: Path) -> None:
    run(LEAVE_OUT + WANTED, NUMBA_CACHE_DIR=str(tmp_path))
    assert [p.name for p in tmp_path.rglob("*.code")] == ["activations.quantize_rows.code"]
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    run(LEAVE_OUT + WANTED, NUMBA_CACHE_DIR=str(blocked))


def test_a_child_that_fails_is_an_error_with_its_reason(tmp_path: Path) -> None:
    code = """
from edgert.errors import EdgertError
from edgert.kernels_cpu import activations, jit
jit._COMPILE = "raise OSError('broken')"
try:
    activations.quantize_rows.compile()
except EdgertError as error:
    print(error)
"""
    said = run(LEAVE_OUT + code, NUMBA_CACHE_DIR=str(tmp_path))
    assert "the kernel quantize_rows is not in the cache" in said
    assert "could compile it (OSError: broken); run edgert warmup" in said


def test_an_attribute_that_no_compiler_has() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = compiler.nothing
    assert edgert.__version__  # what imports it is as ever
