"""What goes with pruned weights in training: L1, the dropout rule, the scan of layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.data import Batch
from aerogel.errors import AerogelError
from aerogel.prune.dropout import dropout_rates, retraining_dropout, set_dropout
from aerogel.prune.l1 import L1, l1_norm
from aerogel.prune.masks import Masks
from aerogel.prune.weight_sensitivity import weight_sensitivity
from aerogel.train import HardLabels


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Dropout(0.1), nn.Linear(8, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 4), nn.ReLU(), nn.Dropout(0.4),
        nn.Linear(4, 3),
    ).eval()  # fmt: skip


def test_l1_adds_its_penalty_and_its_gradient_is_the_sign() -> None:
    model, batch = net(), Batch(torch.randn(5, 8), torch.arange(5) % 3)
    plain, penalised = HardLabels()(model, batch), L1(HardLabels(), 0.01)(model, batch)
    assert penalised.keys() == {"hard", "l1"}
    assert penalised["hard"].item() == plain["hard"].item()
    expected = sum(weight.abs().sum().item() for weight in model.parameters() if weight.ndim > 1)
    assert penalised["l1"].item() == pytest.approx(0.01 * expected, rel=1e-5)
    l1_norm(model).backward()
    assert torch.equal(model[1].weight.grad, model[1].weight.detach().sign())
    assert model[1].bias.grad is None
    for penalty in (-1.0, math.inf):
        with pytest.raises(AerogelError, match="penalty must be >= 0 and finite"):
            L1(HardLabels(), penalty)


def test_dropout_falls_with_the_root_of_the_connections_of_the_layer_before_it() -> None:
    assert retraining_dropout(0.5, 9, 100) == pytest.approx(0.15)
    model = net()
    kept = {"1.weight": torch.zeros(6, 8, dtype=torch.bool), "4.weight": torch.ones(4, 6, dtype=torch.bool)}
    kept["1.weight"].view(-1)[:12] = True  # a quarter
    rates = dropout_rates(model, Masks(kept))
    assert rates == {"3": (0.5, 0.25), "6": (0.4, 0.4)}  # the one before the first layer stays
    set_dropout(model, {name: now for name, (_, now) in rates.items()})
    assert [module.p for module in model if isinstance(module, nn.Dropout)] == [0.1, 0.25, 0.4]
    del kept["4.weight"]  # protected: the dropout behind it stays, whatever the first layer lost
    assert dropout_rates(net(), Masks(kept)) == {"3": (0.5, 0.25)}
    with pytest.raises(AerogelError, match="set_dropout: 1 must be a dropout, got Linear"):
        set_dropout(model, {"1": 0.5})


def test_a_scan_prunes_one_layer_at_a_time_and_leaves_the_network_alone() -> None:
    model = net()
    before = [weight.clone() for weight in model.parameters()]
    seen: list[list[int]] = []

    def evaluate(network: nn.Module) -> float:
        zeros = [int((weight == 0).sum()) for weight in network.parameters() if weight.ndim > 1]
        seen.append(zeros)
        return float(sum(zeros))

    def retrain(network: nn.Module, masks: Masks) -> nn.Module:
        assert len(masks) == 1
        return network

    told: list[str] = []
    found = weight_sensitivity(model, evaluate, shares=(0.25, 0.5), retrain=retrain, progress=told.append)
    assert {name: curve.weights for name, curve in found.items()} == {"1.weight": 48, "4.weight": 24, "7.weight": 12}
    assert found["4.weight"].values == found["4.weight"].retrained == (6.0, 12.0)
    assert seen[::2] == [[12, 0, 0], [24, 0, 0], [0, 6, 0], [0, 12, 0], [0, 0, 3], [0, 0, 6]]
    assert told == ["1.weight", "1.weight", "4.weight", "4.weight", "7.weight", "7.weight"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    alone = weight_sensitivity(model, evaluate, shares=(0.5,), layers=["7"])
    assert (list(alone), alone["7.weight"].retrained) == (["7.weight"], ())


def test_a_scan_goes_by_the_scores_it_is_given() -> None:
    model = net()
    scores: dict[str, Tensor] = {
        name: -weight.detach().abs() for name, weight in model.named_parameters() if weight.ndim > 1
    }
    largest = model[7].weight.detach().abs().flatten().topk(6).values.sum().item()
    sums: list[float] = []

    def evaluate(network: Any) -> float:
        sums.append(float(network[7].weight.detach().abs().sum()))
        return 0.0

    weight_sensitivity(model, evaluate, scores=scores, shares=(0.5,), layers=["7"])
    assert sums[0] == pytest.approx(float(model[7].weight.detach().abs().sum()) - largest, rel=1e-5)
    for shares in ((), (0.5, 0.2), (0.0, 0.5), (0.5, 1.0)):
        with pytest.raises(AerogelError, match=r"shares must rise within \(0, 1\)"):
            weight_sensitivity(model, evaluate, shares=shares)
    with pytest.raises(AerogelError, match="'9' names no weights"):
        weight_sensitivity(model, evaluate, layers=["9"])
