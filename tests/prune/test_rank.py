"""Rankings: who competes with whom, by hand; what scores are divided by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aerogel import nets
from aerogel.errors import CutError
from aerogel.graph import capture
from aerogel.prune import criterion
from aerogel.prune.coupling import Coupling, Group, Member, couple
from aerogel.prune.plan import plan
from aerogel.prune.proof import named_weights
from aerogel.prune.rank import RANKINGS, find_criterion, ranks, scores


class Chain(nn.Module):
    """Four groups: a and b are pointwise, normed and read by the next; c is 3 x 3; d is linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.an = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.b, self.bn = nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
        self.c, self.d, self.e = nn.Conv2d(2, 2, 1, bias=False), nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.b(self.an(self.a(x)).relu()))
        return self.e(self.d(self.c(x).mean((2, 3))))


@pytest.fixture(scope="module")
def chain() -> Coupling:
    found = couple(capture(Chain(), (torch.zeros(1, 3, 4, 4),)))
    assert {group.name: len(group) for group in found.groups} == {"a": 4, "b": 2, "c": 2, "d": 3}
    return found


SCORES = {"a": [1, 2, 3, 9], "b": [8, 0], "c": [5, 5], "d": [7, 4, 6]}


def ranked(coupling: Coupling, ranking: str) -> dict[str, list[int]]:
    given = [np.array(SCORES[group.name], float) for group in coupling.groups]
    found = ranks(coupling.groups, given, coupling.graph, ranking)
    return {group.name: rank.tolist() for group, rank in zip(coupling.groups, found, strict=True)}


def test_globally_the_lowest_goes_first(chain: Coupling) -> None:
    assert ranked(chain, "global") == {"a": [1, 2, 3, 10], "b": [9, 0], "c": [5, 6], "d": [8, 4, 7]}


def test_locally_every_group_loses_the_same_share(chain: Coupling) -> None:
    """Shares 0: b 0, a 1, d 4, c 5; 1/4: a 2; 1/3: d 6; 1/2: a 3, c 5, b 8; 2/3: d 7; 3/4: a 9."""
    assert ranked(chain, "local") == {"a": [1, 4, 6, 10], "b": [8, 0], "c": [3, 7], "d": [9, 2, 5]}


def test_isomorphic_groups_compete_among_themselves(chain: Coupling) -> None:
    """a and b are one league of 6: scores 0 1 2 3 8 9; c has no bias and no norm; d is linear."""
    assert RANKINGS["isomorphic"](chain.groups, chain.graph)[0] == RANKINGS["isomorphic"](chain.groups, chain.graph)[1]
    assert len({*RANKINGS["isomorphic"](chain.groups, chain.graph)}) == 3
    # shares 0: b 0, d 4, c 5; 1/6: a 1; 2/6: a 2, d 6; 3/6: a 3, c 5; 4/6: d 7, b 8; 5/6: a 9
    assert ranked(chain, "isomorphic") == {"a": [3, 4, 6, 10], "b": [9, 0], "c": [2, 7], "d": [8, 1, 5]}


def test_depth_and_width_do_not_matter_to_structure_but_kernels_and_streams_do() -> None:
    net = nets.build("resnet20", num_classes=10)
    found = couple(capture(net, (torch.zeros(1, 3, 32, 32),)))
    structures = dict(
        zip((g.name for g in found.groups), RANKINGS["isomorphic"](found.groups, found.graph), strict=True)
    )
    inner = [structure for name, structure in structures.items() if "conv1" in name and "layers.0.0" not in name]
    assert len(inner) >= 6, structures.keys()
    by_structure: dict[Any, list[str]] = {}
    for name, structure in structures.items():
        by_structure.setdefault(structure, []).append(name)
    sizes = sorted(len(names) for names in by_structure.values())
    assert sizes[-1] == 9, f"the inner channels of all nine blocks are of one structure: {by_structure.values()}"


