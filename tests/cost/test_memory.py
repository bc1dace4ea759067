"""Access and peak bytes, by hand. x is (1, 3, 4, 4) in single precision, 192 bytes; 8 channels are 512."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from work import Apply

from aerogel.cost.memory import (
    Alive,
    Lifetime,
    absorbed_ops,
    access_bytes,
    arena_bytes,
    lifetimes,
    peak_bytes,
    timeline,
    views,
)
from aerogel.graph import Graph, capture

X = torch.zeros(1, 3, 4, 4)
WEIGHT = 8 * 3 * 4  # of a 1x1 convolution from 3 to 8 channels


class Net(nn.Module):
    """Whatever the test is about, with layers at hand: c (3 -> 8), d (8 -> 8), n (norm over 8)."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.c, self.d, self.n = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.p = nn.Parameter(torch.ones(8, 4, 4))
        self.register_buffer("calls", torch.zeros(1))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def graph_of(function: Callable[[Any, Tensor], Any]) -> Graph:
    return capture(Net(function), (X,))


def total(graph: Graph) -> tuple[int, int]:
    """Access bytes: folded, raw."""
    return sum(access_bytes(graph)), sum(access_bytes(graph, folded=False))


def peaks(graph: Graph) -> tuple[int, int]:
    """Peak bytes: folded, raw."""
    return peak_bytes(graph).bytes, peak_bytes(graph, folded=False).bytes


# ---------------------------------------------------------------- access


def test_access_of_a_convolution_with_a_bias() -> None:
    graph = capture(nn.Conv2d(3, 8, 1), (X,))
    assert total(graph) == (192 + WEIGHT + 32 + 512,) * 2


def test_access_of_a_linear_layer() -> None:
    graph = capture(nn.Linear(6, 4), (torch.zeros(2, 6),))
    assert total(graph) == (48 + 96 + 16 + 32,) * 2


def test_access_of_a_sum() -> None:
    assert total(graph_of(lambda net, x: x + x.relu())) == (2 * 192 + 3 * 192,) * 2
    assert total(graph_of(lambda net, x: x + x)) == (2 * 192,) * 2, "one tensor is read once"


def test_access_in_half_precision_is_half() -> None:
    whole, half = (capture(nn.Conv2d(3, 8, 1).to(d), (X.to(d),)) for d in (torch.float32, torch.float16))
    assert total(whole)[0] == 2 * total(half)[0]


def test_a_norm_and_an_activation_are_folded_into_the_layer_before() -> None:
    graph = graph_of(lambda net, x: net.n(net.c(x)).relu())
    assert access_bytes(graph) == [192 + WEIGHT + 32 + 512, 0, 0], "the norm gives its layer a bias"
    assert access_bytes(graph, folded=False) == [192 + WEIGHT + 512, 512 + 4 * 32 + 512, 512 + 512]


def test_a_layer_that_has_a_bias_gets_no_other() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    assert access_bytes(capture(net, (X,))) == [192 + WEIGHT + 32 + 512, 0]


def test_a_norm_of_the_batch_is_folded_into_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8, track_running_stats=False))
    graph = capture(net, (X,))
    assert absorbed_ops(graph) == {}
    assert access_bytes(graph) == [192 + WEIGHT + 512, 512 + 2 * 32 + 512]
    assert peaks(graph) == (1024, 1024)
    told = graph_of(lambda net, x: F.batch_norm(net.c(x), net.n.running_mean, net.n.running_var, training=True))
    assert absorbed_ops(told) == {}, "it has running statistics and is told not to use them"


ABSORBED = {
    "norm and activation": (lambda net, x: net.n(net.c(x)).relu(), {1: 0, 2: 0}),
    "activation": (lambda net, x: F.hardswish(net.c(x)), {1: 0}),
    "norm after the activation": (lambda net, x: net.n(net.c(x).relu()), {1: 0}),
    "read twice": (lambda net, x: net.c(x) + net.c(x).relu(), {2: 1}),
    "needed elsewhere": (lambda net, x: (lambda y: y + y.relu())(net.c(x)), {}),
    "an output": (lambda net, x: (lambda y: (y, y.relu()))(net.c(x)), {}),
    "after a sum": (lambda net, x: (net.c(x) + 1).relu(), {}),
    "of the input": (lambda net, x: x.relu(), {}),
}


@pytest.mark.parametrize("case", ABSORBED)
def test_what_a_runtime_computes_in_the_layer_before(case: str) -> None:
    function, absorbed = ABSORBED[case]
    assert absorbed_ops(graph_of(function)) == absorbed


def test_views_cost_nothing() -> None:
    graph = graph_of(lambda net, x: net.c(x).flatten(1).view(1, 8, 16).transpose(1, 2).unsqueeze(0).chunk(2, 2)[1])
    assert access_bytes(graph)[1:] == [0] * 5
    assert views(graph) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("copying", [lambda x: x.contiguous(), lambda x: x.reshape(1, 8, 4, 4), lambda x: x.flatten(1)])
