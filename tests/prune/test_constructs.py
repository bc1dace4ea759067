"""Every construct that a real network holds, one small network each: it is cut, exactly, and stays a network.

`Case.cut` names layers that must lose channels: a network that came out whole would prove nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference import masked
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from aerogel.errors import CutError
from aerogel.graph import capture
from aerogel.prune import Cut, cut
from aerogel.prune.coupling import couple
from aerogel.prune.proof import prove_inexact

IMAGE = (2, 3, 8, 8)
WORDS = (2, 6, 12)  # batch, tokens, width


class Body(nn.Module):
    """Whatever `forward` does with these modules, parameters and numbers."""

    def __init__(self, forward: Callable[..., Any], **held: Any) -> None:
        super().__init__()
        self._does = forward
        for name, value in held.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return self._does(self, *args, **kwargs)


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    cut: tuple[str, ...]
    shape: tuple[int, ...] = IMAGE
    options: tuple[tuple[str, Any], ...] = ()
    keep: float = 0.5


def around(middle: Callable[[Any, Tensor], Tensor], out: int = 8, **held: Any) -> Callable[[], nn.Module]:
    """conv a (3 -> 8), the middle, conv b (`out` -> 4), mean over pixels."""

    def build() -> nn.Module:
        def forward(net: Any, x: Tensor) -> Tensor:
            return net.b(middle(net, net.a(x))).mean((2, 3))

        modules = {name: value() if isinstance(value, type(lambda: 0)) else value for name, value in held.items()}
        return Body(forward, a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(out, 4, 1), **modules)

    return build


def words(forward: Callable[..., Any], **held: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: Body(forward, **{name: value() for name, value in held.items()})


def _literal_split(net: Any, x: Tensor) -> Tensor:
    first, second = x.split(net.sizes, 1)
    return torch.cat([net.c(first), net.d(second)], 1)


def _stacked(net: Any, x: Tensor) -> Tensor:
    one, other = torch.stack([x, net.c(x)], 1).unbind(1)
    return one + other.sigmoid()


def _shuffled_pixels(net: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


def _shuffled_by_hand(net: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def _interleaved(net: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return torch.stack([x, net.c(x)], 2).view(n, 2 * c, h, w)


IMAGES: dict[str, Case] = {
    "equal chunks": Case(around(lambda net, x: torch.cat([net.c(x.chunk(2, 1)[0]), x.chunk(2, 1)[1]], 1),
                                c=lambda: nn.Conv2d(4, 4, 1)), ("a", "c")),
    "split by a number that the module holds": Case(
        around(_literal_split, c=lambda: nn.Conv2d(3, 3, 1), d=lambda: nn.Conv2d(5, 5, 1), sizes=[3, 5]), ("c", "d"),
        keep=0.6),
    "halves by slices": Case(around(lambda net, x: x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :], 4), ("a",)),
    "the first h channels": Case(around(lambda net, x: torch.cat([net.c(x[:, : net.h]), x[:, net.h :]], 1),
                                        c=lambda: nn.Conv2d(3, 3, 1), h=3), ("a",)),
    "every second channel": Case(around(lambda net, x: x[:, ::2] + x[:, 1::2], 4), ("a",)),
    "cat with the input": Case(lambda: Body(lambda net, x: net.b(torch.cat([x, net.a(x)], 1)).mean((2, 3)),
                                            a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(11, 4, 1)), ("a",)),
    "cat of the same twice": Case(around(lambda net, x: torch.cat([x, x], 1), 16), ("a",)),
    "cat before flatten and linear": Case(
        lambda: Body(lambda net, x: net.f(torch.cat([net.a(x), net.c(x)], 1).flatten(1)), a=nn.Conv2d(3, 8, 3, 4),
                     c=nn.Conv2d(3, 6, 3, 4), f=nn.Linear(14 * 4, 5)), ("a", "c")),
    "shuffle by hand": Case(around(_shuffled_by_hand), ("a",)),
    "shuffle": Case(around(lambda net, x: net.s(x), s=lambda: nn.ChannelShuffle(2)), ("a",)),
    "pixel shuffle": Case(around(lambda net, x: net.s(x), 2, s=lambda: nn.PixelShuffle(2)), ("a",)),
    "pixel shuffle by hand": Case(
        lambda: Body(lambda net, x: net.b(_shuffled_pixels(net, net.a(x))), a=nn.Conv2d(3, 16, 1),
                     b=nn.Conv2d(4, 2, 1)),
        ("a",)),
    "pixel unshuffle": Case(around(lambda net, x: net.s(x), 32, s=lambda: nn.PixelUnshuffle(2)), ("a",)),
    "padded channels": Case(around(lambda net, x: F.pad(x, (0, 0, 0, 0, 2, 1)), 11), ("a",)),
    "stack and unbind": Case(around(_stacked, c=lambda: nn.Conv2d(8, 8, 1)), ("a", "c")),
    "interleaving view": Case(around(_interleaved, 16, c=lambda: nn.Conv2d(8, 8, 1)), ("a", "c")),
    "expanded gate": Case(around(lambda net, x: x * net.c(x).sigmoid().expand_as(x), c=lambda: nn.Conv2d(8, 1, 1)),
                          ("a",)),
    "one-channel gate": Case(around(lambda net, x: x * net.c(x).sigmoid(), c=lambda: nn.Conv2d(8, 1, 1)), ("a",)),
    "cyclic shift": Case(around(lambda net, x: torch.roll(x, (1, -1), (2, 3)) + x.flip(3)), ("a",)),
    "repeated channels": Case(around(lambda net, x: x.repeat_interleave(2, 1), 16), ("a",)),
    "grouped, other width": Case(around(lambda net, x: net.c(x), 12, c=lambda: nn.Conv2d(8, 12, 3, groups=4)),
                                 ("a", "c")),
    "depthwise, multiplier 2": Case(around(lambda net, x: net.c(x), 16, c=lambda: nn.Conv2d(8, 16, 3, groups=8)),
                                    ("a", "c")),
    "transposed": Case(around(lambda net, x: net.c(x), 6, c=lambda: nn.ConvTranspose2d(8, 6, 2, 2)), ("a", "c")),
    "transposed, grouped": Case(around(lambda net, x: net.c(x), 12,
                                       c=lambda: nn.ConvTranspose2d(8, 12, 2, 2, groups=2)), ("a", "c")),
    "transposed, depthwise": Case(around(lambda net, x: net.c(x), 16,
                                         c=lambda: nn.ConvTranspose2d(8, 16, 2, 2, groups=8)), ("a", "c")),
    "prelu": Case(around(lambda net, x: net.p(x), p=lambda: nn.PReLU(8)), ("a",)),
    "group norm": Case(around(lambda net, x: net.n(x), n=lambda: nn.GroupNorm(4, 8)), ("a",)),
    "instance norm": Case(around(lambda net, x: net.n(x), n=lambda: nn.InstanceNorm2d(8, affine=True)), ("a",)),
    "layer scale": Case(around(lambda net, x: x + net.scale * net.c(x), c=lambda: nn.Conv2d(8, 8, 1),
                               scale=nn.Parameter(torch.ones(8, 1, 1))), ("a", "c")),
    "glu": Case(around(lambda net, x: F.glu(x, 1), 4), ("a",)),
    "normalised to length 1": Case(around(lambda net, x: F.normalize(x, dim=1)), ("a",)),
    "weight norm": Case(around(lambda net, x: net.c(x), c=lambda: weight_norm(nn.Conv2d(8, 8, 3))), ("a", "c")),
    "scaled weight": Case(around(lambda net, x: F.conv2d(x, net.w * 0.5), 6, w=nn.Parameter(torch.ones(6, 8, 1, 1))),
                          ("a",)),
    "frozen batch norm": Case(
        around(lambda net, x: x * (net.w * (net.v + 1e-5).rsqrt()).reshape(1, -1, 1, 1) + net.s.reshape(1, -1, 1, 1),
               w=nn.Buffer(torch.rand(8) + 0.5), v=nn.Buffer(torch.rand(8) + 0.5), s=nn.Buffer(torch.rand(8))),
        ("a",)),
    "convolutions in one dimension": Case(
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=2),
                              nn.AvgPool1d(2), nn.Conv1d(8, 4, 1)), ("0", "3"), (2, 3, 12)),
    "convolutions in three": Case(
        lambda: nn.Sequential(nn.Conv3d(3, 8, 2), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(8, 4, 1)),
        ("0",), (2, 3, 4, 4, 4)),
}  # fmt: skip


# ---------------------------------------------------------------- words


class Attention(nn.Module):
    """Self-attention in the ways that people write it. heads and width are held as numbers."""

    def __init__(self, heads: int = 4, width: int = 5, kv: int = 4, fused: bool = False, sdpa: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.kv_heads = heads, width, kv
        self.scale = width**-0.5
        self.fused, self.sdpa = fused, sdpa
        if fused:
            self.qkv = nn.Linear(12, 3 * heads * width)
        else:
            self.q, self.k, self.v = (nn.Linear(12, h * width) for h in (heads, kv, kv))
        self.out = nn.Linear(heads * width, 12)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).view(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        else:
            q = self.q(x).view(n, t, self.num_heads, self.head_dim).transpose(1, 2)
            k, v = (f(x).view(n, t, self.kv_heads, self.head_dim).transpose(1, 2) for f in (self.k, self.v))
        if q.shape[1] != k.shape[1]:
            times = self.num_heads // self.kv_heads
            k, v = (y.repeat_interleave(times, dim=1) for y in (k, v))
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(n, t, self.num_heads * self.head_dim))


class Mixer(nn.Module):
    """MLP-Mixer's block: a perceptron over the tokens, another over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 10)
        self.tokens = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))
        self.channels = nn.Sequential(nn.Linear(10, 14), nn.GELU(), nn.Linear(14, 10))
        self.out = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.out(x + self.channels(x))


