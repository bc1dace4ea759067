"""G3: fragmentation, many small operations where one would do. Ma et al. 2018 (ShuffleNetV2), section 2.

Four forms, each op spoken of once, in this order:
- siblings: dense layers of one geometry that read the same tensor. One layer with their weights stacked computes the
  same; a concatenation of exactly their results falls away. Else the results must be split, which runtimes copy.
- sums: convolutions of one tensor that are added without an activation between. Convolution is linear, so one kernel,
  the sum of theirs (the smaller padded), computes the same: RepVGG, Ding et al. 2021, arXiv:2101.03697.
- branches: a join (concatenation or addition) of two or more branches with layers in them, that share nothing after
  their fork. Beside it: the heaviest branch alone, all its widths times sqrt(r), with all r times its MACs.
- series: layers in a row that each take longer to start than to run. Beside them: one layer of all their MACs that
  reads the first's input and writes the last's output; the rewrite is milder and makes one of each two.
At stake is what the one op saves; where it saves no time on the device nothing is said. A residual addition of a branch
and the identity is no fragment: it is G4's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from aerogel.cost.guidelines.elementwise import gates_of
from aerogel.cost.guidelines.finding import Amount, Finding, Rewrite
from aerogel.cost.guidelines.network import Network, plural
from aerogel.graph import Ref, refs

JOINS = ("cat", "add")


def fragments(net: Network, claimed: set[int]) -> Iterator[Finding]:
    """Ops that a finding replaces exactly join `claimed`, so that no other rule speaks of them; G4 speaks of gates."""
    seen = {i for gate in gates_of(net).values() for i in gate}
    for form in (_siblings, _sums, _branches, _series):
        for finding, used in form(net, seen):
            seen |= used
            if not finding.needs_retraining:
                claimed |= used
            yield finding


Found = tuple[Finding, set[int]]


def _siblings(net: Network, seen: set[int]) -> Iterator[Found]:
    alike: dict[object, list[int]] = {}
    for i in net.judged("G3", net.products):
        op, layer = net.graph.ops[i], net.products[i]
        if layer.groups == 1:
            weight = net.graph.values[op.args[1].name]
            inside = [other.op for other in net.layers if other.fused_into == op.name]
            key = (net.source(i), op.kind, weight.shape[2:], repr((op.args[3:], inside)))
            alike.setdefault(key, []).append(i)
    for group in alike.values():
        if len(group) < 2 or seen.intersection(group):
            continue
        first, written = net.products[group[0]], [net.written(i) for i in group]
        now = net.spent(group)
        reads = first.positions_in * first.c1 * first.itemsize
        bytes_ = now.bytes - (len(group) - 1) * reads
        ms = net.time(net.layers[group[0]].family, sum(net.layers[i].macs for i in group), bytes_)
        results = sum(net.graph.values[net.graph.ops[j].outputs[0]].bytes for j in written)
        join = _join_of(net, written)
        if join is not None:
            now = Amount(now.bytes + net.layers[join].access_bytes, now.ms + net.ms[join])
        else:
            bytes_, ms = bytes_ + 2 * results, ms + net.time("move", 0, 2 * results)
        if now.ms <= ms:
            continue
        saved = Amount(now.bytes - bytes_, now.ms - ms)
        total = sum(net.products[i].c2 for i in group)
        ending = "the concatenation falls away" if join is not None else "split after it"
        words = f"one layer {first.c1} -> {total} with the weights stacked, the same numbers; {ending}"
        what = f"{plural(len(group), 'layer')} of one geometry read the same tensor"
        yield (
            net.finding("G3", group, saved, what, Rewrite(words, saved, needs_retraining=False)),
            {*group, *([] if join is None else [join])},
        )


def _join_of(net: Network, written: Sequence[int]) -> int | None:
    """The concatenation of channels whose operands are exactly what these ops write, and nobody else reads."""
    names = [net.graph.ops[j].outputs[0] for j in written]
    readers = {net.readers.get(name, ()) for name in names}
    if len(readers) != 1 or len(next(iter(readers))) != 1 or set(names) & set(net.graph.outputs):
        return None
    join = next(iter(readers))[0]
    op = net.graph.ops[join]
    axis = op.args[1] if op.kind == "cat" and len(op.args) > 1 else 0
    rank = len(net.graph.values[names[0]].shape)
    channels = axis % rank == (1 if net.layers[written[0]].op != "linear" else rank - 1) if op.kind == "cat" else False
    return join if channels and sorted(op.inputs) == sorted(names) else None


def _sums(net: Network, seen: set[int]) -> Iterator[Found]:
    for root, operands in _joins(net):
        if net.graph.ops[root].kind != "add" or root in seen or not [*net.judged("G3", [root])]:
            continue
        found = [_linear_maker(net, name) for name in operands]
        convs = [i for i in found if i is not None and i not in seen]
        same = {(net.source(i), net.products[i].c2, net.products[i].groups, _grid(net, i)) for i in convs}
        if len(convs) < 2 or len(convs) < len(operands) or len(same) != 1:
            continue
        adds = _inner_adds(net, root)
        largest = max(convs, key=lambda i: net.products[i].taps)
        now, layer = net.spent([*convs, *adds]), net.products[largest]
        after = net.layers[largest].access_bytes
        ms = net.ms[largest]
        saved = Amount(now.bytes - after, now.ms - ms)
        words = f"one convolution {layer.c1} -> {layer.c2} whose kernel is the sum of theirs, the same numbers (RepVGG)"
        what = f"{plural(len(convs), 'convolution')} of one tensor are added with nothing between"
        yield (
            net.finding("G3", convs, saved, what, Rewrite(words, saved, needs_retraining=False)),
            {*convs, *adds},
        )


def _linear_maker(net: Network, name: str) -> int | None:
    """The convolution that makes a value that only one op reads, with no more than a norm between."""
    at = net.maker.get(name)
    if at is None or len(net.readers.get(name, ())) != 1 or name in net.graph.outputs:
        return None
    if net.graph.ops[at].kind == "batch_norm" and net.layers[at].fused_into is not None:
        at = net.maker.get(net.source(at) or "")
    return at if at in net.products and net.layers[at].op != "linear" else None


def _grid(net: Network, i: int) -> str:
    """Where its kernel's centre goes: stride, dilation, and padding less half the kernel."""
    op = net.graph.ops[i]
    kernel, padding = net.graph.values[op.args[1].name].shape[2:], op.args[4]
    centre = padding if isinstance(padding, str) else [p - k // 2 for p, k in zip(padding, kernel, strict=False)]
    return repr((op.args[3], centre, op.args[5]))


def _joins(net: Network) -> Iterator[tuple[int, list[str]]]:
    """Joins with their activations; a tree of additions that nobody else looks into is one join, of many."""
    inner: set[int] = set()
    for root in reversed(range(len(net.graph.ops))):
        op = net.graph.ops[root]
        if op.kind not in JOINS or root in inner or not net.layers[root].runs:
            continue
        adds = _inner_adds(net, root) if op.kind == "add" else {root}
        inner |= adds
        made = {net.graph.ops[i].outputs[0] for i in adds}
        operands = [
            ref.name
            for i in sorted(adds)
            for ref in refs(net.graph.ops[i].args)
            if ref.name not in made and not net.graph.values[ref.name].is_weight
        ]
        if len(set(operands)) > 1:
            yield root, operands


def _inner_adds(net: Network, root: int) -> set[int]:
    """The addition and those below it whose sums only it reads."""
    found = {root}
    for arg in net.graph.ops[root].args:
        below = net.maker.get(arg.name) if isinstance(arg, Ref) else None
        if below is None or net.graph.ops[below].kind != "add" or len(net.readers[arg.name]) != 1:
            continue
        found |= _inner_adds(net, below)
    return found


def _branches(net: Network, seen: set[int]) -> Iterator[Found]:
    reached = _ancestors(net)
    for root, operands in _joins(net):
        if not [*net.judged("G3", [root])]:
            continue
        masks = [reached[net.maker[name]] if name in net.maker else 0 for name in operands]
        common = math.inf if not masks else masks[0]
        for mask in masks:
            common = int(common) & mask
        parts = [_bits(mask & ~int(common)) for mask in masks]
        branches = [part for part in parts if any(net.layers[i].macs and net.layers[i].runs for i in part)]
        together = [i for part in branches for i in part]
        overlap = len(set(together)) < len(together)
        if len(branches) < 2 or overlap or seen.intersection(together) or _gates(net, together):
            continue
        now = net.spent(together)
        alone = max(branches, key=lambda part: sum(net.layers[i].macs for i in part))
        wide = sum(net.layers[i].macs for i in together) / sum(net.layers[i].macs for i in alone)
        after = [_widened(net, i, wide) for i in alone]
        saved = Amount(now.bytes - sum(a.bytes for a in after), now.ms - sum(a.ms for a in after))
        if saved.ms <= 0:
            continue
        kernels = sum(net.layers[i].runs for i in together)
        count = sum(net.layers[i].runs for i in alone)
        words = f"the heaviest branch alone, {plural(count, 'kernel')}, {math.sqrt(wide):.2f} times as wide: equal MACs"
        what = f"{plural(len(branches), 'branch', 'branches')} with {plural(kernels, 'kernel')} in them, side by side"
        note = "projection shortcut of a residual block" if len(branches) == 2 and _projection(net, branches) else ""
        yield (
            net.finding("G3", together, saved, what, Rewrite(words, saved, needs_retraining=True), note=note),
            set(together),
        )


def _projection(net: Network, branches: Sequence[list[int]]) -> bool:
    layers = [[i for i in part if net.layers[i].macs] for part in branches]
    return min(map(len, layers)) == 1 and max(map(len, layers)) > 1


def _gates(net: Network, indices: Sequence[int]) -> bool:
    """Products of two results inside (attention, gates): branches that no wider one replaces."""
    return any(net.layers[i].macs and i not in net.products for i in indices)


def _widened(net: Network, i: int, wide: float) -> Amount:
    """Op i with `wide` times the MACs: tensors sqrt(wide) times, weights `wide` times as large."""
    layer = net.layers[i]
    if not layer.runs:
        return Amount(0.0, 0.0)
    weights = sum(net.graph.values[name].bytes for name in net.graph.ops[i].inputs if net.graph.values[name].is_weight)
    bytes_ = (layer.access_bytes - weights) * math.sqrt(wide) + weights * wide
    work = layer.macs * wide if layer.macs else layer.flops * math.sqrt(wide)
    return Amount(bytes_, net.time(layer.family, work, bytes_))


def _ancestors(net: Network) -> list[int]:
    """For each op the set of ops it depends on and itself, as the bits of a whole number."""
    found: list[int] = []
    for i, op in enumerate(net.graph.ops):
        mask = 1 << i
        for name in op.inputs:
            if name in net.maker:
                mask |= found[net.maker[name]]
        found.append(mask)
    return found


def _bits(mask: int) -> list[int]:
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def _series(net: Network, seen: set[int]) -> Iterator[Found]:
    tiny = {i for i in net.judged("G3", net.products.keys() - seen) if _slower_to_start(net, i)}
    follows = {i: after[0] for i in tiny if len(after := net.after(i)) == 1 and after[0] in tiny}
    starts = tiny & follows.keys() - set(follows.values())
    for start in sorted(starts):
        row = [start]
        while row[-1] in follows:
            row.append(follows[row[-1]])
        first, last = net.products[row[0]], net.products[row[-1]]
        ends = first.positions_in * first.c1 + last.positions_out * last.c2
        weights = sum(net.products[i].taps * net.products[i].c1 * net.products[i].c2 / net.products[i].groups
                      for i in row)  # fmt: skip
        now, bytes_ = net.spent(row), (ends + weights) * first.itemsize
        families = {net.layers[i].family for i in row}
        family = families.pop() if len(families) == 1 else "conv"
        saved = Amount(now.bytes - bytes_, now.ms - net.time(family, sum(net.layers[i].macs for i in row), bytes_))
        if saved.ms <= 0:
            continue
        what = f"{len(row)} layers in a row that each take longer to start than to run"
        words = f"one layer in place of each two, with the MACs of both: {len(row) - len(row) // 2} in all"
        rewrite = Rewrite(words, _paired(net, row), needs_retraining=True)
        yield net.finding("G3", row, saved, what, rewrite), set(row)


def _paired(net: Network, row: Sequence[int]) -> Amount:
    """What is saved where of each two layers the heavier does the work of both."""
    saved = Amount(0.0, 0.0)
    for two in zip(row[::2], row[1::2], strict=False):
        heavier = max(two, key=lambda i: net.layers[i].macs)
        now = net.spent(two)
        one = _widened(net, heavier, sum(net.layers[i].macs for i in two) / net.layers[heavier].macs)
        saved = Amount(saved.bytes + now.bytes - one.bytes, saved.ms + now.ms - one.ms)
    return saved


def _slower_to_start(net: Network, i: int) -> bool:
    return net.ms[i] < 2 * net.device.overhead_us * 1e-3