def test_a_shuffle_is_paid_where_it_copies(copying: Callable[[Tensor], Tensor]) -> None:
    graph = graph_of(lambda net, x: copying(net.c(x).view(1, 2, 4, 4, 4).transpose(1, 2)))
    assert access_bytes(graph)[1:] == [0, 0, 512 + 512]
    assert peaks(graph) == (1024, 1024)


RESHAPES = {  # of (2, 8, 4, 4), 1024 bytes: what the last op copies, 0 where it is a view
    "strided": (lambda x: x[..., ::3].flatten(1), 512),
    "strided evenly": (lambda x: x[..., ::2].flatten(1), 0),
    "a part of the channels": (lambda x: x.chunk(2, 1)[0].reshape(2, -1), 0),
    "a part of the channels, of all images": (lambda x: x.chunk(2, 1)[0].reshape(-1), 512),
    "a part of the channels, of one image": (lambda x: x[:1].chunk(2, 1)[0].reshape(-1), 0),
    "a part of the images": (lambda x: x.chunk(2)[0].reshape(-1), 0),
    "selected": (lambda x: x.select(1, 2).reshape(-1), 128),
    "permuted in place": (lambda x: x.relu().transpose_(0, 1).relu_().flatten(1), 1024),
    "permuted and back": (lambda x: x.transpose(1, 2).transpose(1, 2).flatten(1), 0),
    "expanded": (lambda x: x[:, :, :1, :1].expand(2, 8, 9, 9).flatten(2), 0),
    "in another format": (lambda x: x.contiguous(memory_format=torch.channels_last), 1024),
    "in another format by to": (lambda x: x.to(memory_format=torch.channels_last), 1024),
    "and back": (lambda x: x.contiguous(memory_format=torch.channels_last).contiguous(), 1024),
    "one line that is strided": (lambda x: x.view(-1)[::2].ravel(), 512),
    "as it is": (lambda x: x.view(-1).contiguous().to(torch.float32).ravel(), 0),
}


@pytest.mark.parametrize("case", RESHAPES)
def test_a_reshape_is_paid_where_no_strides_can_show_it(case: str) -> None:
    work, size = RESHAPES[case]
    graph = capture(Apply(work), (torch.zeros(2, 8, 4, 4),))
    assert (len(graph.ops) - 1 in views(graph)) == (size == 0)
    assert access_bytes(graph)[-1] == 2 * size


def test_an_expanded_value_is_stored_and_read_once() -> None:
    """64 numbers, 256 bytes, shown as 64 x 112 x 112."""

    def add(x: Tensor, y: Tensor) -> Tensor:
        return y + x.expand(1, 64, 112, 112)

    size = 4 * 64 * 112 * 112
    graph = capture(Apply(add), (torch.zeros(1, 64, 1, 1), torch.zeros(1, 64, 112, 112)))
    assert access_bytes(graph) == [0, size + 256 + size]
    assert peaks(graph) == (2 * size + 256,) * 2
    copied = capture(Apply(lambda x: x.expand(1, 64, 112, 112).contiguous()), (torch.zeros(1, 64, 1, 1),))
    assert access_bytes(copied) == [0, 256 + size]
    assert peaks(copied) == (256 + size,) * 2


def test_nothing_is_written_into_the_memory_of_an_expanded_value() -> None:
    graph = graph_of(lambda net, x: x.amax((2, 3), True).expand(1, 3, 4, 4) + 1)
    assert peaks(graph) == (192 + 12, 192 + 12)
    held = {life.name: life.bytes for life in lifetimes(graph)}
    assert held == {"x": 192, "amax": 12, "add": 192}


