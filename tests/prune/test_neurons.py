"""Dead neurons: one death brings the next, what nothing depends on goes without a trace, the rest is proven."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import aerogel as ag
from aerogel.prune.masks import Masks
from aerogel.prune.neurons import bury, without_dead
from aerogel.prune.weights import lowest, score


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


X = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_what_has_nothing_out_goes_without_a_trace() -> None:
    net = chain()
    net[4].weight[:, 1] = 0  # neuron 1 of the second layer: nothing out
    net[2].weight[[0, 2, 3], 5] = 0  # neuron 5 of the first: only neuron 1 has read it
    before = net(X)
    masks, dead = bury(net, (X[:1],))
    assert dead == 2
    assert torch.equal(net(X), before)
    assert not net[2].weight[1].any()
    assert net[2].bias[1] == 0
    assert not net[0].weight[5].any()
    assert not masks["0.weight"][5].any()
    assert masks.survivors == 5 * 5 + 5 * 3 + 3 * 3
    cut = without_dead(net, (X[:1],))
    assert [tuple(w.shape) for w in cut.model.parameters() if w.ndim > 1] == [(5, 5), (3, 5), (3, 3)]
    assert torch.allclose(cut.model(X), before, atol=1e-6)
    assert Masks.of(cut.model).survivors == masks.survivors


@torch.no_grad()
def test_a_constant_loses_its_bias_and_its_weights_out() -> None:
    net = chain()
    net[0].weight[2] = 0
    net[0].bias[2] = 3.0
    masks, dead = bury(net, (X[:1],))
    assert dead == 1
    assert net[0].bias[2] == 0
    assert not masks["2.weight"][:, 2].any()
    assert bury(net, (X[:1],))[1] == 1  # nothing more


@torch.no_grad()
def test_what_a_statistic_over_channels_reads_is_not_dead() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 4), nn.Softmax(1), nn.Linear(4, 3))
    net[3].weight[:, 1] = 0  # nothing out, and yet the norm's mean hangs on it
    net[5].weight[:, 2] = 0
    before = net.eval()(X)
    assert bury(net, (X[:1],))[1] == 0
    assert torch.equal(net(X), before)
    assert torch.equal(without_dead(net, (X[:1],)).model(X), before)


@torch.no_grad()
def test_a_protected_layer_loses_nothing_by_it() -> None:
    net = chain()
    net[0].weight[2] = 0  # its neuron is read by a layer that is to stay whole
    net[4].weight[:, 1] = 0
    whole = net[2].weight.clone()
    _, dead = bury(net, (X[:1],), protect=["2"])
    assert dead == 0
    assert torch.equal(net[2].weight, whole)
    assert without_dead(net, (X[:1],), protect=["2"]).model[2].weight.shape == whole.shape
    assert bury(net, (X[:1],))[1] == 2


@torch.no_grad()
def test_a_layer_that_is_dead_as_a_whole_keeps_a_neuron() -> None:
    net = chain()
    net[2].weight.zero_()
    _, dead = bury(net, (X[:1],))
    cut = without_dead(net, (X[:1],))
    assert dead == 5 + 3  # one of each layer stays
    assert [tuple(w.shape) for w in cut.model.parameters() if w.ndim > 1] == [(1, 5), (1, 1), (3, 1)]
    assert torch.allclose(cut.model(X), net(X))


@pytest.mark.parametrize(("name", "sparsity"), [("lenet5", 0.97), ("resnet20", 0.99), ("vgg11:width=0.125", 0.99)])
def test_pruned_networks_become_smaller_and_compute_the_same(name: str, sparsity: float) -> None:
    torch.manual_seed(0)
    known, arguments = ag.nets.parse(name)
    net = ag.nets.build(known, **arguments, num_classes=10, in_channels=1, input_size=28).eval()
    x = torch.randn(2, 1, 28, 28)
    lowest(score("magnitude", net), sparsity, ranking="local").hold(net)
    whole = copy.deepcopy(net)
    masks, dead = bury(net, (x[:1],))
    assert dead > 0
    assert masks.survivors <= Masks.of(whole).survivors
    cut = without_dead(net, (x[:1],))
    assert sum(w.numel() for w in cut.model.parameters()) < sum(w.numel() for w in net.parameters())
    assert Masks.of(cut.model).survivors == masks.survivors
    with torch.no_grad():
        assert torch.allclose(cut.model(x), net(x), atol=1e-5)
