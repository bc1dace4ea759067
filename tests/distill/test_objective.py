"""`Distil`: each loss is its function's; trained, saved, resumed and shared out as any objective; the teacher stays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distil_ranks import EVERY, TAPS, Net, objective, some_digits
from safetensors.torch import load_file
from torch import Tensor, nn

import aerogel as ag
from aerogel.data import Batch
from aerogel.distill import (
    LOSSES,
    Distil,
    Teacher,
    attention_loss,
    confidence_weighted_loss,
    deep_supervision_loss,
    dist_loss,
    dkd_loss,
    ensemble_logits,
    hint_loss,
    logit_mse_loss,
    mixed,
    nkd_loss,
    pkt_loss,
    relational_loss,
    similarity_loss,
    soft_target_loss,
    standardised_loss,
    vid_loss,
)
from aerogel.errors import AerogelError
from aerogel.train import Recipe, State, fit, load_checkpoint, save_checkpoint, start, steps

X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BATCH = Batch(X, torch.arange(6) % 10)


def test_every_loss_is_its_function() -> None:
    student, teacher = Net().eval(), Net(6, seed=1).eval()
    made = objective(student, EVERY, teacher)
    with torch.no_grad():
        found = made(student, BATCH)
        z, v, y = student(X), teacher(X), BATCH.labels
        ours = [student.one(X.double()), student.two(student.one(X.double()))]
        theirs = [teacher.one(X.double()), teacher.two(teacher.one(X.double()))]
        heads: Any = made.heads
        pairs = list(zip(ours, theirs, strict=True))
        expected = {
            "hard": F.cross_entropy(z, y),
            "kd": soft_target_loss(z, v, 3.0),
            "standardised": standardised_loss(z, v, 3.0),
            "logit_mse": logit_mse_loss(z, v),
            "dkd": dkd_loss(z, v, y, 3.0),
            "nkd": nkd_loss(z, v, y, 3.0),
            "dist": dist_loss(z, v, 3.0),
            "confidence": confidence_weighted_loss(z, v, y),
            "at": sum(attention_loss(*pair) for pair in pairs),
            "sp": sum(similarity_loss(*pair) for pair in pairs),
            "rkd": sum(relational_loss(*pair) for pair in pairs),
            "pkt": sum(pkt_loss(*pair) for pair in pairs),
            "hint": sum(hint_loss(head(s), t) for head, (s, t) in zip(heads["hint"], pairs, strict=True)),
            "vid": sum(vid_loss(*head(s), t) for head, (s, t) in zip(heads["vid"], pairs, strict=True)),
            "crd": sum(head(s, t, y) for head, (s, t) in zip(heads["crd"], pairs, strict=True)),
            "review": heads["review"][0](ours, theirs),
            "exits": deep_supervision_loss([h(s) for h, s in zip(heads["exits"], ours, strict=True)], z, y, 3.0),
        }
    assert set(found) == set(LOSSES) == set(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], EVERY[name] * loss, msg=lambda text, name=name: f"{name}: {text}")


def everything(module: nn.Module) -> str:
    """sha256 over every number, flag and requires_grad."""
    found = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        found.update(f"{name} {tensor.requires_grad} {tensor.grad is None}".encode())
        found.update(tensor.detach().numpy().tobytes())
    found.update(str([m.training for m in module.modules()]).encode())
    return found.hexdigest()


def begin() -> tuple[State, nn.Module]:
    student, teacher = Net(), Net(6, seed=1)
    made = objective(student, EVERY, teacher)
    return start(student, made, some_digits(), Recipe(epochs=2, batch_size=21, warmup=0, lr=0.01, ema=0.9)), teacher


def test_training_moves_what_it_owns_and_leaves_the_teacher() -> None:
    state, teacher = begin()
    assert isinstance(state.objective, Distil)
    before, own = everything(teacher), {k: p.clone() for k, p in state.objective.named_parameters()}
    fit(state, some_digits())
    assert everything(teacher) == before
    assert all(not torch.equal(p, own[name]) for name, p in state.objective.named_parameters())
    assert not any("_forward_hooks" in vars(m) and m._forward_hooks for m in state.model.modules())


def test_it_resumes_exactly_and_neither_file_holds_the_other_or_the_teacher(tmp_path: Path) -> None:
    (unbroken, _), (broken, _) = begin(), begin()
    data = some_digits()
    fit(unbroken, data)
    for step in steps(broken, data):
        if step.number == 2:
            break
    path = save_checkpoint(tmp_path, broken)
    resumed, _ = begin()
    load_checkpoint(tmp_path, resumed)
    fit(resumed, data)
    for name in ("model", "objective", "average"):
        one, other = getattr(unbroken, name).state_dict(), getattr(resumed, name).state_dict()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items()), name
    assert set(load_file(path / "model.safetensors")) == set(Net().state_dict())
    held = load_file(path / "objective.safetensors")
    assert {key.split(".")[0] for key in held} == {"heads"}
    assert {key.split(".")[1] for key in held} == {"hint", "vid", "crd", "review", "exits"}


def test_what_is_built_follows_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, other = objective(student := Net()), objective(Net())
    assert not torch.equal(torch.random.get_rng_state(), before)  # Net itself seeds it
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    third = Distil(Net(6, seed=1), {"hint": 1.0}, taps=TAPS)
    torch.manual_seed(5)
    third.prepare(student, X)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_several_teachers_at_each_losss_own_temperature() -> None:
    nets = [Net(6, seed=seed).eval() for seed in (1, 2)]
    student = Net().eval()
    made = Distil(Teacher(nets, [1, 3]), {"kd": 1.0, "dkd": 2.0}, 4.0, options={"kd": {"temperature": 2.0}})
    with torch.no_grad():
        found, z = made(student, BATCH), student(X)
        members = torch.stack([net(X) for net in nets])
        kd = soft_target_loss(z, ensemble_logits(members, [1, 3], temperature=2.0), 2.0)
        dkd = dkd_loss(z, ensemble_logits(members, [1, 3], temperature=4.0), BATCH.labels, 4.0)
    torch.testing.assert_close(found, {"kd": kd, "dkd": 2 * dkd})


def test_function_matching_shows_both_the_same_mixture() -> None:
    student, teacher = Net().eval(), Net(6, seed=1).eval()
    torch.manual_seed(3)
    found = Distil(teacher, {"kd": 1.0}, 1.0, mixup=True)(student, BATCH)["kd"]
    torch.manual_seed(3)
    x = mixed(X)
    torch.testing.assert_close(found, soft_target_loss(student(x), teacher(x), 1.0))


def test_without_a_teacher_exits_learn_from_the_deepest() -> None:
    student = Net()
    made = Distil(None, {"hard": 1.0, "exits": 1.0}, taps={"exits": ["one", "two"]}, student=student, example=X)
    sum(made(student, BATCH).values(), torch.zeros(())).backward()
    assert all(p.grad is not None for p in [*student.parameters(), *made.parameters()])


@pytest.mark.parametrize(
    ("student", "teacher", "taps"),
    [
        ("lenet5", "lenet5", {"features.conv1": "features.conv1", "features.pool2": "features.pool2"}),
        ("mobilenet_v2", "resnet20", {"features.stage2": "features.stage1", "features.stage4": "features.stage3"}),
    ],
)
def test_networks_of_the_zoo(student: str, teacher: str, taps: dict[str, str]) -> None:
    torch.manual_seed(0)
    ours, theirs = ag.nets.build(student, num_classes=10), ag.nets.build(teacher, num_classes=10)
    side, channels = (28, 1) if student == "lenet5" else (32, 3)
    x = torch.randn(4, channels, side, side, generator=torch.Generator().manual_seed(0))
    names = {name: 1.0 for name in LOSSES if name != "exits"}
    made = Distil(theirs, names, taps=taps, student=ours, example=x)
    losses = made(ours, Batch(x, torch.arange(4)))
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*ours.parameters(), *made.parameters()])


def test_a_cut_student_learns_from_its_unpruned_self() -> None:
    torch.manual_seed(0)
    net = ag.nets.build("lenet5", num_classes=10)
    x = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    cut = ag.prune.cut(net, (x,), target={"macs": 0.5}).model
    made = Distil(
        net, {"kd": 1.0, "hint": 1.0, "at": 1.0}, taps={"features.pool2": "features.pool2"}, student=cut, example=x
    )
    torch.stack(list(made(cut, Batch(x, torch.arange(4))).values())).sum().backward()
    assert all(p.grad is not None for p in cut.parameters())
    with pytest.raises(AerogelError, match=r"'features.pool2' must give .* channels, as when it was prepared, got 50"):
        made(net, Batch(x, torch.arange(4)))


def test_under_autocast_the_losses_are_in_single_precision() -> None:
    student, teacher = Net().float(), Net(6, seed=1).float()
    for net in (student, teacher):
        net.forward = lambda x, net=net: net.head(net.two(net.one(x)).mean((2, 3)))  # type: ignore[method-assign]
    made = objective(student, EVERY, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        found = made(student, BATCH)
    assert {loss.dtype for loss in found.values()} == {torch.float32}
    torch.stack(list(found.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*student.parameters(), *made.parameters()])


def processes(
    as_ranks: Callable[..., None], folder: Path, ranks: int
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The script in so many processes: rank 0's losses of each step, and what is trained, equal in all."""
    folder.mkdir()
    as_ranks(Path(__file__).with_name("distil_ranks.py"), ranks, folder)
    tensors = [load_file(folder / f"rank{rank}.safetensors") for rank in range(ranks)]
    for other in tensors[1:]:
        assert all(torch.equal(tensor, other[key]) for key, tensor in tensors[0].items()), "the ranks have parted"
    return json.loads((folder / "rank0.json").read_text()), tensors[0]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one(tmp_path: Path, as_ranks: Callable[..., None]) -> None:
    """Every loss, also those on relations between the samples of the whole batch; and all that is trained."""
    (one, tensors), (two, found) = processes(as_ranks, tmp_path / "one", 1), processes(as_ranks, tmp_path / "two", 2)
    for ours, theirs in zip(two, one, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-6), name
    for key, tensor in tensors.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
