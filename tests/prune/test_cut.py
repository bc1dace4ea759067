"""cut: exact on the nets of the papers, honest about what it leaves whole, and its proof sees a wrong index."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from strategies import IMAGE, Around, Kept, assert_sliced, compare, first_names, half, randomise, widths
from torch import Tensor, nn
from torch.nn import functional as F

from aerogel import nets
from aerogel.cost import count
from aerogel.errors import CaptureError, CutError
from aerogel.graph import capture
from aerogel.prune import cut, deepest
from aerogel.prune.proof import TOLERANCE, prove

# ---------------------------------------------------------------- exact, on the nets of the papers

NETS: dict[str, dict[str, Any]] = {
    "lenet5": {},
    "vgg16": {"input_size": 32, "num_classes": 10},
    "resnet18": {"input_size": 32, "num_classes": 10},
    "resnet50": {"input_size": 64, "num_classes": 10},
    "resnet56": {},
    "mobilenet_v2": {"input_size": 32, "num_classes": 10},
}


def shape_of(net: nn.Module) -> tuple[int, ...]:
    arguments = net.spec["args"]
    return (2, arguments["in_channels"], arguments["input_size"], arguments["input_size"])


def composed(first: Kept, then: Kept, ranks: dict[str, int]) -> Kept:
    """The indices kept by one cut after another, counted in the whole network."""
    both: dict[str, tuple[Tensor | None, ...]] = {}
    for name in first.keys() | then.keys():
        whole = (None,) * ranks[name]
        pairs = zip(first.get(name, whole), then.get(name, whole), strict=True)
        both[name] = tuple(b if a is None else a if b is None else a[b] for a, b in pairs)
    return both


def cut_is_exact(name: str, keep: float, steps: int, **arguments: Any) -> None:
    """A random cut to that share of the channels, in so many steps; on random weights, norms, inputs, three times."""
    torch.manual_seed(0)
    net = nets.build(name, **(NETS[name] | arguments))
    randomise(net, keep)
    x, small, kept = torch.zeros(shape_of(net)), net, {}
    ranks = {key: tensor.ndim for key, tensor in net.state_dict().items()}
    for _ in range(steps):
        made = cut(small, (x,), target={"channels": keep ** (1 / steps)}, criterion="random")
        assert made.max_error <= TOLERANCE
        assert not any("differ" in why or "fails" in why for why in made.frozen.values()), made.frozen
        small, kept = made.model, composed(kept, made.kept, ranks)
    assert made.after == count(capture(small, (x,)))
    assert_sliced(net, small, kept)
    assert all(compare(net, small, kept, shape_of(net), keep, seeds=3)), "the output depends on the input"


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("steps", [1, 5])
def test_lenet5_is_cut_exactly(keep: float, steps: int) -> None:
    cut_is_exact("lenet5", keep, steps)


@pytest.mark.parametrize(("name", "keep"), [("vgg16", 0.1), ("resnet18", 0.5), ("mobilenet_v2", 0.5)])
def test_a_narrow_net_is_cut_exactly(name: str, keep: float) -> None:
    cut_is_exact(name, keep, 1, width=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("name", NETS)
def test_every_net_is_cut_exactly(name: str, keep: float, steps: int) -> None:
    cut_is_exact(name, keep, steps)


# ---------------------------------------------------------------- what the proof freezes


def test_code_that_fails_once_it_is_cut_is_frozen_by_the_proof() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv1, self.conv2, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 50, 3), nn.Linear(800, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv2(self.conv1(x)).view(-1, 800))

    made = half(Constant())
    assert made.frozen["conv2"].startswith("forward fails once it is cut: RuntimeError: ")
    assert widths(made.model) == {"conv1": 3, "conv2": 50}


def test_parts_of_a_size_that_the_code_holds_are_frozen_by_the_proof() -> None:
    def swap(net: Around, x: Tensor) -> Tensor:
        first, second = x.split(4, 1)
        return torch.cat([second, first], 1)

    made = half(Around(swap))
    assert made.frozen["conv1"].startswith("forward fails once it is cut: ValueError: not enough values")
    assert widths(made.model)["conv1"] == 8
    assert widths(made.model)["conv3"] < 6


def test_numbers_that_change_with_the_width_are_frozen_by_the_proof() -> None:
    made = half(Around(lambda net, x: x * (8 / x.shape[1])))
    assert made.frozen["conv1"].startswith("cut and masked outputs differ by ")
    assert widths(made.model)["conv1"] == 8
    assert widths(made.model)["conv3"] < 6


def test_cuts_that_fail_only_together_freeze_the_later_one() -> None:
    def needs_twelve(net: Around, x: Tensor) -> Tensor:
        if len(net.conv1.weight) + len(net.conv2.weight) < 12:
            raise RuntimeError("too narrow")
        return x

    made = deepest(Around(needs_twelve), (IMAGE,), min_channels=4)
    assert made.frozen["conv2"] == "forward fails once it is cut: RuntimeError: too narrow"
    assert widths(made.model) == {"conv1": 4, "conv2": 8, "conv3": 4}


def test_everything_frozen_is_an_error() -> None:
    net = nn.Conv2d(3, 4, 1)
    with pytest.raises(CutError, match=r"channels=0\.5 \(cutting reaches 1\) is out of reach; nothing can be cut"):
        cut(net, (IMAGE,), target={"channels": 0.5})


# ---------------------------------------------------------------- what cannot be proven or copied


def test_an_output_that_is_not_the_same_twice() -> None:
    with pytest.raises(
        CutError, match="Around: nothing can be proven, its output on random inputs is not the same twice"
    ):
        half(Around(lambda net, x: x + torch.rand_like(x)))


def test_an_output_that_is_not_finite() -> None:
    with pytest.raises(CutError, match="nothing can be proven"):
        half(Around(lambda net, x: x.mul(-1).square().neg().sqrt()))


def test_a_network_that_takes_no_random_numbers() -> None:
    net = Around(lambda net, x: x + torch.linalg.cholesky(x))
    with pytest.raises(CutError, match=r"Around fails on random inputs: .*make it take any numbers"):
        cut(net, (IMAGE,), target={"channels": 0.5})


def test_a_network_that_cannot_be_copied() -> None:
    net = Around(lambda net, x: x)
    net.cache = net.conv1.weight * 2
    with pytest.raises(CutError, match=r"Around cannot be copied .*; remove what deepcopy refuses"):
        cut(net, (IMAGE,), target={"channels": 0.5})


def test_a_network_that_cannot_be_read() -> None:
    with pytest.raises(CaptureError, match="check its size"):
        cut(Around(lambda net, x: x), (torch.zeros(2, 4, 8, 8),), target={"channels": 0.5})


def small_block() -> nn.Module:
    """A residual net as trained ones may be: no bias yet, the block's last scale 0, weights and variances tiny."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(6) for _ in range(3)]
    body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), norms[1], nn.ReLU(), nn.Conv2d(6, 6, 1, bias=False), norms[2])
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), norms[0], nets.blocks.Residual(body), nn.Flatten(), nn.Linear(216, 5), nn.Linear(5, 2)
    )
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(0.05)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.mul_(1e-3)
    nn.init.zeros_(norms[2].weight)
    return net


