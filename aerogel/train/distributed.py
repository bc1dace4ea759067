"""More processes than one: torchrun starts them, DistributedDataParallel joins their gradients; no engine of our own.

Two ways to use them:
- a program of your own calls `join()` once and then `fit` or `steps` in every process, each with its own equal state;
- the verbs of the command line run in rank 0 alone, which cuts, measures and writes; the others `follow`: they wait for
  a state to train, train along, and forget it. Rank 0 sends it over the job's own connections, never through a file.

Every global batch is shared out by rows, so a step does what one process would do, up to the order of float sums:
losses and gradients are weighed by rows, batch norms take the statistics of the whole batch (`Recipe.sync_norms`).
Dropout draws other numbers in every rank. A process that dies breaks its connections: the others end with an error
within SECONDS, and torchrun names it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aerogel.errors import AerogelError, Interrupted
from aerogel.imports import one_line

SECONDS = 60  # without an answer of the others before a step gives up
_LOST = re.compile(r"gloo|nccl|closed by peer|reset by peer|timed out waiting|TCPStore", re.IGNORECASE)
CPU = torch.device("cpu")
_NORMS = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class World:
    """Who this process is among how many, and where it computes."""

    rank: int = 0
    ranks: int = 1
    device: torch.device = CPU


ALONE = World()
_patient: Any = None  # the group in which processes wait for another's work, however long it takes
_leads = False  # whether rank 0 tells the others what to do
_training = False  # whether the others are busy with a training of rank 0's


def started() -> World:
    """What torchrun's environment says of this process; ALONE without it. Nothing is joined."""
    words = [os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK")]
    if not all(word.isdecimal() for word in words) or int(words[0]) == 1:
        return ALONE
    ranks = int(words[0])
    device = CPU
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return World(int(os.environ["RANK"]), ranks, device)


def join() -> World:
    """Joins the processes that torchrun started, once: gloo on CPUs, nccl on GPUs. ALONE where it started none.

    Raises AerogelError when the others cannot be reached.
    """
    global _patient
    world = started()
    if world.ranks > 1 and not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        patience = datetime.timedelta(seconds=SECONDS)
        with lost_processes(world):
            store, rank, ranks = next(iter(dist.rendezvous("env://", timeout=patience)))
            # torchrun keeps its store when it restarts a job, and in it the addresses of those who died
            store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=patience)
            _patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    return world


def wait_for_all(world: World) -> None:
    """Returns once every process is here: while rank 0 writes, the others' patience must not end."""
    if world.ranks > 1:
        with lost_processes(world):
            dist.barrier(group=_patient)


def current() -> World:
    """The world that was joined; ALONE before that."""
    return started() if dist.is_available() and dist.is_initialized() else ALONE


@contextlib.contextmanager
def lost_processes(world: World) -> Iterator[None]:
    """Turns what a broken connection raises into one line."""
    try:
        yield
    except RuntimeError as error:
        if world.ranks == 1 or not _LOST.search(str(error)):
            raise
        first = str(error).splitlines()[0][:160]
        raise AerogelError(
            f"train: rank {world.rank} of {world.ranks} has lost another process of the job ({first}); torchrun names "
            "the one that failed first; start the same command again to go on from the last checkpoint"
        ) from error


# ---------------------------------------------------------------- rank 0 leads, the others follow


def leading() -> bool:
    return _leads and current().rank == 0


def restarted() -> bool:
    """Whether torchrun has started this job again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def restarts_allowed() -> bool:
    """Whether torchrun may."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def crew() -> World:
    """Joins, and makes rank 0 the one that tells the others what to do."""
    global _leads
    world = join()
    _leads = world.ranks > 1
    return world


@contextlib.contextmanager
def trained_by_all(payload: Any) -> Iterator[None]:
    """Where rank 0 leads, the others train along with what happens inside. An error leaves them to themselves."""
    global _training
    if not leading():
        yield
        return
    tell("train", payload)
    _training = True
    try:
        yield
    except Interrupted:
        _training = False
        raise
    _training = False


def tell(command: str, payload: Any = None) -> None:
    """Rank 0 to all others. Raises AerogelError where the payload cannot be sent."""
    try:
        sent = pickle.dumps((command, payload))
    except Exception as error:  # whatever a user's own classes raise
        raise AerogelError(
            f"train: the network or its objective cannot be sent to the other processes ({one_line(error)}); define "
            "classes and functions by name at the top of a module, and take parametrizations away first"
        ) from error
    with lost_processes(current()):
        dist.broadcast_object_list([sent], group=_patient)


def dismiss(code: int) -> None:
    """Ends the others, with that exit code. Those left in the middle of a step see the connection break."""
    global _leads
    if leading() and not _training:
        with contextlib.suppress(AerogelError, RuntimeError):
            tell("end", code)
    _leads = False
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def follow(train: Callable[[Any], None]) -> int:
    """Waits for what rank 0 tells and does it with `train`, until it says that this is the end; the exit code.

    Signals are rank 0's to answer: the others go on until it stops them.
    """
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            told: list[Any] = [None]
            with lost_processes(current()):
                dist.broadcast_object_list(told, group=_patient)
            command, payload = pickle.loads(told[0])  # from rank 0 of this very job
            if command == "end":
                return int(payload)
            train(payload)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- a step that several processes make together


