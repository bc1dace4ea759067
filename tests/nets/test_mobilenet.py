"""MobileNetV1, V3 and MnasNet: exact counts, and what tells each from the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_paper import count
from test_structure import convolutions, on_meta, sides
from torch import nn

from aerogel.nets import build
from aerogel.nets.blocks import Residual, SqueezeExcite, strides_for
from aerogel.nets.mnasnet import A1, B1, SMALL
from aerogel.nets.mobilenet_v3 import TABLE_1, TABLE_2

V3 = [("mobilenet_v3_large", TABLE_1), ("mobilenet_v3_small", TABLE_2)]
MNASNET = [("mnasnet_a1", A1), ("mnasnet_b1", B1), ("mnasnet_small", SMALL)]


def blocks(net: nn.Module) -> list[Any]:
    """The blocks of all stages, in order."""
    return [block for name, stage in net.features.named_children() if "stage" in name for block in stage]


def activations(net: nn.Module) -> set[type]:
    kinds = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid)
    return {type(m) for m in net.modules() if isinstance(m, kinds)}


def strided(net: nn.Module) -> list[str]:
    return [key.removeprefix("features.") for key, conv in convolutions(net).items() if conv.stride == (2, 2)]


def squeezed(net: nn.Module) -> list[int]:
    """What squeeze-and-excite reduces to, block by block; 0 where there is none."""
    return [block.body.se.reduce.out_channels if hasattr(block.body, "se") else 0 for block in blocks(net)]


@pytest.mark.parametrize(
    ("spec", "params", "macs"),
    [
        ("mobilenet_v1", 4_231_976, 568_740_352),
        ("mobilenet_v1:width=0.75", 2_585_560, 325_400_448),
        ("mobilenet_v1:width=0.5", 1_331_592, 149_497_088),
        ("mobilenet_v1:width=0.25", 470_072, 41_030_272),
        ("mobilenet_v1:input_size=192", 4_231_976, 418_121_728),
        ("mobilenet_v1:width=0.75,input_size=192", 2_585_560, 239_273_472),
        ("mobilenet_v1:width=0.5,input_size=192", 1_331_592, 109_970_432),
        ("mobilenet_v1:width=0.25,input_size=192", 470_072, 30_212_608),
        ("mobilenet_v1:input_size=160", 4_231_976, 290_675_200),
        ("mobilenet_v1:width=0.75,input_size=160", 2_585_560, 166_396_800),
        ("mobilenet_v1:width=0.5,input_size=160", 1_331_592, 76_524_800),
        ("mobilenet_v1:width=0.25,input_size=160", 470_072, 21_059_200),
        ("mobilenet_v1:input_size=128", 4_231_976, 186_400_768),
        ("mobilenet_v1:width=0.75,input_size=128", 2_585_560, 106_770_432),
        ("mobilenet_v1:width=0.5,input_size=128", 1_331_592, 49_160_192),
        ("mobilenet_v1:width=0.25,input_size=128", 470_072, 13_570_048),
        ("mobilenet_v1:depthwise=false", 29_294_088, 4_867_293_184),
        ("mobilenet_v3_large", 5_483_032, 216_589_760),
        ("mobilenet_v3_large:width=0.75", 3_993_528, 154_560_624),
        ("mobilenet_v3_large:minimalistic=true", 3_924_288, 209_136_704),
        ("mobilenet_v3_large:last_stage=original", 4_983_512, 250_907_520),
        ("mobilenet_v3_small", 2_542_856, 56_510_400),
        ("mobilenet_v3_small:width=0.75", 2_041_872, 43_399_344),
        ("mobilenet_v3_small:width=0.5", 1_593_224, 24_188_688),
        ("mobilenet_v3_small:last_channels=1280", 2_946_568, 56_913_856),
        ("mobilenet_v3_small:minimalistic=true", 2_044_736, 52_288_448),
        ("mnasnet_a1", 3_887_038, 311_579_072),
        ("mnasnet_a1:width=0.5", 2_082_006, 103_162_992),
        ("mnasnet_a1:width=0.75", 2_912_278, 223_448_480),
        ("mnasnet_a1:width=1.4", 6_105_992, 586_317_952),
        ("mnasnet_b1", 4_383_312, 314_415_872),
        ("mnasnet_b1:width=0.5", 2_218_512, 104_455_968),
        ("mnasnet_b1:width=1.3", 6_282_256, 526_362_432),
        ("mnasnet_small", 2_030_264, 68_339_184),
    ],
)
def test_parameters_and_macs(spec: str, params: int, macs: int) -> None:
    assert count(spec) == (params, macs)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("mobilenet_v1", [112, 112, 56, 28, 14, 7]),
        ("mobilenet_v1:input_size=32", [32, 32, 32, 16, 8, 4]),
        ("mobilenet_v3_large", [112, 112, 56, 28, 14, 14, 7, 7]),
        ("mobilenet_v3_large:input_size=32", [32, 32, 32, 16, 8, 8, 4, 4]),
        ("mobilenet_v3_small", [112, 56, 28, 14, 14, 7, 7]),
        ("mobilenet_v3_small:input_size=32", [32, 32, 16, 8, 8, 4, 4]),
        ("mnasnet_a1", [112, 112, 56, 28, 14, 14, 7, 7, 7]),
        ("mnasnet_a1:input_size=32", [32, 32, 32, 16, 8, 8, 4, 4, 4]),
    ],
)
def test_image_sides_along_the_net(spec: str, expected: list[int]) -> None:
    assert sides(*on_meta(spec)) == expected


@given(st.integers(64, 512), st.lists(st.sampled_from([1, 2]), max_size=9))
def test_large_images_keep_their_strides(size: int, strides: list[int]) -> None:
    assert strides_for(size, strides) == strides


@given(st.integers(1, 63), st.lists(st.sampled_from([1, 2]), max_size=9))
def test_small_images_lose_the_first_two_halvings(size: int, strides: list[int]) -> None:
    small = strides_for(size, strides)
    halvings = [index for index, stride in enumerate(strides) if stride == 2]
    assert len(small) == len(strides)
    assert [index for index, stride in enumerate(small) if stride == 2] == halvings[2:]


# --- MobileNetV1 ---


def test_v1_down_samples_by_the_depthwise_convolution() -> None:
    assert strided(on_meta("mobilenet_v1")[0]) == [
        "stem.conv",
        *(f"stage{s}.block1.depthwise.conv" for s in (2, 3, 4, 5)),
    ]


@pytest.mark.parametrize(("option", "act"), [("", nn.ReLU6), ("activation=relu,", nn.ReLU)])
def test_v1_normalises_and_activates_after_every_convolution(option: str, act: type) -> None:
    net, _ = on_meta(f"mobilenet_v1:{option}width=1")
    units = [m for m in net.modules() if hasattr(m, "conv")]
    assert len(units) == 27  # the stem and thirteen pairs; with the linear layer, the paper's 28 layers
    assert {tuple(type(m) for m in unit) for unit in units} == {(nn.Conv2d, nn.BatchNorm2d, act)}
    assert not any(isinstance(m, Residual) for m in net.modules())


def test_v1_pairs_cost_what_the_paper_says_of_full_convolutions() -> None:
    """1 / channels + 1 / 9 of the multiply-adds, pair by pair; the images are of the same size."""
    pairs, full = blocks(on_meta("mobilenet_v1")[0]), blocks(on_meta("mobilenet_v1:depthwise=false")[0])
    for pair, unit in zip(pairs, full, strict=True):
        weights = pair.depthwise.conv.weight.numel() + pair.pointwise.conv.weight.numel()
        assert unit.conv.kernel_size == (3, 3)
        assert unit.conv.groups == 1
        assert unit.conv.stride == pair.depthwise.conv.stride
        assert weights / unit.conv.weight.numel() == pytest.approx(1 / unit.conv.out_channels + 1 / 9)
    assert count("mobilenet_v1:depthwise=false")[1] / count("mobilenet_v1")[1] == pytest.approx(8.56, abs=0.01)


# --- MobileNetV3 ---


@pytest.mark.parametrize(("name", "table"), V3)
def test_v3_blocks_are_the_papers_rows(name: str, table: tuple[Any, ...]) -> None:
    acts = {"RE": nn.ReLU, "HS": nn.Hardswish}
    for block, row in zip(blocks(on_meta(name)[0]), table, strict=True):
        depthwise, project = block.body.depthwise, block.body.project
        assert depthwise.conv.kernel_size == (row.kernel, row.kernel)
        assert depthwise.conv.out_channels == depthwise.conv.groups == row.exp
        assert depthwise.conv.stride == (row.s, row.s)
        assert project.conv.out_channels == row.out
        assert type(depthwise.act) is acts[row.NL]
        assert hasattr(block.body, "se") == row.SE
        assert hasattr(block.body, "expand") == (row.exp > 16)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mobilenet_v3_large", [0, 0, 0, 24, 32, 32, 0, 0, 0, 0, 120, 168, 168, 240, 240]),
        ("mobilenet_v3_small", [8, 0, 0, 24, 64, 64, 32, 40, 72, 144, 144]),
        ("mnasnet_a1", [0, 0, 0, 6, 10, 10, 0, 0, 0, 0, 20, 28, 28, 40, 40, 0]),
        ("mnasnet_b1", [0] * 17),
        ("mnasnet_small", [0, 0, 0, 0, 4, 8, 8, 8, 8, 8, 8, 8, 22, 22, 0]),
    ],
)
def test_squeeze_and_excite_is_where_and_as_wide_as_the_paper_says(name: str, expected: list[int]) -> None:
    """V3: a quarter of the expansion, to multiples of 8. MnasNet: a quarter of the block's input channels."""
    assert squeezed(on_meta(name)[0]) == expected


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("mobilenet_v3_large", nn.Hardsigmoid),
        ("mobilenet_v3_small", nn.Hardsigmoid),
        ("mnasnet_a1", nn.Sigmoid),
        ("mnasnet_small", nn.Sigmoid),
    ],
)
def test_squeeze_and_excite_follows_the_activation_of_the_depthwise(name: str, gate: type) -> None:
    gated = [block.body for block in blocks(on_meta(name)[0]) if hasattr(block.body, "se")]
    for body in gated:
        assert [key for key, _ in body.named_children()][-3:] == ["depthwise", "se", "project"]
        assert [key for key, _ in body.depthwise.named_children()] == ["conv", "bn", "act"]
        assert type(body.se.act) is nn.ReLU
        assert type(body.se.gate) is gate


