"""What the criteria say of every group, made comparable, and who competes with whom.

RANKINGS, in one rule: groups are sorted into leagues; a league's channels are ranked by score, and every league loses
the same share of its channels.
global      one league: the lowest of the whole network go first
local       every group is a league of its own: all lose the same share
isomorphic  groups of the same structure are one league: Fang, Ma, Bi Mi, Wang 2024, "Isomorphic pruning for vision
            models", ECCV, arXiv:2407.04616. The structure is what a channel runs through: for every weight it touches,
            the family of the op that reads it, whether it is one of its outputs or inputs, and whether it is one index
            or a block (a head). Differs: the paper compares graphs with their edges, here the layers alone.
value       one league, scores over what a channel of the group costs of the target (`worth`): what loses least for what
            it saves goes first, the greedy answer to a knapsack. Shen et al. 2022, "Structural pruning via
            latency-saliency knapsack" (HALP), NeurIPS, arXiv:2210.06659. Differs: they solve the knapsack on a table of
            every width of every layer, here a channel costs what it does when half of its group is left. It wants
            scores that say what is lost: `taylor` and `hessian` as they are (normalize="none"), or `lamp`. Of norms
            over their mean all channels are nearly alike, and one layer loses nearly all (docs/log.md).
Equal scores are taken in turn, by the place in their group, so that no group goes before another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from aerogel.cost.ops import family
from aerogel.errors import CutError, nearest
from aerogel.graph import Graph, Ref
from aerogel.prune.coupling import Coupling, Group, Member
from aerogel.prune.criteria import NORMALIZE, Criterion, criterion


def find_criterion(given: str | Criterion) -> Criterion:
    """The criterion of that name, or the function itself. Raises CutError for an unknown name."""
    return given if callable(given) else criterion(given)


def scores(coupling: Coupling, weights: Mapping[str, Tensor], score: Criterion) -> list[np.ndarray]:
    """Each group's scores (n,), over their mean size unless the criterion says otherwise (`criterion(normalize=)`).

    Raises CutError unless the criterion gives one finite number a channel.
    """
    size = NORMALIZE[getattr(score, "normalize", "mean")]
    found = []
    for group in coupling.groups:
        raw = torch.as_tensor(score(group, weights)).detach().double().cpu()
        bad = int((~torch.isfinite(raw)).sum())
        if raw.shape != (len(group),) or bad:
            raise CutError(
                f"cut: the criterion must give one finite score for each of the {len(group)} channels of "
                f"{group.name}, got shape {tuple(raw.shape)} with {bad} not finite"
            )
        found.append((raw / torch.as_tensor(size(raw)).clamp_min(1e-30)).numpy())
    return found


def worth(
    groups: Sequence[Group], scores: Sequence[np.ndarray], count: int, shares: Callable[[np.ndarray], list[float]]
) -> list[np.ndarray]:
    """For each group, its scores over the share of the targets that one of its channels costs.

    count: components of the network. shares: what share of each target is left after a planned cut. The cost is the
    mean over the targets, taken with the lower half of the group gone; a group that saves nothing goes last.
    """
    found = []
    for group, score in zip(groups, scores, strict=True):
        half = len(group) // 2
        flags = np.zeros(count, bool)
        flags[group.units[np.argsort(score, kind="stable")[:half]]] = True
        saved = float(np.mean([1 - share for share in shares(flags)]))
        found.append((score - min(0.0, score.min())) / max(saved / max(half, 1), 1e-12))
    return found


def check_ranking(ranking: str) -> None:
    """Raises CutError for an unknown ranking."""
    if ranking not in RANKINGS:
        raise CutError(f"cut: ranking {ranking!r} is unknown; {nearest(str(ranking), RANKINGS)}")


def ranks(groups: Sequence[Group], scores: Sequence[np.ndarray], graph: Graph, ranking: str) -> list[np.ndarray]:
    """For each group, the rank (n,) of its channels in the whole network: 0 goes first."""
    check_ranking(ranking)
    sizes = [len(score) for score in scores]
    values = np.concatenate([[], *scores])
    places = np.concatenate([[], *(_places(score) / max(len(score), 1) for score in scores)])
    leagues: dict[object, list[np.ndarray]] = defaultdict(list)
    for league, where in zip(RANKINGS[ranking](groups, graph), _spans(sizes), strict=True):
        leagues[league].append(where)
    shares = np.empty(len(values))  # of its league that goes before a channel
    for parts in leagues.values():
        where = np.concatenate(parts)
        shares[where[np.lexsort((places[where], values[where]))]] = np.arange(len(where)) / len(where)
    lowest_first = np.lexsort((values, shares))
    found = np.empty(len(values), dtype=int)
    found[lowest_first] = np.arange(len(values))
    return [found[where] for where in _spans(sizes)]


def _places(score: np.ndarray) -> np.ndarray:
    """The position of each channel when its group is sorted, as `argsort` twice."""
    places = np.empty(len(score), dtype=int)
    places[np.argsort(score, kind="stable")] = np.arange(len(score))
    return places


def _spans(sizes: Sequence[int]) -> list[np.ndarray]:
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes, dtype=int)[:-1]) if sizes else []


def _structures(groups: Sequence[Group], graph: Graph) -> list[object]:
    """For each group, the sorted roles of its members: what it runs through, whatever the widths."""
    readers: dict[str, set[tuple[str, int]]] = defaultdict(set)  # weight: (family of an op, position of the argument)
    for op in graph.ops:
        for position, arg in enumerate(op.args):
            if isinstance(arg, Ref) and graph.values[arg.name].is_weight:
                readers[graph.values[arg.name].target].add((family(graph, op), position))

    def role(member: Member) -> tuple[object, ...]:
        return tuple(sorted(readers[member.target])), member.dim, member.index.shape[1] > 1

    return [tuple(sorted(map(role, group.members))) for group in groups]


League = Callable[[Sequence[Group], Graph], list[object]]

RANKINGS: dict[str, League] = {
    "global": lambda groups, graph: [0] * len(groups),
    "value": lambda groups, graph: [0] * len(groups),
    "local": lambda groups, graph: list(range(len(groups))),
    "isomorphic": _structures,
}
