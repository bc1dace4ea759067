"""resize: new weights in, attributes true, tied weights tied; the module runs with its new shape."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.graph.resize import fit_attributes, resize, sliced


def shrunk(module: nn.Module, **shapes: tuple[int, ...]) -> nn.Module:
    """A copy of the module with random tensors of these shapes."""
    return resize(copy.deepcopy(module), {name: torch.rand(shape) for name, shape in shapes.items()})


CONVOLUTIONS = {
    # (in, out, groups) -> weight after the cut -> (in, out, groups)
    "plain": ((8, 6, 1), (4, 5, 3, 3), (5, 4, 1)),
    "to one channel": ((8, 6, 1), (1, 1, 3, 3), (1, 1, 1)),
    "grouped, outputs": ((8, 6, 2), (4, 4, 3, 3), (8, 4, 2)),
    "grouped, inputs": ((8, 6, 2), (6, 3, 3, 3), (6, 6, 2)),
    "depthwise": ((8, 8, 8), (5, 1, 3, 3), (5, 5, 5)),
    "depthwise with multiplier": ((8, 24, 8), (15, 1, 3, 3), (5, 15, 5)),
    "depthwise to one channel": ((8, 16, 8), (2, 1, 3, 3), (1, 2, 1)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution(case: str) -> None:
    (inputs, outputs, groups), shape, expected = CONVOLUTIONS[case]
    conv = nn.Conv2d(inputs, outputs, 3, groups=groups)
    small = shrunk(conv, weight=shape, bias=shape[:1])
    assert (small.in_channels, small.out_channels, small.groups) == expected
    assert small(torch.zeros(1, expected[0], 3, 3)).shape == (1, expected[1], 1, 1)
    assert (conv.in_channels, conv.out_channels, conv.groups) == (inputs, outputs, groups)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_a_convolution_of_another_rank(kind: type[nn.Module]) -> None:
    conv = kind(4, 6, 1)
    small = shrunk(conv, weight=(3, 2, *conv.weight.shape[2:]), bias=(3,))
    assert (small.in_channels, small.out_channels) == (2, 3)


def test_a_linear_layer() -> None:
    small = shrunk(nn.Linear(6, 4), weight=(2, 3), bias=(2,))
    assert (small.in_features, small.out_features) == (3, 2)
    assert small(torch.zeros(1, 3)).shape == (1, 2)


def test_a_norm_with_and_without_parameters() -> None:
    state = dict.fromkeys(["running_mean", "running_var"], (3,))
    assert shrunk(nn.BatchNorm2d(8), weight=(3,), bias=(3,), **state).num_features == 3
    assert shrunk(nn.BatchNorm1d(8, affine=False), **state).num_features == 3
    assert shrunk(nn.BatchNorm2d(8, track_running_stats=False), weight=(3,), bias=(3,)).num_features == 3
    bare = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
    fit_attributes(bare)
    assert bare.num_features == 8, "nothing tells another"


def test_a_module_that_repeats_no_shape() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

    assert shrunk(Scale(), scale=(3,)).scale.shape == (3,)


def test_what_is_not_named_stays_and_flags_are_kept() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    net[0].weight.requires_grad_(False)
    old = net[1].bias
    resized = resize(net, {"0.weight": torch.ones(3, 4), "0.bias": torch.ones(3), "1.weight": torch.ones(2, 3)})
    assert resized is net
    assert net[1].bias is old
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())
    assert net(torch.ones(1, 4)).shape == (1, 2)


def test_tied_weights_stay_tied_and_go_by_their_first_name() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    net[1].register_buffer("mask", torch.ones(4))
    net[0].register_buffer("mask", net[1].mask)
    resize(net, {"0.weight": torch.ones(3, 3), "0.mask": torch.ones(3)})
    assert net[1].weight is net[0].weight
    assert net[1].mask is net[0].mask
    assert not isinstance(net[1].mask, nn.Parameter)
    assert (net[1].in_features, net[1].out_features) == (3, 3)
    with pytest.raises(AerogelError, match=r"resize: Sequential has no weight 1\.weight; was it another network's"):
        resize(net, {"1.weight": torch.ones(2, 2)})


def test_a_module_used_under_two_names_is_resized_once() -> None:
    conv = nn.Conv2d(8, 8, 1, groups=8)
    net = nn.Sequential(conv, conv)
    resize(net, {"0.weight": torch.ones(5, 1, 1, 1), "0.bias": torch.ones(5)})
    assert (conv.in_channels, conv.out_channels, conv.groups) == (5, 5, 5)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("inputs", [1, 4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sliced_weights_keep_the_order_that_convolutions_go_by(
    inputs: int, memory_format: torch.memory_format, kernel: int
) -> None:
    weight = torch.rand(6, inputs, kernel, kernel).to(memory_format=memory_format)
    for kept in (None, torch.tensor([0])):
        part = sliced(weight, (torch.tensor([0, 2, 3]), kept))
        assert part.stride() == torch.empty(part.shape).to(memory_format=memory_format).stride()


def test_sliced() -> None:
    tensor = torch.arange(12.0, requires_grad=True).view(3, 4)
    part: Tensor = sliced(tensor, (torch.tensor([0, 2]), torch.tensor([1, 3])))
    assert part.tolist() == [[1, 3], [9, 11]]
    assert not part.requires_grad
    assert sliced(tensor, (None, torch.tensor([0]))).tolist() == [[0], [4], [8]]
    assert sliced(tensor, (None, None)).tolist() == tensor.tolist()
