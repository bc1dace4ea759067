"""Teachers: what they give, and that they stay as they are."""

from __future__ import annotations

import copy
import hashlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.distill import Teacher, ensemble_logits
from aerogel.errors import AerogelError

X = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """With a norm and dropout, whose state a call in training mode would change."""

    def __init__(self, classes: int = 4, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def state(*nets: nn.Module) -> str:
    """sha256 over every number, flag and requires_grad."""
    found = hashlib.sha256()
    for net in nets:
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            found.update(f"{name} {tensor.requires_grad} {tensor.grad is None}".encode())
            found.update(tensor.detach().numpy().tobytes())
        found.update(str([module.training for module in net.modules()]).encode())
    return found.hexdigest()


@pytest.mark.parametrize("training", [True, False])
def test_a_teacher_is_left_as_it_was(training: bool) -> None:
    nets = [Net(seed=0).train(training), Net(seed=1).train(training)]
    nets[1].head.weight.requires_grad_(False)
    nets[1].body[1].eval()
    before = state(*nets)
    teacher = Teacher(nets, combine="geometric")
    one, again = teacher(X), teacher(X)
    assert torch.equal(one, again)  # in eval mode: no dropout
    assert not one.requires_grad
    Teacher(nets[0]).features(X, ["body.3"])
    assert state(*nets) == before
    assert all(model is net for model, net in zip(teacher.models, nets, strict=True))  # no copy


def test_one_teacher_gives_its_own_logits() -> None:
    net = Net().eval()
    assert torch.equal(Teacher(net)(X, temperature=7.0), net(X).detach())


@pytest.mark.parametrize("combine", ["arithmetic", "geometric"])
def test_several_give_their_mean(combine: str) -> None:
    nets = [Net(seed=seed).eval() for seed in range(3)]
    found = Teacher(nets, [1, 2, 3], combine)(X, temperature=4.0)
    expected = ensemble_logits(torch.stack([net(X) for net in nets]), [1, 2, 3], combine, 4.0)
    torch.testing.assert_close(found, expected.detach())


def test_features_with_the_logits() -> None:
    net = Net().eval()
    logits, features = Teacher(net).features(X, ["body.3", "body"])
    assert torch.equal(logits[0], net(X).detach())
    assert torch.equal(features["body.3"], net.body(X).detach())
    with pytest.raises(AerogelError, match="features are one network's, got 2 teachers"):
        Teacher([net, net]).features(X, ["body"])


class HuggingFace(Net):
    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=super().forward(x), loss=None)


def test_logits_of_a_hugging_face_output() -> None:
    net = HuggingFace().eval()
    torch.testing.assert_close(Teacher(net)(X), Net().eval()(X).detach())


def test_other_normalisation_is_translated() -> None:
    pixels = X.sigmoid()
    ours, theirs = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]), ([0.1, 0.2, 0.3], [0.6, 0.5, 0.7])

    def normal(scale: tuple[list[float], list[float]]) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in scale)
        return (pixels - mean) / std

    net = Net().eval()
    found = Teacher(net, normalise=(ours, theirs))(normal(ours))
    torch.testing.assert_close(found, net(normal(theirs)).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(AerogelError, match=r"normalise has 3 channels, inputs \(5, 1, 4, 4\)"):
        Teacher(net, normalise=(ours, theirs))(X[:, :1])
    with pytest.raises(AerogelError, match="normalise must be two pairs"):
        Teacher(net, normalise=(ours, ([0.0] * 3, [0.0] * 3)))


class Precision(nn.Module):
    """Notes in which precision its layer computed."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(x.flatten(1)[:, :4])
        self.seen.append(out.dtype)
        return out


def test_its_own_precision() -> None:
    net = Precision()
    with torch.autocast("cpu", torch.bfloat16):
        for autocast in (None, "none", "fp16"):
            assert Teacher(net, autocast=autocast)(X).dtype == torch.float32
    Teacher(net)(X)
    Teacher(copy.deepcopy(net).double())(X)  # inputs follow the weights
    assert net.seen == [torch.bfloat16, torch.float32, torch.float16, torch.float32]
    with pytest.raises(AerogelError, match="autocast must be None, 'none', bf16 or fp16, got 'half'"):
        Teacher(net, autocast="half")


def test_a_student_that_is_its_own_teacher_has_a_gradient_under_autocast() -> None:
    """The casts of weights made without gradient must not be kept for the student."""
    net = Precision()
    with torch.autocast("cpu", torch.bfloat16):
        Teacher(net)(X)
        net(X).sum().backward()
    assert net.head.weight.grad is not None


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return torch.where(torch.arange(4) == 2, math.inf, out)


def test_what_is_no_teacher_is_refused() -> None:
    with pytest.raises(AerogelError, match=r"Teacher: teacher 1: the teacher's logits must be finite, got 5 of 20"):
        Teacher([Net(), Broken()])(X)
    with pytest.raises(AerogelError, match=r"teacher 1 must give logits.*got \(5, 3\); teacher 0 gives \(5, 4\)"):
        Teacher([Net(), Net(classes=3)])(X)
    with pytest.raises(AerogelError, match=r"teacher 0 must give logits \(n, classes\).*got \(5, 3, 4, 4\)"):
        Teacher(nn.Identity())(X)
    with pytest.raises(AerogelError, match="temperature must be > 0"):
        Teacher(Net())(X, temperature=0)
    with pytest.raises(AerogelError, match=r"models must be one nn\.Module or a list of some"):
        Teacher([])
    with pytest.raises(AerogelError, match="weights must be 1 numbers"):
        Teacher(Net(), weights=[1, 2])
    with pytest.raises(AerogelError, match=r"teacher 0 must give a tensor or something with \.logits, got tuple"):
        Teacher(PairOut())(X)


class PairOut(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, x
