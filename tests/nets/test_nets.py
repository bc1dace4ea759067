"""What `build` and `parse` take and refuse, and how a net starts. What every net must do: test_conformance.py."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zoo import each_net, images, options, shapes, small

from aerogel.errors import AerogelError
from aerogel.nets import NETS, build, parse

BIASED = {"alexnet"}  # nets whose authors start some biases elsewhere than at 0


def each_net_with(option: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name in NETS if option in options(name)])


@each_net
def test_has_the_common_arguments_all_by_keyword_with_defaults(name: str) -> None:
    signature = inspect.signature(NETS[name]).parameters
    assert {"num_classes", "in_channels", "input_size"} <= set(signature)
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in signature.values())
    assert NETS[name].__name__ == name
    assert NETS[name].__doc__


@each_net_with("width")
def test_width_one_is_the_default_and_need_not_be_a_float(name: str) -> None:
    with torch.device("meta"):
        assert shapes(build(name, width=1)) == shapes(build(name))


@each_net
def test_spec_rebuilds_it_on_the_meta_device_ready_for_its_weights(name: str) -> None:
    net = small(name).eval()
    spec = json.loads(json.dumps(net.spec))
    assert spec == net.spec
    assert set(spec["args"]) == options(name)
    with torch.device("meta"):
        again = build(spec["net"], **spec["args"]).eval()
    assert all(tensor.is_meta for tensor in again.state_dict().values())
    assert shapes(again) == shapes(net)
    assert again.spec == net.spec
    again.load_state_dict(net.state_dict(), assign=True)
    x = images(net)
    torch.testing.assert_close(again(x), net(x), rtol=0, atol=0)


@each_net
def test_the_seed_decides_the_weights(name: str) -> None:
    one, same = small(name).state_dict(), small(name).state_dict()
    torch.manual_seed(1)
    spec = small(name).spec
    torch.manual_seed(1)
    other = build(name, **spec["args"]).state_dict()
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", [name for name in NETS if name not in BIASED])
def test_biases_start_at_zero(name: str) -> None:
    biases = [p for key, p in small(name).named_parameters() if key.endswith("bias")]
    assert biases
    assert all(p.eq(0).all() for p in biases)


@each_net_with("bn_eps")
def test_norms_take_their_constants(name: str) -> None:
    norms = [m for m in small(name, bn_eps=0.002, bn_momentum=0.03).modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert {(m.eps, m.momentum) for m in norms} == {(0.002, 0.03)}


BAD = [
    ("num_classes", 0),
    ("num_classes", True),
    ("num_classes", 10.0),
    ("num_classes", "ten"),
    ("in_channels", 0),
    ("input_size", 0),
    ("input_size", [28, 28]),
    ("width", 0),
    ("width", -0.5),
    ("width", float("nan")),
    ("width", float("inf")),
    ("width", "abc"),
    ("width", True),
    ("dropout", 1.0),
    ("dropout", -0.1),
    ("bn_eps", 0.0),
    ("bn_momentum", 0.0),
    ("bn_momentum", 1.5),
    ("batch_norm", 1),
    ("conv_relu", "yes"),
    ("head", "mnist"),
    ("head", ["cifar"]),
    ("depthwise", "no"),
    ("activation", "gelu"),
    ("minimalistic", 0),
    ("last_stage", "late"),
    ("last_channels", 0),
    ("growth", 0.5),
    ("lrn", 1),
    ("widths", "0-5"),
    ("widths", "300-"),
    ("widths", True),
    ("widths", -3),
    ("input_dropout", 1.0),
    ("max_norm", 0),
]


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [(name, argument, value) for name in NETS for argument, value in BAD if argument in options(name)],
)
def test_a_bad_argument_is_named(name: str, argument: str, value: object) -> None:
    with pytest.raises(AerogelError, match=rf"^{name}: {argument} must be .*got ") as caught:
        build(name, **{argument: value})
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "smallest"),
    [
        ("lenet5", 16),
        ("vgg11", 16),
        ("vgg11:head=imagenet", 32),
        ("resnet18", 8),
        ("resnet20", 8),
        ("resnet164", 8),
        ("densenet40", 8),
        ("densenet121", 8),
        ("mobilenet_v1", 8),
        ("mobilenet_v2", 8),
        ("mobilenet_v3_small", 8),
        ("mobilenet_v3_large:last_stage=original", 8),
        ("mnasnet_small", 8),
        ("alexnet", 8),
        ("lenet_300_100", 1),
        ("mlp", 1),
    ],
)
def test_the_smallest_image_works_and_a_smaller_one_is_refused(spec: str, smallest: int) -> None:
    name, arguments = parse(spec)
    net = small(name, **arguments, input_size=smallest).eval()
    assert net(images(net)).shape == (4, 10)
    with pytest.raises(AerogelError, match=f"{name}: input_size must be .*got {smallest - 1}"):
        build(name, **arguments, input_size=smallest - 1)


def test_an_unknown_net_is_answered_with_the_nearest() -> None:
    with pytest.raises(AerogelError, match=r"no net is called 'resnet19'; did you mean .*resnet18"):
        build("resnet19")
    with pytest.raises(AerogelError, match="known: alexnet, densenet121, densenet40"):
        build("zzz")


def test_an_unknown_argument_is_answered_with_the_nearest() -> None:
    with pytest.raises(AerogelError, match=r"vgg16 has no argument 'widht'; did you mean .*width"):
        build("vgg16", widht=0.5)
    with pytest.raises(AerogelError, match="lenet5 has no argument 'width'"):
        build("lenet5", width=0.5)


def test_a_net_put_into_the_dict_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(*, units: int = 2) -> nn.Module:
        return nn.Linear(3, units)

    monkeypatch.setitem(NETS, "tiny", tiny)
    assert build("tiny", units=5).spec == {"net": "tiny", "args": {"units": 5}}


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("lenet5", "lenet5", {}),
        ("mobilenet_v2:width=0.5,num_classes=10", "mobilenet_v2", {"width": 0.5, "num_classes": 10}),
        ("vgg16:batch_norm=false,head=cifar", "vgg16", {"batch_norm": False, "head": "cifar"}),
        ("vgg16:batch_norm=true,bn_eps=1e-3", "vgg16", {"batch_norm": True, "bn_eps": 0.001}),
        (" a : b = 1 , c = -2 ", "a", {"b": 1, "c": -2}),
        ("a:b=True", "a", {"b": "True"}),
    ],
)
def test_parse(text: str, name: str, arguments: dict[str, object]) -> None:
    parsed = parse(text)
    assert parsed == (name, arguments)
    assert [type(value) for value in parsed[1].values()] == [type(value) for value in arguments.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no name"),
        (":width=1", "has no name"),
        ("a:", "'' is not KEY=VALUE"),
        ("a:width", "'width' is not KEY=VALUE"),
        ("a:width=", "'width=' is not KEY=VALUE"),
        ("a:=1", "'=1' is not KEY=VALUE"),
        ("a:b=1,", "'' is not KEY=VALUE"),
        ("a:b=c=1", "'b=c=1' is not KEY=VALUE"),
        ("a:b=1,b=2", "'b' twice"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(AerogelError, match=f"nets.parse: .*{message}"):
        parse(text)


def test_a_word_for_a_number_is_refused_when_built() -> None:
    name, arguments = parse("mobilenet_v2:width=abc")
    with pytest.raises(AerogelError, match="mobilenet_v2: width must be a number > 0, got 'abc'"):
        build(name, **arguments)


value = st.one_of(
    st.integers(),
    st.floats(allow_nan=False),
    st.booleans(),
    st.from_regex(r"[a-su-z_][a-z_/.]{0,8}", fullmatch=True).filter(lambda s: s not in ("false", "nan", "inf")),
)


@given(st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True), value))
def test_parse_reads_back_what_was_written(arguments: dict[str, Any]) -> None:
    words = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in arguments.items()]
    assert parse(":".join(["net", ",".join(words)]) if words else "net") == ("net", arguments)
