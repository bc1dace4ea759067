"""Cut.apply_to: training goes on as that of the masked network would, number for number."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from strategies import IMAGE, Around, Kept, everything, leaves, nets, randomise, sliced_state
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from aerogel.errors import CutError
from aerogel.graph import capture, tensor_names
from aerogel.nets.blocks import Residual
from aerogel.prune import Cut, cut
from aerogel.prune.coupling import couple
from aerogel.prune.surgery import Origin

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=1e-2),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True, weight_decay=0.1),
    # a bias before a norm has no gradient but rounding: without the eps its root would be taken for a step
    "rmsprop centered": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True, eps=1e-4),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "adadelta": lambda p: torch.optim.Adadelta(p),
}
X = IMAGE.double()


def small() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Residual(body), nn.AvgPool2d(3), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(24, 5), nn.Linear(5, 2))
    randomise(net)
    return net


def gone(net: nn.Module, kept: Kept) -> dict[str, Tensor]:
    """Flags of what a cut removes, in the shapes of the whole network."""
    names = tensor_names(net)
    flags = {names[id(t)]: torch.zeros(t.shape, dtype=torch.bool) for t in (*net.parameters(), *net.buffers())}
    for name, dims in kept.items():
        for dim, indices in enumerate(dims):
            if indices is not None:
                lost = torch.ones(flags[name].shape[dim], dtype=torch.bool)
                lost[indices] = False
                flags[name].index_fill_(dim, lost.nonzero().flatten(), True)
    return flags


def step(net: nn.Module, optimizer: Optimizer, seed: int, flags: dict[str, Tensor] | None = None) -> None:
    """One step; in the masked network the gradients of what is removed are zero, and so are its weights after."""
    x = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    optimizer.zero_grad()
    sum((out - 1).square().mean() for out in leaves(net(x))).backward()
    removed = [(t, flags[n]) for n, t in net.named_parameters()] if flags else []
    for tensor, flag in removed:
        if tensor.grad is not None:
            tensor.grad[flag] = 0
    optimizer.step()
    for tensor, flag in removed:
        tensor.data[flag] = 0


def zero(net: nn.Module, flags: dict[str, Tensor]) -> None:
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        tensor.data[flags[name]] = 0


def agree(whole: nn.Module, small: nn.Module, kept: Kept) -> None:
    expected, found = sliced_state(whole, kept), small.state_dict()
    for name, tensor in expected.items():
        assert torch.allclose(tensor, found[name], rtol=1e-5, atol=1e-8), name


def trainable(net: nn.Module) -> nn.Module:
    """In float64; dropout draws by shape, so it is off."""
    net = net.double()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def share(net: nn.Module, keep: float) -> float | None:
    """`keep`, or what the last channel of every group is; None where nothing can be cut."""
    groups = couple(capture(net, (X,))).groups
    return max(keep, len(groups) / sum(map(len, groups))) if groups else None


def bounded(net: nn.Module) -> bool:
    """A product of its input with itself, and again, may diverge: rounding then parts the two networks."""
    return all(bool((weight.abs() < 1e6).all()) for weight in net.parameters())


def goes_on(net: nn.Module, make: Callable[[Any], Optimizer], keep: float, rounds: int = 2) -> bool:
    """Train, cut, train: the cut network's steps are those of the masked one; and once more from there. False where
    training diverges."""
    net = trainable(net)
    optimizer, average = make(net.parameters()), AveragedModel(net)
    for round_ in range(rounds):
        for i in range(3):
            step(net, optimizer, seed=100 * round_ + i)
            if not bounded(net):
                return False
            average.update_parameters(net)
        left = share(net, keep)
        if left is None:
            return True
        whole, whole_optimizer, whole_average = copy.deepcopy((net, optimizer, average))
        made = cut(net, (X,), target={"channels": left}, criterion="random")
        made.apply_to(optimizer, average)
        net, flags = made.model, gone(whole, made.kept)
        assert [id(p) for p in net.parameters()] == [id(p) for g in optimizer.param_groups for p in g["params"]]
        zero(whole, flags)
        zero(whole_average.module, flags)
        for i in range(4):
            step(whole, whole_optimizer, seed=i, flags=flags)
            step(net, optimizer, seed=i)
            if not bounded(whole):
                return False
            whole_average.update_parameters(whole)
            average.update_parameters(net)
            agree(whole, net, made.kept)
            agree(whole_average.module, average.module, made.kept)
    return True


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_the_masked_networks_would(name: str) -> None:
    assert goes_on(small(), OPTIMIZERS[name], keep=0.6, rounds=1)


def test_it_goes_on_again_from_there() -> None:
    assert goes_on(small(), OPTIMIZERS["adamw amsgrad"], keep=0.7, rounds=2)


def test_of_a_network_of_every_block_too() -> None:
    assert goes_on(everything(), OPTIMIZERS["adam"], keep=0.6, rounds=1)


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(net=nets(), name=st.sampled_from(list(OPTIMIZERS)), keep=st.floats(0.2, 0.9))
def test_of_random_networks_too(net: nn.Module, name: str, keep: float) -> None:
    assume(goes_on(net, OPTIMIZERS[name], keep, rounds=1))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(net=nets(), name=st.sampled_from(list(OPTIMIZERS)), keep=st.floats(0.2, 0.9))
def test_of_many_random_networks_too(net: nn.Module, name: str, keep: float) -> None:
    assume(goes_on(net, OPTIMIZERS[name], keep, rounds=2))


# ---------------------------------------------------------------- what is kept as it was


def around() -> nn.Module:
    return Around(lambda net, x: x).double()


def half(net: nn.Module) -> Cut:
    return cut(net, (X,), target={"channels": 0.5})


def test_without_surgery_training_goes_another_way() -> None:
    net = around()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    step(net, optimizer, seed=0)
    whole, whole_optimizer = copy.deepcopy((net, optimizer))
    made = half(net)
    flags = gone(whole, made.kept)
    zero(whole, flags)
    step(whole, whole_optimizer, seed=1, flags=flags)
    step(made.model, OPTIMIZERS["adam"](made.model.parameters()), seed=1)
    with pytest.raises(AssertionError):
        agree(whole, made.model, made.kept)


def test_groups_settings_and_strangers_keep_their_places() -> None:
    net, head = around(), nn.Linear(3, 3).double()
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "lr": 0.5}, {"params": [*head.parameters(), *vectors], "weight_decay": 0.25}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    made = half(net)
    made.apply_to(optimizer)
    first, second = optimizer.param_groups
    assert (first["lr"], second["lr"], second["weight_decay"]) == (0.5, 0.1, 0.25)
    new = list(made.model.parameters())
    assert [id(p) for p in first["params"]] == [id(p) for p in new if p.ndim > 1]
    assert [id(p) for p in second["params"]] == [id(p) for p in [*head.parameters(), *(p for p in new if p.ndim <= 1)]]


def test_the_numbers_that_an_averages_modules_hold_follow() -> None:
    net = around()
    net.middle = Halves()
    average = AveragedModel(net)
    made = cut(net, (X,), target={"channels": 0.5})
    made.apply_to(average)
    assert made.model.middle.width == average.module.middle.width < 4
    assert torch.equal(made.model(X + 1), average(X + 1))


class Halves(nn.Module):
    """Splits at a number that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4

    def forward(self, net: nn.Module, x: Tensor) -> Tensor:
        first, second = x[:, : self.width], x[:, self.width :]
        return torch.cat([second, first], 1)


