"""What all tests share: one thread, and the command line as a function."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch

from aerogel import cli


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Nets this small lose time to more, and bit for bit holds for one number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was measured of this machine is not the tests' business, nor theirs the machine's."""
    with patch.dict(os.environ, XDG_CACHE_HOME=str(tmp_path_factory.mktemp("cache"))):
        yield


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
