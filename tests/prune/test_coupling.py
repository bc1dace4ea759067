"""Coupling by hand, and random networks of every op: cut == masked, and the plan's numbers are the truth."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from strategies import IMAGE, Around, assert_sliced, compare, everything, first_names, half, leaves, nets, widths
from torch import Tensor, nn
from torch.nn import functional as F

from aerogel.cost import count
from aerogel.errors import CutError
from aerogel.graph import capture
from aerogel.prune import Cut, cut
from aerogel.prune.coupling import Coupling, couple

# ---------------------------------------------------------------- by hand


def test_a_group_knows_what_each_of_its_channels_takes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 2))
    coupling = couple(capture(net, (IMAGE,)))
    (group,) = coupling.groups
    assert (group.name, len(group)) == ("0", 4)
    assert {(m.target, m.dim): m.index.tolist() for m in group.members} == {
        **{(f"0.{name}", 0): [[0], [1], [2], [3]] for name in ("weight", "bias")},
        **{(f"1.{name}", 0): [[0], [1], [2], [3]] for name in ("weight", "bias", "running_mean", "running_var")},
        ("4.weight", 1): [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
    }
    assert coupling.frozen == {
        "0.weight dim 1": "tied to the network's input or to a constant",
        "4.weight dim 0": "network output",
        "4.bias dim 0": "network output",
    }


def test_what_is_kept_and_what_the_graph_becomes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 2))
    coupling = couple(capture(net, (IMAGE,)))
    removed = np.zeros(coupling.count, bool)
    assert coupling.kept(removed) == {}
    assert coupling.resized(removed) == coupling.graph
    removed[coupling.groups[0].units[[0, 2]]] = True
    kept = coupling.kept(removed)
    assert sorted(kept) == ["0.bias", "0.weight", "3.weight"]
    first = kept["0.weight"]
    assert first[0] is not None
    assert first[0].tolist() == [1, 3]
    assert first[1:] == (None, None, None)
    whole, columns = kept["3.weight"]
    assert whole is None
    assert columns is not None
    assert columns.tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    resized = coupling.resized(removed)
    assert [resized.values[op.outputs[0]].shape for op in resized.ops] == [
        *((2, 2, 8, 8), (2, 2, 2, 2), (2, 8), (2, 2))
    ]
    assert resized.values[resized.ops[0].inputs[1]].shape == (2, 3, 1, 1)


class Shuffled(nn.Module):
    """a (6 channels) and b (2) side by side, shuffled in two groups: a's last two channels go with b's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x)], 1)
        n, c, h, w = x.shape
        return self.c(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def test_a_layer_may_have_channels_in_several_groups() -> None:
    coupling = couple(capture(Shuffled(), (IMAGE,)))
    rows = {g.name: {m.target: m.index.tolist() for m in g.members if "weight" in m.target} for g in coupling.groups}
    assert rows == {
        "a": {"a.weight": [[0, 4], [1, 5]], "c.weight": [[0, 1], [2, 3]]},
        "a#2": {"a.weight": [[2], [3]], "b.weight": [[0], [1]], "c.weight": [[4, 5], [6, 7]]},
    }


def test_one_of_them_can_be_protected_alone() -> None:
    made = cut(Shuffled(), (IMAGE,), target={"channels": 0.5}, protect=["b"])
    assert made.frozen["a#2"] == "protected by 'b'"
    assert (made.model.a.out_channels, made.model.b.out_channels) == (4, 2)


# ---------------------------------------------------------------- what stays whole, and why

FROZEN: dict[str, tuple[Callable[[Around, Tensor], Tensor], str]] = {
    "cumsum": (lambda net, x: x.cumsum(1), "cumsum (cumsum) orders or numbers channels"),
    "unknown": (lambda net, x: x.logcumsumexp(1), "op logcumsumexp (logcumsumexp) is not understood"),
    "fft": (lambda net, x: torch.fft.fft(x, dim=1).abs(), "op fft_fft (fft_fft) is not understood"),
    "pool": (lambda net, x: F.max_pool1d(x.flatten(2).transpose(1, 2), 3, 1, 1).transpose(1, 2).view(x.shape),
             "max_pool1d (max_pool1d) works along channels"),
    "shift": (lambda net, x: F.pad(x, (0, 0, 0, 0, 1, -1)), "pad (pad) works along channels"),
    "uneven": (lambda net, x: torch.cat(x.chunk(3, 1)[::-1], 1), "chunk (chunk) splits channels unevenly"),
    "made": (lambda net, x: x * torch.arange(8.0).view(8, 1, 1), "tied to the network's input or to a constant"),
    "plain": (lambda net, x: x * net.plain, "plain is a constant, neither parameter nor buffer"),
    "weight": (lambda net, x: F.conv2d(x, net.conv2.weight * x.mean(), padding=1), "convolves with a computed weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", FROZEN)
def test_what_is_not_understood_stays_whole(case: str) -> None:
    middle, reason = FROZEN[case]
    made = half(Around(middle))
    assert reason in made.frozen["conv1.weight dim 0"]
    assert made.frozen["conv1.weight dim 1"] == "tied to the network's input or to a constant"
    assert made.frozen["fc.weight dim 0"] == "network output"
    assert widths(made.model)["conv1"] == 8
    assert widths(made.model)["conv3"] < 6, "the rest is cut all the same"


STATISTICS: dict[str, tuple[Callable[[Around, Tensor], Tensor], str]] = {
    "softmax": (lambda net, x: x.softmax(1), "softmax (softmax) takes a statistic over channels"),
    "mean": (lambda net, x: x - x.mean(1, keepdim=True), "mean (mean) takes a statistic over channels"),
    "layer norm": (lambda net, x: F.layer_norm(x.transpose(1, 3), x.shape[1:2]).transpose(1, 3),
                   "layer_norm (layer_norm) takes a statistic over channels"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATISTICS)
def test_what_a_statistic_couples_is_cut_only_where_that_is_allowed(case: str) -> None:
    middle, reason = STATISTICS[case]
    net = Around(middle)
    made = half(net)
    assert reason in made.inexact["conv1"]
    assert (widths(made.model)["conv1"], made.difference) == (8, 0.0)
    made = cut(net, (IMAGE,), target={"channels": 0.5}, allow_inexact=True, ranking="local")
    assert reason in made.inexact["conv1"]
    assert widths(made.model)["conv1"] == 4
    assert made.max_error <= 1e-4 < made.difference


def test_halves_of_a_size_that_the_code_holds_are_frozen_by_the_proof() -> None:
    made = half(Around(lambda net, x: torch.cat([x[:, 4:], x[:, :4]], 1)))
    assert "differ" in made.frozen["conv1"] or "fails" in made.frozen["conv1"]
    assert widths(made.model)["conv3"] < 6, "the rest is cut all the same"


def test_halves_of_a_size_that_follows_are_cut() -> None:
    made = half(Around(lambda net, x: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1)))
    assert widths(made.model)["conv1"] < 8
    assert made.max_error <= 1e-4


def test_a_parameter_that_nothing_reads_is_named() -> None:
    made = half(Around(lambda net, x: x))
    assert made.frozen["grid"] == "no op of the example run reads it"
    assert torch.equal(made.model.grid, Around(lambda net, x: x).grid)
    made = half(Around(lambda net, x: x * net.grid))
    assert "element by element" in made.frozen["grid dim 0"]
    assert widths(made.model)["conv1"] < 8


def test_a_gate_of_one_channel_is_named() -> None:
    net = Around(lambda net, x: x * net.gate(x))
    net.gate = nn.Conv2d(8, 1, 1)
    assert half(net).frozen["gate.weight dim 0"] == "all of it is one coupled channel"


def test_a_layer_of_one_channel_is_named() -> None:
    net = Around(lambda net, x: net.back(net.narrow(x)))
    net.narrow, net.back = nn.Conv2d(8, 1, 1), nn.Conv2d(1, 8, 1)
    assert half(net).frozen["narrow"] == "all of it is one coupled channel"


# ---------------------------------------------------------------- random networks


def removed_by(coupling: Coupling, made: Cut) -> np.ndarray:
    """The components that a cut took, read from what it kept."""
    flags = np.zeros(coupling.count, bool)
    for (target, dim), components in coupling.dims.items():
        indices = made.kept[target][dim] if target in made.kept else None
        if indices is not None:
            gone = np.setdiff1d(np.arange(len(components)), indices.numpy())
            assert (components[gone] >= 0).all(), f"{target} dim {dim} lost what must stay"
            flags[components[gone]] = True
    return flags


def random_cut(net: nn.Module, share: float) -> Cut | None:
    """A cut that leaves `share` of the channels, or what can be left; None where nothing can go."""
    coupling = couple(capture(net, (IMAGE,)))
    total = sum(len(group) for group in coupling.groups)
    if not total:
        with pytest.raises(CutError, match="nothing can be cut: every channel is frozen"):
            cut(net, (IMAGE,), target={"channels": share}, criterion="random")
        return None
    least = len(coupling.groups) / total
    made = cut(net, (IMAGE,), target={"channels": max(share, least)}, criterion="random")
    assert not any("differ" in why or "fails" in why for why in made.frozen.values()), made.frozen

    removed = removed_by(coupling, made)
    assert removed.sum() >= total - max(share, least) * total
    # of two channels left a view may need no copy: the same ops but for their names
    planned, after = (dataclasses.replace(cost, layers=()) for cost in (count(coupling.resized(removed)), made.after))
    assert planned == after, "the plan's prices are those of the network that came out"
    return made


def check(net: nn.Module, share: float) -> None:
    before, flags = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    made = random_cut(net, share)
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    if made is None:
        return
    assert [module.training for module in made.model.modules()] == flags
    assert_sliced(net, made.model, made.kept)
    if not all(compare(net, made.model, made.kept, tuple(IMAGE.shape), keep=share, seeds=4)):
        reject()  # no unit of some layer was alive: nothing was shown
    assert made.max_error <= 1e-4
    assert made.after.macs <= made.before.macs
    assert made.after.params <= made.before.params
    assert first_names(made.model) == first_names(net), "tied weights stay tied"
    assert made.after == count(capture(made.model, (IMAGE,)))
    trains_a_step(made.model)


def trains_a_step(net: nn.Module) -> None:
    torch.manual_seed(0)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    loss = sum(out.square().mean() for out in leaves(net(torch.randn_like(IMAGE))))
    loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
    optimizer.step()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_network_of_every_block_is_cut_exactly(share: float) -> None:
    check(everything(), share)


shares = st.floats(0.1, 0.9)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(net=nets(), share=shares)
def test_random_networks_are_cut_exactly(net: nn.Module, share: float) -> None:
    check(net, share)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(net=nets(), share=shares)
def test_many_random_networks_are_cut_exactly(net: nn.Module, share: float) -> None:
    check(net, share)
