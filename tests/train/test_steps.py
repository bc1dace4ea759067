"""The loop: what a step does, by hand; that it is repeatable; what it refuses."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.data import Batch, Dataset, Split, assemble, batches
from aerogel.errors import AerogelError
from aerogel.train import HardLabels, Recipe, State, Step, accuracy, fit, learning_rate, predict, start, steps
from aerogel.train.steps import update_average

TOTAL = 12  # of the toy recipe: 2.5 epochs of 5 batches


def toy(augment: str = "none") -> Dataset:
    """Thirty-three training images, 1 x 6 x 6, of three classes that a small net can tell apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.randint(0, 128, (60, 1, 6, 6), dtype=torch.uint8, generator=generator)
    images[torch.arange(60), 0, labels * 2] += 100
    return assemble(
        "toy", Split(images[:42], labels[:42]), Split(images[42:], labels[42:]), "abc", val=9, augment=augment
    )


def recipe(**changes: Any) -> Recipe:
    return Recipe(**({"epochs": 2.5, "batch_size": 8, "clip": None} | changes))


def small_net(dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """A convolution, a norm, dropout, a linear layer. No bias before the norm: its gradient is rounding alone, and
    Adam makes steps of that."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


class View(nn.Module):
    """Flattens with `view`, which channels_last activations refuse, as many a tutorial's network does."""

    def __init__(self) -> None:
        super().__init__()
        self.convs, self.fc = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.convs(x).view(len(x), -1))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def run(state: State, data: Dataset, count: int | None = None) -> list[Step]:
    """The next `count` steps, or all that are left."""
    return list(itertools.islice(steps(state, data), count))