def test_the_proof_sees_every_wrong_index() -> None:
    net = small_block()
    kept = half(net, criterion="random").kept
    assert prove(net, (IMAGE,), None, kept)[1] is None
    state, wrong = net.state_dict(), 0
    for name, dims in kept.items():
        for dim, indices in enumerate(dims):
            if indices is None:
                continue
            swapped = indices.clone()
            free = torch.ones(state[name].shape[dim], dtype=torch.bool)
            free[indices] = False
            swapped[0] = free.nonzero()[0]
            dims_swapped = tuple(swapped if d == dim else k for d, k in enumerate(dims))
            error, problem = prove(net, (IMAGE,), None, kept | {name: dims_swapped})
            assert error > 10 * TOLERANCE, f"{name} dim {dim}: {error}"
            assert problem is not None
            wrong += 1
    assert wrong > 15


# ---------------------------------------------------------------- the call


@pytest.fixture(scope="module")
def lenet() -> nn.Module:
    torch.manual_seed(0)
    return nets.build("lenet5")


DIGIT = torch.zeros(1, 1, 28, 28)


def test_the_model_is_untouched_and_the_result_its_own() -> None:
    net = Around(lambda net, x: x)
    net.conv1.requires_grad_(False)
    net.conv2.eval()
    net(torch.ones_like(IMAGE)).sum().backward()
    before, gradient = copy.deepcopy(net.state_dict()), net.conv2.weight.grad
    made = half(net)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.conv2.weight.grad is gradient
    assert net.training
    assert not net.conv2.training
    assert made.model is not net
    assert made.model.training
    assert not made.model.conv2.training, "train and eval flags are the model's"
    assert all(p.grad is None for p in made.model.parameters())
    assert [p.requires_grad for p in made.model.parameters()] == [p.requires_grad for p in net.parameters()]
    memory = {p.data_ptr() for p in net.parameters()}
    assert not any(p.data_ptr() in memory for p in made.model.parameters())


def test_keyword_inputs_and_several_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)

        def forward(self, x: Tensor, *, scale: Tensor, times: int = 1) -> dict[str, Any]:
            x = self.a(x).relu() * scale
            return {"b": [self.b(x)], "c": self.c(x) * times, "best": self.c(x).argmax(1), "width": x.shape[1]}

    kwargs = {"scale": torch.ones(2, 1), "times": 3}
    made = cut(Two(), (torch.zeros(2, 4),), kwargs, target={"channels": 0.5})
    assert made.model.a.out_features == 3
    assert "argmax" in made.frozen["c.weight dim 0"]


