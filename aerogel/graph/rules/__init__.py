"""What every op does to labels, as tables: print them, override a row, add one."""

from __future__ import annotations

import torch

from aerogel.graph.graph import Graph, Ref
from aerogel.graph.labels import Labels, Rule, Tag
from aerogel.graph.rules.compute import COMPUTE
from aerogel.graph.rules.elementwise import ELEMENTWISE
from aerogel.graph.rules.norms import NORMS
from aerogel.graph.rules.shape import SHAPE

RULES: dict[str, Rule] = {**COMPUTE, **ELEMENTWISE, **NORMS, **SHAPE}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"}


def push_labels(graph: Graph, *, whole_heads: bool = True) -> Labels:
    """Runs the graph on labels; twice where products of activations are taken head by head: only behind the view that
    splits channels into heads is it seen that they are heads.

    whole_heads: heads are what can be cut, else their width.
    """
    head_of = torch.zeros(0, dtype=torch.long)
    if any(op.kind in _PRODUCTS for op in graph.ops):
        first = _run(Labels(graph))
        if first.heads:
            labels, head = torch.cat(first.heads, 1)
            head_of = torch.full((int(labels.max()) + 1,), -1)
            head_of[labels] = head
            head_of[0] = -1
    return _run(Labels(graph, head_of, whole_heads=whole_heads))


def _alive(graph: Graph) -> set[str]:
    """Ops whose numbers reach an output; of the others only the shapes are asked for, if anything."""
    wanted, alive = set(graph.outputs), set()
    for op in reversed(graph.ops):
        weighs = any(graph.values[name].is_weight for name in op.inputs)  # a branch for training, say
        if op.inplace or weighs or any(name in wanted for name in op.outputs):
            alive.add(op.name)
            wanted.update(op.inputs)
    return alive


def _run(state: Labels) -> Labels:
    graph = state.graph
    alive = _alive(graph)
    for op in graph.ops:
        rule = RULES.get(op.kind)
        if op.name not in alive:
            out = [Tag() for _ in op.outputs]
        elif rule is None:
            out = state.pin_all(op, f"op {op.kind} ({op.where}) is not understood")
        else:
            out = rule(state, op)
        state.tags |= dict(zip(op.outputs, out, strict=True))
    for name in graph.outputs:
        ref = Ref(name)
        if state.is_matrix(ref):
            state.pin_matrix(ref, "network output")
        else:
            state.pin_tag(state.of(ref), "network output")
    return state