def test_squeeze_excite_is_its_formula() -> None:
    torch.manual_seed(0)
    se, x = SqueezeExcite(6, 2, nn.Hardsigmoid), torch.randn(3, 6, 4, 5)
    hidden = torch.relu(x.mean((2, 3)) @ se.reduce.weight[:, :, 0, 0].T + se.reduce.bias)
    gate = ((hidden @ se.expand.weight[:, :, 0, 0].T + se.expand.bias + 3).clamp(0, 6)) / 6
    torch.testing.assert_close(se(x), x * gate[:, :, None, None])


@pytest.mark.parametrize("name", [name for name, _ in V3 + MNASNET])
def test_projections_are_linear_and_inputs_are_added_where_the_shape_stays(name: str) -> None:
    net, _ = on_meta(name)
    channels = net.features.stem.conv.out_channels
    for index, block in enumerate(blocks(net)):
        depthwise, project = block.body.depthwise, block.body.project
        assert [type(m) for m in project] == [nn.Conv2d, nn.BatchNorm2d]
        same = channels == project.conv.out_channels and depthwise.conv.stride == (1, 1)
        assert isinstance(block, Residual) == (same and (name, index) != ("mnasnet_small", 0))  # that one is noskip
        channels = project.conv.out_channels
    assert all(isinstance(m.act, nn.Identity) for m in net.modules() if isinstance(m, Residual))


