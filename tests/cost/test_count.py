"""count: the papers' numbers, hand-made small ones, and the laws that any count obeys."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from work import Apply

from aerogel import nets
from aerogel.cost import Cost, Sums, count
from aerogel.graph import capture


def cost_of(net: nn.Module, *shape: int) -> Cost:
    return count(capture(net, (torch.zeros(shape),)))


def cost_of_call(function: Callable[..., Tensor], *inputs: Tensor) -> Cost:
    return count(capture(Apply(function), inputs))


# ---------------------------------------------------------------- the papers' numbers

GOLDENS: dict[str, tuple[dict[str, Any], int, int]] = {
    "lenet5": ({}, 431_080, 2_293_000),
    "vgg16": ({"batch_norm": False}, 138_357_544, 15_470_264_320),
    "resnet50": ({}, 25_557_032, 4_089_184_256),
    "mobilenet_v2": ({}, 3_504_872, 300_774_272),
    "mobilenet_v1": ({}, 4_231_976, 568_740_352),  # Howard et al. 2017, table 4: 4.2 million, 569 million
    "shufflenet_v2": ({"merged": False}, 2_278_604, 144_907_992),  # Ma et al. 2018, table 5: 2.3 million, 146 million
}
PEAKS = {  # bytes in single precision: folded, raw
    "vgg16": (25_690_112, 25_690_112),
    "resnet50": (7_225_344, 9_633_792),
    "mobilenet_v2": (6_021_120, 9_633_792),
    "mobilenet_v1": (4_816_896, 6_422_528),  # 112 x 112 x (32 + 64) x 4
    "shufflenet_v2": (1_806_336, 2_408_448),
}


@pytest.fixture(scope="module")
def on_meta() -> Callable[[str], tuple[nn.Module, Tensor, Cost]]:
    """Builds and counts a net once, without memory for its weights."""
    known: dict[str, tuple[nn.Module, Tensor, Cost]] = {}

    def build(name: str) -> tuple[nn.Module, Tensor, Cost]:
        if name not in known:
            with torch.device("meta"):
                net = nets.build(name, **GOLDENS[name][0]).eval()
                size = net.spec["args"]["input_size"]
                x = torch.zeros(1, net.spec["args"]["in_channels"], size, size)
                known[name] = net, x, count(capture(net, (x,)))
        return known[name]

    return build


@pytest.mark.parametrize("name", GOLDENS)
def test_parameters_and_macs_are_the_papers(
    name: str, on_meta: Callable[[str], tuple[nn.Module, Tensor, Cost]]
) -> None:
    _, params, macs = GOLDENS[name]
    net, x, cost = on_meta(name)
    assert (cost.params, cost.macs, cost.uncounted) == (params, macs, {})
    with FlopCounterMode(display=False) as counter:
        net(x)
    assert counter.get_total_flops() == 2 * macs, "PyTorch's own counter, which has products alone"


def test_the_merged_shuffle_has_the_same_peak() -> None:
    """It is the stem's: the image and what the first convolution makes of it."""
    with torch.device("meta"):
        cost = cost_of(nets.build("shufflenet_v2").eval(), 1, 3, 224, 224)
    assert (cost.peak_bytes, cost.peak_op) == (4 * 224 * 224 * 3 + 4 * 112 * 112 * 24, "features.stem.conv1.conv")


@pytest.mark.parametrize("name", PEAKS)
def test_peak_bytes_are_those_of_the_literature(
    name: str, on_meta: Callable[[str], tuple[nn.Module, Tensor, Cost]]
) -> None:
    cost = on_meta(name)[2]
    assert (cost.peak_bytes, cost.peak_bytes_raw) == PEAKS[name]


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("layer", "shape", "macs", "params"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 4, 4), 8 * 16 * 27, 8 * 27 + 8),
        (nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 5, 5), 2 * 8 * 9 * 2 * 9, 8 * 18),
        (nn.Conv2d(4, 8, 1, groups=4), (1, 4, 5, 5), 8 * 25, 8 + 8),
        (nn.Conv2d(3, 8, 3, stride=2), (3, 7, 7), 8 * 9 * 27, 8 * 27 + 8),  # no batch dimension
        (nn.Conv1d(2, 3, 5), (1, 2, 9), 3 * 5 * 10, 3 * 10 + 3),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3), 3 * 8 * 16, 3 * 16 + 3),
        (nn.Linear(6, 4), (2, 6), 2 * 24, 28),
        (nn.Linear(6, 4), (2, 5, 6), 10 * 24, 28),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)), (1, 3, 4, 4), 0, 6),
    ],
)
def test_macs_and_parameters_of_a_layer(layer: nn.Module, shape: tuple[int, ...], macs: int, params: int) -> None:
    cost = cost_of(layer, *shape)
    assert (cost.macs, cost.params) == (macs, params)
    assert cost.uncounted == {}


