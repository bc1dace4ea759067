"""Random small networks made of every op that can be cut, and the independent reference their cuts are held to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from aerogel.prune import Cut, cut

SIDE = 8
IMAGE = torch.zeros(2, 3, SIDE, SIDE)
Kept = Mapping[str, tuple[Tensor | None, ...]]

# ---------------------------------------------------------------- blocks: forward(x (n, c, h, w), image) -> the same


class Plain(nn.Module):
    """A module that needs the features alone."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return self.layers(x)


class Sum(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return F.relu_(x + self.body(x))


class Product(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return x * self.body(x)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excite by linear layers, a view and, for the older way of writing it, expand_as."""

    def __init__(self, c: int, inner: int, expand: bool) -> None:
        super().__init__()
        self.squeeze, self.excite, self.expand = nn.Linear(c, inner), nn.Linear(inner, c), expand

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid()
        gate = gate.view(x.shape[0], x.shape[1], 1, 1)
        return x * (gate.expand_as(x) if self.expand else gate)


class OneChannelGate(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(c, 1, 1)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return x * self.gate(x).sigmoid()


class Scale(nn.Module):
    """A bare parameter and a bare buffer, one number a channel each."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(c, 1, 1))
        self.register_buffer("shift", torch.ones(1, c, 1, 1))

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Branches(nn.Module):
    def __init__(self, c: int, left: int, right: int) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(c, left, 1), nn.Conv2d(c, right, 3, padding=1)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return torch.cat([self.left(x), F.relu(self.right(x)), x], 1)


class WithImage(nn.Module):
    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return torch.cat([F.adaptive_avg_pool2d(image, x.shape[2:]), x], 1)


class Halves(nn.Module):
    """One half goes through a convolution, then both swap sides."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(c // 2, c // 2, 1)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat([second, self.body(first)], 1)


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2)
        return x.reshape(n, c, h, w)


class Twice(nn.Module):
    """One convolution applied twice, and another one that shares its weight."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return self.other(F.relu(self.one(F.relu(self.one(x)))))


class Drawn(nn.Module):
    """A stem, the blocks, and one or two heads."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module, other: nn.Module | None) -> None:
        super().__init__()
        self.stem, self.blocks, self.head, self.other = stem, nn.ModuleList(blocks), head, other

    def forward(self, image: Tensor) -> Any:
        x = self.stem(image)
        for block in self.blocks:
            x = block(x, image)
        y = self.head(x)
        return y if self.other is None else {"head": y, "other": self.other(x.mean((2, 3)))}


# ---------------------------------------------------------------- drawing

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardswish)


@st.composite
def _convolution(draw: st.DrawFn, c: int, side: int) -> tuple[nn.Module, int, int]:
    out = draw(st.integers(2, 8))
    groups = 1
    kind = draw(st.sampled_from(["plain", "1x1", "grouped", "depthwise"]))
    if kind == "depthwise":
        groups, out = c, c * draw(st.integers(1, 2))
    elif kind == "grouped":
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if c % g == 0]))
        out = groups * draw(st.integers(1, 4))
    kernel = 1 if kind == "1x1" else 3
    stride = draw(st.sampled_from([1, 2])) if side >= 4 else 1
    conv = nn.Conv2d(c, out, kernel, stride, kernel // 2, groups=groups, bias=draw(st.booleans()))
    return Plain(conv), out, -(-side // stride)


@st.composite
def _pool(draw: st.DrawFn, side: int) -> tuple[nn.Module, int]:
    pools = [(nn.AdaptiveAvgPool2d(2), 2), (nn.MaxPool2d(3, stride=1, padding=1), side)]
    if side >= 4:
        pools += [(nn.MaxPool2d(2), side // 2), (nn.AvgPool2d(2), side // 2)]
    pool, side = draw(st.sampled_from(pools))
    return Plain(pool), side


@st.composite
def _block(draw: st.DrawFn, c: int, side: int) -> tuple[nn.Module, int, int]:
    """(block, the channels and the side after it)."""
    groups = [g for g in (2, 3) if c % g == 0 and c // g >= g]
    kinds = ["conv", "conv", "norm", "act", "pool", "sum", "product", "se", "gate", "scale", "cat", "image", "twice"]
    kinds += ["dropout"] + ["halves"] * (c % 2 == 0) + ["shuffle"] * bool(groups)
    kind = draw(st.sampled_from(kinds))
    if kind == "conv":
        return draw(_convolution(c, side))
    if kind == "pool":
        pool, side = draw(_pool(side))
        return pool, c, side
    if kind == "cat":
        left, right = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        return Branches(c, left, right), left + right + c, side
    if kind == "image":
        return WithImage(), c + 3, side
    same = {
        "norm": lambda: Plain(nn.BatchNorm2d(c)),
        "act": lambda: Plain(draw(st.sampled_from(ACTIVATIONS))()),
        "sum": lambda: Sum(c),
        "product": lambda: Product(c),
        "se": lambda: SqueezeExcite(c, draw(st.integers(1, 4)), draw(st.booleans())),
        "gate": lambda: OneChannelGate(c),
        "scale": lambda: Scale(c),
        "dropout": lambda: Plain(nn.Dropout(0.5)),
        "halves": lambda: Halves(c),
        "shuffle": lambda: Shuffle(draw(st.sampled_from(groups))),
        "twice": lambda: Twice(c),
    }
    return same[kind](), c, side


@st.composite
def nets(draw: st.DrawFn) -> nn.Module:
    """A random network with random weights, for images like IMAGE."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    c, side = draw(st.integers(3, 8)), SIDE
    stem = nn.Conv2d(3, c, 3, padding=1)
    blocks = []
    for _ in range(draw(st.integers(1, 5))):
        block, c, side = draw(_block(c, side))
        blocks.append(block)
    if draw(st.booleans()):
        head = nn.Sequential(nn.Flatten(), nn.Linear(c * side * side, 5), nn.ReLU(), nn.Linear(5, 3))
    else:
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(c), nn.Linear(c, 3))
    net = Drawn(stem, blocks, head, nn.Linear(c, 2) if draw(st.booleans()) else None)
    randomise(net)
    for module in net.modules():
        module.training = draw(st.booleans()) if isinstance(module, nn.BatchNorm2d | Drawn) else True
    return net


def everything() -> nn.Module:
    """One network with every block, the same each time."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = [
        Plain(nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 6, 3, padding=1, bias=False)),
        Sum(6),
        SqueezeExcite(6, 3, expand=False),
        SqueezeExcite(6, 3, expand=True),
        OneChannelGate(6),
        Plain(nn.Conv2d(6, 12, 3, padding=1, groups=6), nn.Hardswish(), nn.MaxPool2d(2)),
        Plain(nn.Conv2d(12, 12, 1)),
        Shuffle(3),
        Plain(nn.Conv2d(12, 12, 1)),
        Halves(12),
        Plain(nn.Conv2d(12, 12, 1)),
        Scale(12),
        Plain(nn.Conv2d(12, 6, 3, padding=1, groups=3), nn.AvgPool2d(3, stride=1, padding=1)),
        Product(6),
        Branches(6, 3, 2),
        Twice(11),
        WithImage(),
        Plain(nn.Conv2d(14, 4, 1), nn.Sigmoid(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2)),
    ]
    head = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))
    net = Drawn(nn.Conv2d(3, 8, 3), blocks, head, nn.Linear(4, 2))
    randomise(net)
    return net


# ---------------------------------------------------------------- the reference


def randomise(net: nn.Module, keep: float = 1.0) -> None:
    """In place: random weights, biases, and norm statistics, scales and shifts; no value is 0 or 1.

    keep: the share of the channels that a cut will leave; weights are scaled so that the signal survives it.
    """
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim > 1 and tensor.shape[1:].numel() > 1:
                inputs = tensor[0].numel() * (keep if tensor.shape[1] > 3 else 1)
                tensor.normal_(std=math.sqrt(2 / max(inputs, 1)))
            elif tensor.is_floating_point():
                tensor.normal_(0.2, 0.3)
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.5)


def first_names(net: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor."""
    first: dict[int, str] = {}
    every = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in every}


