"""Masks: what they name and refuse, and that pruned weights are exactly zero whatever trains the others."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import aerogel as ag
from aerogel.data import load
from aerogel.errors import AerogelError
from aerogel.prune.masks import Masks, prunable
from aerogel.prune.weights import SCORES, lowest, score
from aerogel.prune.weights.along import prune, pruned_along
from aerogel.train import HardLabels, Recipe, State, fit, load_checkpoint, save_checkpoint, start, steps
from aerogel.train.fit import Snapshot

DATA = load("digits", size=(1, 8, 8))
RECIPE = Recipe(epochs=2, batch_size=32, lr=0.05, warmup=0)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10))


def training(sparsity: float = 0.8, **recipe: Any) -> tuple[State, Masks]:
    """A training that has had some steps before it is pruned, so that the optimizer remembers all weights."""
    state = start(net(), HardLabels(), DATA, RECIPE.model_copy(update=recipe))
    for _ in islice(steps(state, DATA), 5):
        pass
    return state, prune(state, sparsity)


def zeros_are(masks: Masks, model: nn.Module) -> bool:
    """Whether every pruned weight is +0.0 and every other one is not."""
    weights = dict(model.named_parameters())
    return all(
        (weights[name][~mask] == 0).all()
        and not torch.signbit(weights[name][~mask]).any()
        and (weights[name][mask] != 0).all()
        for name, mask in masks.items()
    )


def same(one: Masks, other: Masks) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda weights: torch.optim.Adam(weights, lr=0.01, weight_decay=1e-3),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=0.01, momentum=0.9, weight_decay=1e-3),
}


SLOW = [pytest.param(name, autocast, marks=pytest.mark.slow) for name, autocast in
        [("nesterov", "bf16"), ("rmsprop", "bf16"), ("sgd", "none"), ("adam", "none"), ("adamw", "none")]]  # fmt: skip


@pytest.mark.parametrize(("name", "autocast"), [("sgd", "bf16"), ("adam", "bf16"), ("adamw", "bf16"), *SLOW])
def test_pruned_weights_are_exactly_zero_after_1000_steps(name: str, autocast: str) -> None:
    state = start(net(), HardLabels(), DATA, RECIPE.model_copy(update={"epochs": 30, "autocast": autocast}))
    state.optimizer = OPTIMIZERS[name](list(state.model.parameters()))
    for _ in islice(steps(state, DATA), 5):  # momentum of weights that will be pruned
        pass
    masks = prune(state, 0.8)
    before = [weight.clone() for weight in state.model.parameters()]
    assert sum(1 for _ in islice(steps(state, DATA), 1000)) == 1000
    assert zeros_are(masks, state.model)
    assert all(not torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))


@pytest.mark.parametrize("recipe", [{"autocast": "fp16"}, {"ema": 0.9}, {"accumulate": 3}, {"optimizer": "adamw"}],
                         ids=str)  # fmt: skip
def test_masks_hold_under(recipe: dict[str, Any]) -> None:
    state, masks = training(**recipe)
    for _ in islice(steps(state, DATA), 30):
        pass
    assert zeros_are(masks, state.model)
    assert zeros_are(masks, state.result)


@pytest.mark.slow
def test_masks_hold_in_a_compiled_network() -> None:
    state, masks = training()
    plain = copy.deepcopy(state)
    state.recipe = state.recipe.model_copy(update={"compile": True})
    for _ in islice(steps(state, DATA), 8):
        pass
    for _ in islice(steps(plain, DATA), 8):
        pass
    assert zeros_are(masks, state.model)
    for compiled, eager in zip(state.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(compiled, eager, atol=1e-4)


def test_what_is_pruned_takes_no_part_in_the_norm_that_is_clipped() -> None:
    """A network whose pruned weights have large gradients is trained like one that never had them."""
    state, masks = training(clip=0.01, momentum=0.0)
    hard = state.model

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(hard)

        def forward(self, x: Tensor) -> Tensor:
            kept = {f"{name}": w * masks[name] if name in masks else w for name, w in self.net.named_parameters()}
            return torch.func.functional_call(self.net, kept, (x,))

    other = start(Bare(), HardLabels(), DATA, state.recipe)
    other.step = state.step
    for _ in islice(steps(state, DATA), 3):
        pass
    for _ in islice(steps(other, DATA), 3):
        pass
    mine, theirs = dict(state.model.named_parameters()), dict(other.model.net.named_parameters())
    for name, weight in mine.items():
        kept = theirs[name] * masks[name] if name in masks else theirs[name]
        assert torch.allclose(weight, kept, atol=1e-6)


def test_a_roll_back_and_a_checkpoint_keep_the_zeros(tmp_path: Path) -> None:
    state, masks = training(ema=0.9)
    held = Snapshot.of(state)
    for _ in islice(steps(state, DATA), 3):
        pass
    held.restore(state)
    assert zeros_are(masks, state.model)
    save_checkpoint(tmp_path, state)
    again = start(net(1), HardLabels(), DATA, state.recipe)
    load_checkpoint(tmp_path, again)
    assert same(Masks.of(again.model), masks)
    Masks.of(again.model).put_on(again)
    assert zeros_are(masks, fit(again, DATA))
    for one, other in zip(again.model.parameters(), fit(state, DATA) and state.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_state_with_masks_travels_to_other_processes() -> None:
    state, masks = training()
    assert same(pickle.loads(pickle.dumps(state)).masks, masks)


def test_made_permanent_the_zeros_are_saved_and_say_which_they_are(tmp_path: Path) -> None:
    made = ag.nets.build("lenet5")
    masks = lowest(score("magnitude", made), 0.9)
    masks.hold(made)
    again = ag.load(ag.save(made, tmp_path / "it"))
    assert same(Masks.of(again), masks)
    more = lowest(score("magnitude", again), 0.95, before=Masks.of(again))
    assert more.survivors == round(0.05 * masks.weights)
    assert same(more & masks, more)


def test_weights_are_pruned_along_a_plan() -> None:
    state = start(net(), HardLabels(), DATA, RECIPE.model_copy(update={"epochs": 1}))
    seen = {}
    for step in pruned_along(state, DATA, {0: 0.1, 3: 0.5, 7: 0.75}):
        seen[step.number] = Masks.of(state.model).survivors
    weights = 64 * 20 + 20 * 10
    expected = [round(share * weights) for share in (0.9, 0.5, 0.25)]
    assert [seen[1], seen[3], seen[7]] == expected
    assert seen[max(seen)] == expected[-1]


def test_a_movement_score_goes_by_what_training_moved() -> None:
    state = start(net(), HardLabels(), DATA, RECIPE)
    before = {name: weight.detach().clone() for name, weight in state.model.named_parameters()}
    moved = pruned_along(state, DATA, {20: 0.5}, lambda model: score("movement", model, earlier=before))
    for _ in islice(moved, 20):
        pass
    shrunk = state.model[1].weight.abs() < before["1.weight"].abs()
    assert (state.model[1].weight[~shrunk] != 0).float().mean() > (state.model[1].weight[shrunk] != 0).float().mean()


def test_what_can_be_pruned_has_two_dimensions_and_is_named_once() -> None:
    lenet = ag.nets.build("lenet5")
    names = list(prunable(lenet))
    assert names == ["features.conv1.weight", "features.conv2.weight", "classifier.ip1.weight", "classifier.ip2.weight"]
    assert list(prunable(lenet, layers=["features", "classifier.ip2"], protect=["*.conv1"])) == [names[1], names[3]]
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert list(prunable(tied)) == ["0.weight"]


def test_bad_input_is_told() -> None:
    made = ag.nets.build("lenet_300_100")
    with pytest.raises(AerogelError, match=r"'features\.fc9' names no weights .*did you mean .*features\.fc"):
        prunable(made, protect=["features.fc9"])
    with pytest.raises(AerogelError, match="no weights of two dimensions left to prune"):
        prunable(nn.BatchNorm1d(3))
    with pytest.raises(AerogelError, match=r"the mask of features\.fc1\.weight must have its shape \(300, 784\), got"):
        Masks({"features.fc1.weight": torch.ones(784, 300, dtype=torch.bool)}).check(made)
    with pytest.raises(AerogelError, match=r"has no weight 'features\.fc1'; did you mean"):
        Masks({"features.fc1": torch.ones(3, dtype=torch.bool)}).check(made)
    with pytest.raises(AerogelError, match="must be a bool tensor, got float32"):
        Masks({"features.fc1.weight": torch.ones(300, 784)})
    with pytest.raises(AerogelError, match=r"one shape for a, got \(2,\) and \(3,\)"):
        Masks({"a": torch.ones(2, dtype=torch.bool)}) & Masks({"a": torch.ones(3, dtype=torch.bool)})
    state = start(net(), HardLabels(), DATA, RECIPE)
    with pytest.raises(AerogelError, match="has no weight"):
        Masks({"7.weight": torch.ones(3, dtype=torch.bool)}).put_on(state)
    assert state.masks is None
    with pytest.raises(AerogelError, match=r"pruned_along: sparsity must be a share to remove in \[0, 1\), got 1.0"):
        next(pruned_along(state, DATA, {0: 1.0}))


@given(sparsity=st.floats(0, 0.99), seed=st.integers(0, 9), name=st.sampled_from(["magnitude", "lamp", "random"]))
def test_counts_are_exact_and_deeper_masks_lie_inside(sparsity: float, seed: int, name: str) -> None:
    assert name in SCORES
    made = net(seed)
    masks = lowest(score(name, made), sparsity)
    assert masks.weights - masks.survivors == min(round(sparsity * masks.weights), masks.weights - len(masks))
    assert all(mask.any() for mask in masks.values())
    deeper = lowest(score(name, made), (1 + sparsity) / 2, before=masks)
    assert same(deeper & masks, deeper)
    assert abs(masks.sparsity - sum(t - k for k, t in masks.counts().values()) / masks.weights) < 1e-12
