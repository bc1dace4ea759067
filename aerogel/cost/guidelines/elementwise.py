"""G4: element-wise work is not negligible: few FLOPs, but every byte is read and written. Ma et al. 2018, section 2.

What runs as a kernel of its own and multiplies nothing, by what it is for: squeeze-and-excitation (the pool, the
gate's layers and the product), additions, products, activations that no layer absorbs, joins (concatenations), shuffles
(copies in another order) and the rest. A finding for each, over the whole network; score = its share of all access. At
stake is its whole time. Norms are P2's. The paper's ResNet bottleneck is a fifth faster without ReLU and shortcut.

Not in the prediction: ONNX Runtime adds a convolution's result to a shortcut as it writes it, with the activation that
follows. There the additions of a ResNet cost less than is said here, and a note says of how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from aerogel.cost.guidelines.finding import Amount, Finding, Rewrite
from aerogel.cost.guidelines.network import CONVOLUTIONS, Network, plural
from aerogel.cost.ops import ACTIVATIONS

SHUFFLES = {"channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "roll", "flip", "reshape", "flatten", "contiguous",
            "clone", "permute", "transpose", "repeat_interleave", "repeat", "tile"}  # fmt: skip
LOOKUPS = {"embedding", "gather", "index_select", "index"}  # they make a network's first tensor


def gates_of(net: Network) -> dict[int, list[int]]:
    """{the product of a squeeze-and-excitation: all its ops}."""
    return {i: gate for i in range(len(net.layers)) if (gate := _squeeze_and_excitation(net, i))}


def elementwise(net: Network, claimed: set[int]) -> Iterator[Finding]:
    """All but what another finding has `claimed`."""
    gates = gates_of(net)
    inside = {j for gate in gates.values() for j in gate}
    kinds: dict[str, list[int]] = {}
    for i in net.judged("G4", range(len(net.layers))):
        layer = net.layers[i]
        plain = layer.family in ("elementwise", "move") and layer.op not in LOOKUPS
        if i not in claimed | inside and plain:
            kinds.setdefault(_kind(net, i), []).append(i)
    blocks = {i: gate for i, gate in gates.items() if [*net.judged("G4", [i])]}
    if blocks:
        yield _of_gates(net, blocks)
    for kind, indices in kinds.items():
        stake = net.spent(indices)
        what, rewrite = WORDS[kind](net, indices)
        score, hidden = stake.bytes / net.total_bytes, sum(_inside_a_convolution(net, i) for i in indices)
        words = f"{hidden} of {len(indices)} ONNX Runtime computes as a convolution writes: cheaper there"
        yield net.finding("G4", indices, stake, _share(net, what, stake), rewrite, score, words if hidden else "")


def _inside_a_convolution(net: Network, i: int) -> bool:
    """An addition to what a convolution writes, which nobody else reads, or the activation behind such a one."""
    op = net.graph.ops[i]
    if op.kind in ACTIVATIONS:
        source = net.maker.get(net.source(i) or "")
        return source is not None and net.graph.ops[source].kind == "add" and _inside_a_convolution(net, source)
    for name in op.inputs if op.kind == "add" else ():
        at = net.maker.get(name)
        if at is not None and net.graph.ops[at].kind == "batch_norm" and net.layers[at].fused_into is not None:
            at = net.maker.get(net.source(at) or "")
        if at in net.products and net.graph.ops[at].kind in CONVOLUTIONS and net.readers[name] == (i,):
            return True
    return False


def _share(net: Network, what: str, stake: Amount) -> str:
    return f"{what}: {stake.bytes / net.total_bytes:.1%} of access"


def _kind(net: Network, i: int) -> str:
    op = net.layers[i].op
    if op in ("add", "sub", "rsub"):
        return "additions"
    if op in ("mul", "div"):
        return "products"
    if op in ACTIVATIONS | {"prelu"}:
        return "activations"
    if op in ("cat", "stack"):
        return "joins"
    return "shuffles" if op in SHUFFLES else "rest"


def _squeeze_and_excitation(net: Network, i: int) -> list[int]:
    """Of a product of a map with one number a channel: itself and the ops that made those numbers from the same map."""
    op, values = net.graph.ops[i], net.graph.values
    if op.kind != "mul" or len(op.inputs) != 2:
        return []
    small, large = sorted(op.inputs, key=lambda name: values[name].numel)
    if values[small].is_weight or values[small].numel == values[large].numel or large not in _origins(net, small):
        return []
    made, todo = [i], [small]
    while todo:
        name = todo.pop()
        at = net.maker.get(name)
        if at is not None and name != large and at not in made:
            made.append(at)
            todo += [source for source in net.graph.ops[at].inputs if not values[source].is_weight]
    layers = any(net.layers[j].macs for j in made)
    return made if layers else []


def _origins(net: Network, name: str) -> set[str]:
    """Values that a small tensor was made from, up to the first larger one on each way."""
    found: set[str] = set()
    todo, size = [name], net.graph.values[name].numel
    while todo:
        value = todo.pop()
        if value in found or net.graph.values[value].is_weight:
            continue
        found.add(value)
        at = net.maker.get(value)
        if at is not None and net.graph.values[value].numel <= size:
            todo += net.graph.ops[at].inputs
    return found


def _of_gates(net: Network, gates: dict[int, list[int]]) -> Finding:
    cost = {i: net.spent(gate) for i, gate in gates.items()}
    stake = Amount(sum(c.bytes for c in cost.values()), sum(c.ms for c in cost.values()))
    dearest = sorted(cost.values(), key=lambda c: -c.ms)[: (len(cost) + 1) // 2]
    gain = Amount(sum(c.bytes for c in dearest), sum(c.ms for c in dearest))
    words = f"none in the {plural(len(dearest), 'unit')} where it costs most"
    what = f"squeeze-and-excitation in {plural(len(gates), 'unit')}"
    indices = [j for gate in gates.values() for j in gate]
    rewrite = Rewrite(words, gain, needs_retraining=True)
    return net.finding("G4", indices, stake, _share(net, what, stake), rewrite, stake.bytes / net.total_bytes)


def _rest(net: Network, indices: list[int]) -> tuple[str, Rewrite]:
    """A formula written out, as a norm's or a GELU's: all but the dearest op of each module may go."""
    dearest: dict[str, int] = {}
    for i in indices:
        best = dearest.setdefault(net.layers[i].name, i)
        if net.ms[i] > net.ms[best]:
            dearest[net.layers[i].name] = i
    gain = net.spent(set(indices) - set(dearest.values()))
    words = "write a formula of several ops as the one op that it is (F.gelu, F.layer_norm), the same numbers"
    return plural(len(indices), "other element-wise op"), Rewrite(words, gain, needs_retraining=False)


Words = Callable[[Network, list[int]], tuple[str, Rewrite]]


def _halved(what: str, one: str, every: str) -> Words:
    """For what a network can do with half of: the dearer of each two goes."""

    def words(net: Network, indices: list[int]) -> tuple[str, Rewrite]:
        if len(indices) == 1:
            return plural(1, what), Rewrite(one, net.spent(indices), needs_retraining=True)
        left_out = sorted(indices, key=lambda i: -net.ms[i])[::2]
        text = f"{every}, the dearer of each two: {len(left_out)} of {len(indices)}"
        return plural(len(indices), what), Rewrite(text, net.spent(left_out), needs_retraining=True)

    return words


def _activations(net: Network, indices: list[int]) -> tuple[str, Rewrite]:
    words = "straight behind a convolution or linear layer, where the runtime computes it as that layer writes"
    what = plural(len(indices), "activation") + " that no layer absorbs"
    return what, Rewrite(words, net.spent(indices), needs_retraining=True)


def _shuffles(net: Network, indices: list[int]) -> tuple[str, Rewrite]:
    """A copy in another order of what was just concatenated can be one with it: see aerogel.nets.shufflenet_v2."""
    joined = [i for i in indices if _of_a_join(net, i)]
    what = plural(len(indices), "copy", "copies") + " in another order"
    if joined:
        words = "concatenate along a new axis, which interleaves as it joins, the same numbers"
        return what, Rewrite(f"{words}: {len(joined)} of {len(indices)}", net.spent(joined), needs_retraining=False)
    return what, Rewrite("keep one order of the dimensions throughout", net.spent(indices), needs_retraining=True)


def _of_a_join(net: Network, i: int) -> bool:
    at = net.maker.get(net.source(i) or "")
    while at is not None and net.layers[at].family == "view":
        at = net.maker.get(net.source(at) or "")
    return at is not None and net.layers[at].op == "cat"


WORDS: dict[str, Words] = {
    "additions": _halved("addition", "leave the shortcut out", "leave out every second shortcut"),
    "products": _halved("product", "leave it out", "leave out every second one"),
    "joins": _halved("concatenation", "make both sides by one layer", "join half as often"),
    "rest": _rest,
    "activations": _activations,
    "shuffles": _shuffles,
}
