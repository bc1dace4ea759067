"""Receptive fields: the published ones, small ones by hand, and what a gradient really reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from work import Apply

from aerogel.cost import count
from aerogel.cost.receptive import receptive_fields
from aerogel.graph import capture
from aerogel.nets import build

# Araujo, Norris, Sim 2019, Distill, table of receptive fields: alexnet_v2 195, vgg_16 212, mobilenet_v1 315,
# resnet_v1_50 483. That is with the stride in the first 1x1 of a block, as in the paper; ours is in the 3x3: 427 by
# hand: 35 after stage 1, + 8 + 3 x 16 in stage 2, + 16 + 5 x 32 in stage 3, + 32 + 2 x 64 in stage 4.
PUBLISHED = {"alexnet": 195, "vgg16": 212, "mobilenet_v1": 315}


def of_net(net: nn.Module, side: int = 224) -> list[int | None]:
    return receptive_fields(capture(net, (torch.zeros(1, 3, side, side, device="meta"),)))


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return build(name).eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_ones(name: str) -> None:
    found = of_net(on_meta(name))
    assert max(size for size in found if size is not None) == PUBLISHED[name]
    assert found[-1] is None, "the classifier sees everything"


def test_resnet50_with_the_stride_where_the_paper_has_it() -> None:
    net = on_meta("resnet50")
    assert max(size or 0 for size in of_net(net)) == 427
    for number in (2, 3, 4):
        body = getattr(net.features, f"stage{number}").block1.body
        body.conv1.conv.stride, body.conv2.conv.stride = (2, 2), (1, 1)
    assert max(size or 0 for size in of_net(net)) == 483


def of_call(function: Callable[..., Any], *shape: int) -> list[int | None]:
    return receptive_fields(capture(Apply(function), (torch.zeros(*shape),)))


def conv(x: Tensor, kernel: int, **how: Any) -> Tensor:
    return F.conv2d(x, torch.ones(x.shape[1], 1, kernel, kernel), groups=x.shape[1], **how)


@pytest.mark.parametrize(
    ("function", "last"),
    [
        (lambda x: conv(x, 3), 3),
        (lambda x: conv(x, 3, dilation=2), 5),
        (lambda x: conv(x, 4, padding="same"), 4),
        (lambda x: conv(conv(x, 3, stride=2), 3), 7),
        (lambda x: F.max_pool2d(conv(x, 3), 2), 4),
        (lambda x: F.avg_pool2d(F.max_pool2d(x, 2), 3, 1), 6),
        (lambda x: F.conv2d(x, x[:, :, :3, :3]), None),  # a computed weight
        (lambda x: torch.cat([conv(x, 3, padding=1), conv(x, 5, padding=2)], 1), 5),
        (lambda x: conv(x, 3, padding=1) + conv(x, 3, padding=(2, 1))[:, :, 1:-1], None),  # a slice of the rows
        (lambda x: torch.cat([F.pad(x, (0, 0, 2, 0)), F.pad(x, (0, 0, 0, 2))], 1), 3),  # rows 0 and 2 below it
        (lambda x: conv(x, 3).relu().view(1, 2, 2, 6, 6).transpose(1, 2).flatten(1, 2), 3),  # a shuffle
        (lambda x: conv(x, 3).permute(0, 2, 3, 1).contiguous() @ torch.ones(4, 4), None),  # not understood
        (lambda x: F.linear(conv(x, 3).permute(0, 2, 3, 1), torch.ones(5, 4)).permute(0, 3, 1, 2), 3),
        (lambda x: F.linear(conv(x, 3), torch.ones(5, 6)), 3),  # along the width
        (lambda x: F.layer_norm(conv(x, 3).movedim(1, -1), (4,)), None),  # movedim has no rule
        (lambda x: F.layer_norm(conv(x, 3).permute(0, 2, 3, 1), (4,)), 3),
        (lambda x: F.layer_norm(conv(x, 3), (6, 6)), None),
        (lambda x: conv(x, 3).mean((2, 3)), None),
        (lambda x: conv(x, 3).softmax(1).sum(1).relu(), None),
        (lambda x: conv(x, 3) * conv(x, 3).mean((2, 3), keepdim=True), None),
        (lambda x: conv(x, 3).flatten(1), None),
        (lambda x: conv(x, 3).chunk(2, 1)[1].relu(), 3),
        (lambda x: conv(x, 3)[:, 0].relu(), 3),
        (lambda x: conv(x, 3).transpose(2, 3), 3),
    ],
)  # fmt: skip
def test_by_hand(function: Callable[..., Any], last: int | None) -> None:
    assert of_call(function, 1, 4, 8, 8)[-1] == last


def test_sequences_and_volumes_and_tokens() -> None:
    assert of_call(lambda x: F.conv1d(x, torch.ones(1, 4, 5)), 1, 4, 9)[-1] == 5
    assert of_call(lambda x: F.max_pool3d(x, (1, 3, 2)), 1, 4, 9, 9, 9)[-1] == 3
    words = capture(nn.Embedding(9, 4), (torch.zeros(1, 3, dtype=torch.long),))
    assert receptive_fields(words) == [None]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_it_is_what_a_gradient_reaches(data: st.DataObject) -> None:
    """Rows of the input with a gradient from one row in the middle of the output, far from any border."""
    layers: list[nn.Module] = []
    for _ in range(data.draw(st.integers(1, 4))):
        kernel, stride = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
        if data.draw(st.booleans()):
            layer: nn.Module = nn.Conv1d(1, 1, kernel, stride, dilation=data.draw(st.integers(1, 2)))
            nn.init.ones_(layer.weight)  # type: ignore[arg-type]
            layers.append(layer)
        else:
            layers.append(nn.AvgPool1d(kernel, stride))
    net = nn.Sequential(*layers)
    x = torch.zeros(1, 1, 600, requires_grad=True)
    y = net(x)
    y[0, 0, y.shape[-1] // 2].backward()
    rows = x.grad.nonzero()[:, 2]  # type: ignore[union-attr]
    found = count(capture(net, (x.detach(),))).layers[-1].receptive_field
    assert found == int(rows.max() - rows.min()) + 1