class Objective:
    """Two named losses; `change` edits them, `seen` keeps what came in."""

    def __init__(self, change: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None) -> None:
        self.change, self.seen = change, list[tuple[Batch, Tensor, bool]]()

    def __call__(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = student(batch.inputs)
        self.seen.append((batch, logits.detach(), student.training))
        losses = {"hard": F.cross_entropy(logits, batch.labels), "small": 0.01 * logits.square().mean()}
        return self.change(losses, student) if self.change else losses


def test_every_step_is_told() -> None:
    data, plan = toy("shift"), recipe()
    state = start(small_net(), Objective(), data, plan)
    found = run(state, data)
    assert state.total == TOTAL
    assert [step.number for step in found] == list(range(1, TOTAL + 1))
    assert [step.epoch for step in found] == [number / 5 for number in range(1, TOTAL + 1)]
    assert {step.total for step in found} == {TOTAL}
    assert [step.lr for step in found] == [learning_rate(plan, number, TOTAL, 5) for number in range(TOTAL)]
    assert all(step.losses.keys() == {"hard", "small"} for step in found)
    assert state.step == TOTAL
    assert not state.model.training


def test_it_learns() -> None:
    data = toy("shift")
    net = fit(start(small_net(), HardLabels(), data, recipe(epochs=30, augment="none")), data)
    assert accuracy(net, data, "test") > 90
    assert not net.training


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_are_those_of_a_loop_written_by_hand(optimizer: str, clip: float | None) -> None:
    data, plan = toy("shift"), recipe(optimizer=optimizer, lr=0.01, clip=clip, weight_decay=0.1)
    state = start(small_net(), Objective(), data, plan)
    found = run(state, data)

    net = small_net()
    flat = [p for p in net.parameters() if p.ndim == 1]
    deep = [p for p in net.parameters() if p.ndim > 1]
    groups = [{"params": deep, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    theirs = torch.optim.SGD(groups, momentum=0.9, nesterov=True) if optimizer == "sgd" else torch.optim.AdamW(groups)
    number = 0
    for epoch in range(3):
        options = {"seed": 0, "epoch": epoch, "shuffle": True, "augment": "shift"}
        for batch in itertools.islice(batches(data, "train", 8, **options), TOTAL - number):
            for group in theirs.param_groups:
                group["lr"] = learning_rate(plan, number, TOTAL, 5)
            logits = net(batch.inputs)
            hard, small = F.cross_entropy(logits, batch.labels), 0.01 * logits.square().mean()
            theirs.zero_grad()
            (hard + small).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            theirs.step()
            assert found[number].losses == pytest.approx({"hard": hard.item(), "small": small.item()}, rel=1e-4)
            number += 1
    assert number == TOTAL
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(state.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_caller_may_stop_and_go_on() -> None:
    data = toy("shift")
    whole, parts = (start(small_net(0.5), HardLabels(), data, recipe()) for _ in range(2))
    run(whole, data)
    for count in (3, 2, 1, 5, 1):  # stops within an epoch, at its end, after its first step, before the last step
        assert len(run(parts, data, count)) == count
    assert_same(weights(parts.model), weights(whole.model))
    assert run(whole, data) == []


def test_a_fit_that_pauses_goes_on_to_the_same_weights() -> None:
    whole, parts = (start(small_net(0.5), HardLabels(), toy(), recipe()) for _ in range(2))
    fit(whole, toy())
    seen: list[int] = []
    for until in (3, 3, 7, None):
        fit(parts, toy(), on_step=lambda step: seen.append(step.number), until=until)
        assert parts.step == (until or TOTAL)
    assert seen == list(range(1, TOTAL + 1))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True))


def test_the_seed_decides_everything() -> None:
    def trained(seed: int, noise: int) -> dict[str, Tensor]:
        data = toy("shift")
        state = start(small_net(0.5), HardLabels(), data, recipe(seed=seed))
        torch.manual_seed(noise)
        run(state, data)
        return weights(state.model)

    first = trained(3, noise=1)
    assert_same(first, trained(3, noise=2))
    assert not torch.equal(first["5.weight"], trained(4, noise=1)["5.weight"])
    trained(2**80, noise=1)  # as large as one likes


def test_each_step_has_its_own_dropout() -> None:
    data = toy()
    state = start(small_net(0.5), objective := Objective(), data, recipe(epochs=3, lr=1e-12, batch_size=33))
    objective.seen.clear()
    run(state, data)
    one, two, three = (logits.sum(0) for _, logits, _ in objective.seen)  # of the same images and weights
    assert not torch.allclose(one, two, atol=1e-3)
    assert not torch.allclose(two, three, atol=1e-3)


def test_the_callers_random_state_is_left_alone() -> None:
    data, net = toy("shift"), small_net(0.5)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(start(net, HardLabels(), data, recipe(ema=0.9)), data, 2)
    predict(net, data, "val")
    assert torch.equal(torch.get_rng_state(), before)


def test_seconds_leave_out_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()  # every look at the clock is a second later
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    data = toy()
    found = []
    for step in steps(start(small_net(), HardLabels(), data, recipe()), data):
        for _ in range(100):
            next(now)
        found.append((step.seconds, step.waited))
    assert found == [(2.0, 1.0)] * TOTAL


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(value: float) -> None:
    data = toy()
    objective = Objective()
    state = start(small_net(), objective, data, recipe(ema=0.9))
    run(state, data, 3)
    before, average = weights(state.model), weights(state.average or nn.Module())
    memory = copy.deepcopy(state.optimizer.state_dict())
    objective.change = lambda losses, _: losses | {"small": losses["small"] * value}
    with pytest.raises(AerogelError, match=r"^train: the loss is not finite at step 4 \(hard .*, small .*lower --lr"):
        run(state, data)
    after = weights(state.model)
    trained = dict(state.model.named_parameters())
    assert_same({name: after[name] for name in trained}, {name: before[name] for name in trained})
    assert_same(weights(state.average or nn.Module()), average)
    for index, slots in memory["state"].items():
        assert_same(slots, state.optimizer.state_dict()["state"][index])
    assert state.step == 3


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    def steep(losses: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return losses | {"steep": (0 * next(model.parameters())).sum().abs().sqrt()}  # 0, its slope infinite

    data, net = toy(), small_net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with pytest.raises(AerogelError, match=r"the gradient is not finite at step 1 \(norm nan\); lower --lr"):
        run(start(net, Objective(steep), data, recipe()), data)
    assert_same({name: p.detach() for name, p in net.named_parameters()}, before)


def test_clip_bounds_the_step() -> None:
    data, net = toy(), small_net()
    before = torch.cat([p.detach().flatten().clone() for p in net.parameters()])
    loud = Objective(lambda losses, _: {"hard": 1e4 * losses["hard"]})
    plan = recipe(clip=0.25, lr=0.1, momentum=0, weight_decay=0, schedule="constant", warmup=0)
    run(start(net, loud, data, plan), data, 1)
    moved = torch.cat([p.detach().flatten() for p in net.parameters()]) - before
    assert moved.norm().item() == pytest.approx(0.1 * 0.25, rel=1e-3)


def test_weight_decay_spares_one_dimensional_weights() -> None:
    data, net = toy(), small_net()
    before = weights(net)
    flat = Objective(lambda losses, model: {"none": sum((0 * p).sum() for p in model.parameters())})  # type: ignore[dict-item]
    plan = recipe(lr=0.5, momentum=0, weight_decay=0.1, schedule="constant", warmup=0)
    run(start(net, flat, data, plan), data, 1)
    for name, p in net.named_parameters():
        factor = 1 - 0.5 * 0.1 if p.ndim > 1 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_the_average_by_hand() -> None:
    data = toy()
    state = start(small_net(), HardLabels(), data, recipe(ema=0.3, lr=0.1))
    expected = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    for number, _ in enumerate(steps(state, data)):
        decay = min(0.3, (1 + number) / (10 + number))
        for name, p in state.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    assert state.average is not None
    for name, p in state.average.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name])
    assert not torch.equal(state.average.get_parameter("5.weight"), state.model.get_parameter("5.weight"))
    for name, buffer in state.average.named_buffers():
        assert torch.equal(buffer, state.model.get_buffer(name))
    assert state.result is state.average
    assert fit(state, data) is state.average


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (8, 0.5), (10**6, 0.9)])
def test_the_average_forgets_its_start_fast(step: int, decay: float) -> None:
    average, net = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = decay * average.weight.detach() + (1 - decay) * net.weight.detach()
    update_average(average, net, 0.9, step)
    torch.testing.assert_close(average.weight.detach(), expected)


