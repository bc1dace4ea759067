"""`capture`: reads a PyTorch model once, by torch.export, into a Graph. The model is left as it was found."""

from __future__ import annotations

import logging
import operator
import os
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from aerogel.errors import CaptureError
from aerogel.graph.graph import Graph, Kind, Op, Ref, Value

_KINDS: dict[InputKind, Kind] = {
    InputKind.USER_INPUT: "input",
    InputKind.PARAMETER: "param",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}
# `with torch.no_grad()` and `with torch.autocast()` arrive as one op around a graph of their own.
_WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def capture(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Graph:
    """The graph of `model(*args, **kwargs)` in eval mode; train/eval flags are restored afterwards.

    args, kwargs: example inputs; tensors may sit in tuples, lists and dicts, outputs too.
    Raises CaptureError naming the module, the source line and the remedy.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"capture: model must be a torch.nn.Module, got {type(model).__name__}; "
            "wrap a function in a module that calls it"
        )
    if not isinstance(args, tuple):
        raise CaptureError(f"capture: args must be a tuple of example inputs, got {type(args).__name__}; write (x,)")
    _check_inputs(args, dict(kwargs or {}))
    try:
        with evaluating(model), quiet(), _weightless(model):
            program = torch.export.export(model, args, dict(kwargs or {}), strict=False)
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error
    return _Reader(program, model).graph()


def _check_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises CaptureError naming the first example input that no graph can take."""
    for what, given in (("args", args), ("kwargs", kwargs)):
        for path, leaf in tree_flatten_with_path(given)[0]:
            if not isinstance(leaf, _INPUTS):
                raise CaptureError(
                    f"capture: {what}{keystr(path)} must be a tensor, a number or a text, got {type(leaf).__name__}; "
                    "pass torch.as_tensor(...) of an array; tuples, lists and dicts may hold them"
                )


_INPUTS = (torch.Tensor, int, float, complex, str, type(None), torch.dtype, torch.device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside; every module's own train/eval flag put back outside.

    The flags are set one by one: `model.eval()` may be the user's own, and do more.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield model
    finally:
        for module, training in flags:
            module.training = training


def _weightless(model: nn.Module) -> AbstractContextManager[Any]:
    """Where the weights lie on the meta device, tensors that forward makes without naming a device do too."""
    weights = next(model.parameters(), None)
    return torch.device("meta") if weights is not None and weights.is_meta else nullcontext()


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines or prints inside: export tells its internals, the caller tells the user."""
    before = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        open(os.devnull, "w") as null,
        redirect_stderr(null),
        redirect_stdout(null),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def tensor_names(model: nn.Module) -> dict[int, str]:
    """id of every parameter and buffer -> its first fully-qualified name (tied tensors have several)."""
    names: dict[int, str] = {}
    for name, tensor in _named_tensors(model):
        names.setdefault(id(tensor), name)
    return names


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class _Reader:
    """Turns the nodes of an exported program into values and ops, in order.

    made: what each node stands for: the name of a value, or a list of them for an op with several outputs
    (None for an output that is no tensor).
    """

    def __init__(self, program: ExportedProgram, model: nn.Module) -> None:
        names = tensor_names(model)
        self.program = program
        self.model = type(model).__name__
        self.targets = {name: names[id(tensor)] for name, tensor in _named_tensors(model)}
        self.values: dict[str, Value] = {}
        self.ops: list[Op] = []
        self.made: dict[fx.Node, str | list[str | None]] = {}

    def graph(self) -> Graph:
        specs = {getattr(s.arg, "name", ""): s for s in self.program.graph_signature.input_specs}
        for node in self.program.graph.find_nodes(op="placeholder"):
            spec = specs[node.name]
            target = self.targets.get(spec.target or "", spec.target or "")
            self.add(node, node.name, _KINDS.get(spec.kind, "constant"), target)
        outputs = self.walk(self.program.graph_module)
        read = {self.values[name].target for op in self.ops for name in op.inputs}
        parameters = (v.target for v in self.values.values() if v.kind == "param")
        return Graph(
            values=self.values,
            ops=tuple(self.ops),
            inputs=tuple(v.name for v in self.values.values() if v.kind == "input"),
            outputs=tuple(dict.fromkeys(name for name in outputs if name is not None)),
            unreached=tuple(dict.fromkeys(target for target in parameters if target not in read)),
            model=self.model,
        )

    def walk(self, module: fx.GraphModule, prefix: str = "") -> list[str | None]:
        """Reads the ops of one graph, whose placeholders are known; the names of its outputs."""
        outputs: list[str | None] = []
        for node in module.graph.nodes:
            if node.op == "get_attr":
                if isinstance(node.meta.get("val"), torch.Tensor):
                    self.add(node, prefix + node.name, "constant", str(node.target))
            elif node.op == "output":
                outputs = [cast(str, self.made[n]) if n in self.made else None for n in tree_leaves(node.args)]
            elif node.op == "call_function" and node.target is operator.getitem:
                self.made[node] = self.made[node.args[0]][node.args[1]]
            elif node.op == "call_function" and getattr(node.target, "__name__", "") in _WRAPPERS:
                self.made[node] = self.inline(module, node, prefix)
            elif node.op == "call_function":
                self.op(node, prefix)
        return outputs

    def inline(self, module: fx.GraphModule, node: fx.Node, prefix: str) -> list[str | None]:
        """Reads the graph that a wrapper holds as if its ops stood here."""
        nodes = [arg for arg in node.args if isinstance(arg, fx.Node)]
        body = cast(fx.GraphModule, getattr(module, str(nodes[0].target)))
        for inner, outer in zip(body.graph.find_nodes(op="placeholder"), nodes[1:], strict=True):
            self.made[inner] = self.made[outer]
        return self.walk(body, f"{prefix}{node.name}.")

    def op(self, node: fx.Node, prefix: str) -> None:
        """One op; an assertion that export left behind has no output and is dropped."""
        name, out = prefix + node.name, node.meta.get("val")
        if isinstance(out, torch.Tensor):
            outputs = [self.add(node, name)]
        elif isinstance(out, list | tuple) and any(isinstance(item, torch.Tensor) for item in out):
            parts = [
                self.value(node, f"{name}#{i}", item) if isinstance(item, torch.Tensor) else None
                for i, item in enumerate(out)
            ]
            self.made[node] = parts
            outputs = [part for part in parts if part is not None]
        else:
            return
        kind = str(getattr(node.target, "_overloadpacket", node.target)).removeprefix("aten.")
        inplace = kind.endswith("_") and not kind.endswith("__")
        module, line = _place(node)
        self.ops.append(
            Op(
                name=name,
                kind=kind.removesuffix("_") if inplace else kind,
                fn=cast(Callable[..., Any], node.target),
                args=tuple(self.refer(node, arg) for arg in _positional(node)),
                outputs=tuple(outputs),
                module=module,
                source=line,
                inplace=inplace,
            )
        )

    def add(self, node: fx.Node, name: str, kind: Kind = "activation", target: str = "") -> str:
        """A node that is one tensor; a placeholder of any other kind is a constant of the code, and no value."""
        if isinstance(node.meta.get("val"), torch.Tensor):
            self.made[node] = self.value(node, name, node.meta["val"], kind, target)
        return name

    def value(self, node: fx.Node, name: str, tensor: torch.Tensor, kind: Kind = "activation", target: str = "") -> str:
        if not all(isinstance(size, int) for size in tensor.shape):
            self.refuse(node, "the shape depends on a tensor's values; make it depend on the example input's shape")
        self.values[name] = Value(name, tuple(tensor.shape), tensor.dtype, kind, target)
        return name

    def refer(self, node: fx.Node, arg: Any) -> Any:
        """An argument of the node with Refs for the values in it."""
        if isinstance(arg, list | tuple):
            return [self.refer(node, item) for item in arg]
        if not isinstance(arg, fx.Node):
            return arg
        made = self.made.get(arg)
        if isinstance(made, str):
            return Ref(made)
        if made is not None:
            return [Ref(name) for name in made if name is not None]
        if arg.op == "get_attr":  # the branch of a torch.cond: no value, the op as a whole is what we know
            return str(arg.target)
        return self.refuse(node, "a tensor's value is used as a Python number; keep it a tensor, without .item()")

    def refuse(self, node: fx.Node, why: str) -> NoReturn:
        module, line = _place(node)
        raise CaptureError(f"capture: {module or self.model}{f' ({line})' if line else ''}: {why}")


def _positional(node: fx.Node) -> list[Any]:
    """All arguments in schema order with defaults filled in, so that rules may index them."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [*node.args, *node.kwargs.values()]
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    return [given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema.arguments]


def _place(node: fx.Node) -> tuple[str, str]:
    """(module, source line): `File "net.py", line 9, in forward`, the innermost that is the user's -> net.py:9."""
    stack = node.meta.get("nn_module_stack") or {}
    module = next((path for path, _ in reversed(list(stack.values()))), "")
    for row in reversed((node.meta.get("stack_trace") or "").splitlines()):
        _, quote, rest = row.partition('File "')
        path, _, place = rest.partition('", line ')
        if quote and _is_the_users(path):
            return module, f"{Path(path).name}:{place.partition(',')[0]}"
    return module, ""


@cache
def _is_the_users(path: str) -> bool:
    """Whether a source file is neither torch's, nor Python's, nor this one's, nor code made at run time."""
    parents = Path(path).parents
    stdlib = Path(sysconfig.get_path("stdlib")) in parents and "site-packages" not in path
    ours = Path(torch.__path__[0]) in parents or Path(__file__).parent in parents
    return not (stdlib or ours or path.startswith("<"))


def _explain(model: nn.Module, error: Exception) -> str:
    """One line: which module, which source line, what went wrong, what to do."""
    names = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
    module, line = type(model).__name__, ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        module = names.get(id(frame.f_locals.get("self")), module)
        if _is_the_users(frame.f_code.co_filename):
            line = f"{Path(frame.f_code.co_filename).name}:{number}"
    first = next((row.strip() for row in str(error).splitlines() if row.strip()), "no message")
    what = f"{type(error).__name__}: {first[:200]}"
    return f"capture: {module}{f' ({line})' if line else ''}: {what}; {_remedy(error)}"


def _remedy(error: Exception) -> str:
    text = str(error)
    if "data-dependent" in text or "DataDependent" in type(error).__name__:
        return "the path taken depends on a tensor's values; make it depend on shapes only, or use torch.where"
    if "in output, which is not a known type" in text:
        return "return tensors, or tuples, lists and dicts of them; of Hugging Face's, pass use_cache=False"
    if "same device" in text:
        return "put the example inputs on the network's device"
    if any(words in text for words in _OF_TYPES):
        return "the example input is of another type than the network reads: x.float() for images, x.long() for text"
    if isinstance(error, TypeError) and "argument" in text:
        return "the example inputs do not fit forward(); pass args and kwargs as the model is called"
    if isinstance(error, RuntimeError | ValueError | IndexError) and any(word in text for word in _OF_SHAPES):
        return (
            "the example input does not run through the network; "
            "check its size (--input C,H,W) and the number of channels"
        )
    return "rewrite that line with plain tensor operations that torch.export can follow"


_OF_TYPES = ("scalar types", "should be the same", "same dtype")
_OF_SHAPES = ("size", "shape", "channels", "dimension", "reduction dim")
