"""What the papers say: exact parameters and MACs, and where strides, residuals and activations sit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from aerogel.nets import build, parse
from aerogel.nets.blocks import Net, Residual, make_divisible, scaled
from aerogel.nets.mobilenet_v2 import TABLE_2


def on_meta(spec: str) -> tuple[nn.Module, torch.Tensor]:
    """The net without memory for its weights, and one image for it."""
    name, arguments = parse(spec)
    with torch.device("meta"):
        net = build(name, **arguments).eval()
        resolved = net.spec["args"]
        return net, torch.empty(1, resolved["in_channels"], resolved["input_size"], resolved["input_size"])


def sides(net: nn.Module, x: torch.Tensor) -> list[int]:
    """The height of the image after each child of `features`."""
    after = []
    for child in net.features:
        x = child(x)
        after.append(x.shape[2])
    return after


def convolutions(net: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}


@pytest.mark.parametrize(
    ("spec", "params", "macs"),
    [
        ("lenet_300_100", 266_610, 266_200),
        ("lenet5", 431_080, 2_293_000),
        ("vgg11:batch_norm=false", 132_863_336, 7_609_090_048),
        ("vgg13:batch_norm=false", 133_047_848, 11_308_466_176),
        ("vgg16:batch_norm=false", 138_357_544, 15_470_264_320),
        ("vgg19:batch_norm=false", 143_667_240, 19_632_062_464),
        ("vgg19:input_size=32,num_classes=10", 20_035_018, 398_136_320),
        ("resnet18", 11_689_512, 1_814_073_344),
        ("resnet34", 21_797_672, 3_663_761_408),
        ("resnet50", 25_557_032, 4_089_184_256),
        ("resnet20", 272_474, 40_813_184),
        ("resnet56", 855_770, 125_747_840),
        ("mobilenet_v2:width=0.35", 1_677_128, 59_285_808),
        ("mobilenet_v2:width=0.5", 1_968_680, 97_131_840),
        ("mobilenet_v2:width=0.75", 2_636_424, 209_069_792),
        ("mobilenet_v2", 3_504_872, 300_774_272),
        ("mobilenet_v2:width=1.4", 6_108_776, 582_195_824),
    ],
)
def test_parameters_and_macs(spec: str, params: int, macs: int) -> None:
    net, x = on_meta(spec)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    assert sum(p.numel() for p in net.parameters()) == params
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("lenet5", [24, 12, 8, 4]),
        ("vgg16", [112, 56, 28, 14, 7]),
        ("vgg16:input_size=32", [16, 8, 4, 2, 2]),
        ("vgg16:input_size=28", [14, 7, 3, 1, 1]),
        ("vgg16:input_size=32,head=imagenet", [16, 8, 4, 2, 1]),
        ("resnet18", [56, 56, 28, 14, 7]),
        ("resnet50:input_size=64", [16, 16, 8, 4, 2]),
        ("resnet18:input_size=32", [32, 32, 16, 8, 4]),
        ("resnet56", [32, 32, 16, 8]),
        ("mobilenet_v2", [112, 112, 56, 28, 14, 14, 7, 7, 7]),
        ("mobilenet_v2:input_size=32", [32, 32, 32, 16, 8, 8, 4, 4, 4]),
    ],
)
def test_image_sides_along_the_net(spec: str, expected: list[int]) -> None:
    assert sides(*on_meta(spec)) == expected


def test_features_can_be_tapped_by_name() -> None:
    net, x = on_meta("resnet18:input_size=32")
    assert isinstance(net, Net)
    assert list(dict(net.features.named_children())) == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert list(dict(net.classifier.named_children())) == ["pool", "flatten", "fc"]
    seen = []
    net.get_submodule("features.stage2").register_forward_hook(lambda *call: seen.append(call[2].shape))
    net(x)
    assert seen == [(1, 128, 16, 16)]


# --- LeNet ---


def test_lenet5_has_one_relu_and_two_more_on_request() -> None:
    def relus(spec: str) -> list[str]:
        return [key for key, m in on_meta(spec)[0].named_modules() if isinstance(m, nn.ReLU)]

    assert relus("lenet5") == ["classifier.relu"]
    assert relus("lenet5:conv_relu=true") == ["features.relu1", "features.relu2", "classifier.relu"]


def test_lenet_weights_are_caffe_xavier() -> None:
    torch.manual_seed(0)
    weight = build("lenet_300_100").features.fc1.weight
    bound = math.sqrt(3 / 784)
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


# --- VGG ---


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("vgg11", [1, 1, 2, 2, 2]),
        ("vgg13", [2, 2, 2, 2, 2]),
        ("vgg16", [2, 2, 3, 3, 3]),
        ("vgg19", [2, 2, 4, 4, 4]),
    ],
)
def test_vgg_is_table_1(name: str, layers: list[int]) -> None:
    net, _ = on_meta(name)
    assert [len(convolutions(stage)) for stage in net.features] == layers
    assert sum(layers) + 3 == int(name.removeprefix("vgg"))
    for stage, channels in zip(net.features, [64, 128, 256, 512, 512], strict=True):
        assert {conv.out_channels for conv in convolutions(stage).values()} == {channels}
    assert {conv.kernel_size for conv in convolutions(net).values()} == {(3, 3)}


@pytest.mark.parametrize(
    ("spec", "unit"),
    [("vgg11", (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)), ("vgg11:batch_norm=false", (nn.Conv2d, nn.ReLU))],
)
def test_vgg_units_have_a_bias_or_a_norm(spec: str, unit: tuple[type, ...]) -> None:
    net, _ = on_meta(spec)
    units = [layer for stage in net.features for key, layer in stage.named_children() if key != "pool"]
    assert {tuple(type(m) for m in layer) for layer in units} == {unit}
    assert {conv.bias is None for conv in convolutions(net).values()} == {nn.BatchNorm2d in unit}


@pytest.mark.parametrize(
    ("spec", "rates"),
    [
        ("vgg11", [0.5, 0.5]),
        ("vgg11:dropout=0.1", [0.1, 0.1]),
        ("vgg11:input_size=32", [0.0]),
        ("vgg11:input_size=32,dropout=0.3", [0.3]),
        ("vgg11:input_size=63,head=imagenet", [0.5, 0.5]),
        ("vgg11:head=cifar", [0.0]),
        ("vgg11:input_size=64", [0.5, 0.5]),
        ("mobilenet_v2", [0.2]),
    ],
)
def test_dropout_and_head(spec: str, rates: list[float]) -> None:
    assert [m.p for m in on_meta(spec)[0].modules() if isinstance(m, nn.Dropout)] == rates


# --- ResNet ---


@pytest.mark.parametrize(("name", "blocks", "conv"), [("resnet34", 16, "conv1"), ("resnet50", 16, "conv2")])
def test_resnet_strides_sit_in_a_3x3(name: str, blocks: int, conv: str) -> None:
    net, _ = on_meta(name)
    strided = {key: c for key, c in convolutions(net).items() if c.stride == (2, 2)}
    assert list(strided) == [
        "features.stem.conv",
        *(f"features.stage{s}.block1.{p}" for s in (2, 3, 4) for p in (f"body.{conv}.conv", "shortcut.conv")),
    ]
    assert (net.features.stem.conv.kernel_size, net.features.stem.pool.kernel_size) == ((7, 7), 3)
    assert {c.kernel_size for key, c in strided.items() if ".body." in key} == {(3, 3)}
    assert {c.kernel_size for key, c in strided.items() if ".shortcut." in key} == {(1, 1)}
    assert sum(isinstance(m, Residual) for m in net.modules()) == blocks


@pytest.mark.parametrize(("spec", "projected"), [("resnet18", 3), ("resnet50", 4), ("resnet20", 2), ("resnet56", 2)])
def test_resnet_projects_only_where_the_shape_changes(spec: str, projected: int) -> None:
    residuals = [m for m in on_meta(spec)[0].modules() if isinstance(m, Residual)]
    assert sum(not isinstance(m.shortcut, nn.Identity) for m in residuals) == projected
    assert all(isinstance(m.act, nn.ReLU) for m in residuals)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20", "resnet56"])
def test_resnet_depth_is_its_name(name: str) -> None:
    net, _ = on_meta(name)
    weighted = [key for key in convolutions(net) if "shortcut" not in key]
    assert len(weighted) + 1 == int(name.removeprefix("resnet"))


# --- MobileNetV2 ---


def test_mobilenet_v2_projections_are_linear() -> None:
    net, _ = on_meta("mobilenet_v2")
    projections = [m for key, m in net.named_modules() if key.endswith(".project")]
    assert len(projections) == 17
    assert {tuple(type(m) for m in p) for p in projections} == {(nn.Conv2d, nn.BatchNorm2d)}
    assert all(isinstance(m.act, nn.Identity) for m in net.modules() if isinstance(m, Residual))
    units = [m for m in net.modules() if isinstance(m, nn.Sequential) and hasattr(m, "conv")]
    assert {type(m.act) for m in units if hasattr(m, "act")} == {nn.ReLU6}
    assert sum(not hasattr(m, "act") for m in units) == 17

    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    for name, child in build("mobilenet_v2", width=0.35, input_size=32).features.named_children():
        x = child(x)
        assert (x.min() < 0) == name.startswith("stage"), f"{name} ends with the wrong activation"


@pytest.mark.parametrize("spec", ["mobilenet_v2", "mobilenet_v2:width=0.35", "mobilenet_v2:input_size=32,width=0.35"])
def test_mobilenet_v2_adds_the_input_exactly_where_it_may(spec: str) -> None:
    net, _ = on_meta(spec)
    blocks = [block for name, stage in net.features.named_children() if "stage" in name for block in stage]
    assert len(blocks) == sum(row.n for row in TABLE_2)
    for block in blocks:
        convs = list(convolutions(block).values())
        equal = convs[0].in_channels == convs[-1].out_channels
        unstrided = all(conv.stride == (1, 1) for conv in convs)
        assert isinstance(block, Residual) == (equal and unstrided)
        assert [conv.groups for conv in convs][-2:] == [convs[-2].in_channels, 1]
    if spec == "mobilenet_v2":
        assert sum(isinstance(block, Residual) for block in blocks) == 10


def test_mobilenet_v2_strides_sit_in_the_depthwise_of_the_first_block() -> None:
    strided = [key for key, conv in convolutions(on_meta("mobilenet_v2")[0]).items() if conv.stride == (2, 2)]
    assert strided == [
        "features.stem.conv",
        *(f"features.stage{s}.block1.body.depthwise.conv" for s in (2, 3, 4, 6)),
    ]


@pytest.mark.parametrize(("width", "last"), [(0.35, 1280), (1.0, 1280), (1.4, 1792)])
def test_mobilenet_v2_last_convolution_never_shrinks(width: float, last: int) -> None:
    assert on_meta(f"mobilenet_v2:width={width}")[0].classifier.fc.in_features == last


# --- widths and initialisation ---


@given(st.floats(0.01, 1e5))
def test_make_divisible(channels: float) -> None:
    made = make_divisible(channels)
    assert made % 8 == 0
    assert made >= max(8, 0.9 * channels)
    assert made <= max(8, channels + 8)


def test_make_divisible_of_the_paper() -> None:
    assert [make_divisible(c * 0.35) for c in (16, 24, 32, 64, 96, 160, 320)] == [8, 8, 16, 24, 32, 56, 112]
    assert make_divisible(11) == 16  # 8 would lose more than 10 %


@given(st.integers(1, 4096))
def test_width_one_changes_nothing(channels: int) -> None:
    assert scaled(channels, 1.0) == channels


def test_he_initialisation() -> None:
    torch.manual_seed(0)
    net = build("resnet18", width=0.5)
    conv = net.features.stage4.block1.body.conv1.conv
    assert (conv.in_channels, conv.out_channels) == (128, 256)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.02)
    assert net.classifier.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