def test_whole_numbers_are_compared_too() -> None:
    class Best(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return (self.b(x) + (x.shape[1] - 64) * torch.arange(16)).argmax(1)

    with pytest.raises(CutError, match="out of reach"):  # the one group there is fails its proof
        cut(Best(), (torch.zeros(64, 16),), target={"channels": 0.5})


def test_half_precision_is_proven_in_single() -> None:
    made = cut(Around(lambda net, x: x).bfloat16(), (IMAGE.bfloat16(),), target={"channels": 0.5})
    assert made.max_error < TOLERANCE
    assert made.model.conv1.weight.dtype == torch.bfloat16
    assert widths(made.model)["conv1"] < 8


class Amplified(nn.Module):
    """Rounding in `inner` grows a million times; constants that are float32 stop a proof in float64.

    Sums of thousands: of a few numbers some processors round the cut and the masked one alike.
    """

    def __init__(self, single: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(IMAGE[0].numel(), 3000), nn.ReLU(), nn.Linear(3000, 2))
        self.single = single

    def forward(self, x: Tensor) -> Tensor:
        x = (self.inner(x) * 1e6).sin()
        return F.linear(x, torch.eye(2)) if self.single else x


def test_a_network_that_amplifies_rounding_is_proven_in_double() -> None:
    made = cut(Amplified(single=False), (IMAGE,), target={"channels": 0.5})
    assert made.max_error < 1e-6
    assert made.model.inner[1].out_features == 1500
    assert made.model.inner[1].weight.dtype == torch.float32
    with pytest.raises(CutError, match="every channel is frozen"):  # the one group there is fails its proof
        cut(Amplified(single=True), (IMAGE,), target={"channels": 0.5})


def test_a_network_may_write_into_its_input() -> None:
    net = nn.Sequential(nn.Hardswish(inplace=True), Around(lambda net, x: x))
    x = torch.ones_like(IMAGE) - 1.5
    made = cut(net, (x,), target={"channels": 0.5})
    assert made.max_error < TOLERANCE
    assert made.model[1].conv1.out_channels < 8
    assert (x == -0.5).all(), "the example is the caller's"


def test_tied_weights_stay_tied_and_are_cut_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.one, self.two, self.down = (nn.Linear(*n) for n in [(3, 8), (8, 8), (8, 8), (8, 2)])
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.two(self.one(self.up(x))))

    net = Tied()
    made = cut(net, (torch.zeros(2, 3),), target={"channels": 0.5})
    assert made.model.two.weight is made.model.one.weight
    assert made.model.one.weight.shape == (4, 4)
    assert first_names(made.model) == first_names(net)
    assert "two.weight" not in made.kept


def test_deepest_leaves_one_channel_everywhere(lenet: nn.Module) -> None:
    made = deepest(lenet, (DIGIT,))
    assert [tuple(p.shape) for p in made.model.parameters() if p.ndim > 1] == [
        *((1, 1, 5, 5), (1, 1, 5, 5), (1, 16), (10, 1))
    ]
    assert made.max_error <= TOLERANCE
    made = deepest(lenet, (DIGIT,), min_channels=3, protect=["features.conv1"])
    assert widths(made.model) == {"features.conv1": 20, "features.conv2": 3}
    with pytest.raises(CutError, match="min_channels must be an integer of at least 1, got 0"):
        deepest(lenet, (DIGIT,), min_channels=0)


def test_the_cost_before_and_after_are_those_of_the_two_networks(lenet: nn.Module) -> None:
    made = cut(lenet, (DIGIT,), target={"macs": 0.4})
    assert made.before == count(capture(lenet, (DIGIT,)))
    assert made.after == count(capture(made.model, (DIGIT,)))
    assert made.after.macs <= 0.4 * made.before.macs
    assert made.inexact == {}


@pytest.mark.parametrize(
    ("pattern", "whole"),
    [
        ("features.conv1", {"features.conv1"}),
        ("features.conv1.weight", {"features.conv1"}),
        ("*.conv2", {"features.conv1", "features.conv2"}),  # its input channels are those that conv1 makes
        ("features", {"features.conv1", "features.conv2"}),
    ],
)
def test_protected_layers_keep_their_shape(lenet: nn.Module, pattern: str, whole: set[str]) -> None:
    made = cut(lenet, (DIGIT,), target={"channels": 0.3}, protect=[pattern])
    kept = {name for name, width in widths(made.model).items() if width == widths(lenet)[name]}
    assert kept == whole
    assert all(made.frozen[name] == f"protected by {pattern!r}" for name in whole)


def test_a_pattern_that_names_nothing(lenet: nn.Module) -> None:
    with pytest.raises(CutError, match=r"protect pattern 'features\.conv3' names no layer; did you mean .*conv"):
        cut(lenet, (DIGIT,), target={"channels": 0.5}, protect=["features.conv3"])
    with pytest.raises(CutError, match=r"protect must be a list of patterns, got 'features'; write \['features'\]"):
        cut(lenet, (DIGIT,), target={"channels": 0.5}, protect="features")


def test_a_pattern_may_name_what_was_frozen_anyway(lenet: nn.Module) -> None:
    made = cut(lenet, (DIGIT,), target={"channels": 0.5}, protect=["classifier.ip2"])
    assert made.model.classifier.ip2.out_features == 10
    assert made.model.classifier.ip1.out_features == 500
    assert made.model.features.conv2.out_channels < 50
