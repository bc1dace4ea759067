"""Recalibration: the statistics by hand, and nothing else changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.data import Batch
from aerogel.errors import AerogelError
from aerogel.prune import cut, recalibrate


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.drop, self.fc = (
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6, momentum=0.3), nn.Dropout(0.5), nn.Linear(6, 3),
        )  # fmt: skip
        self.unused = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


def images(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 1, 8, 8, generator=generator) + 3 for _ in range(count)]


def test_statistics_are_the_mean_over_the_batches() -> None:
    net, batches = Net(), images(3)
    assert recalibrate(net, batches) is net
    with torch.no_grad():
        outputs = [net.conv(x) for x in batches]
    means = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variances = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    assert torch.allclose(net.norm.running_mean, means, atol=1e-6)
    assert torch.allclose(net.norm.running_var, variances, atol=1e-6)


def test_nothing_else_changes() -> None:
    net = Net().train()
    net.drop.training = False
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    flags = [module.training for module in net.modules()]
    state = torch.random.get_rng_state()
    recalibrate(net, images(2))
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert [module.training for module in net.modules()] == flags
    assert net.norm.momentum == 0.3
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())


def test_what_it_held_before_does_not_matter_and_a_second_pass_changes_nothing() -> None:
    one, two = Net(), Net()
    two.norm.running_mean.fill_(100)
    two.norm.num_batches_tracked.fill_(7)
    for net in (one, two, two):
        recalibrate(net, images(2))
    assert torch.equal(one.norm.running_mean, two.norm.running_mean)
    assert torch.equal(one.norm.running_var, two.norm.running_var)


def test_it_mends_statistics_that_a_cut_made_wrong() -> None:
    """A cut leaves the statistics of what fed on the removed channels; measured anew, the outputs are normal again."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.Flatten(),
                        nn.Linear(96, 2))  # fmt: skip
    recalibrate(net, images(4))
    less = cut(net, (images(1)[0][:1],), target={"channels": 0.7}, protect=["5"]).model  # 5 holds the norm's channels
    assert less[2].in_channels < 8

    def normal() -> bool:
        with torch.no_grad():
            out = less.eval()[:4](torch.cat(images(4)))
        return bool(torch.allclose(out.mean((0, 2, 3)), torch.zeros(6), atol=1e-3))

    assert not normal()
    recalibrate(less, images(4))
    assert normal()


@pytest.mark.parametrize("kind", ["tensor", "batch", "list", "dict"])
def test_batches_come_as_the_caller_has_them(kind: str) -> None:
    x = images(1)[0]
    labels = torch.zeros(16, dtype=torch.long)
    batch: dict[str, Any] = {"tensor": x, "batch": Batch(x, labels), "list": [x, labels], "dict": {"x": x}}
    net, plain = Net(), Net()
    recalibrate(net, [batch[kind]])
    recalibrate(plain, [x])
    assert torch.equal(net.norm.running_mean, plain.norm.running_mean)


def test_a_network_without_norms_or_with_frozen_ones_is_left_alone() -> None:
    assert recalibrate(nn.Linear(2, 2), iter([])).weight is not None
    frozen = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))
    recalibrate(frozen, [])


def test_a_norm_from_an_old_file_gets_a_counter() -> None:
    net = Net()
    net.norm.num_batches_tracked = None
    recalibrate(net, images(1))
    assert net.norm.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], r"batches must hold at least one, got none; pass some training batches"),
        ([3], r"a batch must be a tensor, a tuple that begins with one, or a dict, got int"),
        ([()], r"a batch must be .*, got tuple"),
    ],
)
def test_what_cannot_be_read_is_refused(batches: list[Any], message: str) -> None:
    net = Net()
    net.norm.num_batches_tracked.fill_(5)
    with pytest.raises(AerogelError, match=f"recalibrate: {message}"):
        recalibrate(net, batches)
    assert net.norm.momentum == 0.3
    assert net.norm.num_batches_tracked == 5
