"""P1, P2, P3: what else makes single layers slow. Practice, not the paper's.

P1-simd   A vector unit computes `simd` channels at once, so c channels take as long as the next multiple of it. At
          stake is the time of the empty lanes, which the prediction leaves out; the last layer's classes are given.
P2-norm   A batch norm folds into the convolution or linear layer whose result it alone reads; any other norm is a
          kernel that reads and writes its whole tensor. At stake is all its time.
P3-ends   The first layer, or the linear layers at the end, takes over 20 % of the predicted time and over twice the
          mean of the other layers: at stake is what is above that mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from aerogel.cost.guidelines.finding import Amount, Finding, Rewrite
from aerogel.cost.guidelines.network import CONVOLUTIONS, Network, Product, nearest_multiple, plural
from aerogel.cost.ops import ACTIVATIONS, VIEWS

DOMINATES = 0.2
LEAST_LAYERS = 4  # of fewer, each has a large share


def empty_lanes(net: Network) -> Iterator[Finding]:
    """One finding a width."""
    step = net.device.simd
    widths: dict[float, list[int]] = {}
    for i in net.judged("P1-simd", net.products.keys() - net.tails):
        if net.products[i].c2 % step:
            widths.setdefault(net.products[i].c2, []).append(i)
    for width, indices in widths.items():
        full = math.ceil(width / step) * step
        less = max(step, full - step)
        stakes, gains = zip(*(_lanes(net, i, full, less) for i in indices), strict=True)
        words = f"{full} channels take no longer"
        if width > step:
            words = f"{less} channels are whole vectors; {words}"
        layers = plural(len(indices), "layer")
        yield net.finding(
            "P1-simd",
            indices,
            Amount(0, sum(stakes)),
            f"{width} channels fill {width / full:.0%} of the lanes of {full // step} vectors of {step}, in {layers}",
            Rewrite(words, Amount(sum(g.bytes for g in gains), sum(g.ms for g in gains)), needs_retraining=True),
            full / width,
            f"`aerogel compress` with round_to = {step} cuts to whole vectors",
        )


def _lanes(net: Network, i: int, full: int, less: int) -> tuple[float, Amount]:
    """The time of a layer's empty lanes, and what the layer loses with `less` channels (none where it has fewer)."""
    layer, old = net.layers[i], net.products[i]
    padded = net.time(layer.family, layer.macs * full / old.c2, layer.access_bytes)
    if less > old.c2:
        return padded - net.ms[i], Amount(0, 0.0)
    new = _narrower(old, less)
    saved = (old.access - new.access) * old.itemsize
    return padded - net.ms[i], Amount(saved, padded - net.time(layer.family, new.macs, layer.access_bytes - saved))


def _narrower(layer: Product, width: int) -> Product:
    if layer.depthwise:
        return replace(layer, c1=width, c2=width, groups=width)
    return replace(layer, c2=width)


def unfolded_norms(net: Network) -> Iterator[Finding]:
    """One finding a reason and remedy."""
    found: dict[tuple[str, str, bool], list[int]] = {}
    for i in net.judged("P2-norm", range(len(net.layers))):
        layer = net.layers[i]
        if layer.family == "norm":
            advice = _of_batch_norm(net, i) if layer.op == "batch_norm" else _of_other_norm(layer.op)
            found.setdefault(advice, []).append(i)
    for (why, words, retrain), indices in found.items():
        stake = net.spent(indices)
        what = f"{plural(len(indices), 'norm')}: {why}"
        yield net.finding("P2-norm", indices, stake, what, Rewrite(words, stake, retrain))


def _of_other_norm(op: str) -> tuple[str, str, bool]:
    words = "a batch norm behind a convolution or linear layer, which folds"
    return f"a {op} computes its statistics at run time", words, True


def _of_batch_norm(net: Network, i: int) -> tuple[str, str, bool]:
    """Why it does not fold, what to write instead, and whether that needs retraining."""
    source = net.maker.get(net.source(i) or "")
    behind = "nothing" if source is None else net.layers[source].op
    readers = net.readers.get(net.graph.ops[i].outputs[0], ())
    why = f"a batch norm behind {behind} folds into nothing before it"
    if behind.startswith("conv_transpose"):
        return (
            why,
            "fold it by hand into the transposed convolution's weights, the same numbers; ONNX Runtime does",
            False,
        )
    if len(readers) == 1 and _unpadded(net, readers[0]):
        return why, "fold it by hand into the layer behind it, which pads nothing: the same numbers", False
    return why, "straight behind a convolution or linear layer, before the activation", True