def test_compiled_it_trains_to_nearly_the_same() -> None:
    data, losses = some_digits(), {"kd": 1.0, "hint": 1.0, "at": 1.0}
    trained = []
    for compiled in (False, True):
        student = Net()
        made = objective(student, losses)
        fit(start(student, made, data, Recipe(epochs=2, batch_size=21, warmup=0, lr=0.01, compile=compiled)), data)
        trained.append({**student.state_dict(), **made.state_dict()})
    for key, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][key], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_hugging_face_teacher() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=1, num_labels=10,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher, student = transformers.ViTForImageClassification(config), Net()
    layer = next(name for name, m in teacher.named_modules() if type(m).__name__ == "ViTLayer")
    taps = {name: {"two": layer} for name in ("sp", "rkd", "pkt", "crd")}
    made = Distil(teacher, {"kd": 1.0} | dict.fromkeys(taps, 1.0), taps=taps, student=student, example=X)
    before = everything(teacher)
    torch.stack(list(made(student, BATCH).values())).sum().backward()
    assert everything(teacher) == before
    assert all(p.grad is not None for p in student.parameters())


def test_it_is_prepared_once_and_before_training() -> None:
    student = Net()
    made = Distil(Net(6, seed=1), {"hint": 1.0, "vid": 1.0}, taps=TAPS)
    with pytest.raises(AerogelError, match=r"hint, vid must be prepared before training: call prepare\(student"):
        made(student, BATCH)
    made.prepare(student, BATCH)
    with pytest.raises(AerogelError, match="prepare must be called once"):
        made.prepare(student, BATCH)


