"""Two networks layer by layer: who is whose counterpart, what is said of a saving, and that nothing is lost."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aerogel.cost import Cost, Layer, count, device
from aerogel.cost.against import Amount, Times, compare, in_words, match
from aerogel.cost.fused import Fused, fused
from aerogel.graph import capture
from aerogel.nets import build

PI = device("raspberry_pi_4")


def cost_of(net: nn.Module, *shape: int) -> Cost:
    return count(capture(net, (torch.zeros(shape),)))


def zoo(name: str, **args: object) -> Cost:
    with torch.device("meta"):
        return cost_of(build(name, **args), 1, 3, 224, 224)


def layer(name: str, op: str = "conv2d", macs: int = 100) -> Fused:
    weight = (8, 8, 1, 1)
    return Fused(Layer(name, name, op, "pointwise", macs, 2 * macs, 64, 512, 512, (1, 8, 4, 4), weight, None, ""))


def statuses(before: Cost, after: Cost) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for pair in compare(before, after).pairs:
        side = pair.after or pair.before
        assert side is not None
        found.setdefault(pair.status, []).append(side.name)
    return found


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2", "resnet50"])
def test_fused_layers_add_up_to_the_network(name: str) -> None:
    cost = zoo(name)
    parts = fused(cost.layers)
    for measure in ("macs", "flops", "params", "access_bytes"):
        assert sum(getattr(part, measure) for part in parts) == getattr(cost, measure)
    nodes = [layer.node for part in parts for layer in part.layers]
    assert len(nodes) == len(set(nodes))


def test_a_fused_layer_is_a_convolution_with_its_norm_and_activation() -> None:
    first = fused(zoo("mobilenet_v2").layers)[0]
    assert first.op == "conv2d+batch_norm+hardtanh"
    assert first.shape == (1, 32, 112, 112)
    assert first.params == 3 * 3 * 3 * 32 + 2 * 32


def test_a_network_against_itself_is_the_same_everywhere() -> None:
    cost = zoo("mobilenet_v1")
    found = compare(cost, cost, PI)
    assert {pair.status for pair in found.pairs} == {"same"}
    assert {amount.ratio for amount in found.totals.values()} == {1.0}
    assert found.text == "MACs x1.00, access x1.00, predicted time on raspberry_pi_4 x1.00."


def test_narrower_layers_are_changed_not_new() -> None:
    assert statuses(zoo("mobilenet_v1"), zoo("mobilenet_v1", width=0.5)).keys() == {"changed"}


def test_one_layer_more_and_one_less() -> None:
    def net(*middle: nn.Module) -> Cost:
        parts = {"first": nn.Linear(4, 8), **{f"m{i}": part for i, part in enumerate(middle)}, "last": nn.Linear(8, 2)}
        net = nn.Sequential()
        for name, part in parts.items():
            net.add_module(name, part)
        return cost_of(net, 1, 4)

    plain, deep = net(), net(nn.Linear(8, 8))
    assert statuses(plain, deep) == {"same": ["first", "last"], "added": ["m0"]}
    assert statuses(deep, plain) == {"same": ["first", "last"], "removed": ["m0"]}


def test_renamed_layers_are_found_by_their_op_and_shapes_in_order() -> None:
    old = [layer("a", "pool"), layer("b"), layer("c", "linear")]
    new = [layer("x", "pool"), layer("y"), layer("y2"), layer("z", "linear")]
    pairs = match(old, new)
    assert [(p.before and p.before.name, p.after and p.after.name) for p in pairs] == [
        ("a", "x"), ("b", "y"), (None, "y2"), ("c", "z"),
    ]  # fmt: skip
    assert [p.status for p in pairs] == ["same", "same", "added", "same"]


def test_the_same_module_called_twice_pairs_call_by_call() -> None:
    pairs = match([layer("a", macs=1), layer("a", macs=2)], [layer("a", macs=1), layer("a", macs=3), layer("a")])
    assert [p.status for p in pairs] == ["same", "changed", "added"]


def test_depthwise_layers_replace_dense_ones() -> None:
    found = statuses(zoo("mobilenet_v1", depthwise=False), zoo("mobilenet_v1"))
    assert {status: len(names) for status, names in found.items()} == {"same": 3, "added": 26, "removed": 13}


def test_groups_that_save_macs_on_paper_only_are_told() -> None:
    found = compare(zoo("shufflenet_v1", groups=1), zoo("shufflenet_v1", groups=8), PI)
    # the same MACs at more channels is what groups are for; the bytes and the time are the price (guideline G2)
    assert re.search(r"Dearer than the MACs tell: access and predicted time on raspberry_pi_4\.", found.text)


def test_times_that_are_known_better_stand_for_the_roofline_s() -> None:
    before = cost_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 1, 4)
    after = cost_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), 1, 4)
    first, last = (layer.node for layer in before.layers if layer.op == "linear")
    times = Times(9.0, {first: 5.0, last: 3.0}), Times(3.0, {after.layers[0].node: 2.0})
    found = compare(before, after, PI, times)
    assert found.ms == ((5.0, 2.0), (3.0, 0.0))
    assert found.totals["ms"] == (9.0, 3.0)
    assert "predicted time on raspberry_pi_4 x0.33" in found.text
    by_roofline = compare(before, after, PI)
    assert by_roofline.ms is not None
    assert sum(amount.before for amount in by_roofline.ms) == pytest.approx(by_roofline.totals["ms"].before)
    assert compare(before, after).ms is None


@pytest.mark.parametrize(
    ("macs", "access", "ms", "said"),
    [
        (0.60, 0.88, 0.91, "A saving on paper: MACs fall by much more than access and predicted time"),
        (0.25, 0.45, 0.60, "A saving on paper: MACs fall by much more than predicted time"),
        (0.25, 0.60, 0.30, "Access does not fall as MACs do; predicted time on raspberry_pi_4 does"),
        (0.25, 0.30, 0.30, "The saving in MACs is one in access and predicted time on raspberry_pi_4 too"),
        (1.00, 1.00, 0.50, "Cheaper than the MACs tell: predicted time on raspberry_pi_4."),
    ],
)
def test_what_is_said_of_a_saving(macs: float, access: float, ms: float, said: str) -> None:
    totals = {"macs": Amount(1, macs), "access_bytes": Amount(1, access), "ms": Amount(1, ms)}
    assert said in in_words(totals, PI)


def test_without_a_device_access_alone_decides() -> None:
    text = in_words({"macs": Amount(100, 50), "access_bytes": Amount(100, 95)})
    assert text == "MACs x0.50, access x0.95. A saving on paper: MACs fall by much more than access."


def test_nothing_is_said_of_a_network_without_macs() -> None:
    assert in_words({"macs": Amount(0, 5), "access_bytes": Amount(0, 5)}) == ""
    assert Amount(0, 5).ratio is None


NAMES = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["conv2d", "linear"]), st.integers(1, 3)))


@given(old=NAMES, new=NAMES)
def test_every_layer_is_in_exactly_one_pair_and_in_its_order(
    old: list[tuple[str, str, int]], new: list[tuple[str, str, int]]
) -> None:
    before, after = [layer(*row) for row in old], [layer(*row) for row in new]
    pairs = match(before, after)
    assert [p.after for p in pairs if p.after] == after
    assert sorted(id(p.before) for p in pairs if p.before) == sorted(map(id, before))
    assert all(p.before or p.after for p in pairs)
    gone = [next(i for i, x in enumerate(before) if x is p.before) for p in pairs if p.before and not p.after]
    assert all(a < b for a, b in pairwise(gone))
