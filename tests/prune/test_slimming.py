"""Network slimming: the penalty and its sub-gradient, the percentile, cuts that lose nothing where gamma is zero."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from aerogel import nets
from aerogel.data import Batch, load
from aerogel.errors import AerogelError, CutError
from aerogel.nets.densenet import dense_layer
from aerogel.prune import criterion, cut
from aerogel.prune.proof import TOLERANCE
from aerogel.prune.slimming import Slimming, histograms, scale_penalty, scales, set_scales, slim, threshold
from aerogel.train import HardLabels, Recipe, fit, start

NETS: dict[str, dict[str, Any]] = {
    "vgg11": {"width": 0.125, "input_size": 16, "num_classes": 10},
    "resnet18": {"width": 0.125, "input_size": 16, "num_classes": 10},
    "mobilenet_v2": {"width": 0.1, "input_size": 16, "num_classes": 10},
    "densenet40": {"growth": 2, "input_size": 8},
    "resnet164": {"width": 0.5, "input_size": 8},
}


class PreAct(nn.Module):
    """Three pre-activation bottlenecks on one stream, then a norm of its own: He et al. 2016, arXiv:1603.05027."""

    def __init__(self, channels: int = 12, inner: int = 6, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, inner, 1, bias=False)),
                *(nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, inner, 3, padding=1, bias=False)),
                *(nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, channels, 1, bias=False)),
            )
            for _ in range(blocks)
        )
        self.last = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(F.relu(self.last(x)).mean((2, 3)))

    def stream(self) -> list[nn.BatchNorm2d]:
        """The norms that read the stream."""
        return [*(block[0] for block in self.blocks), self.last]


def dense(channels: int = 8, k: int = 4, layers: int = 3) -> nn.Sequential:
    """A dense block between a stem and a head: every layer's norm reads all channels that were made before it."""
    block = [dense_layer(channels + i * k, k, False, 0.0, nn.BatchNorm2d) for i in range(layers)]
    last = channels + layers * k
    return nn.Sequential(
        *(nn.Conv2d(3, channels, 3, padding=1, bias=False), *block, nn.BatchNorm2d(last), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 5)),
    )


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Scales, shifts and statistics of a network that has learnt something."""
    generator = torch.Generator().manual_seed(seed)
    for norm in norms(model):
        for tensor, low in ((norm.weight, 0.2), (norm.bias, -0.5), (norm.running_mean, -0.5), (norm.running_var, 0.5)):
            tensor.data = low + torch.rand(tensor.shape, generator=generator)
    return model.eval()


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def silence(norm: nn.BatchNorm2d, gone: Tensor) -> None:
    """These channels of the norm say nothing: gamma = beta = 0."""
    with torch.no_grad():
        norm.weight[gone], norm.bias[gone] = 0.0, 0.0


def built(name: str = "vgg11") -> nn.Module:
    torch.manual_seed(0)
    own = {"preact": PreAct, "dense": dense}
    return drawn(own[name]() if name in own else nets.build(name, **NETS[name]))


def image_of(net: nn.Module, batch: int = 2) -> Tensor:
    arguments = net.spec["args"] if hasattr(net, "spec") else {"in_channels": 3, "input_size": 8}
    side = arguments["input_size"]
    return torch.randn(batch, arguments["in_channels"], side, side, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- the penalty


def test_every_scale_starts_from_a_half() -> None:
    net = nets.build("vgg11", **NETS["vgg11"])
    weight = net.features.stage1.conv1.conv.weight.detach().clone()
    set_scales(net)
    assert [gamma.unique().tolist() for gamma in scales(net).values()] == [[0.5]] * 8
    assert torch.equal(net.features.stage1.conv1.conv.weight, weight)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_start_that_is_no_scale_is_refused(value: float) -> None:
    with pytest.raises(AerogelError, match=r"set_scales: value must be > 0 and finite, got .*0\.5"):
        set_scales(PreAct(), value)


def test_scales_are_named_as_the_weights_are() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4))
    assert list(scales(net)) == ["1.weight"]


def test_the_penalty_is_the_sum_and_its_gradient_the_sign() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    net[1].weight.data = torch.tensor([-2.0, 0.0, 0.5])
    net[3].weight.data = torch.tensor([1.0, -0.25])
    penalty = scale_penalty(net)
    penalty.backward()
    assert penalty.item() == 3.75
    assert net[1].weight.grad.tolist() == [-1.0, 0.0, 1.0]
    assert net[3].weight.grad.tolist() == [1.0, -1.0]
    assert net[0].weight.grad is None


def test_frozen_scales_are_not_penalised() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(2))
    net[0].weight.requires_grad_(False)
    assert scale_penalty(net).item() == 2.0
    net[1].weight.requires_grad_(False)
    with pytest.raises(AerogelError, match="Sequential has no batch norm whose scale is trained; unfreeze"):
        scale_penalty(net)


def test_slimming_adds_its_term_to_any_objective() -> None:
    net, batch = built(), Batch(torch.randn(4, 3, 16, 16), torch.arange(4))
    plain, both = HardLabels(0.1)(net, batch), Slimming(HardLabels(0.1), 0.01)(net, batch)
    assert list(both) == ["hard", "slimming"]
    assert torch.equal(both["hard"], plain["hard"])
    assert both["slimming"].item() == pytest.approx(0.01 * sum(g.abs().sum().item() for g in scales(net).values()))


def test_an_objective_with_weights_of_its_own_keeps_them() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
            return {"hard": self.weight * F.cross_entropy(student(batch.inputs), batch.labels)}

    assert [name for name, _ in Slimming(Weighted()).named_parameters()] == ["objective.weight"]


@pytest.mark.parametrize("penalty", [-1e-4, float("nan"), float("inf")])
def test_a_penalty_below_zero_is_refused(penalty: float) -> None:
    with pytest.raises(AerogelError, match=r"Slimming: penalty must be >= 0 and finite, got .*1e-5 to 1e-4"):
        Slimming(HardLabels(), penalty)


def test_training_with_the_penalty_makes_scales_small() -> None:
    data = load("digits")
    middle = {}
    for penalty in (0.0, 0.1):
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
        )
        set_scales(net)
        fit(start(net, Slimming(HardLabels(), penalty), data, Recipe(epochs=0.5, batch_size=32, lr=0.1)), data)
        middle[penalty] = threshold(net, 0.5)
    assert middle[0.1] < 0.1
    assert middle[0.0] > 0.4


# ---------------------------------------------------------------- the percentile and the histograms


def with_scales(values: list[float]) -> nn.Module:
    """Two norms that share these scales out."""
    half = len(values) // 2
    net = nn.Sequential(nn.BatchNorm2d(half), nn.BatchNorm2d(len(values) - half))
    net[0].weight.data, net[1].weight.data = torch.tensor(values[:half]), torch.tensor(values[half:])
    return net


SCALES = st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=40)


@given(SCALES, st.floats(0, 0.99))
def test_the_threshold_is_the_papers_percentile(values: list[float], ratio: float) -> None:
    """The official code: y, _ = torch.sort(gammas); y[int(total * percent)]."""
    ordered = sorted(abs(value) for value in values)
    found = threshold(with_scales(values), ratio)
    assert found == ordered[int(len(values) * ratio)]
    assert sum(value < found for value in ordered) <= ratio * len(values)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(AerogelError, match=r"threshold: ratio must be in \[0, 1\), got .*0\.4 to 0\.7"):
        threshold(PreAct(), ratio)


def test_a_network_without_batch_norms_has_no_threshold() -> None:
    with pytest.raises(AerogelError, match="Linear has no batch norm with a scale"):
        threshold(nn.Linear(2, 2), 0.5)


@given(st.lists(SCALES, min_size=1, max_size=3), st.integers(1, 60))
def test_histograms_hold_every_channel_on_common_edges(drawn_scales: list[list[float]], bins: int) -> None:
    counts, edges = histograms(*(with_scales(values) for values in drawn_scales), bins=bins)
    assert counts.shape == (len(drawn_scales), bins)
    assert counts.sum(1).tolist() == [len(values) for values in drawn_scales]
    assert edges[0] == 0.0
    assert edges[-1] >= max(abs(value) for values in drawn_scales for value in values)
    assert (np.diff(edges) > 0).all()


def test_a_histogram_counts_by_size() -> None:
    counts, edges = histograms(with_scales([0.0, -0.1, 0.9, 1.0]), with_scales([2.0, 2.0]), bins=2)
    assert edges.tolist() == [0.0, 1.0, 2.0]
    assert counts.tolist() == [[3, 1], [0, 2]]


def test_a_histogram_of_nothing_is_refused() -> None:
    with pytest.raises(AerogelError, match="histograms: give at least one model and one bin, got 0 and bins=50"):
        histograms()
    with pytest.raises(AerogelError, match="got 1 and bins=0"):
        histograms(PreAct(), bins=0)


# ---------------------------------------------------------------- the cut

SLOW = pytest.mark.slow


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_a_plain_network_loses_what_lies_below_the_threshold(ratio: float) -> None:
    net = built()
    below = threshold(net, ratio)
    made = slim(net, (image_of(net),), target={"channels": 1 - ratio})
    assert made.max_error <= TOLERANCE
    for name, gamma in scales(net).items():
        (kept,) = made.kept.get(name, (None,))
        left = torch.arange(len(gamma)) if kept is None else kept
        assert left.tolist() == (gamma.abs() >= below).nonzero().flatten().tolist(), name


@pytest.mark.parametrize("name", ["vgg11", "preact", "dense", *(pytest.param(n, marks=SLOW) for n in [*NETS][1:])])
def test_a_cut_of_silent_channels_changes_nothing(name: str) -> None:
    """Every norm silences the channels that its group loses: the slimmed network gives the same numbers."""
    net = built(name)
    x = image_of(net)
    made = slim(net, (x,), target={"channels": 0.6}, reduce="mean")
    for norm, weight in zip(norms(net), scales(net), strict=True):
        (kept,) = made.kept.get(weight, (None,))
        gone = torch.ones(norm.num_features, dtype=torch.bool)
        gone[slice(None) if kept is None else kept] = False
        silence(norm, gone)
    again = slim(net, (x,), target={"channels": 0.6}, reduce="mean")
    assert {name: [None if k is None else k.tolist() for k in dims] for name, dims in again.kept.items()} == {
        name: [None if k is None else k.tolist() for k in dims] for name, dims in made.kept.items()
    }
    torch.testing.assert_close(again.model.eval()(x), net(x), rtol=1e-4, atol=1e-5)
    assert again.after.params < 0.7 * again.before.params


def test_a_pre_activation_stream_is_cut_where_no_norm_reads_it() -> None:
    """What the paper's channel selection layers do one by one: here the channel itself goes."""
    net = built("preact")
    gone = torch.zeros(12, dtype=torch.bool)
    gone[[1, 4, 5, 9]] = True
    for norm in net.stream():
        silence(norm, gone)
    x = image_of(net)
    made = slim(net, (x,), target={"channels": 44 / 48})  # 12 of the stream, 3 blocks of two inner groups of 6
    assert made.model.stem.out_channels == 8
    assert made.kept["stem.weight"][0].tolist() == (~gone).nonzero().flatten().tolist()
    assert [block[0].num_features for block in made.model.blocks] == [8, 8, 8]
    assert [block[2].out_channels for block in made.model.blocks] == [6, 6, 6]
    torch.testing.assert_close(made.model.eval()(x), net(x), rtol=1e-4, atol=1e-5)


