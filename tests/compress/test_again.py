"""Recovery in one line: a cut network learns from the uncut one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import aerogel as ag
from aerogel.data import Dataset
from aerogel.errors import AerogelError
from aerogel.train import HardLabels, Recipe, accuracy, fit, start

BRIEF = Recipe(epochs=3, warmup=0)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    whole = ag.data.load("digits")
    return dataclasses.replace(whole, train=whole.train.subset(slice(0, 512)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def test_a_cut_network_recovers_and_the_teacher_stays_as_it_is(digits: Dataset) -> None:
    teacher = fit(start(net(), HardLabels(), digits, BRIEF), digits)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    small = ag.prune.cut(teacher, (torch.zeros(1, 1, 28, 28),), target={"channels": 0.15}).model
    lost = accuracy(small, digits, "val")
    assert ag.recover(small, teacher=teacher, data=digits, recipe=BRIEF) is small
    assert accuracy(small, digits, "val") > lost + 3
    assert not small.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_data_may_be_named_and_the_recipe_asks_for_an_average() -> None:
    small = net()
    averaged = ag.recover(small, teacher=net(), data="digits", recipe=Recipe(epochs=0.3, ema=0.9))
    assert averaged is not small


def test_what_cannot_teach_is_refused(digits: Dataset) -> None:
    model = net()
    with pytest.raises(
        AerogelError, match=r"recover: model and teacher are one network; pass cut\(net, .*\)\.model and net"
    ):
        ag.recover(model, teacher=model, data=digits)
    other = nn.Sequential(nn.Flatten(), nn.Linear(784, 7))
    with pytest.raises(AerogelError, match=r"soft_target_loss: student \(\d+, 10\) and teacher \(\d+, 7\)"):
        ag.recover(model, teacher=other, data=digits, recipe=BRIEF)
    with pytest.raises(AerogelError, match=r"unknown data set 'digitz'; did you mean digits"):
        ag.recover(model, teacher=net(), data="digitz")
    with pytest.raises(AerogelError, match="temperature must be > 0"):
        ag.recover(model, teacher=net(), data=digits, temperature=0)
