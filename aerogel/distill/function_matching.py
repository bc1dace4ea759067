"""Function matching. Beyer, Zhai, Royer, Markeeva, Anil, Kolesnikov 2022, "Knowledge distillation: a good teacher is
patient and consistent", arXiv:2106.05237, sections 3 and 4.

x~ = lambda * x + (1 - lambda) * x', x' another image of the batch, lambda uniform in [0, 1], one for the batch
loss = T^2 * KL(teacher(x~) at T || student(x~) at T), without any label
Both see the same crop and the same mixture; the teacher never comes from a cache of other views.
Paper: T = 1, and very long schedules (1,200 epochs and more on ImageNet). Differs: nothing. Under several processes
an image is mixed with one of its own process.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mixed(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each row mixed with its neighbour in the batch by one uniform share: (n, ...) -> (n, ...).

    generator: by default torch's own, which the training loop seeds by step.
    """
    share = torch.rand((), generator=generator).to(inputs)
    return torch.lerp(inputs.roll(1, dims=0), inputs, share)