def test_a_scheduler_goes_on() -> None:
    def rates(cut_after: int | None) -> list[float]:
        net = around()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=8)
        seen = []
        for i in range(8):
            step(net, optimizer, seed=i)
            if i == cut_after:
                made = half(net)
                made.apply_to(optimizer)
                net = made.model
            scheduler.step() if i < 7 else None
            seen.append(optimizer.param_groups[0]["lr"])
        return seen

    assert rates(3) == rates(None)


def test_a_gradient_that_waits_for_its_step_goes_along() -> None:
    net = around()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(X + 1).square().sum().backward()
    made = half(net)
    made.apply_to(optimizer)
    expected = net.conv1.weight.grad[made.kept["conv1.weight"][0]]
    assert torch.equal(made.model.conv1.weight.grad, expected)


def test_a_tied_parameter_stays_tied_and_stands_once() -> None:
    net = around()
    net.conv3 = nn.Conv2d(8, 8, 3).double()
    net.fc = nn.Linear(8, 2).double()
    net.conv3.weight = net.conv2.weight
    optimizer = torch.optim.Adam(net.parameters())
    step(net, optimizer, seed=0)
    made = half(net)
    made.apply_to(optimizer)
    step(made.model, optimizer, seed=1)
    assert made.model.conv3.weight is made.model.conv2.weight
    assert sum(p is made.model.conv2.weight for p in optimizer.param_groups[0]["params"]) == 1