@pytest.mark.parametrize(
    ("product", "left", "right"),
    [
        (torch.mm, (2, 3), (3, 5)),
        (torch.bmm, (4, 2, 3), (4, 3, 5)),
        (torch.matmul, (4, 2, 3), (3, 5)),
        (torch.matmul, (4, 2, 3), (3,)),
        (torch.matmul, (3,), (3, 5)),
        (lambda a, b: torch.addmm(torch.zeros(5), a, b), (2, 3), (3, 5)),
        (lambda a, b: torch.baddbmm(torch.zeros(4, 2, 5), a, b), (4, 2, 3), (4, 3, 5)),
    ],
)
def test_macs_of_a_product(product: Callable[..., Tensor], left: tuple[int, ...], right: tuple[int, ...]) -> None:
    inputs = torch.zeros(left), torch.zeros(right)
    assert cost_of_call(product, *inputs).macs == product(*inputs).numel() * 3


@pytest.mark.parametrize(
    ("layer", "flops"),
    [
        (nn.Conv2d(3, 8, 1, bias=False), 2 * 8 * 16 * 3),
        (nn.Conv2d(3, 8, 1), 2 * 8 * 16 * 3 + 8 * 16),
        (nn.BatchNorm2d(3), 2 * 48),
        (nn.ReLU6(), 48),
        (nn.Hardswish(), 4 * 48),
        (nn.Softmax(1), 5 * 48),
        (nn.MaxPool2d(2), 12 * 4),
        (nn.AvgPool2d((1, 2)), 24 * 2),
        (nn.AdaptiveAvgPool2d(1), 48),
        (nn.Flatten(), 0),
        (nn.Dropout(0.5), 0),
        (nn.ZeroPad2d(1), 0),
    ],
)
def test_flops_are_twice_the_macs_and_the_elementwise_work(layer: nn.Module, flops: int) -> None:
    assert cost_of(layer, 1, 3, 4, 4).flops == flops


