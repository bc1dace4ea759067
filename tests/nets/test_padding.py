"""padding="same": where TensorFlow puts the zeros, and that such a net is captured, counted, cut and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import aerogel as ag
from aerogel.errors import AerogelError
from aerogel.export.onnx import export_onnx
from aerogel.export.verify import run_onnx
from aerogel.nets.blocks import SameConv2d

NETS = ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "mnasnet_a1", "mnasnet_b1")
SMALL = {"width": 0.25, "num_classes": 4, "input_size": 64}


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "first"),
    [(6, 3, 2, 0), (7, 3, 2, 1), (8, 5, 2, 1), (9, 5, 2, 2), (6, 3, 1, 1), (2, 5, 2, 1)],
)
def test_zeros_are_where_tensorflow_puts_them(size: int, kernel: int, stride: int, first: int) -> None:
    """TensorFlow's rule: total = max((ceil(size / stride) - 1) * stride + kernel - size, 0), the smaller half first."""
    conv = SameConv2d(1, 1, kernel, stride, bias=False)
    nn.init.zeros_(conv.weight)
    with torch.no_grad():
        conv.weight[0, 0, first, first] = 1.0  # reads the image's own first pixel at the first place
    x = torch.randn(1, 1, size, size)
    out = conv(x)
    assert out.shape[-1] == -(-size // stride)
    assert out[0, 0, 0, 0] == x[0, 0, 0, 0]


@pytest.mark.parametrize("name", NETS)
def test_only_strided_convolutions_change(name: str) -> None:
    net, plain = (ag.nets.build(name, padding=padding, **SMALL) for padding in ("same", "symmetric"))
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    modules = dict(net.named_modules())
    for key, conv in plain.named_modules():
        if isinstance(conv, nn.Conv2d):
            assert isinstance(modules[key], SameConv2d) == (conv.stride[0] == 2), key


@pytest.mark.parametrize("name", NETS)
def test_its_work_is_counted_as_the_other_padding_s(name: str) -> None:
    x = torch.randn(1, 3, 64, 64)
    nets = [ag.nets.build(name, padding=padding, **SMALL).eval() for padding in ("same", "symmetric")]
    costs = [ag.cost.count(ag.capture(net, (x,))) for net in nets]
    assert costs[0].macs == costs[1].macs
    assert not costs[0].uncounted


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small"])
def test_it_is_cut_saved_and_exported(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = ag.nets.build(name, padding="same", **SMALL).eval(), torch.randn(1, 3, 64, 64)
    found = ag.prune.cut(net, (x,), target={"macs": 0.6})
    assert found.max_error <= 1e-4
    saved = ag.load(ag.save(found.model, tmp_path / "saved"))
    file = export_onnx(found.model, (x,), tmp_path / "model.onnx").path
    with torch.no_grad():
        assert torch.equal(saved(x), found.model(x))
        torch.testing.assert_close(torch.from_numpy(run_onnx(file, x.numpy())), found.model(x), rtol=1e-4, atol=1e-5)


def test_another_padding_is_refused() -> None:
    with pytest.raises(AerogelError, match="mobilenet_v2: padding must be symmetric or same, got 'valid'"):
        ag.nets.build("mobilenet_v2", padding="valid")
