"""Parts of a batch, memory that does not suffice, number types, and what happens when a loss is no number any more."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_steps import Objective, assert_same, recipe, run, small_net, toy, weights
from torch import Tensor, nn

from aerogel.data import Batch
from aerogel.errors import AerogelError
from aerogel.train import (
    HardLabels,
    NotFinite,
    Recipe,
    Speed,
    State,
    Step,
    fit,
    load_checkpoint,
    save_checkpoint,
    start,
    steps,
)

Losses = dict[str, Tensor]


def plain_net() -> nn.Module:
    """Without norms or dropout: what it learns does not hang on which images come together."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 3, 8, 100])
def test_a_batch_in_parts_makes_the_same_step(parts: int) -> None:
    data = toy("shift")
    whole, split = (start(plain_net(), Objective(), data, recipe(accumulate=n)) for n in (1, parts))
    for one, other in zip(run(whole, data), run(split, data), strict=True):
        assert other.losses == pytest.approx(one.losses, rel=1e-4)
    close(weights(whole.model), weights(split.model))


class Greedy:
    """An objective whose memory holds so many images."""

    def __init__(self, most: int, error: Callable[[], Exception]) -> None:
        self.most, self.error, self.sizes = most, error, list[int]()

    def __call__(self, student: nn.Module, batch: Batch) -> Losses:
        if student.training:
            self.sizes.append(len(batch.labels))
            if len(batch.labels) > self.most:
                raise self.error()
        return HardLabels()(student, batch)


def allocator() -> Exception:
    return RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, allocator], ids=["gpu", "python", "cpu"])
def test_what_does_not_fit_the_memory_is_made_in_halves(error: Callable[[], Exception]) -> None:
    data = toy("shift")
    whole, halved = start(plain_net(), HardLabels(), data, recipe()), Greedy(3, error)
    state = start(plain_net(), halved, data, recipe())
    run(whole, data)
    run(state, data)
    assert state.parts == 4
    assert halved.sizes[:4] == [7, 4, 2, 2]  # tried whole, in halves, in quarters, and so on
    assert max(halved.sizes[4:]) == 2
    close(weights(whole.model), weights(state.model))
    assert state.numbers()["parts"] == 4, "a checkpoint holds it"


def test_an_eighth_that_does_not_fit_is_an_error_with_the_remedy() -> None:
    data = toy()
    state = start(plain_net(), Greedy(0, MemoryError), data, recipe(batch_size=33))
    with pytest.raises(AerogelError, match=r"out of memory at step 1 with 4 images at once; take a smaller --batch-si"):
        run(state, data)
    other = start(plain_net(), Greedy(0, lambda: RuntimeError("of another kind")), data, recipe())
    with pytest.raises(RuntimeError, match="of another kind"):
        run(other, data)
    assert other.parts == 1


def test_fp16_scales_its_loss_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    data, plan = toy("shift"), recipe(autocast="fp16", lr=0.01)
    whole, first, second = (start(small_net(), HardLabels(), data, plan) for _ in range(3))
    run(whole, data)
    run(first, data, 5)
    save_checkpoint(tmp_path / "c", first)
    load_checkpoint(tmp_path / "c", second)
    assert second.scaler.state_dict() == first.scaler.state_dict()
    run(second, data)
    assert_same(weights(whole.model), weights(second.model))
    assert all(torch.isfinite(w).all() for w in weights(whole.model).values())


def test_fp16_steps_over_a_gradient_that_overflows_and_scales_down() -> None:
    data = toy()
    state = start(plain_net(), lambda net, b: {"steep": 1e3 * HardLabels()(net, b)["hard"]}, data,
                  recipe(autocast="fp16", lr=1e-6))  # fmt: skip
    before, scale = weights(state.model), state.scaler.get_scale()
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 2.0**120})
    run(state, data, 1)
    assert state.scaler.get_scale() == 2.0**119
    assert scale == 2.0**16
    assert_same(before, weights(state.model))


