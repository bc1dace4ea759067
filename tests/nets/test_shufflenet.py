"""ShuffleNet V1 and V2: the papers' numbers, where groups, shuffles, activations and joins sit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from aerogel.errors import AerogelError
from aerogel.nets import build, parse
from aerogel.nets.blocks import Residual, SqueezeExcite
from aerogel.nets.shufflenet_v1 import STAGE_2, ChannelShuffle, Concatenated, channel_shuffle
from aerogel.nets.shufflenet_v2 import Unit


def on_meta(spec: str) -> nn.Module:
    name, arguments = parse(spec)
    with torch.device("meta"):
        return build(name, **arguments).eval()


def image(net: nn.Module) -> torch.Tensor:
    arguments = net.spec["args"]
    return torch.empty(1, arguments["in_channels"], arguments["input_size"], arguments["input_size"], device="meta")


def macs(net: nn.Module) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(image(net))
    return counter.get_total_flops() // 2


def convolutions(net: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}


def units(net: nn.Module) -> dict[str, Any]:
    return {
        f"{name}.{key}": unit
        for name, stage in net.features.named_children()
        if name.startswith("stage")
        for key, unit in stage.named_children()
    }


def small(name: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return build(name, **({"width": 0.25, "num_classes": 10, "input_size": 28} | arguments)).eval()


# --- what the papers count ---

TABLE_1 = {"groups=1": 143, "groups=2": 140, "groups=3": 137, "groups=4": 133, "groups=8": 137}  # MFLOPs of V1


@pytest.mark.parametrize(
    ("spec", "params", "expected"),
    [
        ("shufflenet_v1:groups=1", 1_531_936, 143_078_976),
        ("shufflenet_v1:groups=2", 1_733_848, 140_836_512),
        ("shufflenet_v1:groups=3", 1_865_728, 137_460_672),
        ("shufflenet_v1:groups=4", 1_968_344, 134_339_776),
        ("shufflenet_v1:groups=8", 2_434_768, 138_365_952),
        ("shufflenet_v1:groups=1,width=0.5", 534_484, 38_517_408),
        ("shufflenet_v1:width=0.5", 718_324, 37_589_856),
        ("shufflenet_v1:groups=1,width=0.25", 209_746, 11_003_184),
        ("shufflenet_v1:width=0.25", 305_902, 11_009_808),
        ("shufflenet_v1:width=1.5", 3_442_168, 292_443_552),
        ("shufflenet_v1:width=2", 5_450_776, 524_045_184),
        ("shufflenet_v1:width=2,se=true", 7_910_083, 526_487_712),
        ("shufflenet_v2:width=0.5", 1_366_792, 40_476_448),
        ("shufflenet_v2", 2_278_604, 144_907_992),
        ("shufflenet_v2:width=1.5", 3_503_624, 295_759_392),
        ("shufflenet_v2:width=2", 7_393_996, 583_253_464),
        ("shufflenet_v2:layout=50", 16_573_534, 2_304_152_672),
        ("shufflenet_v2:layout=164,se=true,residual=true", 75_717_922, 12_541_354_352),
    ],
)
def test_parameters_and_macs(spec: str, params: int, expected: int) -> None:
    net = on_meta(spec)
    assert sum(p.numel() for p in net.parameters()) == params
    found = macs(net)
    assert found == expected
    in_the_paper = TABLE_1.get(spec.removeprefix("shufflenet_v1:"))
    assert in_the_paper in (None, round((found - net.classifier.fc.weight.numel()) / 1e6))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("shufflenet_v1", [56, 28, 14, 7]),
        ("shufflenet_v1:input_size=32", [32, 16, 8, 4]),
        ("shufflenet_v2", [56, 28, 14, 7, 7]),
        ("shufflenet_v2:input_size=28", [28, 14, 7, 4, 4]),
        ("shufflenet_v2:input_size=63", [63, 32, 16, 8, 8]),
        ("shufflenet_v2:layout=50", [56, 56, 28, 14, 7, 7]),
    ],
)
def test_image_sides_along_the_net(spec: str, expected: list[int]) -> None:
    net = on_meta(spec)
    x, after = image(net), []
    for child in net.features:
        x = child(x)
        after.append(x.shape[2])
    assert after == expected


# --- the shuffle ---


def test_channel_shuffle_is_the_transpose_of_groups_and_channels() -> None:
    x = torch.arange(12.0).view(1, 12, 1, 1).expand(2, 12, 3, 5)
    shuffled = channel_shuffle(x, 3)
    assert shuffled.shape == x.shape
    assert shuffled[1, :, 2, 4].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    inverse = channel_shuffle(x, 4)[0, :, 0, 0]
    assert inverse.tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]


@given(groups=st.integers(1, 8), per_group=st.integers(1, 9))
def test_channel_shuffle_by_the_other_factor_undoes_it(groups: int, per_group: int) -> None:
    x = torch.randn(2, groups * per_group, 2, 3)
    shuffled = channel_shuffle(x, groups)
    assert torch.equal(channel_shuffle(shuffled, per_group), x)
    for g in range(groups):
        assert torch.equal(shuffled[:, g::groups], x[:, g * per_group : (g + 1) * per_group])


# --- V1 ---


@pytest.mark.parametrize("groups", STAGE_2)
def test_v1_groups(groups: int) -> None:
    convs = convolutions(on_meta(f"shufflenet_v1:groups={groups}"))
    for key, conv in convs.items():
        if ".depthwise." in key:
            assert conv.groups == conv.in_channels == conv.out_channels
        elif key in ("features.stem.conv", "features.stage2.block1.body.reduce.conv"):
            assert conv.groups == 1, key
        else:
            assert conv.groups == groups, key
    assert len(convs) == 1 + 16 * 3
    strided = [key for key, conv in convs.items() if conv.stride == (2, 2)]
    assert strided == ["features.stem.conv", *(f"features.stage{s}.block1.body.depthwise.conv" for s in (2, 3, 4))]


@pytest.mark.parametrize(("arguments", "groups"), [("groups=8", 8), ("groups=1", None), ("shuffle=false", None)])
def test_v1_shuffles_between_the_first_1x1_and_the_depthwise(arguments: str, groups: int | None) -> None:
    for unit in units(on_meta(f"shufflenet_v1:{arguments}")).values():
        parts = [key for key, _ in unit.body.named_children() if key != "act"]
        assert parts == ["reduce", *(["shuffle"] if groups else []), "depthwise", "expand"]
        assert not groups or unit.body.shuffle.groups == groups


def test_v1_mixes_the_groups_only_by_the_shuffle() -> None:
    def reached(shuffle: bool) -> torch.Tensor:
        body = small("shufflenet_v1", groups=3, shuffle=shuffle).features.stage2.block2.body.double()
        x = torch.randn(1, 60, 4, 4, dtype=torch.double)
        changed = x.clone()
        changed[:, :20] += 1  # the first group of the input
        return (body(x) != body(changed)).any(dim=3).any(dim=2)[0].view(3, 20).any(dim=1)

    assert reached(shuffle=False).tolist() == [True, False, False]
    assert reached(shuffle=True).tolist() == [True, True, True]


@pytest.mark.parametrize("spec", ["shufflenet_v1", "shufflenet_v2", "shufflenet_v2:residual=true,se=true"])
def test_no_activation_after_a_depthwise(spec: str) -> None:
    depthwise = [m for key, m in on_meta(spec).named_modules() if key.endswith(".depthwise")]
    assert len(depthwise) == {"shufflenet_v1": 16}.get(spec, 19)
    assert {tuple(type(m) for m in layer) for layer in depthwise} == {(nn.Conv2d, nn.BatchNorm2d)}


def test_v1_joins() -> None:
    found = units(on_meta("shufflenet_v1"))
    assert [type(unit) for unit in found.values()] == [
        Concatenated if index == 0 else Residual for count in (4, 8, 4) for index in range(count)
    ]
    for unit in found.values():
        if isinstance(unit, Residual):
            assert isinstance(unit.act, nn.ReLU)
            assert isinstance(unit.shortcut, nn.Identity)
            assert not hasattr(unit.body.expand, "act")
    net = small("shufflenet_v1", groups=2)
    x = net.features.stem(torch.randn(2, 3, 28, 28))
    out = net.features.stage2.block1(x)
    assert torch.equal(out[:, : x.shape[1]], nn.functional.avg_pool2d(x, 3, stride=2, padding=1))
    assert out.shape == (2, 48, 14, 14)
    assert out.min() == 0
    inside = net.features.stage2.block2
    assert torch.equal(inside(out), (inside.body(out) + out).relu())


@pytest.mark.parametrize(
    ("groups", "width", "stem", "stage2"),
    [
        (1, 0.25, 6, 36),
        (3, 0.25, 6, 60),
        (8, 0.25, 8, 96),
        (3, 0.5, 12, 120),
        (8, 0.5, 16, 192),
        (4, 0.5, 12, 144),
        (3, 1.5, 24, 360),
        (8, 1.5, 24, 576),
        (3, 2, 48, 480),
        (2, 0.01, 2, 8),
    ],
)
def test_v1_widths(groups: int, width: float, stem: int, stage2: int) -> None:
    net = on_meta(f"shufflenet_v1:groups={groups},width={width}")
    assert net.features.stem.conv.out_channels == stem
    assert net.features.stage2.block2.body.expand.conv.out_channels == stage2
    assert net.classifier.fc.in_features == 4 * stage2


# --- V2 ---


def test_v2_halves_and_shuffles_as_torchvision_does() -> None:
    stage = small("shufflenet_v2").features.stage2
    x = torch.randn(2, 24, 28, 28)
    first = stage.block1(x)
    assert torch.equal(first[:, 0::2], stage.block1.shortcut(x))
    assert torch.equal(first[:, 1::2], stage.block1.body(x))
    second = stage.block2(first)
    kept, taken = first[:, :12], first[:, 12:]
    assert torch.equal(second[:, 0::2], kept)
    assert torch.equal(second[:, 1::2], stage.block2.body(taken))


@pytest.mark.parametrize(
    ("spec", "stem", "stages", "last"),
    [
        ("shufflenet_v2:width=0.25", [24], [(24, 4), (48, 8), (96, 4)], 1024),
        ("shufflenet_v2:width=0.5", [24], [(48, 4), (96, 8), (192, 4)], 1024),
        ("shufflenet_v2:width=0.75", [24], [(88, 4), (176, 8), (352, 4)], 1024),
        ("shufflenet_v2", [24], [(116, 4), (232, 8), (464, 4)], 1024),
        ("shufflenet_v2:width=1.5", [24], [(176, 4), (352, 8), (704, 4)], 1024),
        ("shufflenet_v2:width=2", [24], [(244, 4), (488, 8), (976, 4)], 2048),
        ("shufflenet_v2:width=3", [24], [(368, 4), (736, 8), (1472, 4)], 2048),
        ("shufflenet_v2:layout=50", [64], [(244, 3), (488, 4), (976, 6), (1952, 3)], 2048),
        ("shufflenet_v2:layout=50,width=0.5", [64], [(124, 3), (248, 4), (496, 6), (992, 3)], 1024),
        ("shufflenet_v2:layout=164", [64, 64, 128], [(340, 10), (680, 10), (1360, 23), (2720, 10)], 2048),
    ],
)
def test_v2_layouts(spec: str, stem: list[int], stages: list[tuple[int, int]], last: int) -> None:
    net = on_meta(spec)
    assert [conv.out_channels for conv in convolutions(net.features.stem).values()] == stem
    found = [stage for name, stage in net.features.named_children() if name.startswith("stage")]
    assert [(2 * stage.block1.body.reduce.conv.out_channels, len(stage)) for stage in found] == stages
    assert net.classifier.fc.in_features == last


def test_v2_only_depthwise_convolutions_are_grouped() -> None:
    for key, conv in convolutions(on_meta("shufflenet_v2")).items():
        assert conv.groups == (conv.in_channels if ".depthwise." in key else 1), key


def test_v2_residual_adds_the_half_that_is_computed_on() -> None:
    found = units(on_meta("shufflenet_v2:residual=true"))
    assert {key: isinstance(unit.body, Residual) for key, unit in found.items()} == {
        key: not key.endswith("block1") for key in found
    }
    net = small("shufflenet_v2", residual=True)
    unit, x = net.features.stage2.block2, torch.randn(2, 24, 4, 4)
    assert torch.equal(unit(x)[:, 1::2], (unit.body.body(x[:, 12:]) + x[:, 12:]).relu())
    plain = sum(p.numel() for p in small("shufflenet_v2").parameters())
    assert sum(p.numel() for p in net.parameters()) == plain


@pytest.mark.parametrize("spec", ["shufflenet_v1:", "shufflenet_v2:", "shufflenet_v2:residual=true,"])
def test_squeeze_excite_ends_what_every_unit_computes(spec: str) -> None:
    for unit in units(on_meta(spec + "se=true")).values():
        body = unit.body.body if isinstance(unit.body, Residual) else unit.body
        parts = {key: module for key, module in body.named_children() if key != "act"}
        assert list(parts)[-1] == "se"
        assert isinstance(parts["se"], SqueezeExcite)
        assert parts["se"].reduce.out_channels == parts["expand"].conv.out_channels // 16
    assert not any(isinstance(module, SqueezeExcite) for module in on_meta(spec + "se=false").modules())


@pytest.mark.parametrize("spec", ["shufflenet_v1:", "shufflenet_v2:", "shufflenet_v2:layout=50,"])
def test_the_smallest_image_works_and_a_smaller_one_is_refused(spec: str) -> None:
    net = on_meta(spec + "input_size=8,width=0.25")
    assert net(image(net)).shape == (1, 1000)
    with pytest.raises(AerogelError, match="input_size must be >= 8, got 7"):
        on_meta(spec + "input_size=7")


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("shufflenet_v1", "groups", 5),
        ("shufflenet_v1", "groups", True),
        ("shufflenet_v1", "groups", 3.0),
        ("shufflenet_v1", "shuffle", 1),
        ("shufflenet_v1", "se", "yes"),
        ("shufflenet_v2", "se", 0),
        ("shufflenet_v2", "residual", None),
        ("shufflenet_v2", "merged", "no"),
        ("shufflenet_v2", "layout", "101"),
        ("shufflenet_v2", "layout", ["50"]),
    ],
)
def test_a_bad_argument_is_named(name: str, argument: str, value: object) -> None:
    with pytest.raises(AerogelError, match=rf"^{name}: {argument} must be .*got ") as caught:
        build(name, **{argument: value})
    assert repr(value) in str(caught.value)


def test_layout_may_be_a_number() -> None:
    with torch.device("meta"):
        nets = [build("shufflenet_v2", layout=layout) for layout in (50, "50")]  # 50 is what `parse` reads
    one, other = ({key: tensor.shape for key, tensor in net.state_dict().items()} for net in nets)
    assert one == other


def test_units_are_named_for_taps() -> None:
    net = on_meta("shufflenet_v2")
    assert list(dict(net.features.named_children())) == ["stem", "stage2", "stage3", "stage4", "last"]
    assert isinstance(net.get_submodule("features.stage3.block8"), Unit)
    assert isinstance(on_meta("shufflenet_v1").get_submodule("features.stage3.block8.body.shuffle"), ChannelShuffle)