def test_the_state_can_be_saved_and_put_back() -> None:
    net = around()
    optimizer = torch.optim.Adam(net.parameters())
    step(net, optimizer, seed=0)
    made = half(net)
    made.apply_to(optimizer)
    other = torch.optim.Adam(made.model.parameters())
    other.load_state_dict(optimizer.state_dict())
    for parameter in made.model.parameters():
        for entry, value in optimizer.state[parameter].items():
            assert torch.equal(value, other.state[parameter][entry])
            assert value.shape in (parameter.shape, ())


def test_the_network_before_is_not_kept_alive() -> None:
    net = around()
    made = half(net)
    assert all(ref() is not None for ref in made.origin.parameters.values())
    del net
    gc.collect()
    assert all(ref() is None for ref in made.origin.parameters.values())
    assert pickle.loads(pickle.dumps(made.origin)) == Origin({}, made.origin.shapes, made.origin.numbers)


# ---------------------------------------------------------------- what is refused, and leaves all as it was


class Rows(Optimizer):
    """Keeps one number a row, as Adafactor does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["row_var"] = p.detach().square().flatten(1).mean(1) if p.ndim > 1 else p.detach().clone()


def stepped(make: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """An optimizer with a memory."""

    def build(net: nn.Module) -> Any:
        optimizer = make(net)
        net(X + 1).square().sum().backward()
        optimizer.step(lambda: net(X).square().sum())
        return optimizer

    return build


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "another network's": (lambda net: torch.optim.SGD(around().parameters(), lr=0.1),
                          "SGD holds no parameter of the network that was cut; was it made for another network, or"),
    "rows": (stepped(lambda net: Rows([net.conv1.weight])),
             r"Rows keeps 'row_var' for conv1\.weight, of shape \(8,\), which is not one number a weight; make a new"),
    "history": (stepped(lambda net: torch.optim.LBFGS([p for n, p in net.named_parameters() if n != "grid"])),
                "LBFGS keeps .*which is not one number a weight"),
    "scheduler": (lambda net: torch.optim.lr_scheduler.StepLR(torch.optim.SGD(net.parameters(), lr=0.1), 1),
                  "takes optimizers and networks of the weights, got StepLR; a scheduler needs nothing"),
    "another shape": (lambda net: half(around()).model,
                      r"Around is no copy of the network that was cut: conv1\.weight must be of shape \(8, 3, 3, 3\)"),
    "another class": (lambda net: nn.Linear(2, 2), "Linear is no copy of .*is absent; give a copy made before the cut"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_along_is_refused_before_anything_changes(case: str) -> None:
    build, message = REFUSED[case]
    net = around()
    good = torch.optim.SGD(net.parameters(), lr=0.1)
    holder = build(net)
    made = half(net)
    with pytest.raises(CutError, match=f"apply_to: {message}"):
        made.apply_to(good, holder)
    assert [id(p) for p in good.param_groups[0]["params"]] == [id(p) for p in net.parameters()]


def test_twice_is_refused_and_so_is_nothing() -> None:
    net = around()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    made = half(net)
    made.apply_to(optimizer)
    with pytest.raises(CutError, match="or cut along already"):
        made.apply_to(optimizer)
    with pytest.raises(CutError, match="apply_to: give what is to be cut along"):
        made.apply_to()
