"""The training loop, as a generator: `for step in steps(state, data): ...`. The caller owns it.

Between two yields the caller may log, mask weights, cut, save or stop. What a step does depends only on (seed, step):
the order of the data, augmentation and dropout follow from it, so that a run continues exactly from its state.
PyTorch's global random state is the caller's own: a step leaves it as it was. Under torchrun every process makes the
same step on its share of the batch (aerogel.train.distributed).
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from aerogel.data import Batch, Dataset, batch_count, batches
from aerogel.data.batching import batch_rows
from aerogel.data.files import Lazy
from aerogel.errors import AerogelError
from aerogel.graph import evaluating
from aerogel.train.distributed import ALONE, Losses, World, current, joined, lost_processes, norms_synced, summing
from aerogel.train.objective import Objective
from aerogel.train.recipe import Recipe, learning_rate

HALVINGS = 3  # of a batch that does not fit the memory
LEAST_SCALE = 1.0  # of fp16's loss: below it the loss itself is at fault


class NotFinite(AerogelError):
    """A loss, gradient or weight that is no number any more; the state must not be saved."""


@dataclass(frozen=True)
class Step:
    """What one step did. seconds: of the step with its batch, without what the caller did in between; waited: those of
    them in which it waited for the batch. images: of the global batch. stop, save: whether some process was asked to,
    which all then know."""

    number: int  # from 1
    total: int
    epoch: float
    losses: dict[str, float]
    lr: float
    seconds: float
    waited: float = 0.0
    images: int = 0
    stop: bool = False
    save: bool = False


class Held(Protocol):
    """Weights that a step must leave as they are (aerogel.prune.masks)."""

    def hold_gradients(self, model: nn.Module) -> None: ...

    def hold(self, model: nn.Module) -> None: ...


@dataclass
class State:
    """All that training changes. `average` holds the averaged weights when the recipe asks for them.

    lr_scale: on every learning rate; halved when training was rolled back. parts: a batch is made in so many, because
    the recipe says so or the memory is small. masks: which weights stay zero; set by `Masks.put_on`, and no part of a
    checkpoint, since the zeros are.
    """

    model: nn.Module
    objective: Objective
    recipe: Recipe
    steps_per_epoch: int
    step: int = 0
    channels_last: bool = False  # the order in memory of images and convolutions
    lr_scale: float = 1.0
    parts: int = 0
    masks: Held | None = None
    optimizer: torch.optim.Optimizer = field(init=False)
    average: nn.Module | None = field(init=False, default=None)
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = _optimizer(self.model, self.objective, self.recipe)
        self.parts = self.parts or self.recipe.accumulate
        self.scaler = self.new_scaler()
        if self.recipe.ema is not None:
            self.average = copy.deepcopy(self.model).eval()

    def new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", enabled=self.recipe.autocast == "fp16")

    @property
    def total(self) -> int:
        return max(1, round(self.recipe.epochs * self.steps_per_epoch))

    @property
    def result(self) -> nn.Module:
        return self.average if self.average is not None else self.model

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors and the step."""
        found: dict[str, Any] = {"lr_scale": self.lr_scale, "parts": self.parts}
        return found | ({"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {})

    def set_numbers(self, held: dict[str, Any]) -> None:
        """Puts back what `numbers` gave."""
        self.lr_scale, self.parts = held.get("lr_scale", 1.0), held.get("parts", self.recipe.accumulate)
        self.scaler = self.new_scaler()  # one that was left in the middle of a step takes no other
        if self.scaler.is_enabled() and "scaler" in held:
            self.scaler.load_state_dict(held["scaler"])


def start(model: nn.Module, objective: Objective, data: Dataset, recipe: Recipe) -> State:
    """The state before the first step. Raises AerogelError when nothing in the model can be trained."""
    if not any(p.requires_grad for p in model.parameters()):
        raise AerogelError(f"train: {type(model).__name__} has no parameter that requires a gradient; unfreeze some")
    per_epoch = batch_count(len(data.train), recipe.batch_size)
    return State(model, objective, recipe, per_epoch, channels_last=_try_channels_last(model, objective, data, recipe))


def _try_channels_last(model: nn.Module, objective: Objective, data: Dataset, recipe: Recipe) -> bool:
    """Convolutions on a CPU train about 1.5 times as fast; a network that flattens with `view` refuses it."""
    if not any(weight.ndim == 4 for weight in model.parameters()):
        return False
    lay_out(model, torch.channels_last)
    batch = _first_images(data, recipe)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(model), _autocast(recipe, "cpu"):
            objective(model, _channels_last(batch))
    except RuntimeError:
        lay_out(model, torch.contiguous_format)
        return False
    return True


def _first_images(data: Dataset, recipe: Recipe) -> Batch:
    """Two or three images of the first batch, as training will see them."""
    ranks = max(1, len(data.train) // batch_count(len(data.train), recipe.batch_size) // 2)
    augment = data.augment if recipe.augment is None else recipe.augment
    return next(batches(data, "train", recipe.batch_size, seed=recipe.seed, shuffle=True, augment=augment, ranks=ranks))


def lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Puts four-dimensional weights into this order in memory, in place.

    Of a weight with one input channel both orders are the same bytes; `to` gives it the strides of the one asked for,
    `contiguous` does not, and the convolution then works in the other order (LeNet-5: twice the time).
    """
    for weight in model.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.to(memory_format=memory_format)


def _channels_last(batch: Batch) -> Batch:
    return batch._replace(inputs=batch.inputs.contiguous(memory_format=torch.channels_last))


def _no() -> bool:
    return False


def steps(
    state: State,
    data: Dataset,
    *,
    world: World | None = None,
    stopping: Callable[[], bool] = _no,
    saving: Callable[[], bool] = _no,
) -> Iterator[Step]:
    """Trains `state.model` in place from `state.step` to the end, one optimizer step a yield; then sets eval mode.

    world: the processes that make the steps together, by default those that were joined. stopping, saving: asked once a
    step; where one says yes in any process, all yield it.
    Raises NotFinite at the first loss, gradient or weight that is not finite; AerogelError where memory does not even
    hold an eighth of a batch, or another process is lost.
    """
    recipe, per_epoch = state.recipe, state.steps_per_epoch
    world = current() if world is None else world
    augment = data.augment if recipe.augment is None else recipe.augment
    network: nn.Module | None = None
    trained: nn.Module | None = None
    before = time.perf_counter()
    while state.step < state.total:
        epoch, position = divmod(state.step, per_epoch)
        epoch_batches = batches(
            data, "train", recipe.batch_size, seed=recipe.seed, epoch=epoch, shuffle=True,
            augment=augment, start=position, rank=world.rank, ranks=world.ranks, workers=_workers(recipe, data, world),
        )  # fmt: skip
        for batch in epoch_batches:
            waited = time.perf_counter() - before
            if trained is not state.model or network is None:  # the caller may have cut it
                trained = state.model
                model: Any = torch.compile(trained) if recipe.compile else trained
                with lost_processes(world):
                    network = joined(Losses(model, state.objective), world)
            lr = state.lr_scale * learning_rate(recipe, state.step, state.total, per_epoch)
            part = batch_rows(len(data.train), recipe.batch_size, state.step % per_epoch)
            rows = part.stop - part.start
            with lost_processes(world):
                asked = (float(stopping()), float(saving()))
                losses, stop, save = _update(state, _placed(batch, state, world), lr, network, world, rows, asked)
            state.step += 1
            now = time.perf_counter()
            done = state.step / per_epoch
            yield Step(state.step, state.total, done, losses, lr, now - before, waited, rows, stop, save)
            before = time.perf_counter()
            if state.step >= state.total:
                break
    state.model.eval()


def _workers(recipe: Recipe, data: Dataset, world: World) -> int:
    if recipe.workers is not None:
        return recipe.workers
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.ranks))
    return max(1, (os.cpu_count() or 1) // here) if isinstance(data.train.images, Lazy) else 0


def _placed(batch: Batch, state: State, world: World) -> Batch:
    batch = _channels_last(batch) if state.channels_last else batch
    if world.device.type == "cpu":
        return batch
    return Batch(*(None if x is None else x.to(world.device, non_blocking=True) for x in batch))  # type: ignore[arg-type]


def _update(
    state: State, batch: Batch, lr: float, network: nn.Module, world: World, rows: int, asked: tuple[float, float]
) -> tuple[dict[str, float], bool, bool]:
    """One optimizer step: the losses, and whether to stop and to save. rows: of the global batch, of which `batch` is a
    share. asked: whether this process was.

    Randomness (dropout, the objective's own) comes from (seed, step, rank) alone.
    """
    recipe, optimizer = state.recipe, state.optimizer
    for group in optimizer.param_groups:
        group["lr"] = lr
    values, (ill, stop, save) = _gradients(state, batch, network, world, rows, asked)
    _check_finite("loss", values, state)
    if ill:
        _check_finite("statistic of a norm", {"buffers": math.nan}, state)
    state.scaler.unscale_(optimizer)
    if state.masks is not None:
        state.masks.hold_gradients(state.model)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
    if not state.scaler.is_enabled() or state.scaler.get_scale() < LEAST_SCALE:  # fp16 steps over some of its own
        _check_finite("gradient", {"norm": norm.item()}, state)
    if recipe.clip is not None:
        nn.utils.clip_grads_with_norm_(weights, recipe.clip, norm)
    state.scaler.step(optimizer)
    state.scaler.update()
    if state.masks is not None:
        state.masks.hold(state.model)
    size = nn.utils.get_total_norm([p.detach() for p in weights])
    _check_finite("size of the weights", {"norm": size.item()}, state)
    if state.average is not None and recipe.ema is not None:
        update_average(state.average, state.model, recipe.ema, state.step)
    return values, stop > 0, save > 0


def _ill(model: nn.Module) -> float:
    """1 where a running mean or variance of a batch norm is no number. (Another buffer may hold infinities, as a mask
    does.)"""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    held = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
    return float(not math.isfinite(nn.utils.get_total_norm(held).item()))


Told = tuple[dict[str, float], list[float]]


def _gradients(
    state: State, batch: Batch, network: nn.Module, world: World, rows: int, asked: tuple[float, ...]
) -> Told:
    """Leaves the gradients in the weights; the whole batch's losses, and (whether a norm's statistics are ill, *asked)
    summed over all ranks. In as many parts as memory asks for.

    Raises AerogelError when not even an eighth of the batch fits, and where several processes would have to agree.
    """
    while True:
        state.optimizer.zero_grad(set_to_none=True)
        gpus = [world.device] if world.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):
            seed = _seed(state.recipe.seed, state.step, world.rank)
            torch.default_generator.manual_seed(seed)
            if gpus:
                torch.cuda.manual_seed(seed)
            try:
                return _in_parts(state, batch, network, world, rows, asked)
            except (MemoryError, RuntimeError) as error:
                if not _is_of_memory(error):
                    raise
                refused = state.parts >= min(len(batch.labels), state.recipe.accumulate << HALVINGS)
                if world.ranks > 1 or refused:
                    rest = (
                        "set accumulate in [train] of --config" if world.ranks > 1 else "a smaller network or --input"
                    )
                    raise AerogelError(
                        f"train: out of memory at step {state.step + 1} with {len(batch.labels) // state.parts} images "
                        f"at once; take a smaller --batch-size, or {rest}"
                    ) from error
        state.parts = min(2 * state.parts, len(batch.labels))


def _in_parts(
    state: State, batch: Batch, network: nn.Module, world: World, rows: int, asked: tuple[float, ...]
) -> Told:
    state.model.train()
    sums: dict[str, float] = {}
    held: Callable[[], list[float]] = list
    count = max(1, min(state.parts, rows // world.ranks))  # as many in every process, whose shares differ by one
    columns = ([None] * count if x is None else x.tensor_split(count) for x in batch)
    parts = [Batch._make(row) for row in zip(*columns, strict=True)]
    for number, part in enumerate(parts):
        weight = len(part.labels) / rows
        last = number == len(parts) - 1
        alone = contextlib.nullcontext() if last or world.ranks == 1 else network.no_sync()  # type: ignore[operator]
        with alone, norms_synced(state.model, world if state.recipe.sync_norms else ALONE):
            with _autocast(state.recipe, world.device.type):
                losses = network(part)
            _check_scalars(losses)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + weight * value.item()
            if last:  # sent around while the backward pass runs
                held = summing([*sums.values(), _ill(state.model), *asked], world)
            total = torch.stack(list(losses.values())).sum() * (
                weight * world.ranks
            )  # gradients are averaged over ranks
            state.scaler.scale(total).backward()
    found = held()
    return dict(zip(sums, found, strict=False)), found[len(sums) :]


def _is_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text


def _seed(seed: int, step: int, rank: int = 0) -> int:
    """Independent streams for different (seed, step, rank); the data's are of other numbers."""
    key = (seed, step, rank, rank) if rank else (seed, step)
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


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
        raise NotFinite(
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


def _autocast(recipe: Recipe, device: str) -> contextlib.AbstractContextManager[object]:
    if recipe.autocast == "none":
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16 if recipe.autocast == "bf16" else torch.float16)


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