class Windows(nn.Module):
    """Cyclic shift, windows, patch merging, as Swin writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)
        self.merge, self.out = nn.Linear(32, 10, bias=False), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        shifted = torch.roll(x, (-1, -1), (1, 2)).view(n, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 16, c)
        mixed = self.mix(shifted).view(n, h // 4, w // 4, 4, 4, -1).transpose(2, 3).reshape(n, h, w, c)
        x = x + torch.roll(mixed, (1, 1), (1, 2))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.out(F.relu(self.merge(torch.cat(corners, -1)))).mean((1, 2))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.into = nn.Linear(12, 7)
        self.layer = kind(7, 6, batch_first=True, **options)
        self.out = nn.Linear(12 if options.get("bidirectional") else 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.into(x).relu())[0])


class Tied(nn.Module):
    """Words in, words out, by one table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 11)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(self.table(x.round().long().clamp(0, 10)[..., 0])))


MODELS: dict[str, Case] = {
    "attention": Case(Attention, ("q", "k", "v"), WORDS),
    "attention, its widths": Case(Attention, ("q", "k", "v"), WORDS, (("heads", "width"),)),
    "attention, fused": Case(lambda: Attention(fused=True), ("qkv",), WORDS),
    "attention, fused, its widths": Case(lambda: Attention(fused=True), ("qkv",), WORDS, (("heads", "width"),)),
    "attention, as many heads as each is wide": Case(lambda: Attention(width=4), ("q", "k", "v"), WORDS),
    "attention of torch": Case(lambda: Attention(sdpa=True), ("q", "k", "v"), WORDS),
    "attention, shared keys": Case(lambda: Attention(kv=2), ("q", "k", "v"), WORDS),
    "nn.MultiheadAttention": Case(
        words(lambda net, x: net.out(net.layer(*[net.into(x)] * 3, need_weights=False)[0]),
              into=lambda: nn.Linear(12, 8), layer=lambda: nn.MultiheadAttention(8, 4, batch_first=True),
              out=lambda: nn.Linear(8, 3)), ("into",), WORDS),
    "mixer": Case(Mixer, ("tokens.0", "channels.0", "inner"), WORDS),
    "windows": Case(Windows, ("embed", "mix", "merge")),
    "lstm": Case(lambda: Recurrent(nn.LSTM), ("into", "layer"), WORDS),
    "lstm, two layers, both ways": Case(lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
                                        ("into", "layer"), WORDS),
    "gru": Case(lambda: Recurrent(nn.GRU), ("into", "layer"), WORDS),
    "tied table": Case(Tied, ("inner",), WORDS),
    "bare matrices": Case(
        words(lambda net, x: (x @ net.w + net.s).relu() @ net.u, w=lambda: nn.Parameter(torch.randn(12, 8)),
              s=lambda: nn.Parameter(torch.randn(8)), u=lambda: nn.Parameter(torch.randn(8, 3))), ("w",), WORDS),
    "einsum": Case(
        words(lambda net, x: torch.einsum("btc,oc->bto", torch.einsum("btc,cd->btd", x, net.w).relu(), net.u),
              w=lambda: nn.Parameter(torch.randn(12, 8)), u=lambda: nn.Parameter(torch.randn(3, 8))), ("w",), WORDS),
    "class token and positions": Case(
        words(lambda net, x: net.out(torch.cat([net.cls.expand(x.shape[0], -1, -1), net.into(x)], 1) + net.pos),
              into=lambda: nn.Linear(12, 8), cls=lambda: nn.Parameter(torch.randn(1, 1, 8)),
              pos=lambda: nn.Parameter(torch.randn(1, 7, 8)), out=lambda: nn.Linear(8, 3)), ("into",), WORDS),
}  # fmt: skip
CASES = IMAGES | MODELS


