"""Layers as an inference runtime runs them: each with the norms and activations that it computes in passing.

Every layer of a `Cost` falls into exactly one, but for views of memory, which do nothing and cost nothing; so the MACs,
FLOPs, parameters and access bytes of the fused layers add up to those of the layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from aerogel.cost.count import Layer


@dataclass(frozen=True)
class Fused:
    """host: the layer that is run; guests: those computed where it writes, in order."""

    host: Layer
    guests: tuple[Layer, ...] = ()

    @property
    def layers(self) -> tuple[Layer, ...]:
        return (self.host, *self.guests)

    @property
    def name(self) -> str:
        return self.host.name

    @property
    def op(self) -> str:
        """conv2d+batch_norm+relu."""
        return "+".join(layer.op for layer in self.layers)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it writes."""
        return self.layers[-1].shape

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    @property
    def params(self) -> int:
        return sum(layer.params for layer in self.layers)

    @property
    def access_bytes(self) -> int:
        return sum(layer.access_bytes for layer in self.layers)


def fused(layers: Iterable[Layer]) -> list[Fused]:
    """In the order their hosts run."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.fused_into in found:
            found[layer.fused_into].append(layer)
        elif layer.runs or layer.params or layer.flops:
            found[layer.node] = [layer]
    return [Fused(host, tuple(guests)) for host, *guests in found.values()]
