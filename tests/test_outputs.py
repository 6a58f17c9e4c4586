"""What commands write to a file never costs a model, and --debug never an exit code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import edgert
from tests.command import assert_error
from tests.command import edgert as command


@pytest.mark.parametrize("kind", ["gguf", "pack"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "{}", "-p", "Once", "-n", "1", "--trace", "{}"),
        ("logits", "{}", "--tokens", "1,2", "--out", "{}"),
        ("trace", "{}", "-p", "Once", "-n", "1", "--out", "{}"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_model_is_never_written_over(
    tmp_path: Path, kind: str, arguments: tuple[str, ...]
) -> None:
    path = tmp_path / "model"
    if kind == "gguf":
        shutil.copy(edgert.bundled_model(), path)
    else:
        edgert.pack_model(edgert.bundled_model(), path)
    before = path.read_bytes()
    run = command(*(a.format(path) for a in arguments))
    assert run.returncode == 2 and f"{path} is a model; name another file" in run.stderr
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("false", False)])
def test_debug_is_on_or_off(value: str, shown: bool) -> None:
    run = command("run", "-p", "a", "-b", "1MiB", env={"EDGERT_DEBUG": value})
    assert run.returncode == 5 and ("Traceback" in run.stderr) is shown
    if not shown:
        assert_error(run, 5, "the smallest that works is")
