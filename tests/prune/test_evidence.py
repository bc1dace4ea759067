"""gather: what it finds is the derivative, the curvature and the activations; the network is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.errors import CutError
from aerogel.graph import capture
from aerogel.prune import criterion, cut, gather
from aerogel.prune.coupling import couple
from aerogel.prune.evidence import draw_classes
from aerogel.prune.proof import named_weights


class Net(nn.Module):
    """conv, norm, relu, grouped conv, pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.head = nn.Conv2d(6, 4, 1, groups=2), nn.Linear(4, 3)
        self.gate = torch.ones(6)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-0.3, 0.3)
            self.norm.running_var.uniform_(0.5, 1)
            self.norm.bias.uniform_(-0.3, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)) * self.gate.view(-1, 1, 1)
        return self.head(self.second(x.relu()).mean((2, 3)))


def batches(count: int = 2, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 2, 4, 4, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def test_contributions_of_a_norm_and_of_what_reads_it_are_the_derivative_at_a_gate() -> None:
    net, given = Net(), batches()
    found = gather(net, given, kinds=["gradients"]).gradients
    for i, (x, y) in enumerate(given):
        net.eval().gate = torch.ones(6, requires_grad=True)
        (expected,) = torch.autograd.grad(F.cross_entropy(net(x), y), net.gate)
        assert torch.allclose(found["norm.weight", 0][i] + found["norm.bias", 0][i], expected, atol=1e-6)
        # groups share the indices of the second layer's inputs, so that two gates answer for one of them
        assert torch.allclose(found["second.weight", 1][i], expected.view(2, 3).sum(0), atol=1e-6)


def test_taylor_tells_what_leaving_a_channel_out_would_do() -> None:
    """To first order: for small weights of a layer the prediction is nearly the change itself."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    net[2].weight.data.mul_(0.01)
    given = [(torch.randn(64, 4), torch.randint(3, (64,)))]
    group = couple(capture(net, (given[0][0],))).groups[0]
    evidence = gather(net, given)
    contribution = evidence.gradients["2.weight", 1][0]
    loss = F.cross_entropy(net(given[0][0]), given[0][1])
    for i in range(5):
        without = copy.deepcopy(net)
        without[2].weight.data[:, i] = 0
        change = F.cross_entropy(without(given[0][0]), given[0][1]) - loss
        assert -contribution[i] == pytest.approx(change.item(), rel=0.05, abs=1e-6)
    first = evidence.gradients["0.weight", 0][0] + evidence.gradients["0.bias", 0][0]
    expected = contribution.square() + first.square()
    assert torch.allclose(criterion("taylor", evidence=evidence)(group, named_weights(net)), expected, rtol=1e-4)


def test_curvature_is_the_gauss_newton_diagonal() -> None:
    """Of one linear layer and cross-entropy it is known: h of w_ci is the mean of p_c (1 - p_c) x_i^2."""
    torch.manual_seed(0)
    net, x = nn.Linear(3, 4, bias=False), torch.randn(32, 3)
    found = gather(net, [(x, None)] * 400, kinds=["curvature"]).curvature["weight", 1]
    p = net(x).detach().softmax(1)
    h = torch.einsum("nc,ni->ci", p * (1 - p), x.square()) / len(x)
    expected = (0.5 * h * net.weight.detach().square()).sum(0)
    assert torch.allclose(found, expected, rtol=0.1)


def test_classes_are_drawn_as_often_as_the_network_gives_them() -> None:
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(20000, 3)
    drawn = draw_classes(logits, torch.Generator().manual_seed(0))
    assert drawn.bincount().div(20000).tolist() == pytest.approx([0.7, 0.2, 0.1], abs=0.02)
    places = draw_classes(torch.randn(2, 5, 3, 4), torch.Generator())
    assert places.shape == (2, 3, 4)


def test_zeros_and_sizes_are_of_what_the_next_layer_reads() -> None:
    net, given = Net(), batches()
    found = gather(net, given, kinds="activations")
    assert not found.gradients
    assert not found.curvature
    x = torch.cat([x for x, _ in given])
    read = net.eval().norm(net.first(x)).relu().detach()
    by_index = read.transpose(0, 1).reshape(2, 3, -1)  # groups share indices
    assert torch.allclose(found.zeros["second.weight", 1], (by_index == 0).float().mean((0, 2)))
    assert torch.allclose(found.sizes["second.weight", 1], by_index.mean((0, 2)), rtol=1e-5)
    assert torch.allclose(found.zeros["first.weight", 1], torch.zeros(2))
    assert found.sizes["head.weight", 1].shape == (4,)


class Odd(nn.Module):
    """Layers whose inputs run along another dimension, or are seen as a matrix product; a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ConvTranspose2d(2, 3, 2)
        self.bare = nn.Parameter(torch.randn(3, 5))
        self.fc = nn.Linear(5, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).flatten(2).transpose(1, 2)  # (n, positions, 3)
        x = (x @ self.bare).relu()
        return self.fc(self.fc(x).relu()).mean(1)


def test_inputs_of_transposed_convolutions_and_bare_products_are_seen() -> None:
    net, x = Odd(), torch.randn(4, 2, 3, 3)
    found = gather(net, [(x, None)], kinds="activations").sizes
    assert {key: len(size) for key, size in found.items()} == {("up.weight", 0): 2, ("bare", 0): 3, ("fc.weight", 1): 5}
    hidden = (net.up(x).flatten(2).transpose(1, 2) @ net.bare).relu()
    both = torch.stack([hidden, net.fc(hidden).relu()]).detach()
    assert torch.allclose(found["up.weight", 0], x.abs().mean((0, 2, 3)), rtol=1e-5)
    assert torch.allclose(found["fc.weight", 1], both.mean((0, 1, 2)), rtol=1e-5)


def test_the_network_is_left_as_it_was() -> None:
    net = Net().train()
    net.second.eval()
    net.first.weight.requires_grad_(False)
    net.head(torch.ones(1, 4)).sum().backward()
    before, gradient = copy.deepcopy(net.state_dict()), net.head.weight.grad.clone()
    torch.manual_seed(5)
    with torch.no_grad():
        evidence = gather(net, batches())
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3)), "the caller's random state"
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(net.head.weight.grad, gradient)
    assert [module.training for module in (net, net.first, net.second)] == [True, True, False]
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * (len([*net.parameters()]) - 1)
    assert ("first.weight", 0) in evidence.gradients, "frozen weights have evidence too"


