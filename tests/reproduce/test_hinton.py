"""reproduce/hinton2015_mnist.py and its loop: gradients, resuming, the bias rule, every row on 8 x 8 digits."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import aerogel as ag
from aerogel.errors import AerogelError
from aerogel.train import Recipe

SCRIPTS = Path(__file__).parents[2] / "reproduce"
DIGITS = ag.data.load("digits", size=(1, 28, 28))
SHORT = Recipe(epochs=4, batch_size=100, lr=0.05, warmup=0.5, weight_decay=0)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture
def script(scripts: Any) -> ModuleType:
    module: ModuleType = scripts("hinton2015_mnist")
    return module


@pytest.fixture
def fast_mlp(scripts: Any) -> ModuleType:
    module: ModuleType = scripts("fast_mlp")
    return module


def pixels_of(split: ag.data.Split) -> torch.Tensor:
    return split.rows(slice(None)).flatten(1)


@pytest.fixture
def job(script: ModuleType, fast_mlp: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every row in a few steps on 700 of the embedded digits, 200 of them for validation."""
    monkeypatch.setattr(fast_mlp, "MASKS", 1 << 20)
    train, test = DIGITS.train.subset(slice(0, 700)), DIGITS.test.subset(slice(0, 200))
    digits = script.Digits(pixels_of(train), train.labels, pixels_of(test), test.labels, held_out=200)
    tiny = SHORT.model_copy(update={"epochs": 1})
    budgets = dict.fromkeys(("teacher_first", "teacher", "hard", "soft", "best"), SHORT)
    budgets |= {"grid": tiny, "cnn": tiny}
    return script.Job(digits, tmp_path / "runs", **budgets, cnns=2, shards=2)