@pytest.mark.parametrize("name", ["mobilenet_v3_large", "mobilenet_v3_small"])
def test_v3_minimalistic_has_no_gates_no_h_swish_and_no_5x5(name: str) -> None:
    whole, plain = on_meta(name)[0], on_meta(f"{name}:minimalistic=true")[0]
    assert activations(whole) == {nn.ReLU, nn.Hardswish, nn.Hardsigmoid}
    assert activations(plain) == {nn.ReLU}
    assert not any(squeezed(plain))
    assert {conv.kernel_size for conv in convolutions(whole).values()} == {(1, 1), (3, 3), (5, 5)}
    assert {conv.kernel_size for conv in convolutions(plain).values()} == {(1, 1), (3, 3)}
    channels = [[b.body.project.conv.out_channels for b in blocks(net)] for net in (whole, plain)]
    assert channels[0] == channels[1]


def test_v3_last_stage_saves_the_papers_30_million() -> None:
    """The original one: depthwise and projection to 320 at 7 x 7, 1280 features there too, then the pooling."""
    efficient, original = (on_meta(f"mobilenet_v3_large:last_stage={kind}")[0] for kind in ("efficient", "original"))
    assert [type(m) for m in efficient.features.last] == [nn.Conv2d, nn.BatchNorm2d, nn.Hardswish]
    assert efficient.features.last.conv.weight.shape == (960, 160, 1, 1)
    assert list(dict(efficient.classifier.named_children())) == ["pool", "flatten", "last", "act", "dropout", "fc"]
    assert efficient.classifier.last.weight.shape == (1280, 960)
    assert type(efficient.classifier.act) is nn.Hardswish

    body = original.features.bottleneck.body
    assert [m.conv.weight.shape[:2] for m in body] == [(960, 160), (960, 1), (320, 960)]
    assert body.depthwise.conv.kernel_size == (3, 3)
    assert original.features.last.conv.weight.shape == (1280, 320, 1, 1)
    assert list(dict(original.classifier.named_children())) == ["pool", "flatten", "dropout", "fc"]

    saved = count("mobilenet_v3_large:last_stage=original")[1] - count("mobilenet_v3_large")[1]
    assert saved == 7 * 7 * (960 * 9 + 960 * 320 + 320 * 1280) - 960 * 1280
    assert 30e6 < saved < 35e6


