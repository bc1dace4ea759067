"""Training the multilayer perceptrons of aerogel.nets.mlp several times as fast as the library's loop on one core.

For a step of 500 images the loop of aerogel.train takes 2.7 times as long in bfloat16 and 3.5 to 4 times in float32
(44, 57 and here 16 ms of one busy core for 784-800-800-10). Here the matrix products are in bfloat16, while float32
weights are kept and updated; the backward pass is written out and so makes no graph and few tensors; and masks of
dropout are pieces, from random places on, of one long row drawn before. What a step does depends on (seed, epoch, step)
alone; a stopped run goes on from its last checkpoint, at the end of an epoch, to the same network.

Letters: n images of a batch, d inputs. Layer l: h_l = dropout(relu(h_{l-1} W_l^T + b_l)); logits z = h V^T + c, in
float32. Backward: D = dloss/dz V; D <- D where h_l > 0 (a dropped unit is 0, too), times 1 / (1 - p);
dW_l = D^T h_{l-1}; D <- D W_l.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from aerogel.data.batching import batch_count, batch_rows
from aerogel.export.verify import flushing_denormals
from aerogel.files import replacing
from aerogel.nets.blocks import Net
from aerogel.train import Recipe
from aerogel.train.recipe import learning_rate

Loss = Callable[[Tensor], Tensor]  # logits (n, C) -> ()
Source = Callable[[int, np.ndarray, np.random.Generator], tuple[Tensor, Loss]]  # (epoch, rows) -> uint8 (n, d), loss


MASKS = 1 << 24  # numbers that a dropout rate's masks are cut from, each from a random place on
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class FastMLP:
    """Trains `net`, an `mlp`, in place: one `step` a batch. Its dropout rates are rounded to 256ths; its max_norm is
    the longest incoming weight vector of a hidden unit. dtype: of the matrix products. mean: float (d,), taken from
    every image, of which the first layer then knows only what is left, until `fold`."""

    def __init__(
        self, net: Net, recipe: Recipe, dtype: torch.dtype = torch.bfloat16, mean: Tensor | None = None
    ) -> None:
        layers = [layer for layer in net.features if isinstance(layer, nn.Linear)]
        drops = [round(layer.p * 256) for layer in net.features if isinstance(layer, nn.Dropout)]
        self.drops, self.hidden, self.top = drops, layers, net.classifier.fc
        self.max_norm, self.dtype = net.spec["args"]["max_norm"], dtype
        self.mean = None if mean is None else mean.to(dtype)
        self.optimizer = _optimizer(net, recipe)
        for weight in net.parameters():
            weight.grad = torch.zeros_like(weight)
        self.copies = [layer.weight.detach().to(dtype) for layer in layers]
        self.masks = {rate: _masks(rate, recipe.seed, dtype) for rate in sorted(set(drops)) if rate}

    def step(self, pixels: Tensor, loss: Loss, lr: float, rng: np.random.Generator) -> float:
        """pixels: uint8 (n, d), read as [0, 1]. Gives back the loss."""
        with torch.no_grad():
            x = pixels.to(self.dtype).mul_(1 / 255)
            held = [self._dropped(x if self.mean is None else x.sub_(self.mean), 0, rng)]
            for number, (layer, weight) in enumerate(zip(self.hidden, self.copies, strict=True), start=1):
                z = torch.addmm(layer.bias.to(self.dtype), held[-1], weight.t())
                held.append(self._dropped(z.relu_(), number, rng))
            last = held[-1].float()
            logits = torch.addmm(self.top.bias, last, self.top.weight.t())
        value = loss(logits.requires_grad_())
        (back,) = torch.autograd.grad(value, logits)
        with torch.no_grad():
            _set(self.top, back.t() @ last, back.sum(dim=0))
            back = (back @ self.top.weight).to(self.dtype)
            for number in reversed(range(len(self.hidden))):
                back = torch.ops.aten.threshold_backward(back, held[number + 1], 0)
                if self.drops[number + 1]:
                    back.mul_(256 / (256 - self.drops[number + 1]))
                _set(self.hidden[number], back.t() @ held[number], back.sum(dim=0))
                if number:
                    back = back @ self.copies[number]
            self._update(lr)
        return value.item()

    def fold(self) -> None:
        """Has the network read images as they are: W (x - mean) + b = W x + (b - W mean)."""
        if self.mean is not None:
            with torch.no_grad():
                self.hidden[0].bias.sub_(self.hidden[0].weight @ self.mean.float())
            self.mean = None

    def _dropped(self, units: Tensor, place: int, rng: np.random.Generator) -> Tensor:
        rate = self.drops[place]
        if not rate:
            return units
        first = int(rng.integers(0, len(self.masks[rate]) - units.numel() + 1))
        return units.mul_(self.masks[rate][first : first + units.numel()].view_as(units))

    def _update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for layer, copy in zip(self.hidden, self.copies, strict=True):
            if self.max_norm is not None:
                length = torch.linalg.vector_norm(layer.weight, dim=1, keepdim=True)
                layer.weight.mul_((self.max_norm / length).clamp_(max=1))
            copy.copy_(layer.weight)


def _masks(rate: int, seed: int, dtype: torch.dtype) -> Tensor:
    """(MASKS,): 0 with probability rate / 256, else what keeps the mean."""
    drawn = torch.from_numpy(np.random.default_rng((seed, rate)).integers(0, 256, MASKS, dtype=np.uint8))
    return (drawn >= rate).to(dtype).mul_(256 / (256 - rate))


def _optimizer(net: Net, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(
        net.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True,
        fused=True,
    )  # fmt: skip


def _set(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    layer.weight.grad.copy_(weight)
    layer.bias.grad.copy_(bias)


@flushing_denormals()  # to which momenta of the weights of rare pixels fade: four times as slow
def train(
    net: Net, source: Source, length: int, recipe: Recipe, checkpoint: Path | None = None, every: float = 60.0,
    mean: Tensor | None = None,
) -> Net:  # fmt: skip
    """`recipe.epochs` passes over `length` rows, in a fresh order each; `checkpoint` is written every so many seconds.

    mean: of the images, float (d,) in [0, 1]; the steps then see images without it. Gradients of the first layer are no
    longer all along the mean image, and the same steps get further.
    Of the recipe these count: epochs, batch_size, lr, schedule, warmup, optimizer, momentum (Nesterov's), weight_decay,
    seed.
    """
    fast = FastMLP(net, recipe, mean=mean)
    first = _go_on(fast, net, checkpoint) if checkpoint is not None and checkpoint.exists() else 0
    per_epoch, epochs, saved = batch_count(length, recipe.batch_size), round(recipe.epochs), time.monotonic()
    for epoch in range(first, epochs):
        rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence((recipe.seed, epoch))))
        order = rng.permutation(length)
        for number in range(per_epoch):
            rows = order[batch_rows(length, recipe.batch_size, number)]
            lr = learning_rate(recipe, epoch * per_epoch + number, epochs * per_epoch, per_epoch)
            fast.step(*source(epoch, rows, rng), lr, rng)
        if checkpoint is not None and time.monotonic() - saved > every and epoch + 1 < epochs:
            _save(fast, net, checkpoint, epoch + 1)
            saved = time.monotonic()
    fast.fold()
    return net.eval()


def _save(fast: FastMLP, net: Net, path: Path, epoch: int) -> None:
    tensors = {name: weight.detach() for name, weight in net.named_parameters()}
    for name, weight in net.named_parameters():
        tensors |= {f"{slot}.{name}": value for slot, value in fast.optimizer.state[weight].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temp:
        safetensors.torch.save_file(tensors, temp, metadata={"epoch": str(epoch)})


def _go_on(fast: FastMLP, net: Net, path: Path) -> int:
    """The epoch after which the checkpoint was written."""
    with safetensors.safe_open(path, framework="pt") as file, torch.no_grad():
        epoch = int(file.metadata()["epoch"])
        slots = sorted({name.split(".")[0] for name in file.keys()} - {"features", "classifier"})  # noqa: SIM118
        for name, weight in net.named_parameters():
            weight.copy_(file.get_tensor(name))
            fast.optimizer.state[weight] = {slot: file.get_tensor(f"{slot}.{name}") for slot in slots}
    for layer, copy in zip(fast.hidden, fast.copies, strict=True):
        copy.copy_(layer.weight)
    return epoch


def keep_memory() -> None:
    """Has glibc keep what is freed: large tensors otherwise go back to the system, whose fresh pages take a third of a
    step's time. Elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def logits_of(net: nn.Module, pixels: Tensor, batch: int = 2000) -> Tensor:
    """Of uint8 (N, d) pixels, in eval mode and full precision: (N, C)."""
    net.eval()
    with torch.no_grad():
        return torch.cat([net(part.float().mul_(1 / 255).view(-1, 1, 28, 28)) for part in pixels.split(batch)])