class Losses(nn.Module):
    """The objective on the network, as one module whose parameters are all that is trained.

    A teacher in it is no part of that: it is not wrapped, and its statistics are not sent around.
    """

    def __init__(self, model: nn.Module, objective: Any) -> None:
        super().__init__()
        self.model = model
        self._objective = [objective]  # hidden from nn.Module
        if isinstance(objective, nn.Module) and any(p.requires_grad for p in objective.parameters()):
            self.own = nn.ParameterList([p for p in objective.parameters() if p.requires_grad])

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return self._objective[0](self.model, batch)


def joined(losses: Losses, world: World) -> nn.Module:
    """The losses whose gradients are averaged over the ranks."""
    if world.ranks == 1:
        return losses
    where = [world.device.index] if world.device.type == "cuda" else None
    norms = {buffer for norm in losses.modules() if isinstance(norm, _NORMS) for buffer in norm.buffers()}
    return nn.parallel.DistributedDataParallel(
        losses,
        device_ids=where,
        find_unused_parameters=True,  # what an objective leaves out of a step must not make the others wait
        broadcast_buffers=not norms.issuperset(losses.buffers()),  # training reads no norm's; rank 0's are saved
    )


def summing(values: list[float], world: World) -> Callable[[], list[float]]:
    """Element by element over all ranks: begun now, and what is called for the sums waits for them."""
    if world.ranks == 1:
        return lambda: values
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    going = dist.all_reduce(tensor, async_op=True)

    def sums() -> list[float]:
        going.wait()
        return tensor.tolist()

    return sums


@contextlib.contextmanager
def norms_synced(model: nn.Module, world: World) -> Iterator[None]:
    """Batch norms in training take the statistics of the whole global batch inside. (torch's SyncBatchNorm is for GPUs
    alone; it is left as it is.)

    Raises AerogelError for a batch norm whose class computes something else.
    """
    norms = [m for m in model.modules() if isinstance(m, _NORMS)] if world.ranks > 1 else []
    norms = [norm for norm in norms if not isinstance(norm, nn.SyncBatchNorm)]
    for norm in norms:
        if type(norm).forward is not _NORMS.forward:
            raise AerogelError(
                f"train: {type(norm).__name__} has a forward of its own, its statistics cannot be taken over all "
                "processes; set sync_norms = false under [train]"
            )
    for norm in norms:
        norm.__dict__["forward"] = partial(_synced_norm, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.__dict__["forward"]


class _Normalised(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, of the rows of all ranks: one exchange forward, one back.

    Forward, each rank tells its count, means and sums of squared distances, which add up without cancellation (Chan et
    al. 1979). Backward, with y' the gradient, h the normalised x, N all rows and pixels, S sums over all ranks:
    x' = weight / sqrt(variance + eps) (y' - S(y') / N - h S(y' h) / N). Gradients of weight and bias stay a rank's own,
    as DistributedDataParallel expects them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x if x.dtype == torch.float64 else x.float()
        dims = [d for d in range(x.ndim) if d != 1]
        own = wide.new_tensor([wide.numel() / wide.shape[1]])
        variance, mean = torch.var_mean(wide, dims, correction=0)
        told = torch.cat([own, mean, variance * own])
        heard = told.new_empty(dist.get_world_size(), len(told))
        dist.all_gather_into_tensor(heard.view(-1), told)
        counts, means, squares = heard.split([1, len(mean), len(mean)], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        variance = (squares + counts * (means - mean).square()).sum(0) / total
        weight, bias = weight.to(wide.dtype), bias.to(wide.dtype)
        out = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, total)
        return out, mean, variance, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance, total = ctx.saved_tensors
        scaled, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.cat([to_bias, to_weight])
        dist.all_reduce(sums)
        of_one, of_h = (sums / total).chunk(2)
        root = (variance + ctx.eps).rsqrt()
        slope = -weight * root * root * of_h
        level = -weight * root * of_one - slope * mean
        shape = [1, -1, *[1] * (x.ndim - 2)]
        return scaled + (x * slope.view(shape) + level.view(shape)).to(scaled.dtype), to_weight, to_bias, None


def _synced_norm(norm: Any, x: Tensor) -> Tensor:
    """Batch norm over the rows of all ranks: (n, C, ...) -> the same. The numbers are summed in single precision."""
    if not norm.training:
        return type(norm).forward(norm, x)
    weight = x.new_ones(x.shape[1]) if norm.weight is None else norm.weight
    bias = x.new_zeros(x.shape[1]) if norm.bias is None else norm.bias
    out, mean, variance, count = _Normalised.apply(x, weight, bias, norm.eps)
    if norm.track_running_stats and norm.running_mean is not None:
        norm.num_batches_tracked.add_(1)
        share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean), share)
            norm.running_var.lerp_((variance * count / (count - 1)).to(norm.running_var), share)
    return out
