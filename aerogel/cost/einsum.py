"""What torch.einsum computes, as PyTorch evaluates it: operands two at a time, from the left or by the path given.

An index that neither the output nor another operand needs is summed: before the two are multiplied where one of them
alone has it (an addition for every number that goes in), in a product of matrices where both have it (MACs). Without
such an index the two are multiplied number by number. A dimension of one is no index: it is broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def einsum(equation: str, shapes: Sequence[Sequence[int]], path: Sequence[int] | None = None) -> tuple[int, int]:
    """Multiply-accumulates, and element-wise work. path: pairs of positions among what is left; a result goes last."""
    held, out = _terms(equation.replace(" ", ""), shapes)
    if len(held) == 1:
        return 0, math.prod(held[0].values()) if held[0].keys() - out else 0
    pairs = path or [0, 1] * (len(held) - 1)
    macs = work = 0
    for i, j in zip(pairs[::2], pairs[1::2], strict=True):
        others = [term for number, term in enumerate(held) if number not in (i, j)]
        needed = out.union(*others)
        summed = (held[i].keys() & held[j].keys()) - needed
        both: dict[str, int] = {}
        for term in (held[i], held[j]):
            kept = {index: size for index, size in term.items() if index in needed | summed}
            work += math.prod(term.values()) if len(kept) < len(term) else 0
            both |= kept
        together = math.prod(both.values())
        macs, work = (macs + together, work) if summed else (macs, work + together)
        made = {index: size for index, size in both.items() if index in needed}
        held = [*others, made] if path else [made, *others]
    return macs, work


def _terms(equation: str, shapes: Sequence[Sequence[int]]) -> tuple[list[dict[str, int]], set[str]]:
    """For each operand the sizes of its indices, those of one left out; and the indices of the output."""
    terms, _, out = equation.partition("->")
    if "->" not in equation:
        out = "".join(sorted(index for index in set(terms) - set(",.") if terms.count(index) == 1))
        out = ("..." if "..." in terms else "") + out
    found = []
    for term, shape in zip(terms.split(","), shapes, strict=True):
        sizes = zip(_indices(term, len(shape)), shape, strict=True)
        found.append({index: size for index, size in sizes if size != 1})
    hidden = {index for term in found for index in term if index.isdigit()} if "..." in out else set()
    return found, hidden | set(out) - {"."}


def _indices(term: str, rank: int) -> list[str]:
    """The names of an operand's dimensions; those of an ellipsis are numbers counted from its end."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after)
    return [*before, *(str(i) for i in reversed(range(hidden if dots else 0))), *after]