@pytest.mark.slow
def test_compiled_it_trains_to_nearly_the_same() -> None:
    data = toy("shift")
    plain, compiled = (start(plain_net(), HardLabels(), data, recipe(compile=c)) for c in (False, True))
    run(plain, data)
    run(compiled, data)
    close(weights(plain.model), weights(compiled.model))
    assert "_orig_mod" not in "".join(weights(compiled.model))


class Ill:
    """A loss that is `value` at the calls named, counted from the first of training."""

    def __init__(self, *calls: int, value: float = math.nan) -> None:
        self.calls, self.value, self.seen = calls, value, 0

    def __call__(self, student: nn.Module, batch: Batch) -> Losses:
        loss = HardLabels()(student, batch)["hard"]
        self.seen += student.training
        return {"hard": loss * self.value if student.training and self.seen in self.calls else loss}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_loss_that_is_no_number_takes_it_back_to_what_was_saved(value: float, tmp_path: Path) -> None:
    data, said, rates = toy("shift"), list[str](), list[tuple[int, float]]()
    state = start(small_net(0.5), Ill(6, value=value), data, recipe(ema=0.9, optimizer="adamw", lr=0.01))
    fit(state, data, on_trouble=said.append, on_step=lambda step: rates.append((step.number, step.lr)),
        save=lambda s: save_checkpoint(tmp_path / "c", s), every_seconds=0.0)  # fmt: skip
    (text,) = said
    assert text.startswith("the loss is not finite at step 6 (hard ")
    assert text.endswith("back from step 6 to 5, on with half the learning rate")
    assert [number for number, _ in rates] == [*range(1, 6), *range(6, state.total + 1)]
    plain = start(small_net(0.5), HardLabels(), data, state.recipe)
    usual = [step.lr for step in run(plain, data)]
    assert [rate for _, rate in rates] == pytest.approx([*usual[:5], *(rate / 2 for rate in usual[5:])])


def test_it_goes_back_exactly() -> None:
    data = toy("shift")
    state = start(small_net(0.5), Ill(6), data, recipe(optimizer="adamw", lr=0.01))
    fit(state, data)
    halved = start(small_net(0.5), HardLabels(), data, state.recipe)
    halved.lr_scale = 0.5
    run(halved, data)
    assert_same(weights(halved.model), weights(state.model))


def test_the_second_stops_and_nothing_that_is_no_number_was_saved(tmp_path: Path) -> None:
    data = toy("shift")
    state = start(small_net(), Ill(6, 9), data, recipe())
    with pytest.raises(NotFinite, match=r"^train: the loss is not finite at step \d+ .*; lower --lr \(now 0.05\)"):
        fit(state, data, save=lambda s: save_checkpoint(tmp_path / "c", s), every_seconds=0.0)
    again = start(small_net(), HardLabels(), data, recipe())
    assert load_checkpoint(tmp_path / "c", again) == []
    assert again.lr_scale == 0.5, "a run that is resumed is not rolled back a second time"
    assert all(torch.isfinite(w).all() for w in weights(again.model).values())


def test_one_that_stays_stops_it_after_one_way_back() -> None:
    data, said = toy("shift"), list[str]()
    state = start(small_net(), Ill(*range(6, 99)), data, recipe())
    with pytest.raises(NotFinite):
        fit(state, data, on_trouble=said.append)
    assert len(said) == 1


def test_with_fp16_too() -> None:
    """A scaler that was left in the middle of a step would take no other."""
    data, said = toy("shift"), list[str]()

    def steep(net: nn.Module, batch: Batch) -> Losses:
        return HardLabels()(net, batch) | {"steep": (0 * next(net.parameters())).sum().abs().sqrt()}

    state = start(plain_net(), steep, data, recipe(autocast="fp16", epochs=20))
    with pytest.raises(NotFinite, match="the gradient is not finite"):
        fit(state, data, on_trouble=said.append)
    assert len(said) == 1


def test_a_norms_statistics_that_overflow_are_caught() -> None:
    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(36), nn.Linear(36, 3)
            self.register_buffer("mask", torch.full((3,), -torch.inf))  # which is meant

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(x.flatten(1) * 1e21))

    data = toy()
    with pytest.raises(NotFinite, match="the statistic of a norm is not finite at step 1"):
        run(start(Huge(), HardLabels(), data, recipe()), data)


