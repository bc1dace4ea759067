"""G1: equal channel widths minimise memory access. Ma et al. 2018 (ShuffleNetV2), section 2.

A 1x1 convolution c1 -> c2 over h w positions: B = h w c1 c2 MACs, A = h w (c1 + c2) + c1 c2 elements of access, and

    A >= 2 sqrt(h w B) + B / (h w),          equality at c1 = c2

The same holds for a k x k convolution and for a linear layer, with k^2 c1 c2 weights. score = A / bound; MobileNetV2's
24 -> 144 at 56x56: 530,304 / 372,173 = 1.425. At stake is the time above the bound.

Not judged: strided layers, whose tensors differ in size by intent; the first layer and the last, whose channels are
given by the image and the classes; a score below 1.1, since 1:2 scores 1.06 and is how every network widens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from aerogel.cost.guidelines.finding import Amount, Finding, Rewrite
from aerogel.cost.guidelines.network import Network, Product, nearest_multiple

LEAST = 1.1


def unequal_channels(net: Network) -> Iterator[Finding]:
    given = net.heads | net.tails
    for i in net.judged("G1", net.products.keys() - given):
        layer, old = net.layers[i], net.products[i]
        if old.groups > 1 or old.positions_in != old.positions_out or score(old) < LEAST:
            continue
        excess = (old.access - bound(old)) * old.itemsize
        least = net.time(layer.family, layer.macs, layer.access_bytes - excess)
        new = equal_widths(old, net.device.simd)
        saved = (old.access - new.access) * old.itemsize
        ms = net.time(layer.family, new.macs, layer.access_bytes - saved)
        yield net.finding(
            "G1",
            [i],
            Amount(excess, net.ms[i] - least),
            f"{old.c1} -> {old.c2} channels move {score(old):.2f} times the bytes that their MACs need",
            Rewrite(
                f"{new.c1} -> {new.c2} channels ({new.macs / old.macs - 1:+.0%} MACs); what it reads from and feeds "
                "gets these widths too",
                Amount(saved, net.ms[i] - ms),
                needs_retraining=True,
            ),
            score(old),
            "; ".join(filter(None, [_purpose(net, i), "bound by its MACs here" if net.ms[i] <= least else ""])),
        )


def score(layer: Product) -> float:
    """Access over its bound at equal MACs, 1 at best."""
    return layer.access / bound(layer)


def bound(layer: Product) -> float:
    """The least access, in elements, of a layer without groups and stride that has as many MACs."""
    return 2 * layer.positions_out * math.sqrt(layer.c1 * layer.c2) + layer.taps * layer.c1 * layer.c2


def equal_widths(layer: Product, step: int) -> Product:
    """The layer at about its MACs with equal channels, whole vectors wide."""
    c1 = nearest_multiple(math.sqrt(layer.c1 * layer.c2), step)
    c2 = nearest_multiple(layer.c1 * layer.c2 / c1, step)
    return replace(layer, c1=c1, c2=c2)


def _purpose(net: Network, i: int) -> str:
    """Where the widths are unequal on purpose."""
    layer, before = net.products[i], net.before(i)
    near = [net.products[j] for j in net.after(i) if j in net.products]
    if before in net.products:
        near.append(net.products[before])
    if any(other.depthwise for other in near):
        return "inverted bottleneck: breaks G1 on purpose, its depthwise layer needs the wide side"
    if net.layers[i].op == "linear":
        return "feed-forward block: unequal on purpose" if near else ""
    if layer.taps == 1 and any(other.taps > 1 for other in near):
        return "bottleneck around a larger kernel: unequal on purpose"
    return ""