def step(name: str, *args: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: getattr(torch.Tensor, name)(x, *args)


@st.composite
def looks(draw: st.DrawFn) -> list[Callable[[Tensor], Tensor]]:
    """Views and reshapes that fit one another, one op each, of a (2, 1, 4, 6)."""
    x, steps = torch.zeros(2, 1, 4, 6), []
    for _ in range(draw(st.integers(1, 6))):
        dim = draw(st.integers(0, x.dim() - 1))
        size, other = x.shape[dim], draw(st.integers(0, x.dim() - 1))
        options = [
            step("transpose", dim, other), step("unsqueeze", dim), step("ravel"), step("contiguous"),
            step("flatten", min(dim, other), max(dim, other)), step("reshape", -1), step("reshape", size, -1),
            step("reshape", -1, 2) if x.numel() % 2 == 0 else step("ravel"), step("squeeze", dim),
            step("expand", 2, *x.shape), step("movedim", dim, other), step("permute", *reversed(range(x.dim()))),
        ]  # fmt: skip
        if size > 1:
            options += [
                step("narrow", dim, 1, size - 1), lambda x, dim=dim: torch.ops.aten.slice.Tensor(x, dim, 0, None, 2),
                lambda x, dim=dim: x.chunk(2, dim)[0],
            ]  # fmt: skip
        if x.dim() > 1:
            options += [step("select", dim, 0), lambda x, dim=dim: x.unbind(dim)[-1]]
        if dim != other:
            options.append(step("diagonal", 0, dim, other))
        steps.append(draw(st.sampled_from(options)))
        x = steps[-1](x)
    return steps


@settings(max_examples=80, deadline=None)
@given(steps=looks())
def test_views_are_those_of_pytorch_itself(steps: list[Callable[[Tensor], Tensor]]) -> None:
    """How many bytes are copied on the way, and how many different numbers the last tensor shows."""

    def forward(x: Tensor) -> Tensor:
        for look in steps:
            x = look(x)
        return x.exp()

    graph = capture(Apply(forward), (torch.zeros(2, 1, 4, 6),))
    x, copied = torch.zeros(2, 1, 4, 6), []
    for look in steps:
        before, x = x, look(x)
        if x.untyped_storage().data_ptr() != before.untyped_storage().data_ptr():
            copied.append(x.nbytes)
    copies = [op for i, op in enumerate(graph.ops[:-1]) if i not in views(graph)]  # export leaves out what does nothing
    assert [graph.values[op.outputs[0]].bytes for op in copies] == copied
    place = torch.arange(x.untyped_storage().nbytes() // 4).as_strided(x.shape, x.stride(), x.storage_offset())
    assert access_bytes(graph)[-1] == 4 * place.unique().numel() + 4 * x.numel()


def test_a_change_of_type_copies() -> None:
    graph = graph_of(lambda net, x: x.to(torch.float64))
    assert total(graph) == (192 + 384,) * 2
    assert peaks(graph) == (576, 576)
    assert total(graph_of(lambda net, x: x.to(torch.float32) + 1)) == (384, 384)


def test_cat_and_padding_move_data() -> None:
    assert total(graph_of(lambda net, x: torch.cat([x, x], 1))) == (192 + 384,) * 2
    assert total(graph_of(lambda net, x: F.pad(x, (0, 4)))) == (192 + 384,) * 2


# ---------------------------------------------------------------- peak


def test_the_input_lives_until_its_last_use() -> None:
    graph = graph_of(lambda net, x: net.d(net.c(x)))
    assert peaks(graph) == (1024, 1024)
    assert peak_bytes(graph).op == "d"
    graph = graph_of(lambda net, x: net.d(net.c(x)).sum() + x)
    assert peaks(graph) == (192 + 1024, 192 + 1024)


def test_an_activation_takes_the_memory_of_its_layer_when_folded() -> None:
    assert peaks(graph_of(lambda net, x: net.c(x).relu())) == (192 + 512, 1024)
    assert peaks(graph_of(lambda net, x: net.n(net.c(x)).relu())) == (192 + 512, 1024)


def test_an_op_in_place_takes_no_memory_in_either_view() -> None:
    assert peaks(graph_of(lambda net, x: net.c(x).relu_())) == (704, 704)


def test_a_residual_sum_takes_the_memory_of_the_operand_that_dies() -> None:
    def block(net: Any, x: Tensor) -> Tensor:
        x = net.c(x)
        return x + net.d(x)

    assert peaks(graph_of(block)) == (1024, 1536)


def test_a_sum_whose_operands_are_needed_later_takes_memory_of_its_own() -> None:
    def block(net: Any, x: Tensor) -> tuple[Tensor, ...]:
        x = net.c(x)
        y = net.d(x)
        return x, y, x + y

    assert peaks(graph_of(block)) == (1536, 1536)


def test_the_callers_input_is_not_overwritten_not_even_through_a_view() -> None:
    assert peaks(graph_of(lambda net, x: x + 1)) == (384, 384)
    assert peaks(graph_of(lambda net, x: x.flatten(1) + 1)) == (384, 384)


def test_a_view_lives_as_long_as_its_memory() -> None:
    def late(net: Any, x: Tensor) -> Tensor:
        x = net.c(x)
        view = x.flatten(1)
        return net.d(x).sum() + view

    assert peaks(graph_of(late)) == (1028, 1028), "c, d and the sum"


def test_weights_are_in_no_peak_nor_views_of_them_nor_counters() -> None:
    assert peaks(graph_of(lambda net, x: net.c(x) * net.p)) == (192 + 512, 1024)
    assert peaks(graph_of(lambda net, x: net.c(x) * net.p.unsqueeze(0))) == (192 + 512, 1024)

    def counting(net: Any, x: Tensor) -> Tensor:
        net.calls.add_(1)
        return net.c(x)

    assert peaks(graph_of(counting)) == (704, 704)


def test_outputs_live_to_the_end() -> None:
    assert peaks(graph_of(lambda net, x: (net.c(x), net.d(net.c(x))))) == (1536, 1536)
    assert peaks(graph_of(lambda net, x: (x, net.c(x).sum()))) == (708, 708)


def test_a_network_that_computes_nothing_needs_nothing() -> None:
    assert peaks(graph_of(lambda net, x: x)) == (0, 0)


def test_a_lookup_reads_rows_and_a_new_tensor_is_made_of_nothing() -> None:
    index = torch.tensor([1, 2])
    graph = graph_of(lambda net, x: net.p[index] + torch.zeros_like(net.p[:2]))
    reads = dict(zip((op.kind for op in graph.ops), access_bytes(graph), strict=True))
    assert reads["index"] == 2 * 64 + 2 * 8 + 2 * 64, "of the table two rows of eight, the index, and what is written"
    assert reads["zeros_like"] == 2 * 64


def test_the_parts_of_complex_numbers_are_views() -> None:
    graph = graph_of(lambda net, x: torch.fft.fft(x).real + 1)
    assert access_bytes(graph) == [192 + 384, 0, 192 + 192]


# ---------------------------------------------------------------- what is alive, and the arena


def test_the_peak_says_what_is_alive_there() -> None:
    def block(net: Any, x: Tensor) -> Tensor:
        return net.d(net.c(x)).sum() + x

    peak = peak_bytes(graph_of(block))
    assert (peak.op, peak.bytes) == ("d", 192 + 1024)
    assert peak.alive == (Alive("c", (1, 8, 4, 4), 512), Alive("d", (1, 8, 4, 4), 512), Alive("x", (1, 3, 4, 4), 192))


def test_the_timeline_is_what_is_alive_during_each_op() -> None:
    graph = graph_of(lambda net, x: net.d(net.c(x).relu()).sum())
    assert [op.kind for op in graph.ops] == ["conv2d", "relu", "conv2d", "sum"]
    assert timeline(lifetimes(graph), 4) == [192 + 512, 512, 1024, 512 + 4]
    assert timeline(lifetimes(graph, folded=False), 4) == [192 + 512, 1024, 1024, 512 + 4]


def test_an_arena_by_hand() -> None:
    """The largest lies first; what does not overlap it in time takes its place; the smallest gap that fits is taken."""
    assert arena_bytes([]) == 0
    assert arena_bytes([Lifetime("a", 8, 0, 1), Lifetime("b", 4, 1, 2), Lifetime("c", 8, 2, 3)]) == 12
    held = [Lifetime("a", 10, 0, 3), Lifetime("b", 6, 0, 1), Lifetime("c", 5, 0, 3), Lifetime("d", 4, 2, 3)]
    assert arena_bytes(held) == 21, "d lies where b was, between a and c"
    assert max(timeline(held, 4)) == 21


def test_an_arena_may_need_more_than_the_peak() -> None:
    """a lies at 0 and d behind it, at 5; b takes a's place up to 4, and c does not fit between b and d."""
    held = [Lifetime("a", 5, 2, 2), Lifetime("d", 4, 2, 5), Lifetime("b", 4, 4, 6), Lifetime("c", 2, 3, 4)]
    assert (max(timeline(held, 7)), arena_bytes(held)) == (10, 11)


lives = st.builds(
    lambda bytes, first, length: Lifetime("", bytes, first, first + length),
    st.integers(1, 50), st.integers(0, 12), st.integers(0, 6),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(held=st.lists(lives, max_size=25))
def test_an_arena_holds_the_peak_and_no_more_than_everything(held: list[Lifetime]) -> None:
    peak, arena = max(timeline(held, 20)), arena_bytes(held)
    assert peak <= arena <= sum(life.bytes for life in held)
    assert timeline(held, 20) == [sum(x.bytes for x in held if x.first <= i <= x.last) for i in range(20)]


@settings(max_examples=20, deadline=None)
@given(plan=st.lists(st.sampled_from(["c", "relu", "residual", "cat", "pool"]), max_size=6))
def test_the_arena_of_a_network_holds_its_peak(plan: list[str]) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.c(x)
        for step in plan:
            if step == "residual":
                x = x + net.d(x[:, :8].relu()).mean()
            elif step == "cat":
                x = torch.cat([x, x.relu()], 1)
            else:
                x = {"c": lambda x: net.d(x[:, :8]), "relu": torch.relu, "pool": lambda x: x.amax(1, True) + x}[step](x)
        return x

    graph = graph_of(forward)
    for folded in (True, False):
        held = lifetimes(graph, folded)
        assert arena_bytes(held) >= peak_bytes(graph, folded).bytes == max(timeline(held, len(graph.ops)))