@pytest.mark.parametrize(
    ("losses", "more", "message"),
    [
        ({}, {}, "losses must not be empty"),
        ({"dk": 1.0}, {}, "there is no loss 'dk'; did you mean dkd"),
        ({"kd": -1.0}, {}, "weight of kd must be >= 0 and finite, got -1"),
        ({"kd": 1.0}, {"temperature": 0.0}, "^Distil: temperature must be > 0 and finite, got 0"),
        ({"kd": 1.0, "hard": 1.0}, {"mixup": True}, "with mixup no loss may read labels, got hard"),
        ({"kd": 1.0}, {"taps": TAPS}, "taps are given but no loss reads features"),
        ({"at": 1.0}, {}, "at must have taps, {student's module: teacher's module}"),
        ({"at": 1.0}, {"taps": {"at": ["one"]}}, "at must have taps, {student's module: teacher's module}"),
        ({"at": 1.0, "sp": 1.0}, {"taps": {"at": TAPS}}, "each loss on features .at, sp.*; add sp"),
        ({"at": 1.0}, {"taps": {"at": TAPS, "hint": TAPS}}, "got at, hint; leave out hint"),
        ({"dkd": 1.0}, {"options": {"dkd": {"betta": 1}}}, "dkd has no option 'betta'; did you mean beta"),
        ({"hard": 1.0}, {"options": {"hard": {"x": 1}}}, "hard has no option 'x'"),
        ({"dkd": 1.0}, {"options": {"nkd": {}}}, "options are for losses that are asked for, got 'nkd'"),
        ({"kd": 1.0}, {"student": Net()}, "student and example must be given together"),
        ({"kd": 1.0}, {"student": nn.Linear(8, 10), "example": X}, r"student \(6, 1, 8, 10\)"),
        ({"at": 1.0}, {"taps": {"onee": "one"}, "student": Net(), "example": X}, "'onee' is no module.*mean one"),
        ({"at": 1.0}, {"taps": {"one": "head"}, "student": Net(), "example": X}, "features must have places"),
        ({"at": 1.0}, {"taps": {"head": "threee"}, "student": Net(), "example": X}, "'threee' is no module"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(losses: Any, more: Any, message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        Distil(Net(6, seed=1), losses, **more)


def test_a_loss_on_teachers_needs_one() -> None:
    with pytest.raises(AerogelError, match="at, kd must have a teacher, got None"):
        Distil(None, {"kd": 1.0, "at": 1.0, "hard": 1.0})
