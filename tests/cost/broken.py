"""Networks that break one rule of lint each, and made-up devices on which that costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.cost import Device, Finding, lint
from aerogel.graph import Graph, capture


def device(name: str, gmacs: float, gb_s: float, **other: Any) -> Device:
    numbers: dict[str, Any] = {"simd": 8, "overhead_us": 0.01, "cache_bytes": 0, "cache_gb_s": gb_s, **other}
    speeds = {"conv": gmacs, "depthwise": gmacs, "elementwise": gmacs}
    return Device(name=name, title=name, kind="datasheet", source="made up", gmacs=speeds, memory_gb_s=gb_s,
                  **numbers)  # fmt: skip


SLOW_MEMORY = device("slow memory", gmacs=5000, gb_s=4)
SMALL_CACHE = device("small cache", gmacs=5000, gb_s=4, cache_bytes=2**16, cache_gb_s=40)
SLOW_COMPUTE = device("slow compute", gmacs=2, gb_s=1000)
SLOW_START = device("slow start", gmacs=5000, gb_s=1000, overhead_us=50)


def conv(c1: int, c2: int, kernel: int = 1, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c1, c2, kernel, padding=kernel // 2, **options), nn.BatchNorm2d(c2), nn.ReLU())


class Add(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return sum((branch(x) for branch in self.branches[1:]), self.branches[0](x))


class Cat(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def network(
    *body: nn.Module, c: int = 32, first: nn.Module | None = None, last: nn.Module | None = None
) -> nn.Sequential:
    head = last or nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 8))
    return nn.Sequential(first or conv(3, c, 3), *body, head)


def graph_of(net: nn.Module, size: int = 32) -> Graph:
    return capture(net, (torch.zeros(1, 3, size, size),))


def rows(make: Callable[[], nn.Module], number: int = 8) -> list[nn.Module]:
    return [make() for _ in range(number)]


def plain(size: int = 32) -> Graph:
    narrow, wide = rows(lambda: conv(32, 32, 3)), rows(lambda: conv(64, 64, 3))
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8))
    return graph_of(network(*narrow, conv(32, 64, 3, stride=2), *wide, last=last), size)


def unequal() -> Graph:
    return graph_of(network(*rows(lambda: nn.Sequential(conv(16, 128), conv(128, 16))), c=16))


def grouped() -> Graph:
    return graph_of(network(*rows(lambda: conv(64, 64, groups=8)), c=64))


def fragmented() -> Graph:
    return graph_of(network(*rows(lambda: Cat(*rows(lambda: conv(32, 8), 4)))))


def residual() -> Graph:
    return graph_of(network(*rows(lambda: Add(nn.Identity(), conv(32, 32, 3)))))


def off_the_lanes() -> Graph:
    return graph_of(network(*rows(lambda: conv(36, 36, 3)), c=36))


def normed_late() -> Graph:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(32))

    return graph_of(network(*rows(block)))


def heavy_first() -> Graph:
    return graph_of(network(*rows(lambda: conv(32, 32, 3), 5), first=conv(3, 32, 15)))


def heavy_classifier() -> Graph:
    return graph_of(network(*rows(lambda: conv(32, 32, 3)), last=nn.Sequential(nn.Flatten(), nn.Linear(32 * 1024, 80))))


def peaked() -> Graph:
    return graph_of(network(conv(32, 32, 3, stride=2), *rows(lambda: conv(32, 32, 3), 10)), 64)


def slow_in_onnx() -> Graph:
    return graph_of(network(*rows(lambda: nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Mish()))))


def not_in_onnx() -> Graph:
    head = nn.Sequential(nn.AdaptiveMaxPool2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8))
    return graph_of(network(*rows(lambda: conv(32, 32, 3)), last=head))


# One rule broken, and the device on which that costs.
BROKEN: dict[str, tuple[str, Callable[[], Graph], Device]] = {
    "unequal": ("G1", unequal, SLOW_MEMORY),
    "grouped": ("G2", grouped, SLOW_MEMORY),
    "fragmented": ("G3", fragmented, SLOW_MEMORY),
    "fragmented, slow start": ("G3", fragmented, SLOW_START),
    "residual": ("G4", residual, SLOW_MEMORY),
    "off the lanes": ("P1-simd", off_the_lanes, SLOW_COMPUTE),
    "normed late": ("P2-norm", normed_late, SLOW_MEMORY),
    "heavy first": ("P3-ends", heavy_first, SLOW_COMPUTE),
    "heavy classifier": ("P3-ends", heavy_classifier, SLOW_MEMORY),
    "peaked": ("P4-peak", peaked, SMALL_CACHE),
    "slow in onnx": ("P5-onnx", slow_in_onnx, SLOW_MEMORY),
    "not in onnx": ("P5-onnx", not_in_onnx, SLOW_COMPUTE),
}


def only(graph: Graph, rule: str, on: Device = SLOW_MEMORY) -> Finding:
    found = [finding for finding in lint(graph, on) if finding.rule == rule]
    assert len(found) == 1
    return found[0]
