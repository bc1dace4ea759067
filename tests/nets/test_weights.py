"""Checkpoints of torchvision and timm in our nets: the same answers, and refusals that name the key.

goldens/checkpoints.json holds, for each library's own net, the preprocessing of its default checkpoint, its keys with
their shapes and its first 16 logits under the weights that `weight` makes from a key's name;
`goldens/make_checkpoints.py` made it with those libraries.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aerogel import nets
from aerogel.errors import AerogelError
from aerogel.nets.weights import LAYOUTS, load_weights

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "checkpoints.json").read_text())


def weight(key: str, shape: list[int]) -> torch.Tensor:
    """Weights that depend on a key's name alone, of a size that keeps signals alive through depth."""
    random = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if key.endswith("running_var") or (len(shape) == 1 and key.endswith("weight")):
        values = random.uniform(0.5, 1.5, shape)
    elif len(shape) == 1:
        values = random.standard_normal(shape) * 0.2
    else:
        values = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))


def image() -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(0).standard_normal((1, 3, 64, 64)).astype(np.float32))


def checkpoint(golden: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: weight(key, shape) for key, shape in golden["keys"]}


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda g: f"{g['source']}-{g['net']}-{g['args']}")
def test_a_librarys_checkpoint_gives_the_librarys_answers(golden: dict[str, Any]) -> None:
    net = load_weights(nets.build(golden["net"], **golden["args"]), checkpoint(golden), golden["source"]).eval()
    with torch.no_grad():
        logits = net(image())[0, :16]
    expected = torch.tensor(golden["logits"])
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert net.preprocessing == {key: tuple(value) for key, value in golden["preprocessing"].items()}


def test_every_layout_has_a_golden() -> None:
    """But megvii's, which test_megvii.py has."""
    layouts = {(net, source) for net, held in LAYOUTS.items() for source in held if source != "megvii"}
    assert {(g["net"], g["source"]) for g in GOLDENS} == layouts


def golden_of(net: str, source: str) -> dict[str, Any]:
    return next(g for g in GOLDENS if (g["net"], g["source"]) == (net, source))


def test_a_key_that_is_missing_left_over_or_of_another_shape_is_named() -> None:
    golden = golden_of("mobilenet_v2", "torchvision")
    net, held = nets.build("mobilenet_v2", **golden["args"]), checkpoint(golden)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    key = "features.3.conv.1.0.weight"
    with pytest.raises(AerogelError, match=rf"lacks '{key}'.*name of features.stage2.block2.body.depthwise"):
        load_weights(net, {k: v for k, v in held.items() if k != key}, "torchvision")
    with pytest.raises(AerogelError, match=r"'extra\.weight' has no place in mobilenet_v2"):
        load_weights(net, held | {"extra.weight": torch.zeros(1)}, "torchvision")
    with pytest.raises(AerogelError, match=rf"'{key}' has shape \(1,\).*width and num_classes"):
        load_weights(net, held | {key: torch.zeros(1)}, "torchvision")
    with pytest.raises(AerogelError, match=rf"'{key}' holds torch.int8, .*needs torch.float32; is it quantised"):
        load_weights(net, held | {key: held[key].to(torch.int8)}, "torchvision")
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()), "a refusal changes nothing"


def test_a_source_or_net_without_a_layout_is_refused() -> None:
    with pytest.raises(AerogelError, match="no layout for source 'keras'; known: timm, torchvision"):
        load_weights(nets.build("mobilenet_v2", width=0.35), {}, "keras")
    with pytest.raises(AerogelError, match=r"lenet5 has no layout.*nets with layouts: .*mobilenet_v2"):
        load_weights(nets.build("lenet5"), {}, "torchvision")


