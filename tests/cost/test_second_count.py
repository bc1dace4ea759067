"""verify: a second count that agrees with the first, finds its faults by module, and touches nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import MACS, WORK
from torch import Tensor, nn
from work import Apply

from aerogel.cost import Cost, count, verified, verify
from aerogel.cost.count import Verified
from aerogel.graph import capture
from aerogel.nets import NETS, build


def both(model: nn.Module, *args: Tensor) -> tuple[Cost, Verified]:
    cost = count(capture(model, args))
    return cost, verify(model, args, None, cost)


@pytest.mark.parametrize("case", [*MACS, *(case for case in WORK if case not in MACS)])
def test_both_counts_agree_on_every_kind_of_work(case: str) -> None:
    work, inputs, *_ = {**WORK, **MACS}[case]
    cost, found = both(work if isinstance(work, nn.Module) else Apply(work), *inputs)  # type: ignore[arg-type]
    assert found == Verified(cost.macs, True, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_both_counts_agree_on_the_zoo(name: str) -> None:
    with torch.device("meta"):
        net: Any = build(name).eval()
        size = net.spec["args"].get("input_size", 28)
        x = torch.zeros(1, net.spec["args"].get("in_channels", 1), size, size)
    cost, found = both(net, x)
    assert found == Verified(cost.macs, True, {})


@settings(max_examples=20, deadline=None)
@given(groups=st.integers(1, 3), wide=st.integers(1, 3), kernel=st.integers(1, 3), stride=st.integers(1, 2))
def test_both_counts_agree_on_convolutions_of_any_shape(groups: int, wide: int, kernel: int, stride: int) -> None:
    there = nn.Conv2d(2 * groups, wide * groups, kernel, stride, groups=groups)
    back = nn.ConvTranspose2d(wide * groups, groups, kernel, stride, groups=groups, dilation=2)
    assert both(nn.Sequential(there, back), torch.zeros(2, 2 * groups, 7, 7))[1].agrees


def test_a_difference_names_the_module() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    cost, found = both(net, torch.zeros(2, 4))
    wrong = replace(cost.layers[1], macs=63)
    cost = replace(cost, macs=cost.macs - 1, layers=(cost.layers[0], wrong, cost.layers[2]))
    assert verify(net, (torch.zeros(2, 4),), None, cost) == Verified(96, False, {"1.0": (63, 64)})
    told = verified(cost, net, (torch.zeros(2, 4),))
    assert (told.to_json()["verified"], told.to_json()["differs"]) == (False, {"1.0": [63, 64]})
    assert told.layers == cost.layers
    assert cost.to_json()["verified"] is None, "nobody asked"
    assert found.agrees


def test_what_has_no_formula_but_multiplies_is_found_by_the_second_count() -> None:
    def twice(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.multi_dot([a, b, b])

    cost, found = both(Apply(twice), torch.zeros(3, 4), torch.zeros(4, 4))
    assert set(cost.uncounted) == {"linalg_multi_dot"}
    assert found == Verified(96, False, {"": (0, 96)})


class Shared(nn.Module):
    """One layer under three names, a tied weight, tensors that are no parameters, a keyword, a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.c = nn.Sequential(self.a, nn.Linear(4, 4))
        self.c[1].weight = self.a.weight
        self.plain, self.listed = torch.ones(4), [torch.ones(4)]
        self.called = 0

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        self.called += 1
        return {"y": self.c(self.b(self.a(x))) * scale + self.plain @ self.a.weight + self.listed[0]}


def test_the_model_is_left_as_it_was() -> None:
    net = Shared().train()
    net.a.eval()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in net.state_dict(keep_vars=True).items()}
    inputs: dict[str, Any] = {"scale": torch.ones(4)}
    cost = count(capture(net, (torch.ones(2, 4),), inputs))
    called = net.called
    with torch.enable_grad():
        found = verify(net, (torch.ones(2, 4),), inputs, cost)
        assert torch.is_grad_enabled()
    assert found == Verified(4 * 2 * 16 + 16, True, {})
    assert (net.training, net.a.training, net.called) == (True, False, called)
    assert torch.backends.mha.get_fastpath_enabled()
    for name, tensor in net.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert (net.plain.device.type, net.listed[0].device.type) == ("cpu", "cpu")
    assert not net.a._forward_hooks
    assert not net.a._forward_pre_hooks


@pytest.mark.parametrize("grad", [True, False])
def test_multi_head_attention_is_counted_whatever_the_state_of_gradients(grad: bool) -> None:
    net = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
    with torch.set_grad_enabled(grad):
        cost, found = both(net, torch.zeros(2, 50, 64))
    assert cost.macs == 3_916_800
    assert found == Verified(3_916_800, True, {})


def test_a_model_that_needs_numbers_is_not_verified_and_says_why() -> None:
    cost = count(capture(nn.Linear(4, 4), (torch.ones(2, 4),)))
    needs = Apply(lambda x: x * float(x.sum()))
    found = verify(needs, (torch.ones(2, 4),), None, cost)
    assert (found.macs, found.agrees) == (None, None)
    assert found.reason.startswith("the model does not run on the meta device: ")