def test_v3_stem_and_last_layer_do_not_shrink() -> None:
    net, _ = on_meta("mobilenet_v3_small:width=0.5")
    assert net.features.stem.conv.out_channels == 16
    assert net.features.last.conv.out_channels == 288
    assert net.classifier.last.out_features == 1024
    wide, _ = on_meta("mobilenet_v3_large:width=1.25")
    assert (wide.features.stem.conv.out_channels, wide.classifier.last.out_features) == (24, 1600)


@pytest.mark.parametrize("name", [name for name, _ in V3 + MNASNET])
def test_norms_have_the_official_constants(name: str) -> None:
    norms = [m for m in on_meta(name)[0].modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


# --- MnasNet ---


@pytest.mark.parametrize(("name", "table"), MNASNET)
def test_mnasnet_stages_are_the_published_strings(name: str, table: tuple[Any, ...]) -> None:
    net, _ = on_meta(name)
    stages = [stage for key, stage in net.features.named_children() if "stage" in key]
    channels = net.features.stem.conv.out_channels
    for stage, row in zip(stages, table, strict=True):
        assert len(stage) == row.r
        for index, block in enumerate(stage):
            depthwise = block.body.depthwise.conv
            assert depthwise.kernel_size == (row.k, row.k)
            assert depthwise.stride == ((row.s, row.s) if index == 0 else (1, 1))
            assert depthwise.groups == channels * row.e
            assert block.body.project.conv.out_channels == row.o
            assert hasattr(block.body, "expand") == (row.e > 1)
            channels = row.o
    assert net.features.last.conv.out_channels == 1280


def test_mnasnet_has_plain_relus() -> None:
    assert activations(on_meta("mnasnet_a1")[0]) == {nn.ReLU, nn.Sigmoid}
    assert activations(on_meta("mnasnet_b1")[0]) == {nn.ReLU}


def test_mnasnet_adds_no_input_where_its_string_says_noskip() -> None:
    """At width 0.25 stem and first stage have 8 channels each: MobileNetV2 adds the input, MnasNet does not."""
    assert isinstance(build("mobilenet_v2", width=0.25).features.stage1.block1, Residual)
    for name, width in (("mnasnet_a1", 0.25), ("mnasnet_b1", 0.25), ("mnasnet_small", 1.0)):
        features = build(name, width=width).features
        assert features.stem.conv.out_channels == features.stage1.block1.body.project.conv.out_channels == 8
        assert not isinstance(features.stage1.block1, Residual)
