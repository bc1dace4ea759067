"""Any network: every convolutional one of NETS and every family of Hugging Face is cut exactly, or told why not.

At 10, 30, 50 and 90 % of the channels removed, and half of them in five steps, at random: the cut network computes
what the masked one does, on other random numbers than those that `cut` proves itself with. Whatever stays whole has
its reason. A selection runs in `make test`, all of it in `make conformance`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, Case, random_like, randomise, unexplained
from strategies import Kept, assert_sliced
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from aerogel import nets
from aerogel.cost import count
from aerogel.graph import capture, tensor_names
from aerogel.graph.capture import quiet
from aerogel.prune import cut
from aerogel.prune.coupling import couple
from aerogel.prune.proof import TOLERANCE

SMALL = {"width": 0.25, "growth": 8, "num_classes": 5, "in_channels": 3}
SIDES = {"lenet5": 28, "alexnet": 67, "densenet40": 32, "densenet121": 32}


def of_zoo(name: str) -> Case:
    """One of NETS, narrow where it can be, for small images."""
    torch.manual_seed(0)
    options = inspect.signature(nets.NETS[name]).parameters
    entries = {key: SMALL[key] for key in SMALL if key in options} | {"input_size": SIDES.get(name, 32)}
    inputs = {"x": torch.zeros(2, 3, entries["input_size"], entries["input_size"])}
    return randomise(nets.build(name, **entries), inputs), (), inputs


ZOO = [name for name in nets.NETS if name not in ("lenet_300_100", "mlp")]
NETWORKS: dict[str, Callable[[], Case]] = {name: lambda name=name: of_zoo(name) for name in ZOO} | {
    f"hf {name}": build for name, build in FAMILIES.items()
}
SOME = ("lenet5", "shufflenet_v1", "hf resnet", "hf swin", "hf vit", "hf bert", "hf llama")
WAYS = ((0.9, 1), (0.7, 1), (0.5, 1), (0.1, 1), (0.5, 5))  # (share kept, in so many steps)


def named(net: nn.Module) -> dict[str, Tensor]:
    names = tensor_names(net)
    return {names[id(t)]: t for t in (*net.parameters(), *net.buffers())}


def composed(first: Kept, then: Kept, ranks: dict[str, int]) -> Kept:
    """The indices kept by one cut after another, counted in the whole network."""
    both: dict[str, tuple[Tensor | None, ...]] = {}
    for name in first.keys() | then.keys():
        whole = (None,) * ranks[name]
        pairs = zip(first.get(name, whole), then.get(name, whole), strict=True)
        both[name] = tuple(b if a is None else a if b is None else a[b] for a, b in pairs)
    return both


def masked(net: nn.Module, kept: Kept) -> nn.Module:
    """A copy of the whole network with everything that is not kept set to zero."""
    net = copy.deepcopy(net)
    tensors = named(net)
    with torch.no_grad():
        for name, dims in kept.items():
            for dim, indices in enumerate(dims):
                if indices is not None:
                    lost = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
                    lost[indices] = False
                    tensors[name].index_fill_(dim, lost.nonzero().flatten(), 0)
    return net


def answers(net: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad(), quiet():
        return [leaf for leaf in tree_leaves(net.eval()(**inputs)) if isinstance(leaf, Tensor)]


def largest(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest |got - expected| / max |expected|."""
    assert [e.shape for e in expected] == [g.shape for g in got]
    pairs = [(e.double(), g.double()) for e, g in zip(expected, got, strict=True) if e.numel()]
    return max(((e - g).abs().max() / e.abs().max().clamp_min(1e-12)).item() for e, g in pairs)


def cut_is_exact(case: Case, keep: float, steps: int, **options: Any) -> None:
    """A random cut to that share of the channels, or to the last channel of every group where that is more."""
    net, _, inputs = case
    small, kept = net, {}
    ranks = {name: tensor.ndim for name, tensor in named(net).items()}
    groups: tuple[Any, ...] = ()
    for _ in range(steps):
        groups = tuple(g for g in couple(capture(small, (), inputs)).groups if not g.inexact)
        least = len(groups) / sum(map(len, groups))
        share = max(keep ** (1 / steps), least)
        made = cut(small, (), inputs, target={"channels": share}, criterion="random", **options)
        assert made.max_error <= TOLERANCE
        assert all(made.frozen.values())
        small, kept = made.model, composed(kept, made.kept, ranks)
    assert_sliced(net, small, {name: dims for name, dims in kept.items() if name in net.state_dict()})
    assert made.after == count(capture(small, (), inputs))
    reference = masked(net, kept)
    matters = False
    for seed in (1, 2):
        x = random_like(inputs, seed)
        expected = answers(reference, x)
        assert largest(expected, answers(small, x)) <= TOLERANCE
        matters |= largest(expected, answers(net, x)) > 10 * TOLERANCE
    assert matters, "what was removed makes no difference: nothing was shown"


@pytest.mark.parametrize("name", SOME)
def test_some_networks_are_cut_exactly(name: str) -> None:
    cut_is_exact(NETWORKS[name](), 0.5, 1)


def test_one_is_cut_exactly_step_by_step() -> None:
    cut_is_exact(NETWORKS["hf vit"](), 0.5, 3)


@pytest.mark.parametrize("name", SOME)
def test_of_some_networks_nothing_is_passed_over_in_silence(name: str) -> None:
    net, args, kwargs = NETWORKS[name]()
    assert unexplained(net, couple(capture(net, args, kwargs))) == []


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "steps"), WAYS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_cut_exactly(name: str, keep: float, steps: int) -> None:
    cut_is_exact(NETWORKS[name](), keep, steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_passed_over_in_silence(name: str) -> None:
    net, args, kwargs = NETWORKS[name]()
    assert unexplained(net, couple(capture(net, args, kwargs))) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_width_of_heads_is_cut_exactly(name: str) -> None:
    cut_is_exact(NETWORKS[name](), 0.5, 1, heads="width")


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_what_cannot_be_exact_is_cut_only_when_it_may_and_tells_the_difference(name: str) -> None:
    net, args, kwargs = NETWORKS[name]()
    exact = cut(net, args, kwargs, target={"channels": 0.7}, criterion="random")
    assert exact.difference == 0
    both = cut(net, args, kwargs, target={"channels": 0.5}, criterion="random", allow_inexact=True)
    assert exact.inexact.keys() <= both.inexact.keys()
    assert torch.isfinite(torch.tensor(both.difference))
    assert both.max_error <= TOLERANCE
    assert answers(both.model, random_like(kwargs))
