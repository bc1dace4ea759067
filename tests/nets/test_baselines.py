"""The multilayer perceptrons, AlexNet, DenseNet and the deep ResNets: exact counts and structure."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_paper import count
from test_structure import convolutions, on_meta, sides
from torch import nn

from aerogel.errors import AerogelError
from aerogel.nets import build
from aerogel.nets.blocks import Residual
from aerogel.nets.densenet import DenseLayer
from aerogel.nets.mlp import max_norm_


@pytest.mark.parametrize(
    ("spec", "params", "macs"),
    [
        ("mlp", 2_395_210, 2_392_800),
        ("mlp:widths=800-800", 1_276_810, 1_275_200),
        ("mlp:widths=30-30", 24_790, 24_720),
        ("mlp:widths=500-300", 545_810, 545_000),
        ("mlp:widths=100", 79_510, 79_400),
        ("alexnet", 60_965_224, 724_406_816),
        ("alexnet:input_size=32,num_classes=10", 35_910_026, 247_013_376),
        ("densenet40", 1_019_722, 264_812_928),
        ("densenet121", 7_978_856, 2_834_161_664),
        ("resnet110", 1_730_714, 253_149_824),
        ("resnet29", 312_218, 47_106_560),
        ("resnet164", 1_703_258, 247_646_720),
        ("resnet164:num_classes=100", 1_726_388, 247_669_760),
    ],
)
def test_parameters_and_macs(spec: str, params: int, macs: int) -> None:
    assert count(spec) == (params, macs)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("alexnet", [27, 13, 13, 13, 6]),
        ("alexnet:input_size=32", [16, 8, 8, 8, 4]),
        ("densenet40", [32, 32, 16, 16, 8, 8, 8]),
        ("densenet121", [56, 56, 28, 28, 14, 14, 7, 7, 7]),
        ("densenet121:input_size=32", [32, 32, 16, 16, 8, 8, 4, 4, 4]),
        ("resnet110", [32, 32, 16, 8]),
        ("resnet164", [32, 32, 16, 8, 8]),
    ],
)
def test_image_sides_along_the_net(spec: str, expected: list[int]) -> None:
    assert sides(*on_meta(spec)) == expected


# --- multilayer perceptrons ---


def test_mlp_layers_are_linear_relu_dropout() -> None:
    net = build("mlp", widths="20-10", dropout=0.5, input_dropout=0.2)
    kinds = [type(m) for m in net.features]
    assert kinds == [nn.Flatten, nn.Dropout, *[nn.Linear, nn.ReLU, nn.Dropout] * 2]
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.2, 0.5, 0.5]
    assert [m.out_features for m in net.modules() if isinstance(m, nn.Linear)] == [20, 10, 10]
    assert [m.p for m in build("mlp").modules() if isinstance(m, nn.Dropout)] == [0.0] * 3


def test_mlp_keeps_the_limit_in_its_spec() -> None:
    assert build("mlp", widths="5").spec["args"]["max_norm"] is None
    assert build("mlp", widths="5", max_norm=3.9).spec["args"]["max_norm"] == 3.9


@given(st.integers(0, 2**31), st.floats(0.1, 5))
def test_max_norm_shortens_the_long_vectors_only(seed: int, limit: float) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(7, 6))
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    max_norm_(net, limit)
    for key in ("0.weight", "2.weight"):
        old, new = before[key].flatten(1), net.get_parameter(key).detach().flatten(1)
        short = old.norm(dim=1) <= limit
        assert torch.equal(new[short], old[short])
        torch.testing.assert_close(new[~short].norm(dim=1), torch.full((int((~short).sum()),), limit))
        cosine = nn.functional.cosine_similarity(old, new)
        torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert all(torch.equal(net.get_parameter(key), before[key]) for key in ("0.bias", "2.bias"))


def test_max_norm_can_leave_the_classifier_alone() -> None:
    net = build("mlp", widths="5-4")
    for p in net.parameters():
        nn.init.ones_(p)
    max_norm_(net.features, 1.5)
    assert net.features.fc1.weight.norm(dim=1).allclose(torch.tensor(1.5))
    assert net.features.fc2.weight.norm(dim=1).allclose(torch.tensor(1.5))
    assert net.classifier.fc.weight.eq(1).all()


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), "3", None])
def test_max_norm_refuses_what_is_no_limit(limit: object) -> None:
    with pytest.raises(AerogelError, match=r"^max_norm_: limit must be a number > 0, got"):
        max_norm_(nn.Linear(2, 2), limit)


# --- AlexNet ---


def test_alexnet_layers_hold_what_han_counts() -> None:
    """Han's Table 4: 35K 307K 885K 663K 442K, 38M 17M 4M weights, and the FLOPs (2 a weight and place)."""
    net, _ = on_meta("alexnet")
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    params = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    assert params == [34_944, 307_456, 885_120, 663_936, 442_624, 37_752_832, 16_781_312, 4_097_000]
    assert [conv.groups for conv in convolutions(net).values()] == [1, 2, 1, 2, 2]
    places = [55 * 55, 27 * 27, 13 * 13, 13 * 13, 13 * 13, 1, 1, 1]
    flops = [2 * layer.weight.numel() * n for layer, n in zip(layers, places, strict=True)]
    assert [round(f / 1e6) for f in flops] == [211, 448, 299, 224, 150, 75, 34, 8]