class Odd(nn.Module):
    """A layer used twice, a frozen one, a parameter that nothing reads, an op that has no formula."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.two.weight = self.one.weight
        self.frozen.requires_grad_(False)
        self.unread = nn.Parameter(torch.ones(7))
        self.register_buffer("stored", torch.ones(4))
        self.inner = Apply(lambda x: x.lgamma().lgamma())

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(self.one(x)))
        return self.frozen(self.inner(x) + self.stored)


def test_parameters_are_counted_once_frozen_ones_and_unread_ones_too() -> None:
    net = Odd()
    cost = cost_of(net, 1, 4)
    assert cost.params == 16 + 4 + 4 + 10 + 7 == sum(p.numel() for p in net.parameters())
    assert [layer.params for layer in cost.layers if layer.op == "linear"] == [20, 0, 4, 10]
    assert cost.macs == 3 * 16 + 8, "but computed as often as it is used"


def test_an_op_without_a_formula_is_listed_with_its_module() -> None:
    cost = cost_of(Odd(), 1, 4)
    assert cost.uncounted == {"lgamma": ["inner", "inner"]}
    assert cost_of(nn.Linear(4, 4), 1, 4).uncounted == {}


def test_layers_say_what_and_where_and_add_up() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    cost = cost_of(net, 1, 3, 4, 4)
    assert [(layer.name, layer.op, layer.shape, layer.weight) for layer in cost.layers] == [
        ("0", "conv2d", (1, 8, 4, 4), (8, 3, 1, 1)),
        ("1", "batch_norm", (1, 8, 4, 4), None),
        ("2", "relu", (1, 8, 4, 4), None),
        ("3", "flatten", (1, 128), None),
        ("4", "linear", (1, 2), (2, 128)),
    ]
    for total in ("macs", "flops", "params", "access_bytes"):
        assert sum(getattr(layer, total) for layer in cost.layers) == getattr(cost, total)
    assert json.loads(json.dumps(cost.to_json()))["layers"][0]["weight"] == [8, 3, 1, 1]


def test_sums_by_module_op_and_family_add_up_to_the_totals() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.Conv2d(8, 4, 1))
            self.head, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
            self.tied.weight = self.head.weight
            self.body[0].unread = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(self.head(self.body(x).mean((2, 3)))).relu()

    cost = cost_of(Whole(), 1, 3, 6, 6)
    for sums in (cost.by_module(), cost.by_module(1), cost.by_module(0), cost.by_op(), cost.by_family()):
        for total in ("macs", "flops", "params", "access_bytes"):
            assert sum(getattr(part, total) for part in sums.values()) == getattr(cost, total)
    assert list(cost.by_module()) == ["body.0.0", "body.0.1", "body.1", "", "head", "tied", "body.0"]
    assert cost.by_module()["body.0"] == Sums(params=5), "what nothing reads stands with its module"
    assert list(cost.by_module(1)) == ["body", "", "head", "tied"]
    assert cost.by_module(1)["body"].params == 216 + 8 + 16 + 36 + 5
    assert (cost.by_module()["tied"].params, cost.by_module()["tied"].macs) == (4, 16)
    assert cost.by_op()["linear"].macs == 32
    assert cost.by_op()["unread"] == cost.by_family()["unread"] == Sums(params=5)
    assert cost.by_family()["pointwise"].macs == 16 * 8 * 4
    assert cost.unread == {"body.0.unread": 5}


def test_layers_tell_the_timeline_of_the_memory() -> None:
    cost = cost_of(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)), 1, 3, 4, 4)
    assert [layer.alive_bytes for layer in cost.layers] == [704, 512, 1024]
    assert (cost.peak_bytes, cost.peak_op, cost.arena_bytes) == (1024, "2", 1024)
    assert cost.peak_node == cost.layers[2].node
    assert [(there.name, there.bytes) for there in cost.peak_alive] == [("0", 512), ("2", 512)]


# ---------------------------------------------------------------- laws


@st.composite
def layers(draw: st.DrawFn, c: int, side: int) -> tuple[list[nn.Module], int, int]:
    """A few layers for (n, c, side, side), and the channels and side that they end with."""
    found: list[nn.Module] = []
    for kind in draw(st.lists(st.sampled_from(["conv", "depthwise", "norm", "act", "pool", "dropout"]), max_size=4)):
        if kind == "conv":
            out = draw(st.integers(1, 6))
            found.append(nn.Conv2d(c, out, 3, padding=1, bias=draw(st.booleans())))
            c = out
        elif kind == "depthwise":
            found.append(nn.Conv2d(c, c, 3, padding=1, groups=c))
        elif kind == "pool" and side > 1:
            found.append(draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))(2))
            side //= 2
        else:
            found.append({"norm": nn.BatchNorm2d(c), "dropout": nn.Dropout()}.get(kind, nn.Hardswish()))
    return found, c, side


@settings(max_examples=15, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3))
def test_the_cost_of_two_networks_in_a_row_is_the_sum(data: st.DataObject, batch: int) -> None:
    c, side = data.draw(st.integers(1, 6)), 8
    first, c1, side1 = data.draw(layers(c, side))
    then, *_ = data.draw(layers(c1, side1))
    a = cost_of(nn.Sequential(*first), batch, c, side, side)
    b = cost_of(nn.Sequential(*then), batch, c1, side1, side1)
    both = cost_of(nn.Sequential(*first, *then), batch, c, side, side)
    for total in ("macs", "flops", "params", "access_bytes_raw"):
        assert getattr(both, total) == getattr(a, total) + getattr(b, total)
    assert both.access_bytes <= a.access_bytes + b.access_bytes
    assert both.peak_bytes <= both.peak_bytes_raw
    assert both.peak_bytes_raw == max(a.peak_bytes_raw, b.peak_bytes_raw)
    assert [layer.op for layer in both.layers] == [layer.op for layer in a.layers + b.layers]


@settings(max_examples=8, deadline=None)
@given(data=st.data(), batch=st.integers(2, 5))
def test_work_grows_with_the_batch_and_parameters_do_not(data: st.DataObject, batch: int) -> None:
    net = nn.Sequential(*data.draw(layers(3, 8))[0], nn.ReLU())
    one, more = cost_of(net, 1, 3, 8, 8), cost_of(net, batch, 3, 8, 8)
    assert (more.macs, more.flops, more.params) == (batch * one.macs, batch * one.flops, one.params)
    assert (more.peak_bytes, more.peak_bytes_raw) == (batch * one.peak_bytes, batch * one.peak_bytes_raw)
