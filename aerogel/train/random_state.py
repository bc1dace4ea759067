"""The global random generators as named tensors: torch's, those of its CUDA devices, numpy's and python's.

The loop draws from (seed, step) alone; these are for a user's own code, such as an objective that calls `random`.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def random_tensors() -> dict[str, Tensor]:
    """Their states. CUDA's only where it was used in this process."""
    version, words, gauss = random.getstate()
    held = np.random.get_state(legacy=False)
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words]),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([held["state"]["pos"], held["has_gauss"], *held["state"]["key"].tolist()]),
        "numpy.gauss": torch.tensor([held["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return found


def restore_random(tensors: dict[str, Tensor]) -> None:
    """Puts back what `random_tensors` gave; a CUDA device that is not there is passed over."""
    torch.set_rng_state(tensors["torch"])
    version, *words = tensors["python"].tolist()
    random.setstate((version, tuple(words), next(iter(tensors["python.gauss"].tolist()), None)))
    position, has_gauss, *key = tensors["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, np.uint32), position, has_gauss, tensors["numpy.gauss"].item()))
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
