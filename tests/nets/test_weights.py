"""Checkpoints of torchvision and timm in our nets: the same answers, and refusals that name the key.

goldens/checkpoints.json holds, for each library's own net, its keys with their shapes and its first 16 logits under
the weights that `weight` makes from a key's name; `goldens/make_checkpoints.py` made it with those libraries.
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


def test_every_layout_has_a_golden() -> None:
    """But megvii's, which test_megvii.py has."""
    layouts = {(net, source) for net, held in LAYOUTS.items() for source in held if source != "megvii"}
    assert {(g["net"], g["source"]) for g in GOLDENS} == layouts


def test_a_key_that_is_missing_left_over_or_of_another_shape_is_named() -> None:
    golden = next(g for g in GOLDENS if g["net"] == "mobilenet_v2" and g["source"] == "torchvision")
    net, held = nets.build("mobilenet_v2", **golden["args"]), checkpoint(golden)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    key = "features.3.conv.1.0.weight"
    with pytest.raises(AerogelError, match=rf"lacks '{key}'.*name of features.stage2.block2.body.depthwise"):
        load_weights(net, {k: v for k, v in held.items() if k != key}, "torchvision")
    with pytest.raises(AerogelError, match=r"'extra\.weight' has no place in mobilenet_v2"):
        load_weights(net, held | {"extra.weight": torch.zeros(1)}, "torchvision")
    with pytest.raises(AerogelError, match=rf"'{key}' has shape \(1,\).*width and num_classes"):
        load_weights(net, held | {key: torch.zeros(1)}, "torchvision")
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()), "a refusal changes nothing"


def test_a_source_or_net_without_a_layout_is_refused() -> None:
    with pytest.raises(AerogelError, match="no layout for source 'keras'; known: timm, torchvision"):
        load_weights(nets.build("mobilenet_v2", width=0.35), {}, "keras")
    with pytest.raises(AerogelError, match=r"lenet5 has no layout.*nets with layouts: .*mobilenet_v2"):
        load_weights(nets.build("lenet5"), {}, "torchvision")


def test_a_net_built_otherwise_than_its_checkpoint_is_refused() -> None:
    golden = next(g for g in GOLDENS if g["source"] == "timm_tf" and g["net"] == "mobilenet_v3_small")
    net = nets.build("mobilenet_v3_small", num_classes=1000)
    with pytest.raises(
        AerogelError, match=r"needs padding='same', the net has 'symmetric'; build it with .*padding=same"
    ):
        load_weights(net, checkpoint(golden), "timm_tf")


def test_the_preprocessing_is_the_sources_unless_the_caller_knows_better() -> None:
    golden = next(g for g in GOLDENS if g["source"] == "timm_tf" and g["net"] == "mobilenet_v3_small")
    net = nets.build("mobilenet_v3_small", **golden["args"])
    assert load_weights(net, checkpoint(golden), "timm_tf").preprocessing == {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    load_weights(net, checkpoint(golden), "timm_tf", mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    assert net.preprocessing == {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}


def test_the_norms_of_a_checkpoint_travel_with_the_net() -> None:
    golden = next(g for g in GOLDENS if g["net"] == "mobilenet_v3_small" and g["source"] == "timm")
    net = load_weights(nets.build("mobilenet_v3_small", **golden["args"]), checkpoint(golden), "timm")
    assert net.spec["args"]["bn_eps"] == 1e-5
    assert {m.eps for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-5}
    assert net.preprocessing["mean"] == (0.485, 0.456, 0.406)