def test_alexnet_normalises_before_it_pools() -> None:
    net, _ = on_meta("alexnet")
    parts = [list(dict(stage.named_children())) for stage in net.features]
    assert parts == [
        ["conv", "relu", "norm", "pool"],
        ["conv", "relu", "norm", "pool"],
        ["conv", "relu"],
        ["conv", "relu"],
        ["conv", "relu", "pool"],
    ]
    assert not any(isinstance(m, nn.LocalResponseNorm) for m in on_meta("alexnet:lrn=false")[0].modules())


def test_alexnet_local_response_normalisation_is_caffes() -> None:
    """x / (1 + alpha / 5 * the sum of squares over the five channels around)^0.75"""
    norm = build("alexnet", width=0.1, input_size=32).features.conv1.norm
    torch.manual_seed(0)
    x = 50 * torch.randn(2, 9, 3, 3)
    squares = torch.stack([x[:, max(0, c - 2) : c + 3].square().sum(1) for c in range(9)], 1)
    torch.testing.assert_close(norm(x), x / (1 + 1e-4 / 5 * squares) ** 0.75)


def test_alexnet_starts_from_the_prototxts_fillers() -> None:
    torch.manual_seed(0)
    net = build("alexnet", width=0.5, input_size=32)
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    stds = [layer.weight.std().item() for layer in layers]
    assert stds == pytest.approx([0.01] * 5 + [0.005] * 2 + [0.01], rel=0.05)
    for layer, bias in zip(layers, [0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0], strict=True):
        assert layer.bias.eq(bias).all()


# --- DenseNet ---


@pytest.mark.parametrize(
    ("name", "layers", "channels"),
    [
        ("densenet40", [12, 12, 12], [16, 160, 160, 304, 304, 448, 448]),
        ("densenet121", [6, 12, 24, 16], [64, 256, 128, 512, 256, 1024, 512, 1024, 1024]),
    ],
)
def test_densenet_channels_grow_and_are_compressed(name: str, layers: list[int], channels: list[int]) -> None:
    net, x = on_meta(name)
    assert [len(stage) for key, stage in net.features.named_children() if "stage" in key] == layers
    seen = []
    for child in net.features:
        x = child(x)
        seen.append(x.shape[1])
    assert seen == channels
    assert len(convolutions(net)) + 1 == int(name.removeprefix("densenet"))


@pytest.mark.parametrize(("name", "kernels"), [("densenet40", [3]), ("densenet121", [1, 3])])
def test_densenet_layers_keep_what_they_read(name: str, kernels: list[int]) -> None:
    net = build(name, growth=4, input_size=32, num_classes=10).eval()
    layer = net.features.stage2.layer3
    assert isinstance(layer, DenseLayer)
    convs = list(convolutions(layer).values())
    assert [conv.kernel_size[0] for conv in convs] == kernels
    assert [conv.out_channels for conv in convs] == [16, 4][-len(kernels) :]
    for unit in layer.body:
        assert [type(m) for m in unit] == [nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    x = torch.randn(2, convs[0].in_channels, 8, 8)
    y = layer(x)
    assert torch.equal(y[:, : x.shape[1]], x)
    assert torch.equal(y[:, x.shape[1] :], layer.body(x))


def test_densenet_drops_after_every_convolution_but_the_first_on_request() -> None:
    def rates(spec: str) -> list[float]:
        return [m.p for m in on_meta(spec)[0].modules() if isinstance(m, nn.Dropout)]

    assert rates("densenet40") == []
    assert rates("densenet40:dropout=0.2") == [0.2] * 38


# --- deep ResNets ---


def test_resnet110_is_resnet56_with_twice_the_blocks() -> None:
    shallow, deep = on_meta("resnet56")[0], on_meta("resnet110")[0]
    assert [len(stage) for stage in shallow.features][1:] == [9, 9, 9]
    assert [len(stage) for stage in deep.features][1:] == [18, 18, 18]
    assert len([key for key in convolutions(deep) if "shortcut" not in key]) + 1 == 110


def test_resnet164_activates_before_its_convolutions_and_not_after_the_sum() -> None:
    net, _ = on_meta("resnet164")
    weighted = [key for key in convolutions(net) if "shortcut" not in key]
    assert len(weighted) + 1 == 164
    assert [key for key, _ in net.features.stem.named_children()] == ["conv"]
    assert [type(m) for m in net.features.last] == [nn.BatchNorm2d, nn.ReLU]
    for stage in (net.features.stage1, net.features.stage2, net.features.stage3):
        first, *others = stage
        assert [type(m) for m in first] == [nn.BatchNorm2d, nn.ReLU, Residual]
        assert isinstance(first.residual.shortcut, nn.Conv2d)
        assert all(type(m) is Residual and isinstance(m.shortcut, nn.Identity) for m in others)
        for block in others:
            for unit in block.body:
                assert [type(m) for m in unit] == [nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert all(isinstance(m.act, nn.Identity) for m in net.modules() if isinstance(m, Residual))
    strided = [key for key, conv in convolutions(net).items() if conv.stride == (2, 2)]
    assert strided == [
        f"features.stage{s}.block1.residual.{part}" for s in (2, 3) for part in ("body.conv2.conv", "shortcut")
    ]


def test_resnet164_shortcuts_read_the_shared_activation() -> None:
    torch.manual_seed(0)
    block = build("resnet164", width=0.5, input_size=8).eval().features.stage2.block1
    x = torch.randn(2, block.bn.num_features, 8, 8)
    active = torch.relu(block.bn(x))
    torch.testing.assert_close(block(x), block.residual.body(active) + block.residual.shortcut(active))


def test_preactivated_nets_start_from_he() -> None:
    torch.manual_seed(0)
    conv = build("resnet164", input_size=8).features.stage3.block2.body.conv2.conv
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