def test_heads_are_no_hidden_units() -> None:
    """Both are made by one linear layer and read by another; a head is a block of each."""

    def one(name: str, k: int) -> Group:
        made = Member(f"{name}.weight", 0, np.arange(4 * k).reshape(4, k))
        return Group(name, np.arange(4), (made, Member("out.weight", 1, made.index)))

    graph = capture(nn.Linear(3, 8), (torch.zeros(1, 3),))
    heads, hidden, other = RANKINGS["isomorphic"]([one("q", 2), one("fc", 1), one("fc2", 1)], graph)
    assert heads != hidden == other


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), ranking=st.sampled_from([*RANKINGS]))
def test_ranks_are_an_order_that_keeps_every_groups_own(chain: Coupling, seed: int, ranking: str) -> None:
    generator = np.random.default_rng(seed)
    given_scores = [generator.standard_normal(len(group)) for group in chain.groups]
    found = ranks(chain.groups, given_scores, chain.graph, ranking)
    assert sorted(np.concatenate(found).tolist()) == [*range(11)]
    for rank, score in zip(found, given_scores, strict=True):
        assert np.argsort(rank).tolist() == np.argsort(score).tolist()


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_threshold_that_would_wipe_a_layer_leaves_its_floor(chain: Coupling, ranking: str) -> None:
    low = [np.arange(len(group)) + 100.0 * (group.name != "a") for group in chain.groups]
    removed = plan(chain, low, {"channels": 8 / 11}, ranking=ranking, min_channels=2)
    left = {group.name: int((~removed[group.units]).sum()) for group in chain.groups}
    assert all(count >= 2 for count in left.values())
    assert left["a"] == 2
    removed = plan(chain, low, {"channels": 4 / 11}, ranking=ranking)
    assert all((~removed[group.units]).sum() == 1 for group in chain.groups)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_nothing_to_rank(chain: Coupling, ranking: str) -> None:
    assert ranks([], [], chain.graph, ranking) == []


# ---------------------------------------------------------------- normalised


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [("mean", [0.5, -1.5]), ("max", [1 / 3, -1]), ("sum", [0.25, -0.75]), ("none", [1, -3]), (None, [0.5, -1.5])],
)
def test_scores_are_over_the_size_of_their_group(normalize: str | None, expected: list[float]) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    coupling, weights = couple(capture(net, (torch.zeros(1, 2),))), named_weights(net)
    mine = criterion(lambda group, weights: torch.tensor([1.0, -3.0]), normalize=normalize)
    assert scores(coupling, weights, mine)[0].tolist() == pytest.approx(expected)
    zeros = criterion(lambda group, weights: torch.zeros(2), normalize=normalize)
    assert scores(coupling, weights, zeros)[0].tolist() == [0, 0]
    plain: Any = lambda group, weights: np.array([1, -3])  # noqa: E731  what NumPy gives will do as well
    assert scores(coupling, weights, plain)[0].tolist() == [0.5, -1.5]


def test_lamp_is_compared_as_it_is_and_the_others_by_their_mean() -> None:
    assert criterion("lamp").normalize == "none"
    assert criterion("lamp", normalize="mean").normalize == "mean"
    assert criterion("l2").normalize == "mean"
    assert find_criterion("lamp").normalize == "none"


def test_raw_scales_are_one_threshold_for_the_whole_network() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)
    )
    net[1].weight.data = torch.tensor([0.1, 0.2, 0.3])
    net[4].weight.data = torch.tensor([10.0, 20.0, 0.15])
    coupling, weights = couple(capture(net, (torch.zeros(1, 1, 2, 2),))), named_weights(net)

    def gone(normalize: str) -> list[list[bool]]:
        found = scores(coupling, weights, criterion("bn_scale", normalize=normalize))
        removed = plan(coupling, found, {"channels": 0.5})
        return [removed[group.units].tolist() for group in coupling.groups]

    assert gone("none") == [[True, True, False], [False, False, True]]
    assert gone("mean") == [[True, False, False], [True, False, True]]


def test_an_unknown_ranking_is_named(chain: Coupling) -> None:
    with pytest.raises(CutError, match="ranking 'isomorph' is unknown; did you mean isomorphic"):
        ranks(chain.groups, [], chain.graph, "isomorph")