def masked(net: nn.Module, kept: Kept) -> nn.Module:
    """A copy of the whole network, in eval mode, with everything that is not kept set to zero."""
    net = copy.deepcopy(net).eval()
    state = net.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, dims in kept.items():
            for dim, indices in enumerate(dims):
                if indices is not None:
                    mask = torch.zeros(state[name].shape[dim])
                    mask[indices] = 1
                    state[name].mul_(mask.view([-1 if d == dim else 1 for d in range(state[name].ndim)]))
    return net


def sliced_state(net: nn.Module, kept: Kept) -> dict[str, Tensor]:
    """The state of the network at the kept indices."""
    first, state = first_names(net), dict(net.state_dict())
    for name in state:
        for dim, indices in enumerate(kept.get(first[name], ())):
            if indices is not None:
                state[name] = state[name].index_select(dim, indices)
    return state


def leaves(output: Any) -> list[Tensor]:
    return list(output.values()) if isinstance(output, dict) else [output]


def compare(
    whole: nn.Module, cut: nn.Module, kept: Kept, shape: tuple[int, ...], keep: float, seeds: int
) -> list[bool]:
    """Asserts that cut and masked network agree, on random weights, norm statistics and inputs of each seed.

    Returns for each output whether it depended on the input with some seed: constants would show nothing.
    """
    whole, cut = copy.deepcopy(whole), copy.deepcopy(cut).eval()
    depends: list[bool] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        randomise(whole, keep)
        cut.load_state_dict(sliced_state(whole, kept))
        with torch.no_grad():
            x, reference = torch.randn(shape), masked(whole, kept)
            expected, other, got = leaves(reference(x)), leaves(reference(torch.randn(shape))), leaves(cut(x))
        for e, g in zip(expected, got, strict=True):
            assert e.shape == g.shape
            assert (e - g).abs().max() <= 1e-4 * e.abs().max()
        varies = [bool((e - o).abs().max() > 1e-3 * e.abs().max()) for e, o in zip(expected, other, strict=True)]
        depends = [any(pair) for pair in zip(varies, depends or varies, strict=True)]
    return depends


