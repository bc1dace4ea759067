"""Conformance: every loss with every pair of networks of the zoo, taps found by themselves, and with the teachers and
students that are not of the zoo: Hugging Face's, cut ones, under autocast, compiled.

Small widths and images: what is checked is that the pieces fit, not what they learn.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aerogel as ag
from aerogel.data import Batch
from aerogel.distill import LOSSES, Distil
from aerogel.distill.objective import FEATURES, HEADS, LOGITS
from aerogel.nets import NETS

SIDE = 32
X = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
BATCH = Batch(X, torch.arange(4))
SMALL: dict[str, Any] = {"num_classes": 10, "in_channels": 3, "input_size": SIDE, "width": 0.25, "widths": 16}
ODD: dict[str, dict[str, Any]] = {  # where those are not to be had
    "shufflenet_v1": {"groups": 3},
    "shufflenet_v2": {"width": 0.5},
}
MAPS = {"at", "review"}  # losses that want places


@functools.cache
def built(name: str) -> nn.Module:
    """The smallest network of that name."""
    taken = inspect.signature(NETS[name]).parameters
    arguments = {key: value for key, value in (SMALL | ODD.get(name, {})).items() if key in taken}
    torch.manual_seed(0)
    return ag.nets.build(name, **arguments)


def tapped(model: nn.Module, x: Tensor) -> tuple[list[str], list[str]]:
    """Modules to tap: of maps one in the middle and the last, of vectors the last; those that are called once and whose
    output nothing changes later."""
    seen: dict[str, list[tuple[Any, int]]] = {}

    def note(name: str, output: Any) -> None:
        seen.setdefault(name, []).append((output, output._version if isinstance(output, Tensor) else 0))

    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: note(name, output))
        for name, module in model.named_modules()
        if name
    ]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    good = {
        name: outputs[0][0]
        for name, outputs in seen.items()
        if len(outputs) == 1 and isinstance(outputs[0][0], Tensor) and outputs[0][0]._version == outputs[0][1]
    }
    maps = [name for name, feature in good.items() if feature.ndim == 4]
    vectors = [name for name, feature in good.items() if feature.ndim == 2]
    return [maps[len(maps) // 2], maps[-1]] if len(maps) > 1 else [], vectors[-1:]


@functools.cache
def taps_of(name: str) -> tuple[list[str], list[str]]:
    return tapped(built(name), X)


def chosen(student: tuple[list[str], list[str]], teacher: tuple[list[str], list[str]]) -> dict[str, Any]:
    """Taps of each loss on features that can serve this pair."""
    both = student[0] and teacher[0]
    pairs = dict(zip(*((student[0], teacher[0]) if both else (student[1], teacher[1])), strict=True))
    found: dict[str, Any] = {name: pairs for name in (*FEATURES, *HEADS) if both or name not in MAPS}
    return found | {"exits": [*(student[0] or student[1])]}


def checked(student: nn.Module, teacher: nn.Module, taps: dict[str, Any], x: Tensor = X, **how: Any) -> None:
    """Every loss at once: finite, and a gradient for all that is trained; nothing stays in either network."""
    names = ["hard", *LOGITS, *taps]
    teacher.eval()
    before = [tensor.clone() for tensor in teacher.state_dict().values()]
    options = {"crd": {"size": 8, "dim": 4}}
    made = Distil(teacher, dict.fromkeys(names, 1.0), taps=taps, options=options, student=student, example=x)
    student.train()
    student.zero_grad()
    run = torch.compile(student, backend=how["compiled"]) if "compiled" in how else student
    with torch.autocast("cpu", torch.bfloat16, enabled=how.get("autocast", False)):
        found = made(run, Batch(x, torch.arange(len(x)) % 10))
    assert list(found) == names
    for name, loss in found.items():
        assert loss.isfinite(), name
    torch.stack(list(found.values())).sum().backward()
    for owner, module in (("student", student), ("objective", made)):
        for name, weight in module.named_parameters():
            assert weight.grad is not None, (owner, name)
            assert weight.grad.isfinite().all(), (owner, name)
    assert teacher is student or not teacher.training
    for one, other in zip(before, teacher.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert not any(module._forward_hooks for module in teacher.modules())


def pair(student: str, teacher: str, **how: Any) -> None:
    torch.manual_seed(1)
    ours = ag.nets.build(student, **built(student).spec["args"])  # type: ignore[index,union-attr]
    checked(ours, built(teacher), chosen(taps_of(student), taps_of(teacher)), **how)


def test_every_loss_is_among_them() -> None:
    assert {"hard", *LOGITS, *FEATURES, *HEADS} == set(LOSSES)
    assert set(chosen(taps_of("lenet5"), taps_of("resnet20"))) == {*FEATURES, *HEADS}


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("lenet5", "resnet20"), ("shufflenet_v2", "lenet5"), ("mlp", "lenet5"), ("lenet5", "mlp")],
)
def test_some_pairs(student: str, teacher: str) -> None:
    pair(student, teacher)


@pytest.mark.slow
@pytest.mark.parametrize("student", NETS)
def test_every_pair(student: str) -> None:
    for teacher in NETS:
        try:
            pair(student, teacher)
        except Exception as error:
            raise AssertionError(f"{student} under {teacher}") from error


@pytest.mark.slow
@pytest.mark.parametrize("student", NETS)
def test_every_student_under_autocast(student: str) -> None:
    pair(student, "resnet20", autocast=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "student", ["lenet5", "resnet20", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v1", "mlp"]
)
def test_compiled_students(student: str) -> None:
    """Through aot_eager: as torch.compile traces, without the minutes of its code generation."""
    pair(student, "resnet20", compiled="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NETS) - {"lenet_300_100", "mlp"}))
def test_a_cut_student_under_its_unpruned_self(name: str) -> None:
    whole = built(name)
    cut = ag.prune.cut(whole, (X[:1],), target={"channels": 0.6}).model
    taps = chosen(tapped(cut, X), taps_of(name))
    checked(cut, whole, taps)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "resnet"])
@pytest.mark.parametrize("student", ["lenet5", "mobilenet_v2"])
def test_a_hugging_face_teacher_and_a_students_every_loss(family: str, student: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "vit":
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=SIDE,
            patch_size=8, num_labels=10,
        )  # fmt: skip
        teacher: nn.Module = transformers.ViTForImageClassification(config)
    else:
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
                                           num_labels=10)  # fmt: skip
        teacher = transformers.ResNetForImageClassification(config)
    ours = ag.nets.build(student, **built(student).spec["args"])  # type: ignore[index,union-attr]
    theirs = tapped(teacher, X)
    if family == "resnet":
        checked(ours, teacher, chosen(taps_of(student), theirs))
        return
    layer = next(name for name, module in teacher.named_modules() if type(module).__name__ == "ViTLayer")
    relations = {name: {taps_of(student)[0][-1]: layer} for name in ("sp", "rkd", "pkt", "crd")}
    checked(ours, teacher, relations)


def test_a_teacher_smaller_than_its_student_and_itself() -> None:
    pair("resnet20", "resnet20")
    checked(net := built("lenet5"), net, chosen(taps_of("lenet5"), taps_of("lenet5")))