def test_the_network_is_left_as_it_was_when_it_fails() -> None:
    net = Net().train()
    net.first.weight.requires_grad_(False)
    with pytest.raises(RuntimeError):
        gather(net, [(torch.zeros(1, 7, 4, 4), torch.zeros(1).long())])
    assert net.training
    assert not net.first.weight.requires_grad


def test_evidence_follows_the_seed_and_only_curvature_needs_it() -> None:
    net, given = Net(), batches()
    one, same, other = (gather(net, given, seed=seed) for seed in (0, 0, 1))
    key = ("first.weight", 0)
    assert torch.equal(one.curvature[key], same.curvature[key])
    assert not torch.equal(one.curvature[key], other.curvature[key])
    assert torch.equal(one.gradients[key], other.gradients[key])
    assert one.batches == 2


def test_inputs_may_be_several_and_the_loss_ones_own() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"y": self.fc(a + b)}

    def loss(outputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        return (outputs["y"] - labels).square().mean()

    a, b, y = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 2)
    net = Sum()
    positional = gather(net, [((a, b), y)], loss=loss)
    named = gather(net, [({"a": a, "b": b}, y)], loss=loss)
    assert torch.equal(positional.gradients["fc.weight", 0], named.gradients["fc.weight", 0])
    assert not positional.curvature, "nobody knows how to draw labels for this loss"
    drawn = gather(net, [((a, b), y)], loss=loss, draw=lambda out, g: out["y"] + torch.randn(4, 2, generator=g))
    assert drawn.curvature["fc.weight", 0].shape == (2,)
    for kinds in (["gradients"], ["curvature"]):
        with pytest.raises(CutError, match="the network returns a dict, which cross_entropy cannot read; pass loss="):
            gather(net, [((a, b), y)], kinds=kinds)
    assert gather(net, [((a, b), None)], kinds="activations").sizes["fc.weight", 1].shape == (3,)


def test_a_generator_of_batches_serves() -> None:
    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches(3)

    assert gather(Net(), stream()).batches == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, r"batches must hold at least one \(inputs, labels\), got none"),
        ({"kinds": ["gradient"]}, "kind 'gradient' is unknown; did you mean gradients"),
        ({"loss": lambda out, y: out.sum(1)}, r"loss must be one finite number, got shape \(5,\); take its mean"),
        ({"loss": lambda out, y: out.sum() / 0}, "loss must be one finite number, got tensor"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CutError, match=message):
        gather(Net(), **({"batches": batches()} | options))


@pytest.mark.parametrize("name", ["taylor", "hessian", "apoz", "activation"])
def test_a_cut_by_evidence(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    net[0].weight.data[3], net[0].bias.data[3] = 0, -1  # dead: it is always 0
    net[2].weight.data[4], net[2].bias.data[4] = 0, -1
    made = cut(net, (torch.zeros(1, 2, 4, 4),), target={"channels": 12 / 14}, ranking="global",
               criterion=criterion(name, evidence=gather(net, batches())))  # fmt: skip
    assert 3 not in made.kept["0.weight"][0]
    assert 4 not in made.kept["2.weight"][0]


def test_evidence_of_the_network_before_a_cut_is_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    x = torch.zeros(1, 2, 4, 4)
    by_taylor = criterion("taylor", evidence=gather(net, batches()))
    small = cut(net, (x,), target={"channels": 0.5}, criterion=by_taylor).model
    with pytest.raises(CutError, match=r"is of 8 channels, the network has 4; gather it again after a cut"):
        cut(small, (x,), target={"channels": 0.5}, criterion=by_taylor)
