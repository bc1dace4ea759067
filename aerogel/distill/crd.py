"""Contrastive representation distillation (CRD). Tian, Krishnan, Isola 2020, arXiv:1910.10699.

f, g = the student's and the teacher's embedding, each a trained linear map to 128, of length 1
e(a, b) = exp(f(a) . g(b) / tau);  h(a, b) = e / (e + N Z), Z the mean of e over pairs at the start
loss = -mean of log h(a, a) - sum over N negatives b of log(1 - h(a, b)), for f against g and for g against f
Negatives are samples of other classes. Paper: N 16,384 from a bank of all samples, tau 0.07, weight 0.8.
Differs: the bank is a queue of the last embeddings with their labels (He et al. 2020, arXiv:1911.05722), which needs no
number of the sample; those of other classes are its negatives, N of them, beside the batch's own. The paper's bank has
an entry a sample and averages it with momentum 0.5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.distill.features import channels, check_features, pooled
from aerogel.errors import AerogelError


def contrastive_loss(scores: Tensor, positive: Tensor, negative: Tensor, mean_score: Tensor) -> Tensor:
    """Noise-contrastive: e of every anchor and candidate (n, k), which are the positive and the negative ones
    (bool (n, k)), Z () -> (). Never negative."""
    noise = negative.sum(dim=1, keepdim=True).clamp_min(1) * mean_score
    hit = torch.log1p(noise / scores)  # -log h
    miss = torch.log1p(scores / noise)  # -log(1 - h)
    return ((hit * positive).sum() + (miss * negative).sum()) / len(scores)


class Contrast(nn.Module):
    """Both embeddings and the queue, by an example of each feature: (student, teacher, labels) -> loss ().

    Raises AerogelError when size or dim is below 1 or tau is not positive; in forward as `check_features` does.
    """

    queue: Tensor
    queue_labels: Tensor
    mean_score: Tensor
    cursor: Tensor

    def __init__(self, student: Tensor, teacher: Tensor, dim: int = 128, size: int = 16_384, tau: float = 0.07) -> None:
        super().__init__()
        if dim < 1 or size < 1 or not tau > 0:
            raise AerogelError(
                f"Contrast: dim, size and tau must be > 0, got {dim}, {size} and {tau}; 128, 16384, 0.07"
            )
        self.tau = tau
        self.student, self.teacher = nn.Linear(channels(student), dim), nn.Linear(channels(teacher), dim)
        self.register_buffer("queue", torch.zeros(2, size, dim))
        self.register_buffer("queue_labels", torch.full((size,), -1))  # -1: not filled yet
        self.register_buffer("mean_score", torch.zeros(()))  # 0: not known yet
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        check_features("Contrast", student, teacher)
        ours = F.normalize(self.student(pooled(student)), dim=1)
        theirs = F.normalize(self.teacher(pooled(teacher)), dim=1)
        known = torch.cat([labels, self.queue_labels])
        negative = (known != labels[:, None]) & (known >= 0)
        positive = torch.eye(len(labels), len(known), dtype=torch.bool, device=labels.device)
        queue = self.queue.to(ours)  # joined into a copy, as it is written below
        one = (ours @ torch.cat([theirs, queue[1]]).T / self.tau).exp()
        other = (theirs @ torch.cat([ours, queue[0]]).T / self.tau).exp()
        scale = self.mean_score if self.mean_score > 0 else one.detach()[positive | negative].mean()
        loss = contrastive_loss(one, positive, negative, scale) + contrastive_loss(other, positive, negative, scale)
        if torch.is_grad_enabled():  # in training alone
            self._remember(ours.detach(), theirs.detach(), labels, scale)
        return loss

    def _remember(self, ours: Tensor, theirs: Tensor, labels: Tensor, scale: Tensor) -> None:
        size = self.queue.shape[1]
        rows = (self.cursor + torch.arange(min(len(labels), size), device=labels.device)) % size
        self.queue[0, rows], self.queue[1, rows] = ours[:size].to(self.queue), theirs[:size].to(self.queue)
        self.queue_labels[rows] = labels[:size]
        self.cursor.copy_((self.cursor + len(rows)) % size)
        self.mean_score.copy_(scale)
