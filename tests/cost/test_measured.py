"""Kernel times on the layers of the captured graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_device import made
from test_kernels import Unit
from torch import nn

from aerogel.cost import count
from aerogel.cost.latency import measure
from aerogel.cost.measured import by_layer, on_this_machine
from aerogel.export.onnx import export_onnx
from aerogel.graph import capture


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def layers(net: nn.Module, *shape: int):
    return count(capture(net, (torch.zeros(shape),))).layers


def test_what_is_fused_goes_to_its_host_and_reorders_to_whom_they_serve() -> None:
    held = layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)), 1, 3, 8, 8)
    first, last = held[0].node, held[-1].node
    assert by_layer([("2", 1.0), ("3", 2.0), ("3", 0.5)], held) == {first: 1.0, last: 2.5}


def test_kernels_of_one_module_are_matched_in_order_and_the_rest_goes_to_the_last() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 1).softmax(1)

    held = layers(nn.Sequential(Two()), 1, 8)
    assert by_layer([("0", 1.0), ("0", 2.0), ("0", 4.0)], held) == {held[0].node: 1.0, held[1].node: 6.0}


def test_modules_within_one_take_its_layers_in_turn() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin().cumsum(1)

    held = layers(nn.Sequential(Two()), 1, 8)
    assert by_layer([("0.a", 1.0), ("0.b", 2.0)], held) == {held[0].node: 1.0, held[1].node: 2.0}


def test_a_module_that_no_layer_is_in_gives_to_the_one_around_it() -> None:
    held = layers(nn.Sequential(nn.Linear(4, 4)), 1, 4)
    assert by_layer([("0.quantised.inner", 3.0)], held) == {held[0].node: 3.0}
    assert by_layer([("elsewhere", 3.0)], held) == {}


def test_measured_and_predicted_by_layer(tmp_path: Path) -> None:
    net, x = Unit(), torch.randn(1, 3, 16, 16)
    cost = count(capture(net, (x,)))
    path = export_onnx(net, (x,), tmp_path / "net.onnx").path
    found = on_this_machine(path, cost.layers, latency=measure(path, seconds=0.05), device=made())
    assert found.latency is not None
    assert found.prediction is not None
    assert found.measured_ms is not None
    nodes = {layer.node: layer for layer in cost.layers}
    for times in (found.measured_ms, found.predicted_ms):
        assert times is not None
        assert all(nodes[node].runs for node in times)
        assert {nodes[node].name for node in times} >= {"stem.0", "depthwise", "pointwise", "fc", "up"}
    assert sum(found.predicted_ms.values()) == pytest.approx(found.prediction.ms, rel=1e-6)


def test_only_what_is_asked_for_is_done(tmp_path: Path) -> None:
    net, x = nn.Linear(4, 4), torch.randn(1, 4)
    path = export_onnx(net, (x,), tmp_path / "net.onnx").path
    found = on_this_machine(path, layers(net, 1, 4), device=made())
    assert found.latency is None
    assert found.measured_ms is None
    assert found.prediction is not None
