"""What all tests share: one thread, no network, and the command line as a function."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch

from aerogel import cli

NO_NETWORK = Path(__file__).with_name("no_network")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def _module(name: str, path: Path) -> ModuleType:
    """The script at `path`, run as a module of that name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def benchmark_script() -> Callable[[str], ModuleType]:
    """Loads benchmarks/NAME.py."""
    return lambda name: _module(f"benchmark_{name}", BENCHMARKS / f"{name}.py")


def _as_ranks(script: Path, ranks: int, *words: object) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    places = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, words)]
    children = [
        subprocess.Popen(
            command, env={**os.environ, **places, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]  # fmt: skip
    for child in children:
        _, err = child.communicate(timeout=300)
        assert child.returncode == 0, err


@pytest.fixture(scope="session")
def as_ranks() -> Callable[..., None]:
    """as_ranks(SCRIPT, RANKS, *WORDS): the script in so many processes, as torchrun would start them, to their end."""
    return _as_ranks


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Nets this small lose time to more, and bit for bit holds for one number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def small_numbers() -> None:
    """Code that torch.compile builds may leave the processor flushing them to zero, for whoever comes after."""
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was measured of this machine is not the tests' business, nor theirs the machine's."""
    with patch.dict(os.environ, XDG_CACHE_HOME=str(tmp_path_factory.mktemp("cache"))):
        yield


@pytest.fixture(autouse=True, scope="session")
def connections(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where attempts to connect are written, by this process and by those that it starts."""
    log = tmp_path_factory.mktemp("network") / "connections"
    log.touch()
    paths = os.pathsep.join(filter(None, (str(NO_NETWORK), os.environ.get("PYTHONPATH"))))
    with patch.dict(os.environ, AEROGEL_TEST_CONNECTIONS=str(log), PYTHONPATH=paths):
        spec = importlib.util.spec_from_file_location("aerogel_no_network", NO_NETWORK / "sitecustomize.py")
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        yield log


@pytest.fixture(autouse=True)
def no_connections(connections: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that tries to connect fails, whatever the code makes of the refusal."""
    marked = {"AEROGEL_TEST_LOOPBACK": "1"} if request.node.get_closest_marker("distributed") else {}
    before = connections.stat().st_size
    with patch.dict(os.environ, marked):
        yield
    tried = connections.read_text(encoding="utf-8")[before:]
    assert not tried, f"it tried to connect (mark it `distributed` where that is to this machine alone): {tried}"


@pytest.fixture(scope="session")
def aerogel() -> Callable[..., Outcome]:
    """`aerogel("cost", "lenet5")`: the command in this process; its exit code, stdout and stderr."""

    def run(*words: object) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        argv = ["aerogel", *map(str, words)]
        try:
            with patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main()
        except SystemExit as stop:
            return Outcome(int(stop.code or 0), out.getvalue(), err.getvalue())
        raise AssertionError("main returned without an exit code")

    return run
