"""What a network would cost after a planned cut, on the captured graph resized on paper.

Each metric alone, and only when asked for: a plan asks a dozen times. The numbers are those of `aerogel.cost.count`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from aerogel.cost.memory import access_bytes, peak_bytes
from aerogel.cost.ops import MACS
from aerogel.graph import Graph
from aerogel.prune.coupling import Coupling


def file_bytes(graph: Graph) -> int:
    """Bytes of the numbers in a file of the weights: parameters and buffers, each once. Not of the file's header, which
    no cut changes."""
    return sum({v.target: v.bytes for v in graph.values.values() if v.kind in ("param", "buffer")}.values())


# Cheapest first: of several goals the next is priced only where those before are met.
PRICES: dict[str, Callable[[Graph], int]] = {
    "params": lambda graph: sum({v.target: v.numel for v in graph.values.values() if v.kind == "param"}.values()),
    "file_bytes": file_bytes,
    "macs": lambda graph: sum(MACS[op.kind](graph, op) for op in graph.ops if op.kind in MACS),
    "access_bytes": lambda graph: sum(access_bytes(graph)),
    "peak_bytes": lambda graph: peak_bytes(graph).bytes,
}
METRICS = ("channels", *PRICES)


def measure(coupling: Coupling, metric: str, removed: np.ndarray | None = None) -> float:
    """A metric of the network after a planned cut (none: as it is); `channels` are those that can be cut."""
    return dict(measures(coupling, [metric], removed))[metric]


def measures(
    coupling: Coupling, metrics: Iterable[str], removed: np.ndarray | None = None
) -> Iterator[tuple[str, float]]:
    """(metric, value) one after the other, cheapest first: the caller may stop."""
    graph = None
    for metric in sorted(metrics, key=METRICS.index):
        if metric == "channels":
            gone = 0 if removed is None else int(removed.sum())
            yield metric, float(sum(len(group) for group in coupling.groups) - gone)
            continue
        if graph is None:
            graph = coupling.graph if removed is None else coupling.resized(removed)
        yield metric, float(PRICES[metric](graph))


def shares_left(coupling: Coupling, removed: np.ndarray, before: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """(metric, share of it that would be left), cheapest first; all of it where there is nothing to begin with."""
    for metric, value in measures(coupling, before, removed):
        yield metric, value / before[metric] if before[metric] else 1.0
