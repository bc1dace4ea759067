"""G2: too many groups cost memory access. Ma et al. 2018 (ShuffleNetV2), section 2.

For a fixed number of MACs, g groups allow channels sqrt(g) times as many, and these are what is moved:

    score = A(c1, c2, g) / A(c1 / sqrt g, c2 / sqrt g, 1)          both have B = positions taps c1 c2 / g MACs

as in the paper's experiment (1 x 128, 2 x 180, 4 x 256, 8 x 360 channels). At stake is the time above the ungrouped
form. A depthwise layer breaks the rule by definition, and its ungrouped form of equal MACs, sqrt(c) channels, is none
that anybody would build. It is judged otherwise: against the dense layer of the same widths, and against one dense
layer in the place of itself and the 1x1 before it (Fused-MBConv, Tan and Le 2021, arXiv:2104.00298). These have more
MACs and fewer bytes; where the device would be faster with one, that is at stake, else nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from aerogel.cost.guidelines.finding import Amount, Finding, Rewrite
from aerogel.cost.guidelines.network import Network, Product, nearest_multiple


def costly_groups(net: Network) -> Iterator[Finding]:
    for i in net.judged("G2", net.products):
        if net.products[i].depthwise:
            yield _depthwise(net, i)
        elif net.products[i].groups > 1:
            yield _grouped(net, i)


def score(layer: Product) -> float:
    """Access over that of the ungrouped form at equal MACs; 1 without groups."""
    return layer.access / _ungrouped(layer).access


def _ungrouped(layer: Product) -> Product:
    root = math.sqrt(layer.groups)
    return replace(layer, c1=layer.c1 / root, c2=layer.c2 / root, groups=1)


def _grouped(net: Network, i: int) -> Finding:
    layer, old = net.layers[i], net.products[i]
    ideal, step = _ungrouped(old), net.device.simd
    new = replace(ideal, c1=nearest_multiple(ideal.c1, step), c2=nearest_multiple(ideal.c2, step))
    stake, gain = (
        Amount(saved, net.ms[i] - net.time(form.family, form.macs, layer.access_bytes - saved))
        for form in (ideal, new)
        for saved in [(old.access - form.access) * old.itemsize]
    )
    words = f"no groups, {new.c1} -> {new.c2} channels ({new.macs / old.macs - 1:+.0%} MACs)"
    return net.finding(
        "G2",
        [i],
        stake,
        f"{old.groups} groups of {old.c1} -> {old.c2} channels move {score(old):.2f} times the bytes of the ungrouped "
        "form of equal MACs",
        Rewrite(words, gain, needs_retraining=True),
        score(old),
    )


def _depthwise(net: Network, i: int) -> Finding:
    layer, old = net.layers[i], net.products[i]
    forms = {"a dense convolution of the same widths": ([i], replace(old, groups=1))}
    before = net.before(i)
    if before in net.products and before is not None:
        expand = net.products[before]
        if (expand.taps, expand.groups, net.after(before)) == (1, 1, [i]):
            name = f"one dense convolution {expand.c1} -> {old.c2} in place of this and {net.layers[before].name}"
            forms[name] = ([before, i], replace(old, c1=expand.c1, groups=1))
    found = {}
    for name, (replaced, new) in forms.items():
        now, bytes_ = net.spent(replaced), new.access * new.itemsize
        ms = net.time(new.family, new.macs, bytes_)
        found[name] = Amount(now.bytes - bytes_, now.ms - ms), new.macs - sum(net.layers[j].macs for j in replaced)
    best = max(found, key=lambda name: found[name][0].ms)
    gain, more = found[best]
    if gain.ms > 0:
        rewrite = Rewrite(f"{best} ({more / 1e6:+,.1f}M MACs)", gain, needs_retraining=True)
    else:
        gain = Amount(0.0, 0.0)
        rewrite = Rewrite(f"none: {best} would take {-found[best][0].ms:.3g} ms more here", gain, False)
    return net.finding(
        "G2",
        [i],
        gain,
        f"a depthwise layer of {old.c1} channels: {layer.intensity:.1f} FLOPs for each byte",
        rewrite,
        score(old),
        "depthwise: breaks G2 by definition; judged against dense forms, not at equal MACs",
    )
