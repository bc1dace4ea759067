"""The training loop, as a generator: `for step in steps(state, data): ...`. The caller owns it.

Between two yields the caller may log, mask weights, save or stop. What a step does depends only on (seed, step):
the order of the data, augmentation and dropout follow from it, so that a run continues exactly from its state.
PyTorch's global random state is the caller's own: a step leaves it as it was.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from aerogel.data import Batch, Dataset, batches
from aerogel.errors import AerogelError, Interrupted
from aerogel.graph import evaluating
from aerogel.train.interrupt import Signals
from aerogel.train.objective import Objective
from aerogel.train.recipe import Recipe, learning_rate


@dataclass(frozen=True)
class Step:
    """What one step did. seconds: of the step with its batch, without what the caller did in between."""

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
    channels_last: bool = False  # the order in memory of images and convolutions
    optimizer: torch.optim.Optimizer = field(init=False)
    average: nn.Module | None = field(init=False, default=None)

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
    """The state before the first step. Raises AerogelError when nothing in the model can be trained."""
    if not any(p.requires_grad for p in model.parameters()):
        raise AerogelError(f"train: {type(model).__name__} has no parameter that requires a gradient; unfreeze some")
    per_epoch = len(data.train) // batch_size(data, recipe)
    return State(model, objective, recipe, per_epoch, channels_last=_try_channels_last(model, objective, data, recipe))


def _try_channels_last(model: nn.Module, objective: Objective, data: Dataset, recipe: Recipe) -> bool:
    """Convolutions on a CPU train about 1.5 times as fast; a network that flattens with `view` refuses it."""
    if not any(weight.ndim == 4 for weight in model.parameters()):
        return False
    lay_out(model, torch.channels_last)
    batch = next(batches(data, "train", min(2, len(data.train))))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(model), _autocast(recipe):
            objective(model, _channels_last(batch))
    except RuntimeError:
        lay_out(model, torch.contiguous_format)
        return False
    return True


def lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Puts four-dimensional weights into this order in memory, in place."""
    for weight in model.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=memory_format)


def _channels_last(batch: Batch) -> Batch:
    return batch._replace(inputs=batch.inputs.contiguous(memory_format=torch.channels_last))


def batch_size(data: Dataset, recipe: Recipe) -> int:
    """The recipe's, or the whole split when that is smaller. The last, incomplete batch of an epoch is left out."""
    return min(recipe.batch_size, len(data.train))


def steps(state: State, data: Dataset) -> Iterator[Step]:
    """Trains `state.model` in place from `state.step` to the end, one optimizer step a yield; then sets eval mode.

    Raises AerogelError at the first loss or gradient that is not finite, before it reaches the weights.
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
            losses = _update(state, _channels_last(batch) if state.channels_last else batch, lr)
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
    until: int | None = None,
) -> nn.Module:
    """Drains `steps`, saving at intervals and when a signal comes. Returns the trained network, in eval mode.

    until: the step after which to pause; None trains to the end. The state goes on from there when it is fitted again.
    Raises Interrupted once the state is saved, when `signals` caught one.
    """
    saved_at = time.monotonic()
    last = state.total if until is None else until
    for step in islice(steps(state, data), max(0, last - state.step)):
        if on_step:
            on_step(step)
        if step.number == last:
            continue  # nothing is left to save or to stop
        stopped = signals.caught if signals else None
        if save and (stopped is not None or time.monotonic() - saved_at > every_seconds):
            save(state)
            saved_at = time.monotonic()
        if stopped is not None:
            raise Interrupted(stopped)
    if state.step >= state.total:
        lay_out(state.result, torch.contiguous_format)
    return state.result.eval()


def _update(state: State, batch: Batch, lr: float) -> dict[str, float]:
    """One optimizer step. Randomness (dropout, the objective's own) comes from (seed, step) alone."""
    recipe, optimizer = state.recipe, state.optimizer
    for group in optimizer.param_groups:
        group["lr"] = lr
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_seed(recipe.seed, state.step))  # and no other device's
        state.model.train()
        with _autocast(recipe):
            losses = state.objective(state.model, batch)
        _check_scalars(losses)
        values = {name: value.item() for name, value in losses.items()}
        _check_finite("loss", values, state)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        _check_finite("gradient", {"norm": norm.item()}, state)
        if recipe.clip is not None:
            nn.utils.clip_grads_with_norm_(weights, recipe.clip, norm)
        optimizer.step()
    if state.average is not None and recipe.ema is not None:
        update_average(state.average, state.model, recipe.ema, state.step)
    return values


def _seed(seed: int, step: int) -> int:
    """Independent streams for different (seed, step); the data's are of three numbers, so they are others."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])


def _check_scalars(losses: dict[str, Tensor]) -> None:
    if not losses:
        raise AerogelError("train: the objective must return at least one named loss, got none")
    for name, value in losses.items():
        if value.ndim:
            raise AerogelError(
                f"train: loss {name!r} must be one number, got shape {tuple(value.shape)}; take its mean"
            )


def _check_finite(what: str, values: dict[str, float], state: State) -> None:
    if not all(map(math.isfinite, values.values())):
        shown = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise AerogelError(
            f"train: the {what} is not finite at step {state.step + 1} ({shown}); lower --lr (now {state.recipe.lr:g})"
        )


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """average = d average + (1 - d) model, in place, d = min(decay, (1 + step) / (10 + step)); buffers are copied.

    step: from 0. The smaller d of the first steps lets the average forget the initial weights.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(buffer)


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
    tensors = {f"{i}.{k}": v for i, slots in memory.items() for k, v in slots.items()}
    return {name: value.contiguous() for name, value in tensors.items() if isinstance(value, Tensor)}


def restore_optimizer(state: State, tensors: dict[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave, in the weights' order in memory."""
    weights = [p for group in state.optimizer.param_groups for p in group["params"]]
    memory: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, slot = name.split(".", 1)
        like = weights[int(index)].detach() if tensor.ndim else tensor
        memory.setdefault(int(index), {})[slot] = torch.empty_like(like).copy_(tensor)
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": memory})
