"""Taps: what a module gives, by its name; under wrappers and compiled too; nothing stays."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.distill.taps import Taps, bare, taps_of
from aerogel.errors import AerogelError


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x + 1, {"late": x + 2}


class Net(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=inplace), nn.Linear(4, 4))
        self.pair, self.act, self.spare = Pair(), nn.ReLU(), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.pair(self.features(x))
        return self.head(self.act(self.act(x)))


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


def test_several_at_once_with_their_gradients() -> None:
    net = Net()
    with Taps(net, ["features.1", "features", "head"]) as taps:
        out = net(X)
    torch.testing.assert_close(taps["features.1"], net.features[1](net.features[0](X)))
    torch.testing.assert_close(taps["features"], net.features(X))
    assert taps["head"] is out
    taps["features.1"].sum().backward()
    assert net.features[0].weight.grad is not None
    assert hooks(net) == 0


def test_the_model_is_left_as_it_was_when_forward_fails() -> None:
    net = Net()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), Taps(net, ["head"]):
        net(torch.zeros(2, 5))
    assert hooks(net) == 0


def test_a_part_of_a_tuple_is_picked_by_its_index() -> None:
    net = Net()
    with Taps(net, ["pair[0]", "pair[-2]"]) as taps:
        net(X)
    torch.testing.assert_close(taps["pair[0]"], net.features(X) + 1)
    assert taps["pair[-2]"] is taps["pair[0]"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pair", r"'pair' gives a tuple, not a tensor; say which part is meant: 'pair\[0\]' is the first"),
        ("pair[1]", r"'pair\[1\]' must be a tensor in a tuple.*'pair' gives a tuple without it; take another index"),
        ("pair[7]", r"'pair\[7\]' must be a tensor.*take another index"),
        ("head[0]", r"'head\[0\]' must be a tensor in a tuple.*'head' gives a Tensor; leave the index out"),
    ],
)
def test_an_output_that_is_no_tensor_is_refused(name: str, message: str) -> None:
    net = Net()
    with Taps(net, [name]) as taps:
        net(X)
    with pytest.raises(AerogelError, match=message):
        taps[name]


def test_a_part_of_a_mapping_by_its_key() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"first": x, "last_hidden_state": x + 1}

    net = nn.Sequential(Named())
    with Taps(net, ["0[last_hidden_state]", "0[0]"]) as taps:
        net(X)
    assert torch.equal(taps["0[last_hidden_state]"], X + 1)
    assert torch.equal(taps["0[0]"], X)


def test_a_name_that_does_not_exist_is_told_the_nearest() -> None:
    with pytest.raises(AerogelError, match=r"'feature.1' is no module of the network; did you mean features.1"):
        Taps(Net(), ["feature.1"])
    with pytest.raises(AerogelError, match="names must differ"):
        Taps(Net(), ["head", "head"])
    with pytest.raises(AerogelError, match="'heat' is not tapped; did you mean head"):
        Taps(Net(), ["head"])["heat"]


def test_a_tap_that_does_not_fire_is_an_error() -> None:
    net = Net()
    with pytest.raises(AerogelError, match="'spare' of Net did not fire"), Taps(net, ["head", "spare"]):
        net(X)
    assert hooks(net) == 0


def test_a_tap_that_fires_twice_is_an_error() -> None:
    net = Net()
    with pytest.raises(AerogelError, match="'act' of Net fired 2 times in one forward pass"), Taps(net, ["act"]):
        net(X)


def test_what_is_changed_in_place_afterwards_is_refused() -> None:
    net = Net(inplace=True)
    with Taps(net, ["features.0", "features.1"]) as taps:
        net(X)
    with pytest.raises(AerogelError, match=r"'features.0' gave was changed in place by a later module"):
        taps["features.0"]
    assert (taps["features.1"] >= 0).all()


def test_a_copy_of_a_tapped_model_has_no_hooks() -> None:
    net = Net()
    with Taps(net, ["head"]):
        net(X)
    assert hooks(copy.deepcopy(net)) == 0


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_wrappers_are_looked_through(wrap: Callable[[nn.Module], Any]) -> None:
    net = Net()
    assert bare(wrap(net)) is net


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_it_taps_again_and_again_and_leaves_with_it(backend: str) -> None:
    torch._dynamo.reset()
    net = Net()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for seed in range(3):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
        with taps_of(compiled, ["features.0", "features.2"]) as taps:
            compiled(x)
        torch.testing.assert_close(taps["features.0"], net.features[0](x))
        torch.testing.assert_close(taps["features.2"], net.features(x))
        net.zero_grad()
        taps["features.2"].sum().backward()
        assert net.features[0].weight.grad is not None
    compiled(x)  # idle, it notes nothing
    assert hooks(net) == 2
    with pytest.raises(AerogelError, match="'spare' of Net did not fire"), taps_of(compiled, ["spare"]):
        compiled(X)
    del compiled, taps
    torch._dynamo.reset()
    gc.collect()
    assert hooks(net) == 0


def test_uncompiled_ones_are_new_each_time() -> None:
    net = Net()
    assert taps_of(net, ["head"]) is not taps_of(net, ["head"])
