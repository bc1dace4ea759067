"""`capture`: reads a PyTorch model once, by torch.export, into a Graph. The model is left as it was found."""

from __future__ import annotations

import logging
import operator
import os
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from aerogel.errors import CaptureError
from aerogel.graph.graph import Graph, Op, Ref, Value

_KINDS = {
    InputKind.USER_INPUT: "input",
    InputKind.PARAMETER: "param",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}
_NOT_THE_USERS = tuple(
    str(Path(p)) for p in (torch.__path__[0], sysconfig.get_path("stdlib"), Path(__file__).parent)
)


def capture(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Graph:
    """The graph of `model(*args, **kwargs)` in eval mode; train/eval flags are restored afterwards.

    args, kwargs: example inputs; tensors may sit in tuples, lists and dicts, outputs too.
    Raises CaptureError naming the module, the source line and the remedy.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"capture: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(args, tuple):
        raise CaptureError(
            f"capture: args must be a tuple of example inputs, got {type(args).__name__}; write (x,)"
        )
    try:
        with evaluating(model), quiet():
            program = torch.export.export(model, args, dict(kwargs or {}), strict=False)
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error
    return _read(program, model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside; every module's own train/eval flag put back outside."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in flags:
            module.training = training


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
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        names.setdefault(id(tensor), name)
    return names


def _read(program: ExportedProgram, model: nn.Module) -> Graph:
    names = tensor_names(model)
    state = {name: names[id(t)] for name, t in _all_tensors(model)}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    values: dict[str, Value] = {}
    alias: dict[str, str] = {}  # a getitem node -> the output it picks
    ops: list[Op] = []
    outputs: tuple[str, ...] = ()

    def refer(arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            return Ref(alias.get(arg.name, arg.name))
        if isinstance(arg, list | tuple):
            return [refer(item) for item in arg]
        return arg

    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs.get(node.name)
            kind = _KINDS.get(spec.kind, "constant") if spec else "constant"
            if isinstance(node.meta.get("val"), torch.Tensor):
                target = state.get(spec.target, spec.target) if spec and spec.target else ""
                values[node.name] = _value(node.name, node.meta["val"], kind, target)
        elif node.op == "get_attr":
            values[node.name] = _value(node.name, node.meta["val"], "constant", str(node.target))
        elif node.op == "call_function" and node.target is operator.getitem:
            source, index = node.args
            alias[node.name] = f"{source.name}#{index}"
        elif node.op == "call_function":
            ops.append(_op(node, refer, values))
        elif node.op == "output":
            outputs = tuple(alias.get(n.name, n.name) for n in node.all_input_nodes)
    ops = _without_checks(ops)
    read = {values[name].target for op in ops for name in op.inputs if values[name].kind == "param"}
    unreached = tuple(dict.fromkeys(n for t, n in names.items() if n not in read and n in _parameters(model)))
    inputs = tuple(v.name for v in values.values() if v.kind == "input")
    return Graph(values, tuple(ops), inputs, outputs, unreached, type(model).__name__)


def _op(node: torch.fx.Node, refer: Any, values: dict[str, Value]) -> Op:
    out = node.meta.get("val")
    names = []
    if isinstance(out, torch.Tensor):
        values[node.name] = _value(node.name, out)
        names.append(node.name)
    elif isinstance(out, list | tuple):
        for i, item in enumerate(out):
            if isinstance(item, torch.Tensor):
                values[f"{node.name}#{i}"] = _value(f"{node.name}#{i}", item)
                names.append(f"{node.name}#{i}")
    stack = node.meta.get("nn_module_stack") or {}
    module = next((path for path, _ in reversed(list(stack.values()))), "")
    full = getattr(node.target, "_overloadpacket", node.target)
    kind = str(full).removeprefix("aten.")
    args = tuple(refer(arg) for arg in _positional(node))
    inplace = kind.endswith("_") and not kind.endswith("__")
    return Op(node.name, kind.removesuffix("_") if inplace else kind, node.target, args, tuple(names), module,
              _line(node.meta.get("stack_trace") or ""), inplace)  # fmt: skip


def _positional(node: torch.fx.Node) -> list[Any]:
    """All arguments in schema order with defaults filled in, so that rules may index them."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [*node.args, *node.kwargs.values()]
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    return [given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema.arguments]


def _without_checks(ops: list[Op]) -> list[Op]:
    """Less the assertions export leaves behind: they compute nothing."""
    return [op for op in ops if op.outputs]


def _value(name: str, tensor: torch.Tensor, kind: Any = "activation", target: str = "") -> Value:
    return Value(name, tuple(int(s) for s in tensor.shape), tensor.dtype, kind, target)


def _all_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _parameters(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def _line(stack: str) -> str:
    """The innermost line of the stack that is the user's: `File "net.py", line 9, in forward` -> net.py:9."""
    for row in reversed(stack.splitlines()):
        if row.strip().startswith('File "') and not row.split('"')[1].startswith(_NOT_THE_USERS):
            path, line = row.split('"')[1], row.split("line ")[1].split(",")[0]
            return f"{Path(path).name}:{line}"
    return ""


def _explain(model: nn.Module, error: Exception) -> str:
    """One line: which module, which source line, what went wrong, what to do."""
    names = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
    module, line = type(model).__name__, ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        module = names.get(id(frame.f_locals.get("self")), module)
        if not frame.f_code.co_filename.startswith(_NOT_THE_USERS):
            line = f"{Path(frame.f_code.co_filename).name}:{number}"
    first = next((row.strip() for row in str(error).splitlines() if row.strip()), "no message")
    return f"capture: {module}{f' ({line})' if line else ''}: {type(error).__name__}: {first[:200]}; {_remedy(error)}"


def _remedy(error: Exception) -> str:
    text = str(error)
    if "data-dependent" in text or "DataDependent" in type(error).__name__:
        return (
            "the path taken depends on a tensor's values; make it depend on shapes only, or use torch.where"
        )
    if isinstance(error, TypeError) and ("forward()" in text or "argument" in text):
        return "the example inputs do not fit forward(); pass args and kwargs as the model is called"
    if isinstance(error, RuntimeError | ValueError | IndexError) and not type(error).__module__.startswith(
        "torch._dynamo"
    ):
        return "the example input does not run through the network; check its size (--input C,H,W) and the number of channels"
    return "rewrite that line with plain tensor operations that torch.export can follow"