def test_a_shared_channel_stays_while_one_norm_asks_for_it() -> None:
    net = built("preact")
    for norm in net.stream()[:-1]:
        silence(norm, torch.arange(12) == 3)
    target, x = {"channels": 47 / 48}, image_of(net)
    least = min(gamma.abs().min().item() for name, gamma in scales(net).items() if name != "blocks.0.0.weight")
    net.last.weight.data[3] = 10.0
    assert least < 0.5
    assert slim(net, (x,), target=target).model.stem.out_channels == 12
    made = slim(net, (x,), target={"channels": 40 / 48}, reduce="max")
    assert made.kept.get("stem.weight", (None,))[0] is None or 3 in made.kept["stem.weight"][0]
    net.last.weight.data[3] = 0.25
    made = slim(net, (x,), target=target, reduce="mean")
    assert made.kept["stem.weight"][0].tolist() == [i for i in range(12) if i != 3]


def test_a_layer_of_silent_channels_keeps_its_floor() -> None:
    net = built()
    silence(net.features.stage3.conv1.bn, torch.ones(32, dtype=torch.bool))
    x = image_of(net)
    for least in (1, 4):
        made = slim(net, (x,), target={"channels": 0.8}, min_channels=least)
        assert made.model.features.stage3.conv1.conv.out_channels == least


