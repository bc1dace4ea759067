"""lint: networks that break one rule and no other, the paper's numbers, the laws of the scores, what is one op."""

from __future__ import annotations

import functools

import pytest
import torch
from broken import (
    BROKEN,
    SLOW_COMPUTE,
    SLOW_MEMORY,
    SLOW_START,
    Add,
    Call,
    Cat,
    conv,
    device,
    graph_of,
    network,
    only,
    plain,
    rows,
    unequal,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import aerogel as ag
from aerogel.cost import Device, lint
from aerogel.cost.guidelines import NOISE, RULES, groups, width
from aerogel.cost.guidelines.network import Product, read
from aerogel.cost.roofline import total_ms
from aerogel.graph import Graph, capture


@pytest.mark.parametrize("name", BROKEN)
def test_the_rule_that_is_broken_comes_first_and_no_other_is_above_noise(name: str) -> None:
    rule, make, on = BROKEN[name]
    found = lint(make(), on)
    assert found[0].rule == rule
    assert found[0].share >= NOISE
    assert {finding.rule for finding in found if finding.share >= NOISE} == {rule}
    assert [finding.ms for finding in found] == sorted((finding.ms for finding in found), reverse=True)


def test_every_rule_has_its_network() -> None:
    assert {rule for rule, _, _ in BROKEN.values()} == RULES.keys()


@pytest.mark.parametrize("on", [SLOW_MEMORY, SLOW_COMPUTE, ag.cost.device("raspberry_pi_4")])
def test_a_well_made_network_has_nothing_above_noise(on: Device) -> None:
    assert [finding for finding in lint(plain(), on) if finding.share >= NOISE] == []


def test_what_is_at_stake_depends_on_the_device() -> None:
    of_rule = [finding for finding in lint(unequal(), SLOW_COMPUTE) if finding.rule == "G1"]
    assert of_rule
    assert all(
        finding.ms == 0 and finding.bytes > 0 and "bound by its MACs here" in finding.note for finding in of_rule
    )


# ---------------------------------------------------------------- G1 and G2: the papers' numbers and laws

P56 = 56 * 56


def pointwise(c1: float, c2: float, g: int = 1, positions: int = P56) -> Product:
    return Product(c1, c2, g, 1, positions, positions, 4)


def test_the_score_of_mobilenet_v2s_expansion() -> None:
    # MobileNetV2, Sandler et al. 2018, table 2: stride 4, 24 channels, expanded six times at 56 x 56.
    layer = pointwise(24, 144)
    assert (layer.macs, layer.access) == (10_838_016, 530_304)
    assert width.bound(layer) == pytest.approx(372_173, abs=1)
    assert width.score(layer) == pytest.approx(1.425, abs=5e-4)
    with torch.device("meta"):
        graph = capture(ag.nets.build("mobilenet_v2"), (torch.zeros(1, 3, 224, 224),))
    found = next(f for f in lint(graph, SLOW_MEMORY) if f.module == "features.stage2.block2.body.expand.conv")
    assert (found.rule, round(found.score or 0, 3)) == ("G1", 1.425)
    assert "inverted bottleneck: breaks G1 on purpose" in found.note


@pytest.mark.parametrize(
    ("c1", "c2", "access", "bound"), [(128, 128, 0.819, 0.819), (90, 180, 0.863, 0.814), (52, 312, 1.158, 0.815),
                                      (36, 432, 1.483, 0.798)],
)  # fmt: skip
def test_the_access_of_the_papers_ratios(c1: int, c2: int, access: float, bound: float) -> None:
    # ShuffleNetV2, Ma et al. 2018, table 1, GPU x1: its channels; millions of elements by its equation (1).
    layer = pointwise(c1, c2)
    assert layer.access / 1e6 == pytest.approx(access, abs=5e-4)
    assert width.bound(layer) / 1e6 == pytest.approx(bound, abs=5e-4)


@pytest.mark.parametrize(("g", "c", "access"), [(1, 128, 0.819), (2, 180, 1.145), (4, 256, 1.622), (8, 360, 2.274)])
def test_the_access_of_the_papers_groups(g: int, c: int, access: float) -> None:
    # The same paper, table 2, GPU x1, and its equation (2).
    layer = pointwise(c, c, g)
    assert layer.access / 1e6 == pytest.approx(access, abs=5e-4)
    assert groups.score(layer) == pytest.approx(access / 0.819, rel=0.02)


channels = st.integers(1, 1024)


@given(channels, channels, st.integers(1, 4096))
def test_g1_is_least_at_equal_channels(c1: int, c2: int, positions: int) -> None:
    layer = pointwise(c1, c2, positions=positions)
    macs, score = layer.macs, width.score(layer)
    assert width.bound(layer) == pytest.approx(2 * (positions * macs) ** 0.5 + macs / positions), "the paper's form"
    assert score >= 1 - 1e-12
    assert score == pytest.approx(width.score(pointwise(c2, c1, positions=positions)))
    assert (score == pytest.approx(1, abs=1e-12)) == (c1 == c2) or abs(c1 - c2) < 1e-3 * c1


@given(channels, st.integers(0, 5), st.integers(1, 4096))
def test_g2_grows_with_the_groups(c: int, power: int, positions: int) -> None:
    g, wide = 2**power, 64 * c
    few, many = (groups.score(pointwise(wide, wide, k, positions)) for k in (g, 2 * g))
    assert few >= 1 - 1e-12
    assert few < many


@functools.cache
def graph_called(name: str) -> Graph:
    return BROKEN[name][1]()


@pytest.mark.parametrize("name", ["unequal", "grouped", "fragmented", "residual"])
@given(factor=st.floats(0.1, 10))
@settings(max_examples=5, deadline=None)
def test_a_device_twice_as_fast_in_all_changes_no_share(name: str, factor: float) -> None:
    rule, _, on = BROKEN[name]
    graph = graph_called(name)
    faster = device("faster", on.gmacs["conv"] * factor, on.memory_gb_s * factor, overhead_us=on.overhead_us / factor)
    before, after = lint(graph, on)[0], lint(graph, faster)[0]
    assert after.rule == rule
    assert after.share == pytest.approx(before.share)
    assert after.ms == pytest.approx(before.ms / factor)


def built(net: nn.Module, on: Device, parts: str = "") -> float:
    """Predicted milliseconds of a network, or of its numbered parts alone."""
    layers = read(graph_of(net), on, lambda rule, layer: False).layers
    return total_ms((layer for layer in layers if not parts or layer.name.partition(".")[0] in parts), on)


def test_the_rewrite_of_g1_gains_what_it_says() -> None:
    before = network(*rows(lambda: nn.Sequential(conv(16, 64), conv(64, 16))), c=16)
    found = [f for f in lint(graph_of(before), SLOW_MEMORY) if f.rule == "G1"]
    assert len(found) == 16
    assert all(f.rewrite.startswith("32 -> 32 channels (+0% MACs)") for f in found)
    after = network(*rows(lambda: nn.Sequential(conv(32, 32), conv(32, 32))), c=32)
    gained = built(before, SLOW_MEMORY, "12345678") - built(after, SLOW_MEMORY, "12345678")
    assert gained == pytest.approx(sum(f.gain_ms for f in found), rel=0.01)


def test_depthwise_is_judged_against_dense_forms() -> None:
    def block() -> nn.Module:
        return nn.Sequential(conv(32, 128), conv(128, 128, 3, groups=128), conv(128, 32))

    graph = graph_of(network(*rows(block)))
    on_memory, on_compute = ([f for f in lint(graph, on) if f.rule == "G2"] for on in (SLOW_MEMORY, SLOW_COMPUTE))
    assert len(on_memory) == len(on_compute) == 8
    assert all(f.gain_ms > 0 and "one dense convolution 32 -> 128 in place" in f.rewrite for f in on_memory)
    assert all(f.ms == f.gain_ms == 0 and f.rewrite.startswith("none:") for f in on_compute)
    assert all("breaks G2 by definition" in f.note for f in on_memory + on_compute)


# ---------------------------------------------------------------- G3 and G4: structure


def test_stacked_siblings_gain_what_is_said() -> None:
    block = Cat(*rows(lambda: conv(32, 8), 4))
    net = network(conv(32, 32), block, conv(32, 32)).eval()
    found = only(graph_of(net), "G3")
    assert "one layer 32 -> 32 with the weights stacked" in found.rewrite
    assert not found.needs_retraining
    assert len(found.nodes) == 4
    assert found.gain_ms == pytest.approx(
        built(net, SLOW_MEMORY) - built(network(conv(32, 32), conv(32, 32), conv(32, 32)), SLOW_MEMORY), rel=0.01
    )


def test_convolutions_of_one_tensor_that_are_added_are_one() -> None:
    def linear(kernel: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(32, 32, kernel, padding=kernel // 2), nn.BatchNorm2d(32))

    found = only(graph_of(network(conv(32, 32), Add(linear(3), linear(1), linear(5)), nn.ReLU(), conv(32, 32))), "G3")
    assert "kernel is the sum of theirs" in found.rewrite
    assert found.what.startswith("3 convolutions")
    assert not found.needs_retraining
    one, two, three = (nn.Conv2d(4, 4, k, padding=k // 2) for k in (1, 3, 5))
    whole = nn.Conv2d(4, 4, 5, padding=2)
    whole.weight.data = F.pad(one.weight, [2] * 4) + F.pad(two.weight, [1] * 4) + three.weight
    whole.bias.data = one.bias + two.bias + three.bias
    x = torch.randn(1, 4, 9, 9)
    torch.testing.assert_close(whole(x), one(x) + two(x) + three(x), msg="the claim itself")


def test_branches_are_replaced_by_the_heaviest_at_equal_macs() -> None:
    net = network(Cat(nn.Sequential(conv(32, 16), conv(16, 16, 3)), nn.Sequential(conv(32, 8), conv(8, 16, 3))))
    found = only(graph_of(net), "G3")
    assert found.what == "2 branches with 4 kernels in them, side by side"
    assert found.needs_retraining
    # MACs a position: 32 16 + 16 16 9 = 2816 and 32 8 + 8 16 9 = 1408
    assert "1.22 times as wide" in found.rewrite


def test_a_shortcut_is_no_fragment_and_a_projection_is_said_to_be_one() -> None:
    body = nn.Sequential(conv(32, 32), conv(32, 32, 3))
    assert "G3" not in {finding.rule for finding in lint(graph_of(network(Add(nn.Identity(), body))), SLOW_MEMORY)}
    found = only(graph_of(network(Add(conv(32, 32, 5), body))), "G3")
    assert found.note == "projection shortcut of a residual block"


def test_tiny_kernels_in_a_row_are_one() -> None:
    graph = graph_of(network(*rows(lambda: conv(32, 32), 4)), 4)
    found = only(graph, "G3", SLOW_START)
    assert found.what.startswith("5 layers in a row")
    assert found.ms == pytest.approx(4 * SLOW_START.overhead_us / 1e3, rel=0.05)
    assert found.rewrite.endswith("3 in all")
    assert found.gain_ms == pytest.approx(2 * SLOW_START.overhead_us / 1e3, rel=0.05)
    assert "G3" not in {finding.rule for finding in lint(graph, SLOW_COMPUTE)}


def test_attention_is_no_fragment() -> None:
    net = nn.Sequential(nn.Flatten(2), nn.Linear(1024, 64), nn.TransformerEncoderLayer(64, 2, 128, batch_first=True))
    found = [finding for finding in lint(graph_of(net), SLOW_MEMORY) if finding.rule == "G3"]
    assert all("branches" not in finding.what for finding in found)


class Gate(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


def test_squeeze_and_excitation_is_one_finding_of_all_its_ops() -> None:
    graph = graph_of(network(*rows(lambda: nn.Sequential(conv(32, 32, 3), Gate()), 3)))
    found = only(graph, "G4")
    assert found.what.startswith("squeeze-and-excitation in 3 units")
    assert "none in the 2 units" in found.rewrite
    kinds = {op.kind for op in graph.ops if op.name in found.nodes}
    assert kinds == {"mul", "conv2d", "relu", "sigmoid", "adaptive_avg_pool2d"}


def test_element_wise_work_by_what_it_is_for() -> None:
    def shuffle(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    pair = [conv(32, 16), conv(32, 16, 3)]
    net = network(
        Add(nn.Identity(), nn.Conv2d(32, 32, 3, padding=1)), nn.ReLU(), conv(32, 32), Cat(*pair), Call(shuffle),
        conv(32, 32), Call(lambda x: x * x), conv(32, 32), Call(shuffle), conv(32, 32),
    )  # fmt: skip
    found = {f.what.partition(":")[0]: f for f in lint(graph_of(net), SLOW_MEMORY) if f.rule == "G4"}
    assert found.keys() == {"1 addition", "1 activation that no layer absorbs", "1 concatenation",
                            "2 copies in another order", "1 product"}  # fmt: skip
    shuffles = found["2 copies in another order"]
    assert "concatenate along a new axis, which interleaves as it joins, the same numbers: 1 of 2" in shuffles.rewrite
    assert not shuffles.needs_retraining
    assert shuffles.gain_bytes == shuffles.bytes // 2
    assert found["1 addition"].bytes == 3 * 32 * 1024 * 4
    assert found["1 addition"].note.startswith("1 of 1 ONNX Runtime computes as a convolution writes")
    assert found["1 activation that no layer absorbs"].note.startswith("1 of 1 ONNX Runtime")
    assert found["1 product"].note == ""
    assert sum(f.score or 0 for f in found.values()) < 1