def test_an_older_checkpoint_is_read(tmp_path: Path) -> None:
    import json

    from aerogel.files import sha256
    from aerogel.train.checkpoint import MANIFEST, STATE, _digest

    data = toy("shift")
    one, other = (start(small_net(), HardLabels(), data, recipe()) for _ in range(2))
    run(one, data, 3)
    path = save_checkpoint(tmp_path / "c", one)
    held = json.loads((path / STATE).read_text())
    for name in ("accumulate", "compile", "sync_norms"):
        del held["run"][name]
    del held["numbers"]
    (path / STATE).write_text(json.dumps(held))
    files = {file.name: sha256(file) for file in sorted(path.iterdir()) if file.name != MANIFEST}
    (path / MANIFEST).write_text(json.dumps({"files": files, "sha256": _digest(files)}))
    assert load_checkpoint(tmp_path / "c", other) == []
    run(one, data)
    run(other, data)
    assert_same(weights(one.model), weights(other.model))


def test_weights_that_overflow_are_caught_in_their_step() -> None:
    data = toy()
    state = start(plain_net(), HardLabels(), data, recipe(lr=1e30, warmup=0, weight_decay=1.0))
    kept: list[bool] = []
    with pytest.raises(NotFinite, match=r"the size of the weights is not finite at step \d"):
        kept += [all(torch.isfinite(w).all() for w in weights(state.model).values()) for _ in steps(state, data)]
    assert all(kept)


def test_speed_is_told_with_the_knob_to_turn() -> None:
    def step(seconds: float, waited: float) -> Step:
        return Step(1, 9, 0.1, {}, 0.1, seconds, waited, images=50)

    speed = Speed()
    assert speed.images_per_second == speed.share_waited == 0.0
    speed.add(step(0.5, 0.01))
    assert speed.text() == "100 images/s, 2 % of the time waiting for data"
    assert speed.knob() == "to go faster: bf16 (autocast) or more processes (torchrun); the data keep up"
    assert speed.to_json(4)["text"].endswith("to go faster: bf16 (autocast) or larger batches; the data keep up")
    speed.add(step(0.5, 0.4))
    assert speed.knob().startswith('to go faster: augment = "none" in [train] of --config; the images are decoded')
    speed.decoded = True
    assert speed.knob().startswith("to go faster: `aerogel data pack`")
    told = speed.to_json()
    assert (told.pop("text")[:14], told.pop("processes")) == ("100 images/s, ", 1)
    rates = {"images_per_second": 100.0, "share_waited": 0.41}
    assert told == pytest.approx({"images": 100, "seconds": 1.0, "waited": 0.41, **rates})


def test_what_an_objective_holds_is_found_wherever_it_is() -> None:
    from aerogel.distill import SoftTargets
    from aerogel.prune.slimming import Slimming
    from aerogel.train.fit import _networks

    teacher, net = small_net(), small_net()
    objective = Slimming(SoftTargets(teacher), 0.1)
    state = start(net, objective, toy(), recipe(ema=0.9))
    found = list(_networks(state))
    assert all(any(one is other for other in found) for one in (teacher, net, objective, state.average))


def test_workers_do_not_change_a_run_that_goes_on(tmp_path: Path) -> None:
    data = toy("shift")
    one = start(small_net(), HardLabels(), data, recipe())
    run(one, data, 3)
    save_checkpoint(tmp_path / "c", one)
    other = start(small_net(), HardLabels(), data, recipe(workers=1))
    load_checkpoint(tmp_path / "c", other)
    run(one, data)
    run(other, data)
    assert_same(weights(one.model), weights(other.model))


def test_a_state_can_be_sent_whole() -> None:
    """As rank 0 does: the optimizer goes on holding the very parameters of the network."""
    import pickle

    data = toy("shift")
    one = start(small_net(), HardLabels(), data, Recipe(epochs=2.5, batch_size=8, ema=0.9))
    run(one, data, 3)
    other: State = pickle.loads(pickle.dumps(one))
    run(one, data)
    run(other, data)
    assert_same(weights(one.model), weights(other.model))
    assert_same(weights(one.result), weights(other.result))