def assert_sliced(whole: nn.Module, cut: nn.Module, kept: Kept) -> None:
    """Asserts that every tensor of the cut network is the original's at the kept indices."""
    for dims in kept.values():
        assert all(k is None or torch.equal(k, k.unique()) for k in dims), "sorted, each once"
    expected, found = sliced_state(whole, kept), cut.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


# ---------------------------------------------------------------- one network around one op


class Around(nn.Module):
    """conv1, whatever the test is about, conv2, conv3, mean, linear."""

    def __init__(self, middle: Callable[[Around, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 2)
        self.plain = torch.rand(8, 1, 1)  # neither parameter nor buffer
        self.grid = nn.Parameter(torch.rand(6, 6))
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.middle(self, self.conv1(x)))
        return self.fc(self.conv3(x.relu()).mean((2, 3)))


def half(net: nn.Module, **options: Any) -> Cut:
    """A cut to half of what can be cut, checked against the masked network."""
    made = cut(net, (IMAGE,), target={"channels": 0.5}, **options)
    assert_sliced(net, made.model, made.kept)
    assert all(compare(net, made.model, made.kept, tuple(IMAGE.shape), keep=1, seeds=3))
    return made


def widths(net: nn.Module) -> dict[str, int]:
    return {name: module.out_channels for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
