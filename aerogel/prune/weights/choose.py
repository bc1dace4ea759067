"""From scores to masks: how many weights go, and from which layer.

global   one ranking for the whole network: the lowest scores go wherever they are
local    every layer loses the same share
ratios   {pattern of layers: share}, layer by layer, as a sensitivity scan suggests (`per_layer`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from aerogel.errors import AerogelError, nearest
from aerogel.prune.masks import Masks

RANKINGS = ("global", "local")


def check_sparsity(caller: str, sparsity: float) -> None:
    """Raises AerogelError unless it is a share to remove in [0, 1)."""
    if not (isinstance(sparsity, int | float) and 0 <= sparsity < 1):
        raise AerogelError(f"{caller}: sparsity must be a share to remove in [0, 1), got {sparsity!r}; 0.9 leaves 10 %")


def lowest(
    scores: Mapping[str, Tensor],
    sparsity: float = 0.0,
    *,
    ranking: str = "global",
    ratios: Mapping[str, float] | None = None,
    before: Mapping[str, Tensor] | None = None,
    least: int = 1,
) -> Masks:
    """The masks with which `sparsity` of all weights that have a score is gone, the lowest scores first.

    ratios: layers that have a sparsity of their own, instead of the whole's. before: what is gone already; it stays
    gone and counts. least: weights that every layer keeps (of those it has), so that none is cut through.
    The number is exact: round(sparsity * weights), of equal scores the first go; more only where more are gone already.
    Raises AerogelError for a sparsity outside [0, 1), an unknown ranking or layer, a mask of another shape, and a score
    that is nan.
    """
    check_sparsity("lowest", sparsity)
    if ranking not in RANKINGS:
        raise AerogelError(f"lowest: ranking {ranking!r} is unknown; {nearest(ranking, RANKINGS)}")
    if not scores:
        raise AerogelError("lowest: scores must name at least one weight, got none")
    alive = _alive(scores, before)
    ranked = {name: _ranked(name, score, alive[name], least) for name, score in scores.items()}
    own = _own_ratios(ranked, ratios or {})
    shares = own if ranking == "global" else {name: own.get(name, sparsity) for name in ranked}
    kept = {name: _cut([ranked[name]], share)[0] for name, share in shares.items()}
    together = [name for name in ranked if name not in shares]
    kept |= dict(zip(together, _cut([ranked[name] for name in together], sparsity), strict=True))
    return Masks({name: kept[name].view(scores[name].shape) & alive[name] for name in scores})


def per_layer(
    shares: Sequence[float], values: Mapping[str, Sequence[float]], whole: float, drop: float
) -> dict[str, float]:
    """{layer: the largest share of a sensitivity scan at which, and below which, it loses at most `drop`}; 0 if none.

    values: {layer: the evaluation at each share}, all others whole. Han et al. set their thresholds so (figure 6).
    """
    found = {}
    for name, curve in values.items():
        within = 0.0
        for share, value in zip(shares, curve, strict=True):
            if value < whole - drop:
                break
            within = share
        found[name] = within
    return found


def _alive(scores: Mapping[str, Tensor], before: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What is not gone yet, by weight."""
    before = before or {}
    for name, mask in before.items():
        if name in scores and mask.shape != scores[name].shape:
            raise AerogelError(
                f"lowest: the mask of {name} must have its shape {tuple(scores[name].shape)}, got "
                f"{tuple(mask.shape)}; it is of another network"
            )
    return {name: before.get(name, torch.ones_like(score, dtype=torch.bool)) for name, score in scores.items()}


def _ranked(name: str, score: Tensor, alive: Tensor, least: int) -> Tensor:
    """Scores (n,) in which what is gone comes first and the best `least` of what lives last, whatever they have."""
    if torch.isnan(score).any():
        raise AerogelError(f"lowest: the scores of {name} hold nan; the weights or gradients are no numbers any more")
    flat = score.detach().double().flatten().clone()
    gone = ~alive.flatten()
    flat[gone] = -torch.inf
    spare = min(least, int((~gone).sum()))
    if spare > 0:
        flat[flat.argsort(descending=True, stable=True)[:spare]] = torch.inf
    return flat


def _cut(parts: list[Tensor], share: float) -> list[Tensor]:
    """Of these scores together the lowest `share` go: bool, True for what is kept."""
    if not parts:
        return []
    flat = torch.cat(parts)
    count = min(round(share * len(flat)), int((flat < torch.inf).sum()))
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept[flat.argsort(stable=True)[:count]] = False
    return list(kept.split([len(part) for part in parts]))


def _own_ratios(ranked: Mapping[str, Tensor], ratios: Mapping[str, float]) -> dict[str, float]:
    """{weight: its own sparsity}. Raises AerogelError for a pattern that names no weight, or two that disagree."""
    own: dict[str, float] = {}
    for pattern, share in ratios.items():
        check_sparsity(f"lowest: ratios: {pattern!r}", share)
        hit = [name for name in ranked if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)]
        if not hit:
            layers = [name.rpartition(".")[0] for name in ranked]
            raise AerogelError(f"lowest: ratios: {pattern!r} names no layer; {nearest(pattern, layers)}")
        for name in hit:
            if own.setdefault(name, share) != share:
                raise AerogelError(f"lowest: ratios: two patterns name {name} with {own[name]} and {share}; give one")
    return own