def test_bf16_is_the_number_type_of_the_forward_pass_alone() -> None:
    data = toy()
    state = start(small_net(), objective := Objective(), data, recipe(autocast="bf16"))
    objective.seen.clear()
    found = run(state, data)
    assert {logits.dtype for _, logits, _ in objective.seen} == {torch.bfloat16}
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    assert found[-1].losses["hard"] < found[0].losses["hard"]


def test_frozen_weights_stay_and_a_frozen_model_is_refused() -> None:
    data, net = toy(), small_net()
    net[0].requires_grad_(False)  # type: ignore[index]
    before = weights(net)
    run(start(net, HardLabels(), data, recipe()), data)
    assert torch.equal(net.state_dict()["0.weight"], before["0.weight"])
    assert not torch.equal(net.state_dict()["5.weight"], before["5.weight"])
    with pytest.raises(AerogelError, match="train: Sequential has no parameter that requires a gradient; unfreeze"):
        start(net.requires_grad_(False), HardLabels(), data, recipe())


@pytest.mark.parametrize("batch_size", [33, 34, 10**9])
def test_a_batch_larger_than_the_set_is_the_set(batch_size: int) -> None:
    data = toy()
    state = start(small_net(), objective := Objective(), data, recipe(batch_size=batch_size, epochs=2))
    objective.seen.clear()
    assert len(run(state, data)) == state.total == 2
    for batch, _, training in objective.seen:
        assert torch.equal(batch.labels.sort().values, data.train.labels.sort().values)
        assert training