# Every argument that changes what a net computes, and not the names and shapes of its weights alone.
OTHERWISE = [
    ("mobilenet_v3_small", {}, "timm_tf", "padding='same', the net has 'symmetric'; build .*small:padding=same"),
    ("mobilenet_v3_small", {"padding": "same"}, "timm", "padding='symmetric', the net has 'same'"),
    ("mobilenet_v3_small", {"padding": "same"}, "torchvision", "padding='symmetric', the net has 'same'"),
    ("mobilenet_v3_small", {"minimalistic": True}, "timm", "minimalistic=False, .*small:minimalistic=false"),
    ("mobilenet_v3_small", {"last_stage": "original"}, "torchvision", "last_stage='efficient'"),
    ("mobilenet_v3_small", {"last_stage": "original", "padding": "same"}, "timm_tf", "last_stage='efficient'"),
    ("mobilenet_v1", {"activation": "relu"}, "timm", "activation='relu6', the net has 'relu'"),
    ("mobilenet_v1", {"depthwise": False}, "timm", "depthwise=True, .*mobilenet_v1:depthwise=true"),
    ("mobilenet_v2", {"padding": "same"}, "timm", "padding='symmetric'"),
    ("mnasnet_b1", {"padding": "same"}, "torchvision", "padding='symmetric'"),
    ("mnasnet_a1", {"padding": "same"}, "timm", "padding='symmetric'"),
    ("shufflenet_v2", {"wiring": "even_odd"}, "torchvision", "wiring='halves', the net has 'even_odd'"),
    ("shufflenet_v2", {"se": True}, "torchvision", "se=False, .*shufflenet_v2:se=false"),
    ("shufflenet_v2", {"residual": True}, "torchvision", "residual=False"),
    ("shufflenet_v2", {"layout": 50}, "torchvision", "layout='mobile', the net has 50; build .*layout=mobile"),
    ("shufflenet_v1", {"shuffle": "inverse", "se": True}, "megvii", "se=False"),
]


@pytest.mark.parametrize(("name", "arguments", "source", "message"), OTHERWISE)
def test_a_net_built_otherwise_than_its_checkpoint_is_refused(
    name: str, arguments: dict[str, Any], source: str, message: str
) -> None:
    net = nets.build(name, num_classes=2, width=0.5, **arguments)
    with pytest.raises(AerogelError, match=f"^load_weights: a {source} checkpoint of {name} needs {message}"):
        load_weights(net, {}, source)


def test_a_net_for_small_images_has_other_strides_and_is_refused() -> None:
    net = nets.build("mobilenet_v2", width=0.35, input_size=32)
    with pytest.raises(AerogelError, match=r"leaves out strides below 64 pixels.*input_size=32; build it larger"):
        load_weights(net, {}, "timm")


def test_the_prefix_of_data_parallel_is_left_out() -> None:
    golden = golden_of("mobilenet_v3_small", "timm")
    plain, wrapped = checkpoint(golden), {f"module.{key}": t for key, t in checkpoint(golden).items()}
    one, other = (load_weights(nets.build("mobilenet_v3_small"), held, "timm") for held in (plain, wrapped))
    assert all(torch.equal(one.state_dict()[key], t) for key, t in other.state_dict().items())


def test_the_preprocessing_is_the_sources_unless_the_caller_knows_better() -> None:
    golden = golden_of("mobilenet_v3_small", "timm_tf")
    net = nets.build("mobilenet_v3_small", **golden["args"])
    assert load_weights(net, checkpoint(golden), "timm_tf").preprocessing == {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    load_weights(net, checkpoint(golden), "timm_tf", mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    assert net.preprocessing == {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}
    load_weights(net, checkpoint(golden), "timm_tf", mean=(0, 0, 0))
    assert net.preprocessing == {"mean": (0.0,) * 3, "std": (0.5,) * 3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": (0.5,)}, r"mean must be three numbers, .*got \(0\.5,\)"),
        ({"mean": 0.5}, r"mean must be three numbers, .*got 0\.5"),
        ({"mean": ()}, r"mean must be three numbers, .*got \(\)"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean must be three numbers, .*nan"),
        ({"std": (0.5, 0.0, 0.5)}, r"std must be three numbers > 0, .*got \(0\.5, 0\.0, 0\.5\)"),
        ({"std": ("a", "b", "c")}, "std must be three numbers > 0"),
    ],
)
def test_a_mean_or_std_that_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    golden = golden_of("mobilenet_v3_small", "timm")
    net = nets.build("mobilenet_v3_small", **golden["args"])
    before = net.state_dict()["features.stem.conv.weight"].clone()
    with pytest.raises(AerogelError, match=f"^load_weights: {message}"):
        load_weights(net, checkpoint(golden), "timm", **given)
    assert torch.equal(net.state_dict()["features.stem.conv.weight"], before)


def test_the_norms_of_a_checkpoint_travel_with_the_net() -> None:
    golden = golden_of("mobilenet_v3_small", "timm")
    net = load_weights(nets.build("mobilenet_v3_small", **golden["args"]), checkpoint(golden), "timm")
    assert net.spec["args"]["bn_eps"] == 1e-5
    assert {m.eps for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-5}
    assert net.preprocessing["mean"] == (0.485, 0.456, 0.406)
