"""Labels: what each rule joins and what it pins, read from the classes of indices that belong together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aerogel.graph import capture
from aerogel.graph.labels import Labels, collapse
from aerogel.graph.rules import RULES, push_labels


class Net(nn.Module):
    """conv a (3 -> 8), whatever the test is about, conv b (as many -> 2)."""

    def __init__(self, middle: Callable[[Net, Tensor], Tensor], inputs: int = 8, **modules: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(inputs, 2, 1)
        self.middle = middle
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(self, self.a(x)))


class Classes:
    """The labels of one network, joined."""

    def __init__(self, net: nn.Module, *args: Tensor) -> None:
        self.state: Labels = push_labels(capture(net, args or (torch.zeros(2, 3, 4, 4),)))
        self.root = list(range(self.state.count))
        for pairs in self.state.pairs:
            for one, other in pairs.T.tolist():
                one, other = self.of(one), self.of(other)
                self.root[max(one, other)] = min(one, other)
        self.reasons: dict[int, str] = {0: "0"}
        for labels, reason in self.state.pins:
            for label in labels.tolist():
                self.reasons.setdefault(self.of(label), reason)

    def of(self, label: int) -> int:
        while self.root[label] != label:
            label = self.root[label]
        return label

    def dim(self, target: str, dim: int) -> list[int]:
        """The class of each index of a weight's dimension."""
        return [self.of(label) for label in self.state.dims[target, dim].tolist()]

    def pinned(self, target: str, dim: int) -> list[str]:
        """The reasons of each index that stays."""
        return [self.reasons[c] for c in self.dim(target, dim) if c in self.reasons]


def test_a_convolution_joins_its_input_and_its_own_parameters() -> None:
    found = Classes(Net(lambda net, x: x))
    assert found.dim("a.weight", 0) == found.dim("a.bias", 0) == found.dim("b.weight", 1)
    assert len(set(found.dim("a.weight", 0))) == 8
    assert found.pinned("a.weight", 0) == []
    assert found.dim("a.weight", 1) == [0, 0, 0], "the network's input"
    assert found.pinned("b.weight", 0) == found.pinned("b.bias", 0) == ["network output"] * 2


def test_an_input_without_a_batch_dimension() -> None:
    found = Classes(Net(lambda net, x: x), torch.zeros(3, 4, 4))
    assert found.dim("a.weight", 0) == found.dim("b.weight", 1)
    assert found.pinned("b.weight", 0) == ["network output"] * 2


def test_a_grouped_convolution_ties_the_kth_channels_of_its_groups() -> None:
    found = Classes(Net(lambda net, x: net.g(x), 4, g=nn.Conv2d(8, 4, 1, groups=2)))
    first = found.dim("a.weight", 0)
    assert first[:4] == first[4:] == found.dim("g.weight", 1)
    assert len(set(first)) == 4
    out = found.dim("g.weight", 0)
    assert out[:2] == out[2:]
    assert len(set(out)) == 2
    assert not set(out) & set(first)


def test_a_depthwise_convolution_joins_each_input_with_its_outputs() -> None:
    found = Classes(Net(lambda net, x: net.g(x), 16, g=nn.Conv2d(8, 16, 1, groups=8)))
    assert found.dim("g.weight", 0) == [c for c in found.dim("a.weight", 0) for _ in range(2)]
    assert found.dim("g.weight", 0) == found.dim("b.weight", 1)
    assert ("g.weight", 1) not in found.state.dims


def test_a_norm_joins_its_four_tensors_with_the_channels() -> None:
    found = Classes(Net(lambda net, x: net.n(x), n=nn.BatchNorm2d(8)))
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert found.dim(f"n.{name}", 0) == found.dim("a.weight", 0)
    assert ("n.num_batches_tracked", 0) not in found.state.dims


def test_a_linear_layer_reads_the_last_dimension() -> None:
    found = Classes(Net(lambda net, x: net.f(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 5, f=nn.Linear(8, 5)))
    assert found.dim("f.weight", 1) == found.dim("a.weight", 0)
    assert found.dim("f.weight", 0) == found.dim("f.bias", 0) == found.dim("b.weight", 1)
    assert found.pinned("f.weight", 1) == []


def test_flatten_repeats_a_channel_for_every_pixel() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 2))
    found = Classes(net)
    assert found.dim("2.weight", 1) == [c for c in found.dim("0.weight", 0) for _ in range(16)]


