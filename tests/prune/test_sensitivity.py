"""The scan: a point equals the cut it stands for, the model stays as it was, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aerogel.cost import count as count_cost
from aerogel.errors import CutError
from aerogel.graph import capture
from aerogel.graph.resize import resize
from aerogel.prune import sensitivity
from aerogel.prune.coupling import couple
from aerogel.prune.criteria import l2
from aerogel.prune.proof import copied, named_weights, slices, to_tensors

IMAGE = torch.zeros(1, 1, 8, 8)
SAMPLES = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """stem and back meet in a sum: one group of 10; wide is a group of 20."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(1, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.wide, self.back = nn.Conv2d(10, 20, 3, padding=1), nn.Conv2d(20, 10, 1)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.back(self.wide(x).relu())).mean((2, 3)))


def energy(model: nn.Module) -> float:
    """A number that every channel changes."""
    with torch.no_grad():
        return float(model.eval()(SAMPLES).square().mean())


@pytest.mark.parametrize("name", ["stem", "wide"])
def test_a_point_is_what_the_cut_network_computes(name: str) -> None:
    """The same lowest channels of that group cut out: the same outputs, the same MACs."""
    net = Residual()
    found = sensitivity(net, (IMAGE,), evaluate=energy, shares=(0.2, 0.5))
    assert list(found.groups) == ["stem", "wide"]
    assert found.whole == energy(net)
    coupling = couple(capture(net, (IMAGE,)))
    group = next(group for group in coupling.groups if group.name == name)
    lowest = l2(group, named_weights(net)).argsort(stable=True).numpy()
    curve = found.groups[name]
    for count, value, macs in zip(curve.removed, curve.values, curve.macs, strict=True):
        flags = np.zeros(coupling.count, bool)
        flags[group.units[lowest[:count]]] = True
        kept = to_tensors(coupling.kept(flags))
        less = resize(copied(net), slices(named_weights(net), kept))
        assert value == pytest.approx(energy(less), rel=1e-5)
        assert value != found.whole
        assert macs == count_cost(capture(less, (IMAGE,))).macs / count_cost(coupling.graph).macs


def test_counts_are_shares_of_the_group_and_one_channel_stays() -> None:
    found = sensitivity(Residual(), (IMAGE,), evaluate=energy, shares=(0.1, 0.5, 0.99))
    stem, wide = found.groups["stem"], found.groups["wide"]
    assert (stem.channels, stem.removed) == (10, (1, 5, 9))
    assert (wide.channels, wide.removed) == (20, (2, 10, 19))


def test_the_network_is_as_it_was() -> None:
    net = Residual().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    sensitivity(net, (IMAGE,), evaluate=energy, shares=(0.9,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training


def test_protected_groups_are_left_out_and_equal_points_are_evaluated_once() -> None:
    calls: list[str] = []
    progress: list[tuple[int, int, str]] = []

    def evaluate(model: nn.Module) -> float:
        calls.append("")
        return 0.0

    shares = (0.1, 0.11, 0.5)  # of twenty channels: 2, 2, 10
    found = sensitivity(Residual(), (IMAGE,), evaluate=evaluate, shares=shares, protect=["stem"],
                        progress=lambda *seen: progress.append(seen))  # fmt: skip
    assert list(found.groups) == ["wide"]
    assert found.groups["wide"].removed == (2, 2, 10)
    assert len(calls) == 1 + 2
    assert progress == [(0, 3, "wide"), (1, 3, "wide"), (2, 3, "wide")]


def test_the_lowest_scores_go_first() -> None:
    """A channel of weight zero costs nothing; the criterion sends it first."""
    net = Residual()
    with torch.no_grad():
        for weight in (net.wide.weight[7], net.wide.bias[7], net.back.weight[:, 7]):
            weight.zero_()
    found = sensitivity(net, (IMAGE,), evaluate=energy, shares=(0.05, 0.1), protect=["stem"])
    one, two = found.groups["wide"].values
    assert one == pytest.approx(found.whole, rel=1e-6)
    assert two != pytest.approx(found.whole, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": ()}, r"shares must rise within \(0, 1\), .* got \(\)"),
        ({"shares": (0.5, 0.2)}, r"shares must rise"),
        ({"shares": (0.5, 0.5)}, r"shares must rise"),
        ({"shares": (0.0, 0.5)}, r"shares must rise"),
        ({"shares": (0.5, 1.0)}, r"shares must rise"),
        ({"criterion": "l3"}, r"criterion 'l3' is unknown; did you mean l"),
        ({"protect": ["stme"]}, r"'stme' names no layer; did you mean stem"),
    ],
)
def test_what_is_wrong_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CutError, match=message):
        sensitivity(Residual(), (IMAGE,), evaluate=energy, **options)
