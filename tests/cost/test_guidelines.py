"""lint: networks that break one rule and no other, the paper's numbers, the laws of the scores, opt-out and limits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import aerogel as ag
from aerogel.cost import Device, Finding, lint
from aerogel.cost.guidelines import NOISE, RULES, groups, width
from aerogel.cost.guidelines.exceptions import exceeded
from aerogel.cost.guidelines.network import Product, read
from aerogel.cost.guidelines.runtime import SLOW, UNSUPPORTED
from aerogel.cost.roofline import total_ms
from aerogel.errors import AerogelError
from aerogel.export.onnx import export_onnx
from aerogel.graph import Graph, capture

Aerogel = Callable[..., Any]


def device(name: str, gmacs: float, gb_s: float, **other: Any) -> Device:
    numbers: dict[str, Any] = {"simd": 8, "overhead_us": 0.01, "cache_bytes": 0, "cache_gb_s": gb_s, **other}
    speeds = {"conv": gmacs, "depthwise": gmacs, "elementwise": gmacs}
    return Device(name=name, title=name, kind="datasheet", source="made up", gmacs=speeds, memory_gb_s=gb_s,
                  **numbers)  # fmt: skip


SLOW_MEMORY = device("slow memory", gmacs=5000, gb_s=4)
SMALL_CACHE = device("small cache", gmacs=5000, gb_s=4, cache_bytes=2**16, cache_gb_s=40)
SLOW_COMPUTE = device("slow compute", gmacs=2, gb_s=1000)
SLOW_START = device("slow start", gmacs=5000, gb_s=1000, overhead_us=50)


def conv(c1: int, c2: int, kernel: int = 1, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c1, c2, kernel, padding=kernel // 2, **options), nn.BatchNorm2d(c2), nn.ReLU())


class Add(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return sum((branch(x) for branch in self.branches[1:]), self.branches[0](x))


class Cat(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def network(
    *body: nn.Module, c: int = 32, first: nn.Module | None = None, last: nn.Module | None = None
) -> nn.Sequential:
    head = last or nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 8))
    return nn.Sequential(first or conv(3, c, 3), *body, head)


def graph_of(net: nn.Module, size: int = 32) -> Graph:
    return capture(net, (torch.zeros(1, 3, size, size),))


def rows(make: Callable[[], nn.Module], number: int = 8) -> list[nn.Module]:
    return [make() for _ in range(number)]


def plain(size: int = 32) -> Graph:
    narrow, wide = rows(lambda: conv(32, 32, 3)), rows(lambda: conv(64, 64, 3))
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8))
    return graph_of(network(*narrow, conv(32, 64, 3, stride=2), *wide, last=last), size)


def unequal() -> Graph:
    return graph_of(network(*rows(lambda: nn.Sequential(conv(16, 128), conv(128, 16))), c=16))


def grouped() -> Graph:
    return graph_of(network(*rows(lambda: conv(64, 64, groups=8)), c=64))


def fragmented() -> Graph:
    return graph_of(network(*rows(lambda: Cat(*rows(lambda: conv(32, 8), 4)))))


def residual() -> Graph:
    return graph_of(network(*rows(lambda: Add(nn.Identity(), conv(32, 32, 3)))))


def off_the_lanes() -> Graph:
    return graph_of(network(*rows(lambda: conv(36, 36, 3)), c=36))


def normed_late() -> Graph:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(32))

    return graph_of(network(*rows(block)))


def heavy_first() -> Graph:
    return graph_of(network(*rows(lambda: conv(32, 32, 3), 5), first=conv(3, 32, 15)))


def heavy_classifier() -> Graph:
    return graph_of(network(*rows(lambda: conv(32, 32, 3)), last=nn.Sequential(nn.Flatten(), nn.Linear(32 * 1024, 80))))


def peaked() -> Graph:
    return graph_of(network(conv(32, 32, 3, stride=2), *rows(lambda: conv(32, 32, 3), 10)), 64)


def slow_in_onnx() -> Graph:
    return graph_of(network(*rows(lambda: nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Mish()))))


def not_in_onnx() -> Graph:
    head = nn.Sequential(nn.AdaptiveMaxPool2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8))
    return graph_of(network(*rows(lambda: conv(32, 32, 3)), last=head))


# One rule broken, and the device on which that costs.
BROKEN: dict[str, tuple[str, Callable[[], Graph], Device]] = {
    "unequal": ("G1", unequal, SLOW_MEMORY),
    "grouped": ("G2", grouped, SLOW_MEMORY),
    "fragmented": ("G3", fragmented, SLOW_MEMORY),
    "fragmented, slow start": ("G3", fragmented, SLOW_START),
    "residual": ("G4", residual, SLOW_MEMORY),
    "off the lanes": ("P1-simd", off_the_lanes, SLOW_COMPUTE),
    "normed late": ("P2-norm", normed_late, SLOW_MEMORY),
    "heavy first": ("P3-ends", heavy_first, SLOW_COMPUTE),
    "heavy classifier": ("P3-ends", heavy_classifier, SLOW_MEMORY),
    "peaked": ("P4-peak", peaked, SMALL_CACHE),
    "slow in onnx": ("P5-onnx", slow_in_onnx, SLOW_MEMORY),
    "not in onnx": ("P5-onnx", not_in_onnx, SLOW_COMPUTE),
}


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


@pytest.mark.parametrize("name", ["unequal", "grouped", "fragmented", "residual"])
@given(factor=st.floats(0.1, 10))
@settings(max_examples=5)
def test_a_device_twice_as_fast_in_all_changes_no_share(name: str, factor: float) -> None:
    rule, _, on = BROKEN[name]
    graph = GRAPHS[name]
    faster = device("faster", on.gmacs["conv"] * factor, on.memory_gb_s * factor, overhead_us=on.overhead_us / factor)
    before, after = lint(graph, on)[0], lint(graph, faster)[0]
    assert after.rule == rule
    assert after.share == pytest.approx(before.share)
    assert after.ms == pytest.approx(before.ms / factor)


GRAPHS = {name: BROKEN[name][1]() for name in ("unequal", "grouped", "fragmented", "residual")}


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


def only(graph: Graph, rule: str, on: Device = SLOW_MEMORY) -> Finding:
    found = [finding for finding in lint(graph, on) if finding.rule == rule]
    assert len(found) == 1
    return found[0]


def test_stacked_siblings_compute_the_same_and_gain_what_is_said() -> None:
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
    found = only(graph_of(network(*rows(lambda: nn.Sequential(conv(32, 32, 3), Gate()), 3))), "G4")
    assert found.what.startswith("squeeze-and-excitation in 3 units")
    assert "none in the 2 units" in found.rewrite
    assert {"mul", "conv2d", "adaptive_avg_pool2d"} <= {node.rsplit("_", 1)[0] if node[-1].isdigit() else node
                                                        for node in found.nodes} | {"conv2d"}  # fmt: skip


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
    assert sum(f.score or 0 for f in found.values()) < 1


# ---------------------------------------------------------------- practice


def test_lanes() -> None:
    found = only(graph_of(network(*rows(lambda: conv(36, 36, 3)), c=36)), "P1-simd", SLOW_COMPUTE)
    assert found.what == "36 channels fill 90% of the lanes of 5 vectors of 8, in 9 layers"
    assert found.rewrite == "32 channels are whole vectors; 40 channels take no longer"
    assert found.score == pytest.approx(40 / 36)
    assert found.share == pytest.approx(40 / 36 - 1, rel=0.01)
    few = only(graph_of(network(*rows(lambda: conv(3, 3, 3)), c=3)), "P1-simd", SLOW_COMPUTE)
    assert (few.rewrite, few.gain_ms) == ("8 channels take no longer", 0)


@pytest.mark.parametrize(
    ("block", "why", "retrain"),
    [
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 1)), "the layer behind it", False),
        (
            lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1)),
            "straight behind",
            True,
        ),
        (lambda: nn.Sequential(nn.ConvTranspose2d(32, 32, 1), nn.BatchNorm2d(32)), "ONNX Runtime does", False),
        (lambda: nn.GroupNorm(4, 32), "a batch norm behind", True),
    ],
)
def test_norms_that_do_not_fold(block: Callable[[], nn.Module], why: str, retrain: bool) -> None:
    found = only(graph_of(network(nn.Conv2d(32, 32, 1), block(), conv(32, 32))), "P2-norm")
    assert why in found.rewrite
    assert found.needs_retraining == retrain
    assert found.bytes >= 2 * 32 * 1024 * 4


def test_ends() -> None:
    found = only(heavy_classifier(), "P3-ends")
    assert found.rewrite == "average over the 1024 positions before it: 32 -> 80, not 32768 -> 80"
    assert found.gain_bytes == pytest.approx(4 * 80 * (32768 - 32), rel=0.02)
    assert only(heavy_first(), "P3-ends", SLOW_COMPUTE).rewrite.startswith("stride 2: 75% fewer positions")
    net = network(*rows(lambda: conv(32, 32, 3)), last=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                  nn.Linear(32, 4096), nn.ReLU(), nn.Linear(4096, 800)))  # fmt: skip
    found = only(graph_of(net), "P3-ends")
    assert len(found.nodes) == 2
    assert "two layers 4096 ->" in found.rewrite


def test_peak() -> None:
    found = only(peaked(), "P4-peak")
    wide, narrow = 4 * 32 * 64 * 64, 4 * 32 * 32 * 32
    assert found.bytes == wide + narrow - 2 * narrow
    assert found.ms == 0, "without a cache bands save memory and no time"
    on_cache = only(peaked(), "P4-peak", SMALL_CACHE)
    assert on_cache.bytes == found.bytes
    # Of the two kernels that hold the wide tensor, each moves the bytes above at 40 GB/s instead of 4.
    assert on_cache.ms == pytest.approx(2 * found.bytes * (1 / 4 - 1 / 40) * 1e-6)
    assert only(peaked(), "P4-peak", SLOW_COMPUTE).ms == 0
    assert found.score == pytest.approx((wide + narrow) / (2 * narrow))
    assert found.module == "1.0"
    assert not found.needs_retraining


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "elu": F.elu, "selu": F.selu, "celu": F.celu, "mish": F.mish,
               "softplus": F.softplus, "threshold": lambda x: F.threshold(x, 0.1, 0.0)}  # fmt: skip
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATIONS,
    "group_norm": lambda x: F.group_norm(x, 4),
    "rms_norm": lambda x: F.rms_norm(x, (16,)),
    "glu": lambda x: F.glu(x, 1),
    "roll": lambda x: x.roll(2, 2),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 5),
    "cdist": lambda x: torch.cdist(x, x),
    "cummax": lambda x: x.cummax(1)[0],
    "cumprod": lambda x: x.cumprod(1),
    "kthvalue": lambda x: x.kthvalue(2, 1, keepdim=True)[0],
    "lgamma": torch.lgamma,
    "linalg_cholesky": torch.linalg.cholesky,
    "linalg_inv": torch.linalg.inv,
    "linalg_svdvals": torch.linalg.svdvals,
    "median": lambda x: x.median(1, keepdim=True)[0],
    "special_erfinv": torch.special.erfinv,
}
FAST = ("silu", "mish", "group_norm", "adaptive_max_pool2d", "cdist")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in SLOW.keys() | UNSUPPORTED]
)
def test_the_tables_are_what_the_exporter_and_the_runtime_do(kind: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), Call(FUNCTIONS[kind])).eval()
    x, path, optimised = torch.rand(1, 16, 16, 16), tmp_path / "net.onnx", tmp_path / "optimised.onnx"
    assert capture(net, (x,)).ops[1].kind == kind
    if kind in UNSUPPORTED:
        with pytest.raises(AerogelError, match="No ONNX function found"):
            export_onnx(net, (x,), path)
        return
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(optimised), 4
    onnxruntime.InferenceSession(str(export_onnx(net, (x,), path).path), options, providers=["CPUExecutionProvider"])
    passing = {"Conv", "FusedConv", "ReorderInput", "ReorderOutput", "Shape", "Reshape", "Concat", "Slice"}
    kernels = [node.op_type for node in onnx.load(optimised).graph.node if node.op_type not in passing]
    counted = 0 if kind in ACTIVATIONS else 1
    assert len(kernels) + (kind == "roll") >= counted + SLOW[kind][0], kernels


# ---------------------------------------------------------------- what the user says


def test_allow_leaves_modules_out_of_a_rule() -> None:
    graph = unequal()
    assert {f.module.partition(".")[0] for f in lint(graph, SLOW_MEMORY, allow=["G1:[1-7].*"]) if f.rule == "G1"} == {
        "8"
    }
    assert not [f for f in lint(graph, SLOW_MEMORY, allow=["g1:*"]) if f.rule == "G1"]
    assert [f for f in lint(graph, SLOW_MEMORY, allow=["G2:*", "P1:*"]) if f.rule == "G1"]


@pytest.mark.parametrize(
    ("allow", "message"),
    [
        ("G1", r"allow must be RULE:PATTERN of modules, got 'G1'; write G2:features"),
        ("G9:*", r"allow: 'G9' is no rule; did you mean G"),
        ("G1:nowhere.*", r"allow: no module matches 'nowhere\.\*' in 'G1:nowhere\.\*'"),
    ],
)
def test_an_exception_that_is_wrong_is_told(allow: str, message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        lint(GRAPHS["unequal"], SLOW_MEMORY, allow=[allow])


def test_a_device_that_is_none() -> None:
    with pytest.raises(AerogelError, match=r"lint: device must be a Device, got str; write device=ag\.cost\.device"):
        lint(GRAPHS["unequal"], "raspberry_pi_4")  # type: ignore[arg-type]


def test_limits_add_up_the_findings_of_a_rule() -> None:
    found = lint(GRAPHS["unequal"], SLOW_MEMORY)
    total = sum(f.share for f in found if f.rule == "G1")
    assert exceeded(found, [f"G1={100 * total + 0.1:.3f}%", "G2=0%"]) == []
    assert max(f.share for f in found) < total - 0.001, "no single finding is over the next limit"
    (line,) = exceeded(found, [f"G1={100 * total - 0.1:.3f}%"])
    assert line.startswith(f"G1: {total:.1%} of the predicted time, over ")
    with pytest.raises(AerogelError, match=r"fail-on must be RULE=SHARE%, got 'G1=0\.05'; write G1=5%"):
        exceeded(found, ["G1=0.05"])


NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 128, 1), nn.Conv2d(128, 16, 1)
        self.end = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.wide(x).relu()  # aerogel: allow G1, P4
        return self.end(self.narrow(x).relu())

def build():
    return Net()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in sys.modules if name.startswith("aerogel_user_guided")]:
        monkeypatch.delitem(sys.modules, name)  # an earlier test's file of that name
    (tmp_path / "guided.py").write_text(NET)
    (tmp_path / "slow.toml").write_text(
        'name = "slow"\ntitle = "slow memory"\nkind = "datasheet"\nsource = "made up"\nsimd = 8\noverhead_us = 0.01\n'
        "cache_bytes = 0\ncache_gb_s = 4\nmemory_gb_s = 4\n"
        "[gmacs]\nconv = 5000\ndepthwise = 5000\nelementwise = 5000\n"
    )
    return tmp_path


def test_the_command_for_machines(folder: Path, aerogel: Aerogel) -> None:
    words = ("lint", f"{folder}/guided.py:build", "--input", "3,32,32", "--device", folder / "slow.toml", "--json")
    outcome = aerogel(*words)
    found = json.loads(outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    assert (found["schema"], found["version"], found["device"]["name"]) == ("aerogel.lint", 1, "slow")
    assert [f["module"] for f in found["findings"] if f["rule"] == "G1"] == ["narrow"], "the comment left `wide` out"
    assert not any(f["rule"] == "P4-peak" and f["module"] == "wide" for f in found["findings"])
    assert {"op", "source", "severity", "bytes", "ms", "share", "rewrite", "gain_bytes", "gain_ms", "needs_retraining",
            "note", "score", "what", "nodes", "modules"} <= found["findings"][0].keys()  # fmt: skip
    failed = aerogel(*words, "--fail-on", "G1=1%")
    assert failed.code == 2
    assert failed.err.startswith("G1: ")
    assert json.loads(failed.out)["exceeded"][0] == failed.err.strip()
    assert aerogel(*words, "--fail-on", "G1=1%", "--allow", "G1:narrow").code == 0


def test_the_command_for_people_and_its_file(folder: Path, aerogel: Aerogel) -> None:
    (folder / "lint.toml").write_text(f'device = "{folder}/slow.toml"\nallow = ["P4:*"]\nfail_on = ["G1=1%"]\n')
    words = ("lint", f"{folder}/guided.py:build", "--input", "3,32,32", "--config", folder / "lint.toml")
    outcome = aerogel(*words)
    assert outcome.code == 2
    assert "on slow memory (datasheet)" in outcome.out
    assert "128 -> 16 channels move" in outcome.out
    assert "needs retraining" in outcome.out
    assert "P4" not in outcome.out
    assert "over the limit  G1: " in outcome.out
    (folder / "lint.toml").write_text("fails = 3\n")
    outcome = aerogel(*words)
    assert (outcome.code, outcome.out) == (1, "")
    assert "lint.toml: fails: Extra inputs are not permitted; give device, allow, fail_on" in outcome.err


def test_a_comment_in_one_of_two_files_of_a_name_is_refused(
    folder: Path, aerogel: Aerogel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "guided.py").write_text("pass\n" * 20)
    other = type(sys)("another_guided")
    other.__file__ = str(folder / "other" / "guided.py")
    monkeypatch.setitem(sys.modules, "another_guided", other)
    outcome = aerogel("lint", f"{folder}/guided.py:build", "--input", "3,32,32", "--device", folder / "slow.toml")
    assert outcome.code == 1
    assert "2 imported files are called guided.py, and what they allow in line 12 differs" in outcome.err


def test_a_comment_that_names_no_rule(folder: Path, aerogel: Aerogel) -> None:
    (folder / "guided.py").write_text(NET.replace("allow G1, P4", "allow G7"))
    outcome = aerogel("lint", f"{folder}/guided.py:build", "--input", "3,32,32", "--device", folder / "slow.toml")
    assert outcome.code == 1
    assert "the comment at guided.py:12: 'G7' is no rule" in outcome.err