@pytest.mark.parametrize("flatten", [lambda x: x.view(2, -1), lambda x: x.reshape(2, 128), lambda x: x.flatten(1)])
def test_every_way_of_flattening_is_the_same(flatten: Callable[[Tensor], Tensor]) -> None:
    found = Classes(Net(lambda net, x: net.f(flatten(x)).view(2, 2, 1, 1), 2, f=nn.Linear(128, 2)))
    assert found.dim("f.weight", 1) == [c for c in found.dim("a.weight", 0) for _ in range(16)]


@pytest.mark.parametrize("op", [torch.add, torch.sub, torch.mul, torch.maximum])
def test_operands_that_meet_are_joined(op: Callable[[Tensor, Tensor], Tensor]) -> None:
    found = Classes(Net(lambda net, x: op(x, net.c(x).relu()), c=nn.Conv2d(8, 8, 1)))
    assert found.dim("c.weight", 0) == found.dim("c.weight", 1) == found.dim("a.weight", 0)


def test_one_channel_for_all_stays_and_holds_nothing() -> None:
    found = Classes(Net(lambda net, x: x * net.c(x) * 2 + 1, c=nn.Conv2d(8, 1, 1)))
    assert ("c.weight", 0) in found.state.dims
    assert found.pinned("a.weight", 0) == []


def test_a_gate_expanded_by_hand_is_joined() -> None:
    def gate(net: Net, x: Tensor) -> Tensor:
        return x * net.c(x.mean((2, 3), keepdim=True)).sigmoid().expand_as(x)

    found = Classes(Net(gate, c=nn.Conv2d(8, 8, 1)))
    assert found.dim("c.weight", 0) == found.dim("a.weight", 0)
    assert found.pinned("a.weight", 0) == []


def test_cat_puts_classes_side_by_side_and_the_networks_input_stays() -> None:
    net = Net(lambda net, x: torch.cat([net.image, x, net.c(x)], 1), 16, c=nn.Conv2d(8, 5, 1))
    net.register_forward_pre_hook(lambda net, args: setattr(net, "image", args[0]))
    found = Classes(net)
    assert found.dim("b.weight", 1) == [0, 0, 0, *found.dim("a.weight", 0), *found.dim("c.weight", 0)]


def test_equal_chunks_tie_their_kth_channels() -> None:
    found = Classes(Net(lambda net, x: net.c(x.chunk(2, 1)[1]), c=nn.Conv2d(4, 8, 1)))
    first = found.dim("a.weight", 0)
    assert first[:4] == first[4:] == found.dim("c.weight", 1)
    assert len(set(first)) == 4


def test_chunks_of_pixels_tie_nothing() -> None:
    found = Classes(Net(lambda net, x: torch.cat(x.split([1, 3], 2)[::-1], 2)))
    assert len(set(found.dim("a.weight", 0))) == 8
    assert found.pinned("a.weight", 0) == []


def test_a_shuffle_moves_channels_and_ties_the_groups() -> None:
    def shuffle(net: Net, x: Tensor) -> Tensor:
        return x.view(2, 2, 4, 4, 4).transpose(1, 2).reshape(2, 8, 4, 4)

    found = Classes(Net(shuffle))
    first = found.dim("a.weight", 0)
    assert first[:4] == first[4:]
    assert found.dim("b.weight", 1) == [first[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]


def test_bare_parameters_and_buffers_run_along_the_channels() -> None:
    net = Net(lambda net, x: x * net.scale + net.table + net.number)
    net.scale, net.table = nn.Parameter(torch.ones(8, 1, 1)), nn.Parameter(torch.ones(1, 8, 4, 4))
    net.register_buffer("number", torch.ones(1))
    found = Classes(net)
    assert found.dim("scale", 0) == found.dim("table", 1) == found.dim("a.weight", 0)
    assert found.pinned("a.weight", 0) == []
    assert not any(target == "number" for target, _ in found.state.dims)


@pytest.mark.parametrize(
    "same",
    [
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 3, 1, 1),
        lambda x: F.adaptive_avg_pool2d(x, 2),
        lambda x: F.adaptive_max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        lambda x: F.pad(x, (1, 1, 0, 2)),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: x.mean((2, 3), keepdim=True),
        lambda x: x.amax(3, keepdim=True),
        lambda x: x.sum((2, 3)).view(2, 8, 1, 1),
        lambda x: x.mean(3).mean(2).unsqueeze(-1).unsqueeze(-1),
        lambda x: F.dropout(F.hardswish(x).clamp(0, 1).abs().to(torch.float32)),
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda x: x.view(16, 1, 4, 4).relu().view(2, 8, 4, 4),
        lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).view(2, 8, 4, 4),
        lambda x: x[None].squeeze(0),
    ],
)
def test_what_leaves_channels_in_their_places(same: Callable[[Tensor], Tensor]) -> None:
    found = Classes(Net(lambda net, x: same(x)))
    assert found.dim("b.weight", 1) == found.dim("a.weight", 0)
    assert len(set(found.dim("a.weight", 0))) == 8
    assert found.pinned("a.weight", 0) == []