def built(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.build()


def done(case: Case, net: nn.Module, keep: float, **options: Any) -> Cut:
    given = dict(case.options) | options
    return cut(net, (torch.zeros(case.shape),), target={"channels": keep}, ranking="local", **given)


def width(net: nn.Module, name: str) -> int:
    """Of a layer, all its weights counted: whatever loses channels has fewer."""
    held = getattr(net, name, None)
    return held.numel() if isinstance(held, Tensor) else sum(p.numel() for p in net.get_submodule(name).parameters())


@pytest.mark.parametrize("name", CASES)
def test_it_is_cut_exactly(name: str) -> None:
    case = CASES[name]
    net = built(case)
    made = done(case, net, case.keep)
    assert made.max_error <= 1e-4
    assert made.difference == 0.0
    for layer in case.cut:
        assert width(made.model, layer) < width(net, layer), (layer, made.frozen)
    torch.manual_seed(1)
    x = torch.randn(case.shape)
    whole, less = masked(net, made.kept).eval()(x), made.model.eval()(x)
    assert less.shape == whole.shape
    assert (whole - less).abs().max() <= 1e-4 * whole.abs().max()
    assert whole.std() > 0, "a constant would show nothing"


@pytest.mark.parametrize("name", CASES)
def test_it_trains_and_is_cut_again(name: str) -> None:
    case = CASES[name]
    first = done(case, built(case), max(case.keep, 0.7))
    net = first.model.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    net(torch.randn(case.shape)).square().mean().backward()
    optimizer.step()
    left = couple(capture(net, (torch.zeros(case.shape),)), whole_heads="heads" not in dict(case.options))
    if not any(len(group) > 1 for group in left.groups):
        return  # one unit is left everywhere
    second = done(case, net, max(0.8, len(left.groups) / sum(map(len, left.groups))))
    assert second.max_error <= 1e-4
    capture(copy.deepcopy(second.model), (torch.zeros(case.shape),))


# ---------------------------------------------------------------- what modules hold


def test_numbers_of_heads_follow() -> None:
    made = done(CASES["attention"], built(CASES["attention"]), 0.5)
    net = made.model
    assert (net.num_heads, net.head_dim, net.kv_heads, net.scale) == (2, 5, 2, 5**-0.5)
    assert net.q.out_features == net.v.out_features == net.out.in_features == 10


def test_numbers_of_widths_follow_and_the_scale_stays() -> None:
    made = done(CASES["attention, its widths"], built(CASES["attention, its widths"]), 0.5)
    net = made.model
    assert net.num_heads == 4
    assert net.head_dim < 5
    assert net.scale == 5**-0.5
    assert net.q.out_features == 4 * net.head_dim


def test_of_two_equal_numbers_the_right_one_follows() -> None:
    name = "attention, as many heads as each is wide"
    net = done(CASES[name], built(CASES[name]), 0.5).model
    assert (net.num_heads, net.head_dim) == (2, 4)


def test_heads_that_share_keys_go_with_them() -> None:
    net = done(CASES["attention, shared keys"], built(CASES["attention, shared keys"]), 0.5).model
    assert (net.num_heads, net.kv_heads) == (2, 1)


def test_sizes_held_in_a_list_follow() -> None:
    name = "split by a number that the module holds"
    net = done(CASES[name], built(CASES[name]), 0.6).model
    assert net.sizes == [net.c.in_channels, net.d.in_channels]
    assert sum(net.sizes) < 8


def test_attributes_of_torchs_modules_follow() -> None:
    for name, layer, attribute, size in [
        ("group norm", "n", "num_groups", "num_channels"),
        ("prelu", "p", "num_parameters", "num_parameters"),
        ("lstm", "layer", "hidden_size", "hidden_size"),
        ("transposed, depthwise", "c", "groups", "in_channels"),
        ("nn.MultiheadAttention", "layer", "num_heads", "embed_dim"),
    ]:
        before = built(CASES[name])
        after = done(CASES[name], copy.deepcopy(before), 0.5).model
        old, new = before.get_submodule(layer), after.get_submodule(layer)
        assert 0 < getattr(new, attribute) < getattr(old, attribute), name
        assert getattr(new, size) < getattr(old, size), name


def test_tied_tables_stay_tied() -> None:
    made = done(CASES["tied table"], built(CASES["tied table"]), 0.5)
    assert made.model.out.weight is made.model.table.weight
    assert made.model.table.embedding_dim == made.model.out.in_features < 8


def test_a_width_that_the_scale_is_made_of_stays() -> None:
    net, x = Attention(sdpa=True), (torch.zeros(WORDS),)
    assert "only whole heads can go" in couple(capture(net, x), whole_heads=False).frozen["q.weight dim 0"]
    with pytest.raises(CutError, match="nothing can be cut"):
        cut(net, x, target={"channels": 0.9}, heads="width")


def test_several_inputs_and_a_dict_of_outputs() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c, self.b, self.d = nn.Linear(5, 8), nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 3)

        def forward(self, x: Tensor, y: Tensor, unused: Tensor) -> dict[str, Any]:
            z = (self.a(x) + self.c(y)).relu()
            return {"one": self.b(z), "more": (self.d(z), {"least": self.b(-z)})}

    torch.manual_seed(0)
    net = Several()
    given = (torch.zeros(2, 5), torch.zeros(2, 6), torch.zeros(2, 9))
    made = cut(net, given, target={"channels": 0.5})
    assert made.model.a.out_features == made.model.c.out_features == made.model.d.in_features == 4
    assert made.frozen["unused"] == "an input that nothing reads"


