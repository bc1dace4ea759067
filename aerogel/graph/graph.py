"""A captured network: values, and the ops between them in the order they run.

A `Value` is a tensor (a shape, not numbers); an `Op` is one ATen call as `torch.export` recorded it, with its
arguments, the module it was called in and the source line. Everything downstream (cost, coupling, peak memory,
reports) reads only this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch

Kind = Literal["input", "param", "buffer", "constant", "activation"]


@dataclass(frozen=True)
class Ref:
    """An argument of an op that is a value of the graph."""

    name: str


@dataclass(frozen=True)
class Value:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind = "activation"
    target: str = ""  # the fully-qualified name of a parameter or buffer; tied ones share the first

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def is_weight(self) -> bool:
        return self.kind in ("param", "buffer", "constant")


@dataclass(frozen=True)
class Op:
    name: str
    kind: str  # "conv2d", "add", "relu": the ATen name, less its overload and its in-place underscore
    fn: Callable[..., Any]
    args: tuple[Any, ...]  # as recorded; values of the graph appear as Ref, also inside lists
    outputs: tuple[str, ...]
    module: str  # "features.0.conv"; "" is the network itself
    source: str  # "file.py:12", the line of the user's forward, or ""
    inplace: bool = False

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values it reads, in order, each once."""
        return tuple(dict.fromkeys(ref.name for ref in refs(self.args)))

    @property
    def where(self) -> str:
        """For messages: the module, else the op's own name."""
        return self.module or self.name


@dataclass(frozen=True)
class Graph:
    values: dict[str, Value]
    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    unreached: tuple[str, ...] = ()  # parameters no op reads
    model: str = ""  # the class name, for messages

    def with_shapes(self, shapes: dict[str, tuple[int, ...]]) -> Graph:
        """The same graph with some values resized: what it would be after a cut, without capturing again."""
        values = {n: replace(v, shape=shapes[n]) if n in shapes else v for n, v in self.values.items()}
        return replace(self, values=values)

    def readers(self) -> dict[str, list[int]]:
        """{value: indices of the ops that read it}, in order."""
        found: dict[str, list[int]] = {}
        for i, op in enumerate(self.ops):
            for name in op.inputs:
                found.setdefault(name, []).append(i)
        return found

    def makers(self) -> dict[str, int]:
        """{value: index of the op that makes it}; inputs and weights have none."""
        return {name: i for i, op in enumerate(self.ops) for name in op.outputs}

    def last_use(self) -> dict[str, int]:
        """For each value, the index of the last op that reads it; outputs live to the end."""
        last = {name: i for i, op in enumerate(self.ops) for name in op.inputs}
        return last | dict.fromkeys(self.outputs, len(self.ops))


def refs(args: Any) -> Iterator[Ref]:
    """Every Ref in nested arguments, in order."""
    if isinstance(args, Ref):
        yield args
    elif isinstance(args, list | tuple):
        for item in args:
            yield from refs(item)
    elif isinstance(args, dict):
        yield from refs(list(args.values()))


def fill(args: Any, values: dict[str, Any]) -> Any:
    """Arguments with every Ref replaced by what `values` holds under its name."""
    if isinstance(args, Ref):
        return values[args.name]
    if isinstance(args, list | tuple):
        return type(args)(fill(item, values) for item in args)
    if isinstance(args, dict):
        return {key: fill(item, values) for key, item in args.items()}
    return args
