"""What the small networks of han2015_mnist.py learn from: distorted copies of the training images, and a teacher's word
on each of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aerogel.data import Batch, Dataset, Split
from aerogel.distill import soft_target_loss
from aerogel.train import Objective, predict

Teach = Callable[[nn.Module, Objective, Dataset], nn.Module]


def distorted(images: Tensor, seed: int, strength: float = 1.0) -> Tensor:
    """uint8 (n, 1, H, W), each image turned, scaled, moved and bent at random: affine up to 10 degrees, 10 % and 1.5
    pixels; elastic as in Simard, Steinkraus, Platt 2003, displacements smoothed by a Gaussian of 4 pixels, about one
    pixel large. strength: on all of them."""
    generator = torch.Generator().manual_seed(seed)
    side, out = images.shape[-1], []
    places = torch.arange(float(side))
    blur = torch.exp(-((places - places[:, None]) ** 2) / 32) / math.sqrt(32 * math.pi)
    for part in images.split(5000):
        n = len(part)
        angle, zoom, right, down = strength * (2 * torch.rand(4, n, generator=generator) - 1)
        angle, zoom, moved = angle * math.pi / 18, 1 + 0.1 * zoom, 3 / side * torch.stack([right, down], 1)
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2) * zoom[:, None, None]
        grid = F.affine_grid(torch.cat([turn, moved[:, :, None]], 2), [n, 1, side, side], align_corners=False)
        field = blur @ (2 * torch.rand(n, 2, side, side, generator=generator) - 1) @ blur
        bent = strength * 25 * 2 / side * field.permute(0, 2, 3, 1)
        found = F.grid_sample(part.float(), grid + bent, align_corners=False)
        out.append(found.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(out)


def teacher_net() -> nn.Module:
    def unit(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

    pool = nn.MaxPool2d(2)
    return nn.Sequential(*unit(1, 16), pool, *unit(16, 48), pool, *unit(48, 96), nn.Flatten(), nn.Linear(96 * 49, 10))


class Lessons:
    """Copies of the training images, and what a teacher says of each. A copy's label is its number.

    The teacher is a small convolutional network, trained on the copies by their true labels; `file` keeps its logits.
    `plainer`: half of these copies are the images themselves, which small networks had better fit.
    """

    def __init__(self, dataset: Dataset, copies: int, file: Path, teach: Teach) -> None:
        train, half = dataset.train, copies // 2
        images = [train.images, *(distorted(train.images, seed) for seed in range(1, copies))]
        self.labels = train.labels.repeat(copies)
        split = Split(torch.cat(images), torch.arange(len(self.labels)))
        self.data = dataclasses.replace(dataset, train=split, val=split, test=split, classes=range(len(split)))
        plain = torch.arange(len(train)).repeat(copies - half)
        rows = torch.cat([plain, torch.arange(len(train), (half + 1) * len(train))])
        self.plainer = dataclasses.replace(self.data, train=split.subset(rows))
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            net = teach(teacher_net(), self.hard, self.data)
            with torch.autocast("cpu", torch.bfloat16):
                save_file({"logits": predict(net, self.data, "train").float()}, file)
        self.logits = load_file(file)["logits"]

    def hard(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"hard": F.cross_entropy(student(batch.inputs), self.labels[batch.labels])}

    def soft(self, temperature: float) -> Objective:
        """The teacher's word alone."""

        def objective(student: nn.Module, batch: Batch) -> dict[str, Tensor]:
            return {"soft": soft_target_loss(student(batch.inputs), self.logits[batch.labels], temperature)}

        return objective