def test_two_passes_reach_further_and_leave_the_network_alone() -> None:
    net = built()
    before = copy.deepcopy(net.state_dict())
    x = image_of(net)
    first = slim(net, (x,), target={"channels": 0.5})
    second = slim(drawn(first.model, seed=1), (x,), target={"channels": 0.5})
    assert second.after.params < 0.5 * second.before.params < 0.25 * first.before.params
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_other_goals_and_options_hold_as_in_cut() -> None:
    net = built()
    made = slim(net, (image_of(net),), target={"params": 0.3, "macs": 0.5}, round_to=4, protect=["features.stage1"])
    assert made.after.params <= 0.3 * made.before.params
    assert made.after.macs <= 0.5 * made.before.macs
    assert made.frozen["features.stage1.conv1.conv"] == "protected by 'features.stage1'"
    assert all(len(gamma) % 4 == 0 for gamma in scales(made.model).values())


def test_what_passes_no_norm_is_named_and_stays() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten()),
        nn.Linear(6 * 16, 3),
    )
    made = slim(drawn(net), (torch.zeros(1, 3, 8, 8),), target={"channels": 0.5})
    assert made.frozen["3"] == "passes no batch norm"
    assert (made.model[0].out_channels, made.model[3].out_channels) == (4, 6)


