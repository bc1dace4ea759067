"""capture: what it reads, what it leaves alone, what it refuses and how it says so."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.errors import CaptureError
from aerogel.graph import Graph, capture, evaluating, tensor_names


class Net(nn.Module):
    """A convolution, then whatever function of (self, x) the test is about."""

    def __init__(self, then: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(self, self.conv(x))


def image(channels: int = 3, side: int = 6) -> Tensor:
    return torch.zeros(2, channels, side, side)


def kinds(graph: Graph) -> list[str]:
    return [op.kind for op in graph.ops]


# ---------------------------------------------------------------- what it reads


def test_ops_values_modules_and_source_lines() -> None:
    graph = capture(Net(lambda net, x: x.relu()), (image(),))
    conv, relu = graph.ops
    assert (conv.kind, conv.module, conv.where) == ("conv2d", "conv", "conv")
    assert (relu.kind, relu.module, relu.where) == ("relu", "", relu.name)
    assert conv.source.startswith("test_capture.py:")
    assert graph.inputs == ("x",)
    assert graph.outputs == relu.outputs
    assert graph.model == "Net"
    weight = graph.values[conv.inputs[1]]
    assert (weight.kind, weight.target, weight.shape, weight.bytes) == ("param", "conv.weight", (8, 3, 3, 3), 864)
    assert graph.values[graph.outputs[0]].shape == (2, 8, 4, 4)
    assert len(conv.args) == 7, "every argument of the schema, defaults filled in"


def test_positional_and_keyword_arguments_and_values_that_are_no_tensors() -> None:
    class Options(nn.Module):
        def forward(self, x: Tensor, times: int, *, bias: Tensor | None = None, negate: bool = False) -> Tensor:
            x = x * times if bias is None else x * times + bias
            return -x if negate else x

    x = torch.zeros(2, 3)
    assert kinds(capture(Options(), (x, 3))) == ["mul"]
    graph = capture(Options(), (x,), {"times": 3, "bias": torch.zeros(3), "negate": True})
    assert kinds(graph) == ["mul", "add", "neg"]
    assert [graph.values[name].shape for name in graph.inputs] == [(2, 3), (3,)]


def test_tuples_and_dicts_of_tensors_go_in_and_out() -> None:
    class Nested(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], named: dict[str, Tensor]) -> dict[str, Any]:
            total = pair[0] + pair[1]
            return {"total": total, "more": [total * 2, (named["a"], None)], "size": 3}

    one = torch.zeros(2, 3)
    graph = capture(Nested(), ((one, one),), {"named": {"a": torch.zeros(4)}})
    assert [graph.values[name].shape for name in graph.inputs] == [(2, 3), (2, 3), (4,)]
    assert [graph.values[name].shape for name in graph.outputs] == [(2, 3), (2, 3), (4,)]
    assert graph.outputs[2] == graph.inputs[2], "an input handed through is an output too"


def test_pieces_of_a_chunk_are_values_of_their_own() -> None:
    def swap(net: Net, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat([second, first], 1)

    graph = capture(Net(swap), (image(),))
    chunk, cat = graph.ops[1:]
    assert kinds(graph) == ["conv2d", "chunk", "cat"]
    assert cat.inputs == chunk.outputs[::-1]
    assert [graph.values[name].shape for name in chunk.outputs] == [(2, 4, 4, 4)] * 2


def test_an_op_in_place_has_the_plain_name_and_the_flag() -> None:
    graph = capture(Net(lambda net, x: x.relu_().add_(1)), (image(),))
    assert [(op.kind, op.inplace) for op in graph.ops] == [("conv2d", False), ("relu", True), ("add", True)]


def test_a_shared_parameter_has_one_target() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = Tied()
    graph = capture(model, (torch.zeros(2, 4),))
    assert [graph.values[op.inputs[1]].target for op in graph.ops] == ["first.weight", "first.weight"]
    assert graph.unreached == ()
    assert tensor_names(model)[id(model.second.weight)] == "first.weight"


def test_buffers_constants_and_parameters_that_nothing_reads() -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))
            self.register_buffer("stored", torch.ones(3))
            self.register_buffer("passing", torch.ones(3), persistent=False)
            self.plain = torch.ones(3)  # neither parameter nor buffer

        def forward(self, x: Tensor) -> Tensor:
            return x * self.used + self.stored + self.passing + self.plain

    graph = capture(Kinds(), (torch.zeros(2, 3),))
    found = {value.target: value.kind for value in graph.values.values() if value.is_weight}
    assert found == {
        "used": "param",
        "unused": "param",
        "stored": "buffer",
        "passing": "buffer",
        "plain": "constant",
    }
    assert graph.unreached == ("unused",)


@pytest.mark.parametrize("context", [torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_what_stands_in_a_context_is_read_where_it_stands(context: Callable[[], Any]) -> None:
    def wrapped(net: Net, x: Tensor) -> Tensor:
        with context():
            first, second = net.conv(image()).relu().chunk(2, 1)
        return torch.cat([second, first], 1) + x

    graph = capture(Net(wrapped), (image(),))
    assert [kind for kind in kinds(graph) if kind not in ("zeros", "to", "_to_copy")] == [
        *("conv2d", "conv2d", "relu", "chunk", "cat", "add")
    ]
    second = [op for op in graph.ops if op.kind == "conv2d"][1]
    assert second.module == "conv"
    assert graph.values[second.inputs[1]].target == "conv.weight"


def test_a_choice_between_two_graphs_is_one_op() -> None:
    def choose(net: Net, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    graph = capture(Net(choose), (image(),))
    assert kinds(graph) == ["conv2d", "sum", "gt", "cond"]
    assert graph.ops[-1].inputs == (*graph.ops[2].outputs, *graph.ops[0].outputs)
    assert graph.outputs == graph.ops[-1].outputs


def test_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        graph = capture(nn.Linear(3, 5), (torch.zeros(2, 3),))
    assert graph.values[graph.outputs[0]].shape == (2, 5)


# ---------------------------------------------------------------- what it leaves alone


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def mixed() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.Dropout(0.5), nn.ReLU()))
    model.train()
    model[1].training = False
    model[2].training = False  # while its children train
    return model


def test_train_and_eval_flags_are_left_as_found_and_the_graph_is_that_of_eval() -> None:
    model = mixed()
    before, state = flags(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = capture(model, (image(),))
    assert flags(model) == before
    assert set(before) == {True, False}
    norm = next(op for op in graph.ops if op.kind == "batch_norm")
    assert norm.args[5] is False, "batch_norm(training=False)"
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_train_and_eval_flags_are_left_as_found_after_an_error() -> None:
    model = mixed()
    before = flags(model)
    with pytest.raises(CaptureError, match="channels"):
        capture(model, (image(channels=5),))
    assert flags(model) == before


def test_an_eval_of_the_users_own_is_not_called() -> None:
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> Merging:
            raise AssertionError("a side effect on the user's model")

    model = Merging(3, 3)
    with evaluating(model) as same:
        assert same is model
        assert model.training is False
    assert model.training is True


def test_nothing_is_printed_warned_or_logged(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def loud(net: Net, x: Tensor) -> Tensor:
        print("on stdout")
        print("on stderr", file=sys.stderr)
        warnings.warn("a warning", stacklevel=1)
        if x.sum() > 0:
            return x
        return -x

    def unlike(net: Net, x: Tensor) -> Tensor:  # an error that torch.export logs
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.sum(), (x,))

    capture(Net(lambda net, x: (print("fine"), x.relu())[1]), (image(),))
    with pytest.raises(CaptureError, match="values"):
        capture(Net(loud), (image(),))
    with pytest.raises(CaptureError, match="capture: Net"):
        capture(Net(unlike), (image(),))
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# ---------------------------------------------------------------- what it refuses


def branch(net: Net, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x
    return -x


def message(model: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(CaptureError, match=r"^capture: ") as caught:
        capture(model, args, kwargs)
    text = str(caught.value)
    assert "\n" not in text, "one line"
    return text


def line_of(function: Callable[..., Any], offset: int) -> str:
    return f"test_capture.py:{function.__code__.co_firstlineno + offset}"


def test_a_path_that_depends_on_values() -> None:
    text = message(Net(branch), image())
    assert f"Net ({line_of(branch, 1)})" in text
    assert "the path taken depends on a tensor's values" in text
    assert "use torch.where" in text


def test_a_value_used_as_a_python_number() -> None:
    def scale(net: Net, x: Tensor) -> Tensor:
        return x * x.mean().item()

    text = message(Net(scale), image())
    assert f"Net ({line_of(Net.forward, 1)})" in text, "export keeps the lines of forward() alone"
    assert "keep it a tensor" in text


def test_a_shape_that_depends_on_values() -> None:
    def pick(net: Net, x: Tensor) -> Tensor:
        return x[x > 0]

    text = message(Net(pick), image())
    assert f"Net ({line_of(Net.forward, 1)})" in text, "export keeps the lines of forward() alone"
    assert "the shape depends on a tensor's values" in text


def test_wrong_channels_and_wrong_size() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Flatten(), nn.Linear(8 * 16, 2))
    text = message(model, image(channels=4))
    assert "capture: 0.0: " in text, "the module, and no line of torch's own"
    assert "to have 3 channels, but got 4" in text
    assert "check its size (--input C,H,W) and the number of channels" in text
    text = message(model, image(side=7))
    assert "capture: 2: " in text
    assert "check its size (--input C,H,W)" in text
    assert "check its size (--input C,H,W)" in message(model, image(side=2))


def test_the_source_line_is_the_users() -> None:
    text = message(Net(branch), image(channels=4))
    assert f"capture: conv ({line_of(Net.forward, 1)}): RuntimeError" in text


@pytest.mark.parametrize("args", [(), (image(), image())])
def test_too_few_and_too_many_arguments(args: tuple[Tensor, ...]) -> None:
    text = message(Net(branch), *args)
    assert "capture: Net: TypeError" in text
    assert "pass args and kwargs as the model is called" in text


def test_an_unknown_keyword() -> None:
    assert "pass args and kwargs as the model is called" in message(Net(branch), image(), scale=2)


@pytest.mark.parametrize("wrong", [3, "text", [image()]])
def test_no_tensor_where_one_is_needed(wrong: Any) -> None:
    text = message(Net(branch), wrong)
    assert f"capture: conv ({line_of(Net.forward, 1)}): TypeError" in text
    assert "the example inputs do not fit forward()" in text


def test_no_module() -> None:
    assert "model must be a torch.nn.Module, got function" in message(lambda x: x, image())


def test_args_that_are_no_tuple() -> None:
    with pytest.raises(CaptureError, match=r"args must be a tuple of example inputs, got Tensor; write \(x,\)"):
        capture(Net(branch), image())  # type: ignore[arg-type]


def test_code_that_cannot_be_followed() -> None:
    def leave(net: Net, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy())

    text = message(Net(leave), image())
    assert line_of(leave, 1) in text
    assert "rewrite that line with plain tensor operations" in text


def test_an_error_of_several_lines_becomes_one() -> None:
    def fail(net: Net, x: Tensor) -> Tensor:
        raise ValueError("\n\n  first\nsecond")

    text = message(Net(fail), image())
    assert "ValueError: first; " in text
    assert isinstance(CaptureError("x"), ValueError)


# ---------------------------------------------------------------- example inputs that do not do


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (
            (image().numpy(),),
            {},
            r"^capture: args\[0\] must be a tensor, a number or a text, got ndarray; pass torch",
        ),
        (([image(), {"a": object()}],), {}, r"^capture: args\[0\]\[1\]\['a'\] must be a tensor, .* got object; "),
        ((image(),), {"options": object()}, r"^capture: kwargs\['options'\] must be a tensor, .* got object; "),
        ((image().long(),), {}, r"^capture: conv .*long int.*; the example input is of another type than the network"),
        (("cat.png",), {}, r"^capture: conv .*; the example inputs do not fit forward\(\)"),
    ],
)
def test_an_input_of_a_wrong_type(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(Net(lambda net, x: x), args, kwargs)


def test_an_output_that_is_no_tensor() -> None:
    with pytest.raises(CaptureError, match=r"^capture: Net: .*; return tensors, .* Hugging Face's, pass use_cache=Fal"):
        capture(Net(lambda net, x: object()), (image(),))


def test_inputs_on_another_device() -> None:
    net = Net(lambda net, x: x * torch.ones(2, 8, 4, 4, device="meta"))
    with pytest.raises(CaptureError, match=r"^capture: Net .*same device.*; put the example inputs on"):
        capture(net, (image(),))


def test_a_network_on_the_meta_device_makes_its_tensors_there() -> None:
    with torch.device("meta"):
        net = Net(lambda net, x: x + torch.arange(4))
    assert kinds(capture(net, (image().to("meta"),))) == ["conv2d", "arange", "add"]
    assert torch.zeros(1).device.type == "cpu"
