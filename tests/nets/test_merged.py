"""The merged ShuffleNetV2 unit computes the plain one's numbers, bit by bit, with one copy less."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aerogel.cost import count
from aerogel.export.onnx import export_onnx
from aerogel.export.verify import run_onnx
from aerogel.graph import capture
from aerogel.nets import build
from aerogel.nets.shufflenet_v1 import channel_shuffle
from aerogel.nets.shufflenet_v2 import Unit, interleave
from aerogel.prune import cut


def net_of(**arguments: Any) -> nn.Module:
    """A net for 28 x 28 images with norm statistics and parameters of its own, in eval mode."""
    torch.manual_seed(0)
    net = build("shufflenet_v2", **({"width": 0.125, "num_classes": 10, "input_size": 28} | arguments)).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


def plain_copy(net: nn.Module) -> nn.Module:
    plain = copy.deepcopy(net)
    for unit in plain.modules():
        if isinstance(unit, Unit):
            assert unit.merged
            unit.merged = False
    return plain


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_interleave_is_concatenation_and_shuffle(n: int, c: int, h: int, w: int) -> None:
    a, b = torch.randn(2, n, c, h, w)
    expected = channel_shuffle(torch.cat((a, b), dim=1), 2)
    assert torch.equal(interleave(a, b), expected)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        a, b = (t.contiguous(memory_format=memory_format) for t in (a, b))
        assert torch.equal(interleave(a, b), expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"width": 0.125},
        {"width": 0.5},
        {"width": 1},
        {"width": 1.5},
        {"width": 2},
        {"se": True},
        {"residual": True},
        {"se": True, "residual": True},
        {"layout": "50", "width": 0.125},
        {"layout": "164", "width": 0.05, "input_size": 64},
    ],
    ids=str,
)
def test_merged_equals_plain(arguments: dict[str, Any]) -> None:
    merged = net_of(**arguments)
    plain = build("shufflenet_v2", **(merged.spec["args"] | {"merged": False})).eval()
    plain.load_state_dict(merged.state_dict())
    size = merged.spec["args"]["input_size"]
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        out = merged(x)
        assert torch.equal(out, plain(x))
        assert torch.equal(out, plain_copy(merged)(x))
    assert out.isfinite().all()
    assert out.std() > 0


def test_merged_is_the_default_and_plain_is_on_request() -> None:
    def flags(**arguments: Any) -> set[bool]:
        with torch.device("meta"):
            net = build("shufflenet_v2", **arguments)
        return {unit.merged for unit in net.modules() if isinstance(unit, Unit)}

    assert flags() == {True}
    assert flags(merged=False) == {False}


def test_a_training_step_is_equal_too() -> None:
    merged = net_of().train()
    plain = plain_copy(merged)
    x = torch.randn(4, 3, 28, 28)
    for net in (merged, plain):
        nn.functional.cross_entropy(net(x), torch.tensor([0, 1, 2, 3])).backward()
    other = dict(plain.named_parameters())
    assert all(torch.equal(p.grad, other[key].grad) for key, p in merged.named_parameters())
    buffers = dict(plain.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in merged.named_buffers())


def test_merged_saves_the_copy_of_every_shuffle() -> None:
    merged = net_of().features.stage2
    x = torch.randn(1, 24, 28, 28)
    graphs = [capture(stage, (x,)) for stage in (plain_copy(merged), merged)]
    kinds = [[op.kind for op in graph.ops] for graph in graphs]
    assert [(k.count("transpose"), k.count("cat")) for k in kinds] == [(4, 4), (0, 4)]
    plain_cost, merged_cost = (count(graph) for graph in graphs)
    one_copy = 2 * 4 * 12 * 14**2  # bytes read and written: float32, 12 channels, 14 x 14
    assert plain_cost.access_bytes - merged_cost.access_bytes == 4 * one_copy
    assert (plain_cost.macs, plain_cost.params) == (merged_cost.macs, merged_cost.params)
    assert merged_cost.peak_bytes <= plain_cost.peak_bytes
    assert merged_cost.uncounted == {}


def test_both_are_cut_alike() -> None:
    merged = net_of(width=0.25).features.stage2[:3]
    x = torch.randn(1, 24, 6, 6)
    of_plain, of_merged = (cut(units, (x,), target={"macs": 0.9}) for units in (plain_copy(merged), merged))
    assert of_merged.after.macs < of_merged.before.macs
    assert of_plain.kept.keys() == of_merged.kept.keys()
    for target, dims in of_merged.kept.items():
        for one, other in zip(dims, of_plain.kept[target], strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
    assert torch.equal(of_plain.model(x), of_merged.model(x))


def test_an_exported_stage_has_no_transpose_and_the_same_numbers(tmp_path: Path) -> None:
    merged = net_of(width=0.25).features.stage2[:2]
    x = torch.randn(2, 24, 6, 6)
    outputs = []
    for name, stage in (("merged", merged), ("plain", plain_copy(merged))):
        exported = export_onnx(stage, (x,), tmp_path / f"{name}.onnx")
        assert exported.dynamic_batch
        kinds = [node.op_type for node in onnx.load(exported.path).graph.node]
        assert kinds.count("Transpose") == (0 if name == "merged" else 2)
        outputs.append(run_onnx(exported.path, x.numpy()))
    assert np.array_equal(*outputs)
    np.testing.assert_allclose(outputs[0], merged(x).detach().numpy(), rtol=1e-4, atol=1e-5)