def _unpadded(net: Network, i: int) -> bool:
    op = net.graph.ops[i]
    if op.kind == "linear":
        return True
    return op.kind in CONVOLUTIONS and not isinstance(op.args[4], str) and not any(op.args[4])


def dominant_ends(net: Network) -> Iterator[Finding]:
    running = [i for i in net.products if net.layers[i].runs]
    if len(running) < LEAST_LAYERS:
        return
    for indices, first in (([min(running)], True), (_classifier(net), False)):
        chosen = [*net.judged("P3-ends", indices)]
        others = [net.ms[i] for i in running if i not in chosen]
        cost = net.spent(chosen)
        mean = sum(others) / max(1, len(others))
        if not chosen or not others or cost.ms < max(DOMINATES * net.total_ms, 2 * mean):
            continue
        dearest = max(chosen, key=lambda i: net.ms[i])
        words, new = _smaller_first(net, dearest) if first else _smaller_classifier(net, dearest)
        old, layer = net.products[dearest], net.layers[dearest]
        saved = old.access * old.itemsize - new.bytes
        stake = Amount(cost.bytes * (1 - mean / cost.ms), cost.ms - mean)
        end = "the first layer takes" if first else "the classifier takes"
        yield net.finding(
            "P3-ends",
            chosen,
            stake,
            f"{end} {cost.ms / net.total_ms:.0%} of the predicted time, {layer.params:,} parameters",
            Rewrite(words, Amount(saved, net.ms[dearest] - new.ms), needs_retraining=True),
        )


def _smaller_first(net: Network, i: int) -> tuple[str, Amount]:
    old = net.products[i]
    if old.positions_out * 2 > old.positions_in and net.layers[i].op in CONVOLUTIONS:
        rank = len(net.layers[i].weight or ()) - 2
        new = replace(old, positions_out=old.positions_out // 2**rank)
        words = f"stride 2: {1 - 1 / 2**rank:.0%} fewer positions here and behind it"
    else:
        new = replace(old, c2=nearest_multiple(old.c2 / 2, net.device.simd))
        words = f"{new.c2} channels instead of {old.c2}"
    return words, _priced(net, new, net.layers[i].family)


def _smaller_classifier(net: Network, i: int) -> tuple[str, Amount]:
    old, family = net.products[i], net.layers[i].family
    positions = _flattened(net, i)
    if positions > 1:
        new = replace(old, c1=old.c1 // positions)
        words = f"average over the {positions} positions before it: {new.c1} -> {old.c2}, not {old.c1} -> {old.c2}"
        return words, _priced(net, new, family)
    rank = nearest_multiple(old.c1 * old.c2 / (old.c1 + old.c2) / 2, net.device.simd)
    parts = [_priced(net, form, family) for form in (replace(old, c2=rank), replace(old, c1=rank))]
    words = f"two layers {old.c1} -> {rank} -> {old.c2}, half the parameters"
    return words, Amount(sum(p.bytes for p in parts), sum(p.ms for p in parts))


def _priced(net: Network, form: Product, family: str) -> Amount:
    bytes_ = form.access * form.itemsize
    return Amount(bytes_, net.time(family, form.macs, bytes_))


def _flattened(net: Network, i: int) -> int:
    """Positions of the map that was flattened into this linear layer's input; 1 where none was."""
    name = net.source(i) or ""
    while (at := net.maker.get(name)) is not None and net.graph.ops[at].kind in VIEWS:
        name = net.source(at) or ""
    shape, width = net.graph.values[name].shape, net.products[i].c1
    return math.prod(shape[2:]) if len(shape) > 2 and math.prod(shape[1:]) == width else 1


def _classifier(net: Network) -> list[int]:
    """The last layer and the linear layers before it, with nothing but activations and views between."""
    ends = sorted(net.tails)
    found = [ends[-1]] if ends else []
    while found:
        at = net.maker.get(net.source(found[-1]) or "")
        while at is not None and net.graph.ops[at].kind in VIEWS | ACTIVATIONS:
            at = net.maker.get(net.source(at) or "")
        if at not in net.products or at is None or net.layers[at].op != "linear":
            break
        found.append(at)
    return found