def test_a_network_without_batch_norms_cannot_be_slimmed() -> None:
    net = nets.build("lenet5")
    with pytest.raises(CutError, match=r"slim: Net: no channels that can be cut pass a batch norm; .*criterion='l2'"):
        slim(net, (torch.zeros(1, 1, 28, 28),), target={"channels": 0.5})


@pytest.mark.parametrize("reduce", ["max", "mean", "sum"])
def test_slimming_is_the_criterion_that_compares_raw_scales(reduce: str) -> None:
    net = built("preact")
    x, target = (image_of(net),), {"channels": 0.5}
    raw = criterion("bn_scale", reduce=reduce, normalize="none")
    own = slim(net, x, target=target, reduce=reduce)
    other = cut(net, x, target=target, criterion=raw, ranking="global")
    assert own.kept.keys() == other.kept.keys()
    for name, dims in own.kept.items():
        assert all(torch.equal(a, b) for a, b in zip(dims, other.kept[name], strict=True) if a is not None), name


def test_bad_options_are_refused() -> None:
    net, x = PreAct(), torch.zeros(1, 3, 8, 8)
    with pytest.raises(CutError, match="reduce 'maximum' is unknown; did you mean max"):
        slim(net, (x,), target={"channels": 0.5}, reduce="maximum")
    with pytest.raises(CutError, match=r"slim: latency is a target of cut alone; use cut\(criterion=.*reduce='max'"):
        slim(net, (x,), target={"latency": 0.5})
    with pytest.raises(CutError, match="target 'chanels' is unknown; did you mean channels"):
        slim(net, (x,), target={"chanels": 0.5})
    with pytest.raises(CutError, match="min_channels must be an integer of at least 1, got 0"):
        slim(net, (x,), target={"channels": 0.5}, min_channels=0)
