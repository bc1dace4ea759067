"""What every net must do: a new one is tested by being in NETS.

The quick half takes narrow nets and small images. The slow half (`make conformance`) has the same checks at the
default size, and torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import each_net, images, options, parameters, shapes, small

import aerogel as ag
from aerogel.export.onnx import export_onnx
from aerogel.export.verify import check_parity
from aerogel.nets import NETS, build

SLOW = {  # to export; without them a smaller net of the same file stands for the rest
    *("vgg13", "vgg16", "vgg19", "resnet34", "resnet56", "resnet110", "resnet164", "densenet121"),
    *("mobilenet_v3_large", "mnasnet_a1", "mnasnet_b1"),
}


def default(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build(name)


SIZES = [
    *(pytest.param(n, small, id=n, marks=pytest.mark.slow if n in SLOW else ()) for n in NETS),
    *(pytest.param(n, default, id=f"{n}-default", marks=pytest.mark.slow) for n in NETS),
]


@each_net
@pytest.mark.parametrize(("size", "in_channels", "num_classes"), [(28, 1, 1), (28, 3, 7), (32, 1, 7), (32, 3, 1)])
def test_images_become_logits(name: str, size: int, in_channels: int, num_classes: int) -> None:
    net = small(name, input_size=size, in_channels=in_channels, num_classes=num_classes).eval()
    x = images(net, batch=3)
    with torch.no_grad():
        logits = net(x)
        alone = net(x[1:2])
    assert logits.shape == (3, num_classes)
    torch.testing.assert_close(alone, logits[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "option", "little", "much"),
    [
        (name, option, little, much)
        for name in NETS
        for option, little, much in [("width", 0.25, 0.5), ("growth", 4, 8), ("widths", "8-8", "16-16")]
        if option in options(name)
    ],
)
def test_width_widens(name: str, option: str, little: object, much: object) -> None:
    narrow, wide = small(name, **{option: little}), small(name, **{option: much})
    assert parameters(narrow) < parameters(wide)
    assert shapes(narrow).keys() == shapes(wide).keys()


@each_net
def test_a_train_step_reaches_every_parameter(name: str) -> None:
    net = small(name)
    x, labels = images(net), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    assert net.training
    loss = nn.functional.cross_entropy(net(x), labels)
    loss.backward()
    for key, p in net.named_parameters():
        assert p.grad is not None, f"{key} gets no gradient"
        assert p.grad.isfinite().all(), f"{key} gets a gradient that is not finite"
    optimizer.step()
    assert any(not torch.equal(p, before[key]) for key, p in net.named_parameters())
    with torch.no_grad():
        after = nn.functional.cross_entropy(net.eval()(x), labels)
    assert loss.isfinite()
    assert after.isfinite()


@pytest.mark.parametrize(("name", "make"), SIZES)
def test_is_captured_counted_saved_and_exported(name: str, make: Callable[[str], nn.Module], tmp_path: Path) -> None:
    net = make(name).eval()
    _live(net)
    x = images(net, batch=2)
    cost = ag.cost.count(ag.capture(net, (x[:1],)))
    assert cost.params == parameters(net)
    assert cost.macs > 0
    assert cost.peak_bytes > 0
    assert not cost.uncounted
    assert sum(layer.macs for layer in cost.layers) == cost.macs
    again = ag.load(ag.save(net, tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
    parity = check_parity(net, export_onnx(net, (x[:1],), tmp_path / "model.onnx").path, x)
    assert parity.ok, parity


@pytest.mark.slow
@each_net
def test_torch_compile_computes_the_same_and_trains(name: str) -> None:
    torch.compiler.reset()
    net = small(name)
    _live(net)
    x, labels = images(net), torch.tensor([0, 1, 2, 3])
    compiled = torch.compile(net)
    with torch.no_grad():
        net.eval()
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-4)
    net.train()
    nn.functional.cross_entropy(compiled(x), labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def _live(net: nn.Module) -> None:
    """Random norm statistics, and a last layer that tells images apart: fresh nets answer almost nothing."""
    generator = torch.Generator().manual_seed(2)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=generator) * 0.1
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
