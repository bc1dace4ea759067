"""Two processes train a pruned network: its zeros stay, and both have the same."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("mask_ranks.py")
SLOW = [pytest.param(name, 1000, marks=pytest.mark.slow) for name in ("sgd", "adam", "adamw")]


@pytest.mark.parametrize(("name", "count"), [("sgd", 100), *SLOW])
def test_pruned_weights_are_zero_in_both_after_so_many_steps(name: str, count: int, tmp_path: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, SCRIPT, tmp_path, name, str(count)], env={**os.environ, **places, "RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for child in children:
        _, err = child.communicate(timeout=300)
        assert child.returncode == 0, err
    first, second = (load_file(tmp_path / f"{name}_{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for key in ("1.weight", "4.weight"):
        gone = ~first[f"mask {key}"]
        assert 0.4 < gone.float().mean() < 1
        for kind in ("model", "average"):
            assert (first[f"{kind} {key}"][gone] == 0).all()
            assert (first[f"{kind} {key}"][~gone] != 0).all()
