"""Two networks layer by layer: what was added, removed and changed, and whether fewer MACs are a real saving.

Layers are compared as an inference runtime runs them (`aerogel.cost.fused`). Two are the same layer when module and op
have the same name; of those left over, when op and shapes agree in the order they run; then when only the op agrees.

A fake speed-up is one in MACs alone: access or time keeps most of what it was. In factors, as speed-ups are told:
it is said where the old network's share that is left of access or time is more than the square root of the share that
is left of the MACs (MACs / 4, time not even / 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

from aerogel.cost.count import Cost
from aerogel.cost.device import Device
from aerogel.cost.fused import Fused, fused
from aerogel.cost.roofline import roofline, total_ms

TOTALS = ("macs", "flops", "params", "access_bytes", "peak_bytes")
NOTABLE = 0.9  # a saving below a tenth needs no warning

Key = Callable[[Fused], Hashable]


class Amount(NamedTuple):
    """One measure of both networks."""

    before: float
    after: float

    @property
    def ratio(self) -> float | None:
        """After / before; None where before is nothing."""
        return self.after / self.before if self.before else None


@dataclass(frozen=True)
class Pair:
    """One layer of both networks; `before` is None where it was added, `after` where it was removed."""

    before: Fused | None
    after: Fused | None

    @property
    def status(self) -> Literal["added", "removed", "changed", "same"]:
        if self.before is None:
            return "added"
        if self.after is None:
            return "removed"
        return "same" if _all_of(self.before) == _all_of(self.after) else "changed"

    def amount(self, measure: str) -> Amount:
        """Of macs, flops, params or access_bytes; nothing for a side that is not there."""
        return Amount(*(getattr(side, measure) if side else 0 for side in (self.before, self.after)))

    def ms(self, before: Times, after: Times) -> Amount:
        sides = ((self.before, before), (self.after, after))
        return Amount(*(times.layers.get(side.host.node, 0.0) if side else 0.0 for side, times in sides))


class Times(NamedTuple):
    """Predicted milliseconds of a network: of the whole, and by the node of each layer that is run."""

    ms: float
    layers: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    pairs: tuple[Pair, ...]  # in the new network's order; what was removed stands where it stood
    ms: tuple[Amount, ...] | None  # of each pair, where the time is known
    totals: dict[str, Amount]  # by measure; "ms" where the time is known
    text: str  # what it means, in words


def compare(
    before: Cost, after: Cost, device: Device | None = None, times: tuple[Times, Times] | None = None
) -> Comparison:
    """The network `after` against `before`, on a device when one is given.

    times: of both, predicted in the same way; without them the device's roofline says them.
    """
    if device is not None and times is None:
        times = _by_roofline(before, device), _by_roofline(after, device)
    totals = {name: Amount(getattr(before, name), getattr(after, name)) for name in TOTALS}
    pairs = match(fused(before.layers), fused(after.layers))
    if times is not None:
        totals["ms"] = Amount(times[0].ms, times[1].ms)
    of_pairs = tuple(pair.ms(*times) for pair in pairs) if times is not None else None
    return Comparison(pairs, of_pairs, totals, in_words(totals, device))


def _by_roofline(cost: Cost, device: Device) -> Times:
    return Times(total_ms(cost.layers, device), {layer.node: roofline(layer, device).ms for layer in cost.layers})


def match(before: Sequence[Fused], after: Sequence[Fused]) -> tuple[Pair, ...]:
    """Pairs every layer with its counterpart or with None."""
    partner = _by_name(before, after)
    keys: tuple[Key, ...] = (lambda x: (x.op, x.shape, x.host.weight), lambda x: (x.host.op, x.host.family))
    for key in keys:
        taken = set(partner.values())
        old = [i for i in range(len(before)) if i not in partner]
        new = [j for j in range(len(after)) if j not in taken]
        alike = SequenceMatcher(None, [key(before[i]) for i in old], [key(after[j]) for j in new], autojunk=False)
        for start, to, length in alike.get_matching_blocks():
            partner |= {old[start + k]: new[to + k] for k in range(length)}
    pairs, placed = [], {j: i for i, j in partner.items()}
    waiting = 0  # the first layer of `before` that has no place yet
    for j, layer in enumerate(after):
        i = placed.get(j)
        while i is not None and waiting <= i:
            if waiting not in partner:
                pairs.append(Pair(before[waiting], None))
            waiting += 1
        pairs.append(Pair(None if i is None else before[i], layer))
    left = (Pair(before[i], None) for i in range(waiting, len(before)) if i not in partner)
    return (*pairs, *left)


def in_words(totals: dict[str, Amount], device: Device | None = None) -> str:
    """One or two sentences about MACs, access and predicted time: whether the saving is a real one."""
    on = f" on {device.name}" if device else ""
    names = {"macs": "MACs", "access_bytes": "access", "ms": f"predicted time{on}"}
    left = {name: totals[name].ratio for name in names if name in totals}
    macs = left.pop("macs")
    others = {name: ratio for name, ratio in left.items() if ratio is not None}
    if macs is None or not others:
        return ""
    told = ", ".join(f"{names[name]} x{ratio:.2f}" for name, ratio in others.items())
    text = f"MACs x{macs:.2f}, {told}."
    if macs > NOTABLE:
        dearer = [names[name] for name, ratio in others.items() if ratio > macs / NOTABLE]
        cheaper = [names[name] for name, ratio in others.items() if ratio < macs * NOTABLE]
        said = [f"Dearer than the MACs tell: {_and(dearer)}."] * bool(dearer)
        said += [f"Cheaper than the MACs tell: {_and(cheaper)}."] * bool(cheaper)
        return " ".join([text, *said])
    kept = [name for name, ratio in others.items() if ratio > math.sqrt(macs)]
    if kept == ["access_bytes"] and "ms" in others:
        return f"{text} Access does not fall as MACs do; {names['ms']} does."
    if kept:
        return f"{text} A saving on paper: MACs fall by much more than {_and(names[name] for name in kept)}."
    return f"{text} The saving in MACs is one in {_and(names[name] for name in others)} too."


def _and(names: Iterable[str]) -> str:
    return " and ".join(names)


def _by_name(before: Sequence[Fused], after: Sequence[Fused]) -> dict[int, int]:
    """{index before: index after} of layers with the same module and op, the k-th call with the k-th."""
    places: dict[tuple[str, str], list[int]] = {}
    for j, layer in enumerate(after):
        places.setdefault((layer.name, layer.host.op), []).append(j)
    found = {}
    for i, layer in enumerate(before):
        waiting = places.get((layer.name, layer.host.op))
        if waiting:
            found[i] = waiting.pop(0)
    return found


def _all_of(layer: Fused) -> tuple[object, ...]:
    """What two layers must share to be called the same, whatever they are called."""
    costs = (layer.macs, layer.flops, layer.params, layer.access_bytes)
    return (layer.op, layer.host.family, layer.host.weight, layer.shape, *costs)
