"""The training loop, as a generator: `for step in steps(state, data): ...`. The caller owns it.

Between two yields the caller may log, prune, save or stop. What a step does depends only on (seed, step number):
the order of the data, augmentation and dropout follow from it, so that a run continues exactly from its state.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from aerogel.data import Batch, Dataset, batches
from aerogel.errors import AerogelError, Interrupted
from aerogel.train.interrupt import Signals
from aerogel.train.objective import Objective
from aerogel.train.recipe import Recipe, learning_rate


@dataclass(frozen=True)
class Step:
    """What one step did. seconds: since the step before."""

    number: int  # from 1
    total: int
    epoch: float
    losses: dict[str, float]
    lr: float
    seconds: float


@dataclass
class State:
    """All that training changes. `average` holds the averaged weights when the recipe asks for them."""

    model: nn.Module
    objective: Objective
    recipe: Recipe
    steps_per_epoch: int
    step: int = 0
    optimizer: torch.optim.Optimizer = field(init=False)
    average: nn.Module | None = None

    def __post_init__(self) -> None:
        self.optimizer = _optimizer(self.model, self.objective, self.recipe)
        if self.recipe.ema is not None:
            self.average = copy.deepcopy(self.model).eval()

    @property
    def total(self) -> int:
        return max(1, round(self.recipe.epochs * self.steps_per_epoch))

    @property
    def result(self) -> nn.Module:
        return self.average if self.average is not None else self.model


def start(model: nn.Module, objective: Objective, data: Dataset, recipe: Recipe) -> State:
    """The state before the first step."""
    if not any(p.requires_grad for p in model.parameters()):
        raise AerogelError(
            f"train: {type(model).__name__} has no parameter that requires a gradient; unfreeze some"
        )
    return State(model, objective, recipe, max(1, len(data.train) // batch_size(data, recipe)))


def batch_size(data: Dataset, recipe: Recipe) -> int:
    return min(recipe.batch_size, len(data.train))


def steps(state: State, data: Dataset) -> Iterator[Step]:
    """Trains `state.model` in place from `state.step` to the end, one optimizer step a yield.

    Raises AerogelError at the first loss that is not finite, before it reaches the weights.
    """
    recipe, per_epoch = state.recipe, state.steps_per_epoch
    augment = data.augment if recipe.augment is None else recipe.augment
    before = time.perf_counter()
    while state.step < state.total:
        epoch, position = divmod(state.step, per_epoch)
        epoch_batches = batches(
            data, "train", batch_size(data, recipe), seed=recipe.seed, epoch=epoch, shuffle=True,
            augment=augment, drop_last=True, start=position,
        )  # fmt: skip
        for batch in epoch_batches:
            lr = learning_rate(recipe, state.step, state.total, per_epoch)
            losses = _update(state, batch, lr)
            state.step += 1
            now = time.perf_counter()
            yield Step(state.step, state.total, state.step / per_epoch, losses, lr, now - before)
            before = time.perf_counter()
            if state.step >= state.total:
                break
    state.model.eval()


def fit(
    state: State,
    data: Dataset,
    *,
    on_step: Callable[[Step], None] | None = None,
    save: Callable[[State], Path] | None = None,
    every_seconds: float = 60.0,
    signals: Signals | None = None,
) -> nn.Module:
    """Drains `steps`, saving at intervals and when a signal comes. Returns the trained network, in eval mode.

    Raises Interrupted once the state is saved, when `signals` caught one.
    """
    saved_at = time.monotonic()
    for step in steps(state, data):
        if on_step:
            on_step(step)
        stopped = signals.caught if signals else None
        if save and (stopped or time.monotonic() - saved_at > every_seconds) and step.number < step.total:
            save(state)
            saved_at = time.monotonic()
        if stopped:
            raise Interrupted(stopped)
    return state.result.eval()


def _update(state: State, batch: Batch, lr: float) -> dict[str, float]:
    """One optimizer step. Randomness (dropout, the objective's own) comes from (seed, step) alone."""
    recipe, model = state.recipe, state.model
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed * 1_000_003 + state.step)
        model.train()
        with _autocast(recipe):
            losses = state.objective(model, batch)
        loss = torch.stack(list(losses.values())).sum()
        values = {name: value.item() for name, value in losses.items()}
        if not all(map(math.isfinite, values.values())):
            raise AerogelError(
                f"train: the loss is not finite at step {state.step + 1} ({values}); lower --lr (now {recipe.lr:g})"
            )
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        state.optimizer.step()
    if state.average is not None:
        assert recipe.ema is not None
        update_average(state.average, model, recipe.ema, state.step)
    return values


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """average = d * average + (1 - d) * model, with d grown over the first steps; norm statistics are copied."""
    decay = min(decay, (1 + step) / (10 + step))
    for mean, now in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(now, 1 - decay)
    for kept, now in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(now)


def _optimizer(model: nn.Module, objective: Objective, recipe: Recipe) -> torch.optim.Optimizer:
    own = list(objective.parameters()) if isinstance(objective, nn.Module) else []
    trained = [p for p in [*model.parameters(), *own] if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def _autocast(recipe: Recipe) -> contextlib.AbstractContextManager[object]:
    if recipe.autocast == "none":
        return contextlib.nullcontext()
    return torch.autocast("cpu", torch.bfloat16)


def optimizer_tensors(state: State) -> dict[str, Tensor]:
    """The optimizer's memory as named tensors: "3.momentum_buffer"."""
    memory = state.optimizer.state_dict()["state"]
    return {f"{i}.{k}": v for i, slots in memory.items() for k, v in slots.items() if isinstance(v, Tensor)}


def restore_optimizer(state: State, tensors: dict[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave."""
    memory: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, slot = name.split(".", 1)
        memory.setdefault(int(index), {})[slot] = tensor
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": memory})