def test_frozen_weights_are_named_and_protected() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].requires_grad_(False)
    made = cut(net, (torch.zeros(2, 4),), target={"channels": 0.5})
    assert made.model[0].out_features == 8
    assert made.model[2].out_features < 8
    assert "requires_grad is False" in made.frozen["0"]
    net.requires_grad_(False)  # a network that is only used
    assert cut(net, (torch.zeros(2, 4),), target={"channels": 0.5}).model[0].out_features < 8


def test_a_branch_that_the_example_did_not_take_is_named() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.b(net.a(x)) if x.shape[0] < 100 else net.c(net.a(x))

    net = Body(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 2), c=nn.Linear(8, 2))
    made = cut(net, (torch.zeros(2, 4),), target={"channels": 0.5})
    assert made.frozen["c.weight"] == "no op of the example run reads it"


# ---------------------------------------------------------------- statistics


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.into, self.norm, self.out = nn.Linear(12, 8), norm, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.into(x)))


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(8),
    "rms norm": lambda: nn.RMSNorm(8),
    "rms norm by hand": ByHand,
    "softmax": lambda: nn.Softmax(-1),
    "group norm of one group": lambda: nn.Sequential(nn.Flatten(0, 1), nn.GroupNorm(1, 8), nn.Unflatten(0, (2, 6))),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_statistic_is_cut_only_where_that_is_allowed_and_then_proven_too(name: str) -> None:
    torch.manual_seed(0)
    net = Normed(NORMS[name]())
    x = (torch.zeros(WORDS),)
    with pytest.raises(CutError, match=r"1 more groups pass a statistic .*allow_inexact=True"):
        cut(net, x, target={"channels": 0.5})
    made = cut(net, x, target={"channels": 0.5}, allow_inexact=True)
    assert "takes a statistic over channels" in made.inexact["into"]
    assert made.model.into.out_features == made.model.out.in_features == 4
    assert made.max_error <= 1e-4 < made.difference < math.inf


def test_a_wrong_index_behind_a_statistic_is_seen() -> None:
    torch.manual_seed(0)
    net = Normed(nn.LayerNorm(8))
    made = cut(net, (torch.zeros(WORDS),), target={"channels": 0.5}, allow_inexact=True)
    kept = dict(made.kept)
    rows, columns = kept["out.weight"]
    assert columns is not None
    wrong = columns.clone()
    wrong[0] = next(i for i in range(8) if i not in columns)
    kept["out.weight"] = (rows, wrong.sort().values)
    error, problem, _ = prove_inexact(net, (torch.zeros(WORDS),), {}, kept)
    assert error > 1e-3
    assert "with the statistics held fixed" in str(problem)
