"""What every net must do: a new one is tested by being in NETS.

The quick half takes narrow nets and small images. The slow half (`make conformance`) has the same checks at the
default size, and torch.compile.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import each_net, images, options, parameters, shapes, small

import aerogel as ag
from aerogel.export.onnx import export_onnx
from aerogel.export.verify import check_parity
from aerogel.nets import NETS, build

SLOW = {  # to export; without them a smaller net of the same file stands for the rest
    *("vgg13", "vgg16", "vgg19", "resnet34", "resnet50", "resnet56", "resnet110", "resnet164", "densenet121"),
    *("mobilenet_v3_large", "mnasnet_a1", "mnasnet_b1"),
}
SEEDS = range(8)


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
    narrow, wide = small(name, **{option: little}).eval(), small(name, **{option: much}).eval()
    assert parameters(narrow) < parameters(wide)
    assert shapes(narrow).keys() == shapes(wide).keys()
    with torch.no_grad():
        assert narrow(images(narrow)).shape == wide(images(wide)).shape == (4, 10)


@each_net
def test_a_train_step_moves_the_weights_and_stays_finite(name: str) -> None:
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


@each_net
def test_the_gradient_reaches_every_parameter(name: str) -> None:
    missing = {key for key, _ in small(name).named_parameters()}
    for seed in SEEDS:  # a narrow layer behind a ReLU may be dead by chance, not with every seed
        net = lively(small(name), seed).train()
        nn.functional.cross_entropy(net(images(net)), torch.tensor([0, 1, 2, 3])).backward()
        missing -= {key for key, p in net.named_parameters() if p.grad is not None and p.grad.any()}
        if not missing:
            break
    assert not missing


@pytest.mark.parametrize(("name", "make"), SIZES)
def test_is_captured_counted_saved_and_exported(name: str, make: Callable[[str], nn.Module], tmp_path: Path) -> None:
    net = lively(make(name))
    x = images(net)
    cost = ag.cost.count(ag.capture(net, (x[:1],)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x[:1])
    assert cost.macs == counter.get_total_flops() // 2
    assert cost.params == parameters(net) == sum(layer.params for layer in cost.layers)
    assert cost.access_bytes > 0
    assert cost.peak_bytes > 0
    assert not cost.uncounted
    again = ag.load(ag.save(net, tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
        assert net(x).std(0).mean() > 0.1, "without a difference between images, parity would say nothing"
    parity = check_parity(net, export_onnx(net, (x[:1],), tmp_path / "model.onnx").path, x)
    assert parity.ok, parity
    shutil.rmtree(tmp_path)  # pytest would keep three runs of these, 6 GB each in the slow half


@pytest.mark.slow
@each_net
def test_torch_compile_computes_and_trains_the_same(name: str) -> None:
    torch.compiler.reset()
    net = lively(small(name))
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # compiled code draws other masks
    x, labels = images(net), torch.tensor([0, 1, 2, 3])
    twin = copy.deepcopy(net)
    # The code that inductor writes for a deep net takes g++ minutes; its blocks are those of a net that has it written.
    compiled = torch.compile(twin, backend="aot_eager" if name in SLOW else "inductor")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-4)
    # In float64, because in float32 a ReLU at 0 may go either way and a deep net shows it.
    for one in (net.double().train(), twin.double().train()):
        loss = nn.functional.cross_entropy((compiled if one is twin else one)(x.double()), labels)
        loss.backward()
        torch.optim.SGD(one.parameters(), lr=0.01).step()
    torch.testing.assert_close(twin.state_dict(), net.state_dict(), rtol=1e-6, atol=1e-6)


def lively(net: nn.Module, seed: int = 2) -> nn.Module:
    """The net in eval mode with random weights and norms, by which logits differ between images by about 1.

    Fresh nets answer all images alike, to 1e-7 of a logit: a wrong file would pass for a right one.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, generator=generator)
        if layer.bias is not None:
            nn.init.normal_(layer.bias, std=0.1, generator=generator)
    norms = [(module, module.momentum) for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm, _ in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
        nn.init.normal_(norm.bias, std=0.1, generator=generator)
        norm.momentum = 1.0  # the statistics of one batch
    x = images(net, batch=8)
    with torch.no_grad():
        net.train()(x)
        spread = net.eval()(x).std(0).mean()
        for p in layers[-1].parameters():
            p /= spread
    for norm, momentum in norms:
        norm.momentum = momentum
    return net