@pytest.mark.parametrize(("epochs", "total"), [(1e-9, 1), (0.25, 1), (1.3, 6), (2, 10)])
def test_epochs_may_be_a_fraction(epochs: float, total: int) -> None:
    data = toy()
    assert len(run(start(small_net(), HardLabels(), data, recipe(epochs=epochs)), data)) == total


def test_an_objective_may_have_weights_of_its_own() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
            return {"hard": F.cross_entropy(self.scale * student(batch.inputs), batch.labels)}

    data, objective = toy(), Scaled()
    run(start(small_net(), objective, data, recipe()), data)
    assert objective.scale.item() != 1


def test_losses_must_be_named_numbers() -> None:
    data = toy()
    with pytest.raises(AerogelError, match="must return at least one named loss, got none"):
        run(start(small_net(), Objective(lambda *_: {}), data, recipe()), data)
    rows = Objective(lambda losses, _: {"rows": losses["hard"].expand(8)})
    with pytest.raises(AerogelError, match=r"loss 'rows' must be one number, got shape \(8,\); take its mean"):
        run(start(small_net(), rows, data, recipe()), data)


def test_an_unknown_augmentation_is_refused() -> None:
    data = toy()
    with pytest.raises(AerogelError, match="unknown name 'shfit'; did you mean shift"):
        run(start(small_net(), HardLabels(), data, recipe(augment="shfit")), data)


def test_convolutions_train_channels_last_and_come_back_as_they_were() -> None:
    data, net = toy(), nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    state = start(net, HardLabels(), data, recipe())
    assert state.channels_last
    assert net[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert net[0].weight.stride() == (9, 1, 3, 1)  # and not (9, 9, 3, 1), the same bytes: the convolution goes by it
    assert fit(state, data) is net
    assert all(p.is_contiguous() for p in net.parameters())
    assert net[0].weight.stride() == (9, 9, 3, 1)


@pytest.mark.parametrize("autocast", ["none", "bf16"])
def test_a_network_that_flattens_with_view_trains_too(autocast: str) -> None:
    data, net = toy(), View()
    state = start(net, HardLabels(), data, recipe(epochs=30, autocast=autocast))
    assert not state.channels_last
    assert accuracy(fit(state, data), data, "test") > 90


def test_three_dimensional_convolutions_train_too() -> None:
    deep = (nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 2, (1, 3, 3)), nn.Flatten(1, 2))
    net = nn.Sequential(*deep, nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    data = toy()
    assert len(run(start(net, HardLabels(), data, recipe()), data)) == TOTAL


def test_predict_answers_in_order_and_leaves_the_flags() -> None:
    data, net = toy(), small_net(0.5)
    net[1].eval()  # type: ignore[index]
    flags = [module.training for module in net.modules()]
    logits = predict(net, data, "test", batch_size=5)
    assert [module.training for module in net.modules()] == flags
    assert not logits.requires_grad
    inputs = torch.cat([batch.inputs for batch in batches(data, "test", 18)])
    torch.testing.assert_close(logits, net.eval()(inputs).detach())
    right = (logits.argmax(1) == data.test.labels).sum().item()
    assert accuracy(net, data, "test") == pytest.approx(100 * right / 18)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(AerogelError, match="unknown split 'tset'; did you mean test"):
        accuracy(small_net(), toy(), "tset")


def test_smoothing_by_hand() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    target = torch.tensor([0.8 + 0.2 / 3, 0.2 / 3, 0.2 / 3])
    expected = -(target * logits.log_softmax(1)[0]).sum()
    found = HardLabels(0.2)(nn.Identity(), Batch(logits, labels))
    assert found.keys() == {"hard"}
    torch.testing.assert_close(found["hard"], expected)
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(AerogelError, match=r"HardLabels: smoothing must be in \[0, 1\), got"):
            HardLabels(bad)
