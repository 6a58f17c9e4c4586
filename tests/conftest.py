"""What every test may use: a seed that is printed, a time limit, models, the shared data."""

from __future__ import annotations

import faulthandler
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numba  # noqa: F401  (first, so that tests can compile: kernels_cpu/compiler.py)
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 180  # for a test that does not ask for more with @pytest.mark.timeout(seconds)
_STDERR = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of the rng fixture")


def pytest_report_header(config: pytest.Config) -> str:
    return f"edgert seed: {config.getoption('--seed')}"


def pytest_configure(config: pytest.Config) -> None:
    for name in ("EDGERT_EXPERT_PROFILE", "EDGERT_ACCEPTANCE"):
        os.environ[name] = "off"  # no test leaves anything in the user's folders
    os.environ["EDGERT_PREFETCH"] = "on"  # the harder case
    # A copy of the real stderr: during a test, pytest has put a file in its place.
    config.stash[_STDERR] = os.dup(2)


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[_STDERR])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End a test that hangs: all stacks on stderr, then exit 1. A thread cannot be stopped."""
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0]) if marker else TIMEOUT_SECONDS
    faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash[_STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on --seed and on the name of the test alone."""
    name = zlib.crc32(request.node.nodeid.encode())
    return np.random.default_rng([request.config.getoption("--seed"), name])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Larger files that are not part of the repository; the test is skipped without them."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the larger test data is not on this machine")
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of random weights, under 3 MB, of the Llama family in Q8_0."""
    from tests.tiny import tiny_model

    return tiny_model("llama", "Q8_0", path=tmp_path_factory.mktemp("tiny") / "llama-q8_0.gguf")


@pytest.fixture(scope="session")
def tiny_moe_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with experts, under 6 MB, in Q8_0."""
    from tests.tiny import tiny_model

    return tiny_model("olmoe", "Q8_0", path=tmp_path_factory.mktemp("tiny") / "olmoe-q8_0.gguf")
