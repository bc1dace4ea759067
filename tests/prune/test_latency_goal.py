"""A latency goal from end to end: the cut network is exported, its kernels timed, its price met."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aerogel import nets
from aerogel.errors import AerogelError
from aerogel.graph import capture
from aerogel.prune import cut
from aerogel.prune.coupling import couple
from aerogel.prune.cut import Trial
from aerogel.prune.latency import DoesNotRun, LatencyAfter

DIGIT = torch.zeros(1, 1, 28, 28)


@pytest.fixture(scope="module")
def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


@pytest.mark.slow
def test_a_latency_goal_is_met(wide: nn.Module) -> None:
    made = cut(wide, (DIGIT,), target={"latency": 0.6})
    found, price = couple(capture(wide, (DIGIT,))), LatencyAfter(Trial(wide, (DIGIT,), None).network, (DIGIT,))
    removed = np.zeros(found.count, bool)
    whole = price(found, removed)
    removed[found.groups[0].units[made.model[1].out_features :]] = True  # which ones does not matter to the time
    assert made.model[1].out_features < 256
    assert price(found, removed) <= 0.6 * whole, "the table holds what the plan saw"


def test_equal_shapes_are_priced_once(wide: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    found, price = couple(capture(wide, (DIGIT,))), LatencyAfter(Trial(wide, (DIGIT,), None).network, (DIGIT,))
    units = found.groups[0].units
    first, other = np.zeros(found.count, bool), np.zeros(found.count, bool)
    first[units[:100]], other[units[100:200]] = True, True
    calls: list[nn.Module] = []
    real = LatencyAfter._price

    def counted(self: LatencyAfter, model: nn.Module) -> float:
        calls.append(model)
        return real(self, model)

    monkeypatch.setattr(LatencyAfter, "_price", counted)
    assert price(found, first) == price(found, other) > 0
    assert [model[1].out_features for model in calls] == [156]
    assert wide[1].out_features == 256, "the network itself is untouched"


class Constant(nn.Module):
    """A size in the code: cut like this it does not run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2, self.fc = nn.Conv2d(1, 64, 5), nn.Conv2d(64, 5, 1), nn.Linear(2880, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.conv1(x)).view(-1, 2880))


def test_a_cut_that_does_not_run_has_no_price() -> None:
    net = Constant()
    found = couple(capture(net, (DIGIT,)))
    removed = np.zeros(found.count, bool)
    conv2 = next(group for group in found.groups if group.name == "conv2")
    removed[conv2.units[:2]] = True
    with pytest.raises(DoesNotRun):
        LatencyAfter(Trial(net, (DIGIT,), None).network, (DIGIT,))(found, removed)


@pytest.mark.slow
def test_what_does_not_run_is_frozen_and_the_rest_is_priced() -> None:
    net = Constant()
    made = cut(net, (DIGIT,), target={"latency_ms": 1e4, "channels": 0.6})
    assert made.frozen["conv2"].startswith("forward fails once it is cut")
    assert made.model.conv1.out_channels < 40
    assert made.model.conv2.out_channels == 5


class Heads(nn.Module):
    """Attention of which the number of heads stands in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = 4
        self.qkv, self.out, self.head = nn.Linear(28, 96), nn.Linear(32, 28), nn.Linear(28, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x[:, 0]).view(len(x), 28, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.out(x).mean(1))


def test_what_modules_hold_follows_before_the_price_is_told() -> None:
    net = Heads()
    made = cut(net, (DIGIT,), target={"channels": 0.5, "latency_ms": 1e4}, protect=["out.bias"])
    assert made.model.heads == 2
    assert made.frozen.get("qkv") is None


def test_a_network_that_cannot_be_exported_is_an_error() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.special.bessel_j0(self.a(x)))

    with pytest.raises(AerogelError, match="Odd cannot be exported to ONNX"):
        cut(Odd(), (torch.zeros(1, 4),), target={"latency": 0.5})


def test_milliseconds_that_are_met_already_leave_the_network_whole() -> None:
    net = nets.build("lenet5")
    made = cut(net, (DIGIT,), target={"latency_ms": 1e4})
    assert made.after == made.before
