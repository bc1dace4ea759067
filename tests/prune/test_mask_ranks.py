"""Two processes train a pruned network: its zeros stay, and both have the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("mask_ranks.py")
SLOW = [pytest.param(name, 1000, marks=pytest.mark.slow) for name in ("sgd", "adam", "adamw")]


@pytest.mark.parametrize(("name", "count"), [("sgd", 100), *SLOW])
def test_pruned_weights_are_zero_in_both_after_so_many_steps(
    name: str, count: int, tmp_path: Path, as_ranks: Callable[..., None]
) -> None:
    as_ranks(SCRIPT, 2, tmp_path, name, count)
    first, second = (load_file(tmp_path / f"{name}_{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for key in ("1.weight", "4.weight"):
        gone = ~first[f"mask {key}"]
        assert 0.4 < gone.float().mean() < 1
        for kind in ("model", "average"):
            assert (first[f"{kind} {key}"][gone] == 0).all()
            assert (first[f"{kind} {key}"][~gone] != 0).all()