PINNED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "unknown op": (lambda net, x: x.logcumsumexp(1), "op logcumsumexp (logcumsumexp) is not understood"),
    "order": (lambda net, x: x.cumsum(1), "cumsum (cumsum) orders or numbers channels"),
    "pooled channels": (lambda net, x: F.max_pool2d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2),
                        "max_pool2d (max_pool2d) works along channels"),
    "shifted channels": (lambda net, x: F.pad(x, (0, 0, 0, 0, 1, -1)), "pad (pad) works along channels"),
    "uneven parts": (lambda net, x: torch.cat(x.chunk(3, 1), 1), "chunk (chunk) splits channels unevenly"),
    "computed weight": (lambda net, x: F.conv2d(x, net.w * x.mean()),
                        "conv2d (conv2d_1) convolves with a computed weight"),
    "computed bias": (lambda net, x: F.conv2d(x, net.w, x.mean((0, 2, 3))), "convolves with a computed weight"),
    "computed scale": (lambda net, x: F.batch_norm(x, None, None, net.v * x.mean(), None, True),
                       "batch_norm (batch_norm) scales by a computed weight"),
    "computed matrix": (lambda net, x: F.linear(x.transpose(1, 3), net.m * x.mean()).transpose(1, 3),
                        "linear (linear) multiplies by a computed weight"),
    "memory": (lambda net, x: x.view(torch.int32).to(torch.float32), "view (view) reads the memory as another type"),
}  # fmt: skip


@pytest.mark.parametrize("case", PINNED)
def test_what_must_stay_is_pinned_with_the_reason(case: str) -> None:
    middle, reason = PINNED[case]
    net = Net(middle, c=nn.Linear(16, 16))
    net.w, net.v = nn.Parameter(torch.ones(8, 8, 1, 1)), nn.Parameter(torch.ones(8))
    net.m = nn.Parameter(torch.ones(8, 8))
    found = Classes(net)
    reasons = found.pinned("a.weight", 0)
    assert len(reasons) == 8
    assert all(reason in why for why in reasons)


def test_what_meets_the_result_of_an_unknown_op_stays_for_the_same_reason() -> None:
    found = Classes(Net(lambda net, x: net.c(x.logcumsumexp(1)), c=nn.Conv2d(8, 8, 1)))
    assert set(found.pinned("c.weight", 1)) == {"op logcumsumexp (logcumsumexp) is not understood"}
    assert found.pinned("c.weight", 0) == []


def test_weights_that_an_unknown_op_reads_stay_whole_before_and_after() -> None:
    net = Net(lambda net, x: net.c(x) + net.c.weight.logcumsumexp(0).mean())
    net.c = nn.Conv2d(8, 8, 1)
    found = Classes(net)
    assert len(found.pinned("c.weight", 0)) == len(found.pinned("c.weight", 1)) == 8
    assert found.state.pinned["c.weight"] == "op logcumsumexp (logcumsumexp) is not understood"


def test_collapse_keeps_what_changes_and_owns_its_memory() -> None:
    labels = torch.arange(1, 4).view(1, 3, 1).expand(2, 3, 5)
    assert collapse(labels).tolist() == [[[1], [2], [3]]]
    assert collapse(labels.contiguous()).shape == (1, 3, 1)
    assert collapse(labels.contiguous()).untyped_storage().nbytes() == 3 * 8
    assert collapse(torch.arange(6).view(2, 3)).shape == (2, 3)


def test_every_rule_has_a_name_that_export_uses() -> None:
    missing = [kind for kind in RULES if not hasattr(torch.ops.aten, kind)]
    assert missing == []