def weights(net: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in net.parameters()])


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_written_out_backward_pass_is_autograds(fast_mlp: ModuleType, dropout: float) -> None:
    """With the same masks, cut from the same places."""
    torch.manual_seed(0)
    net = ag.nets.build("mlp", widths="50-40", dropout=dropout, input_dropout=dropout / 2)
    pixels, labels = pixels_of(DIGITS.train)[:64], DIGITS.train.labels[:64]
    fast = fast_mlp.FastMLP(net, Recipe(lr=1e-3), torch.float32)
    params = [weight.detach().clone().requires_grad_() for weight in net.parameters()]
    rng, h = np.random.default_rng(1), pixels / 255
    for place, rate in enumerate([round(dropout * 128), round(dropout * 256), round(dropout * 256)]):
        if place:
            h = F.linear(h, params[2 * place - 2], params[2 * place - 1]).relu()
        if rate:
            first = int(rng.integers(0, fast_mlp.MASKS - h.numel() + 1))
            h = h * fast.masks[rate][first : first + h.numel()].view_as(h)
    F.cross_entropy(F.linear(h, params[4], params[5]), labels).backward()
    fast.step(pixels, lambda logits: F.cross_entropy(logits, labels), 1e-3, np.random.default_rng(1))
    for weight, expected in zip(net.parameters(), params, strict=True):
        torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_the_mean_image_is_folded_into_the_first_bias(fast_mlp: ModuleType) -> None:
    """One step on images less their mean is the step of a network that takes it away itself."""
    pixels, labels = pixels_of(DIGITS.train)[:64], DIGITS.train.labels[:64]
    mean = pixels.float().mean(dim=0) / 255

    def taught(images: torch.Tensor, mean: torch.Tensor | None) -> Any:
        torch.manual_seed(0)
        net = ag.nets.build("mlp", widths="50-40")
        fast = fast_mlp.FastMLP(net, Recipe(lr=0.1, optimizer="sgd"), torch.float32, mean)
        for _ in range(3):
            fast.step(images.clone(), lambda logits: F.cross_entropy(logits, labels), 0.1, np.random.default_rng(1))
        return fast, net

    (_, plain), (fast, net) = taught(pixels.float() - 255 * mean, None), taught(pixels, mean)
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    fast.fold()
    expected = plain((pixels / 255 - mean).view(-1, 1, 28, 28))
    torch.testing.assert_close(net((pixels / 255).view(-1, 1, 28, 28)), expected, rtol=1e-4, atol=1e-5)
    fast.fold()  # once is enough
    torch.testing.assert_close(net((pixels / 255).view(-1, 1, 28, 28)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [51, 128])
def test_masks_keep_the_mean(fast_mlp: ModuleType, rate: int) -> None:
    mask = fast_mlp._masks(rate, 0, torch.float32)
    assert (mask == 0).double().mean().item() == pytest.approx(rate / 256, abs=1e-3)
    assert mask.double().mean().item() == pytest.approx(1, abs=1e-3)


def test_no_weight_vector_of_a_hidden_unit_is_longer_than_max_norm(script: ModuleType, fast_mlp: ModuleType) -> None:
    net = ag.nets.build("mlp", widths="50-40", max_norm=0.5)
    source = script.labelled(pixels_of(DIGITS.train), DIGITS.train.labels)
    fast_mlp.train(net, source, len(DIGITS.train), SHORT.model_copy(update={"epochs": 1}))
    lengths = torch.cat([layer.weight.detach().norm(dim=1) for layer in (net.features.fc1, net.features.fc2)])
    assert lengths.max() <= 0.5 + 1e-6
    assert (lengths > 0.499).float().mean() > 0.5  # it was in force
    assert net.classifier.fc.weight.norm(dim=1).max() > 0.5


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_stopped_run_goes_on_to_the_same_network(
    script: ModuleType, fast_mlp: ModuleType, tmp_path: Path, optimizer: str
) -> None:
    recipe = SHORT.model_copy(update={"optimizer": optimizer, "lr": 0.01})
    whole_source = script.jittered(pixels_of(DIGITS.train), DIGITS.train.labels)
    seen: list[int] = []

    def killed_in_epoch_2(epoch: int, rows: np.ndarray, rng: np.random.Generator) -> Any:
        if seen.count(2) == 3:
            raise KeyboardInterrupt
        return watched(epoch, rows, rng)

    def watched(epoch: int, rows: np.ndarray, rng: np.random.Generator) -> Any:
        seen.append(epoch)
        return whole_source(epoch, rows, rng)

    def fresh() -> Any:
        torch.manual_seed(0)
        return ag.nets.build("mlp", widths="50-40", dropout=0.5, max_norm=2.0)

    mean = pixels_of(DIGITS.train).float().mean(dim=0) / 255
    whole = fast_mlp.train(fresh(), whole_source, len(DIGITS.train), recipe, mean=mean)
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fast_mlp.train(fresh(), killed_in_epoch_2, len(DIGITS.train), recipe, checkpoint, every=0.0, mean=mean)
    seen.clear()
    again = fast_mlp.train(fresh(), watched, len(DIGITS.train), recipe, checkpoint, mean=mean)
    assert min(seen) == 2
    assert torch.equal(weights(again), weights(whole))


# ---------------------------------------------------------------- the images


def test_jitter_moves_by_up_to_two_pixels_and_lets_zeros_in(script: ModuleType) -> None:
    pixels = torch.zeros(1, 784, dtype=torch.uint8)
    pixels[0, 14 * 28 + 10] = 200
    draw = script.jittered(pixels, torch.zeros(1, dtype=torch.int64))
    moved, _ = draw(0, np.zeros(400, dtype=np.int64), np.random.default_rng(0))
    places = {divmod(int(image.argmax()), 28) for image in moved}
    assert places == {(14 + down, 10 + across) for down in range(-2, 3) for across in range(-2, 3)}
    assert (moved.long().sum(dim=1) == 200).all()


def test_validation_is_held_out_of_fit_and_part_of_all(script: ModuleType, job: Any) -> None:
    whole, fit, val = (job.digits.part(name)[0] for name in ("all", "fit", "val"))
    assert torch.equal(torch.cat([fit, val]), whole)
    assert len(val) == 200


def test_views_change_the_image_and_no_strength_leaves_it(scripts: Any) -> None:
    make, images = scripts("views").views, DIGITS.train.rows(slice(0, 50)).float()
    torch.testing.assert_close(make(images, strength=0.0), images, rtol=0, atol=0.05)
    one, two = (make(images, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(one, two)
    assert (one - images).abs().mean() > 5  # of 255
    assert one.min() >= -1e-3
    assert one.max() <= 255.001


# ---------------------------------------------------------------- the bias


def test_the_best_shift_is_the_middle_of_those_with_fewest_errors(script: ModuleType) -> None:
    """Class 0 is too low by 2 for its own image, rightly low by 6 for the other's: any shift from 2 to 6 will do."""
    logits = torch.tensor([[0.0, 2.05], [0.0, 6.05]])
    labels = torch.tensor([0, 1])
    assert script.best_shift(logits, labels, (0,)) == pytest.approx(4.1, abs=0.051)
    assert script.errors(script.moved(logits, (0,), 4.0), labels) == 0
    assert script.errors(logits, labels) == 1
    assert script.errors(logits, labels, of=1) == 0
    assert torch.equal(logits, torch.tensor([[0.0, 2.05], [0.0, 6.05]]))


# ---------------------------------------------------------------- the rows


def test_every_row_is_counted_and_only_once(script: ModuleType, job: Any, tmp_path: Path) -> None:
    path = tmp_path / "results" / "hinton.json"
    rows = [*script.ROWS, "grid_30_T2.5"]
    for row in rows:
        script.learn(job, row, 0, path=path)
    held = {one["row"]: one for one in scripts_rows(path)}
    assert set(rows) <= set(held)
    assert held["student_soft_T20"]["paper"] == 74
    assert held["grid_30_T2.5"]["unit"] == "validation errors"
    total = len(job.digits.test_labels)
    assert all(0 <= one["mean"] <= total for name, one in held.items() if not name.endswith("_shift"))
    assert held["only_7_8_bias_test"]["mean"] <= held["only_7_8"]["mean"]
    assert held["no_threes_bias_test"]["mean"] <= held["no_threes"]["mean"]
    assert held["teacher"]["mean"] < 0.5 * total  # it learns
    before = path.read_bytes()
    script.learn(job, "teacher", 0, path=path)
    assert path.read_bytes() == before


def scripts_rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = importlib.import_module("results").rows(path)
    return rows


def test_the_transfer_set_has_no_threes(script: ModuleType, job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taught: list[torch.Tensor] = []
    softened = script.softened
    monkeypatch.setattr(script, "softened", lambda pixels, *rest: taught.append(pixels) or softened(pixels, *rest))
    job.network("no_threes", 0)
    job.network("only_7_8", 0)
    labels = job.digits.labels
    kept = [labels != 3, (labels == 7) | (labels == 8)]
    assert [len(pixels) for pixels in taught] == [int(one.sum()) for one in kept]


def test_teachers_see_the_pixels_that_the_student_sees(script: ModuleType, job: Any) -> None:
    pixels, logits = script.shard(job, "all", 1)  # a mixed set
    found = script.ensemble(job, "all")(pixels.float().div(255).view(-1, 1, 28, 28))
    torch.testing.assert_close(logits, found, rtol=0.02, atol=0.1)  # other batches, in bf16
    again = script.shard(job, "all", 1)
    assert torch.equal(pixels, again[0])
    other = script.shard(dataclasses.replace(job, mix=0.0), "all", 1)[0]
    assert not torch.equal(pixels, other)


def test_a_network_that_was_made_is_read_back(script: ModuleType, job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = job.network("student_hard", 1)
    monkeypatch.setattr(script, "train", None)
    assert torch.equal(weights(job.network("student_hard", 1)), weights(made))


def test_students_start_from_small_weights_and_teachers_from_hes(
    script: ModuleType, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "train", lambda net, *rest, **others: net)
    for row, shape, starts in [
        ("student_hard", {"widths": "800-800"}, job.starts),
        ("teacher_first", script.TEACHER, (1, 1, 1)),
    ]:
        torch.manual_seed(3)
        plain = ag.nets.build("mlp", **shape)
        for (name, ours), whole in zip(job.network(row, 3).named_parameters(), plain.parameters(), strict=True):
            scale = 1 if name.endswith("bias") else starts[("fc1", "fc2", "fc").index(name.split(".")[1])]
            assert torch.equal(ours, whole * scale), name


def test_without_the_data_the_error_says_what_to_do(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AEROGEL_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AerogelError, match="mnist was not found"):
        script.Digits.mnist()
