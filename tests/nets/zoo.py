"""What the tests of the nets share: each net small, and images that it takes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from aerogel.nets import NETS, build

each_net = pytest.mark.parametrize("name", NETS)


def options(name: str) -> set[str]:
    return set(inspect.signature(NETS[name]).parameters)


NARROW = {"num_classes": 10, "in_channels": 1, "input_size": 28, "width": 0.125, "growth": 4, "widths": "16-16"}


def small(name: str, **arguments: Any) -> nn.Module:
    """The net for 10 classes and 28 x 28 grey images, narrow where it can be, from seed 0."""
    torch.manual_seed(0)
    return build(name, **({key: NARROW[key] for key in NARROW if key in options(name)} | arguments))


def images(net: nn.Module, batch: int = 4) -> torch.Tensor:
    arguments = net.spec["args"]
    generator = torch.Generator().manual_seed(1)
    side = arguments["input_size"]
    return torch.randn(batch, arguments["in_channels"], side, side, generator=generator)


def shapes(net: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
