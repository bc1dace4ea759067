"""Random networks of every op that can be cut: cut == masked, and the plan's numbers are the truth."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from strategies import BATCH, SIDE, assert_sliced, compare, first_names, leaves, nets
from torch import nn

from aerogel.cost import count
from aerogel.errors import CutError
from aerogel.graph import capture
from aerogel.prune import Cut, cut
from aerogel.prune.coupling import Coupling, couple

SHAPE = (BATCH, 3, SIDE, SIDE)


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
    x = torch.zeros(SHAPE)
    coupling = couple(capture(net, (x,)))
    total = sum(len(group) for group in coupling.groups)
    if not total:
        with pytest.raises(CutError, match="nothing can be cut: every channel is frozen"):
            cut(net, (x,), target={"channels": share}, criterion="random")
        return None
    least = len(coupling.groups) / total
    made = cut(net, (x,), target={"channels": max(share, least)}, criterion="random")
    assert not any("differ" in why or "fails" in why for why in made.frozen.values()), made.frozen

    removed = removed_by(coupling, made)
    assert removed.sum() >= total - max(share, least) * total
    planned = count(coupling.resized(removed))
    assert planned == made.after, "the plan's prices are those of the network that came out"
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
    if not all(compare(net, made.model, made.kept, SHAPE, keep=share, seeds=4)):
        reject()  # no unit of some layer was alive: nothing was shown
    assert made.max_error <= 1e-4
    assert made.after.macs <= made.before.macs
    assert made.after.params <= made.before.params
    assert first_names(made.model) == first_names(net), "tied weights stay tied"
    assert made.after == count(capture(made.model, (torch.zeros(SHAPE),)))
    trains_a_step(made.model)


def trains_a_step(net: nn.Module) -> None:
    torch.manual_seed(0)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    loss = sum(out.square().mean() for out in leaves(net(torch.randn(SHAPE))))
    loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
    optimizer.step()
    assert torch.isfinite(loss)


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
