"""Teachers: one network or several, asked without being touched.

Parameters, buffers, train/eval flags and requires_grad are after a call what they were before: no frozen copy is made.
A teacher is in eval mode inside a call, and builds no graph.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.data import Batch
from aerogel.distill.cache import TeacherCache
from aerogel.distill.checks import check_finite, check_temperature
from aerogel.distill.ensemble import check_ensemble, ensemble_logits
from aerogel.distill.taps import Taps
from aerogel.errors import AerogelError
from aerogel.graph import evaluating

Scale = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of each channel
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher:
    """One or many networks as one: `teacher(inputs)` gives logits (n, C) of their mean distribution.

    weights: of the networks, equal without; combine: "arithmetic" or "geometric" (aerogel.distill.ensemble).
    autocast: "bf16" or "fp16", "none" for full precision inside a loop that has another; None as the loop has it.
    normalise: ((mean, std) of the batches, (mean, std) that the teachers were trained with), a number a channel.
    cache: answers to the batches of a training, kept on the disk; read by `answers` alone.
    Raises AerogelError for no network, bad weights, and names or numbers that are none of these.
    """

    def __init__(
        self,
        models: nn.Module | Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        combine: str = "arithmetic",
        autocast: str | None = None,
        normalise: tuple[Scale, Scale] | None = None,
        cache: TeacherCache | None = None,
    ) -> None:
        listed = [models] if isinstance(models, nn.Module) else list(models)
        if not listed or not all(isinstance(model, nn.Module) for model in listed):
            raise AerogelError(f"Teacher: models must be one nn.Module or a list of some, got {models!r}")
        if autocast not in (None, "none", *AUTOCAST):
            raise AerogelError(f"Teacher: autocast must be None, 'none', {' or '.join(AUTOCAST)}, got {autocast!r}")
        self.models = nn.ModuleList(listed)  # one attribute, so that the loop finds it and moves it to a GPU
        self.weights, self.combine = check_ensemble("Teacher", len(listed), weights, combine), combine
        self.autocast, self.normalise = autocast, normalise
        self._affine = None if normalise is None else _affine(normalise)
        self.cache = cache
        self._hashed: tuple[list[Any], list[str]] = ([], [])  # versions of what was hashed, the hashes

    def __call__(self, inputs: Tensor, temperature: float = 1.0) -> Tensor:
        """Logits whose softmax at T is the mean of the teachers' at T: (n, ...) -> (n, C).

        Raises AerogelError for a bad temperature, logits that are not (n, C) or not finite, and teachers with other
        classes than the first.
        """
        check_temperature("Teacher", temperature)
        return self.combined(self.members(inputs), temperature)

    def combined(self, members: Tensor, temperature: float) -> Tensor:
        """What `members` gave as one: (K, n, C) -> (n, C)."""
        return members[0] if len(members) == 1 else ensemble_logits(members, self.weights, self.combine, temperature)

    def members(self, inputs: Tensor) -> Tensor:
        """Each teacher's logits: (n, ...) -> (K, n, C), in single precision at least."""
        found: list[Tensor] = []
        for number, model in enumerate(self.models):
            logits = wide(logits_of(self._run(model, inputs), f"teacher {number}"))
            if logits.ndim != 2 or (found and logits.shape != found[0].shape):
                told = f"; teacher 0 gives {tuple(found[0].shape)}" if found else ""
                raise AerogelError(
                    f"Teacher: teacher {number} must give logits (n, classes), as many classes as the others, got "
                    f"{tuple(logits.shape)}{told}; take teachers of the same classes"
                )
            check_finite(f"Teacher: teacher {number}", logits, "logits")
            found.append(logits)
        return torch.stack(found)

    def answers(self, batch: Batch, keep: bool) -> Tensor:
        """`members`, from the cache where there is one. keep: this is training, so what is not there yet is kept.

        Raises AerogelError as `TeacherCache.members` does.
        """
        if self.cache is None:
            return self.members(batch.inputs)
        return self.cache.members(self.members, self.identity(batch.inputs.device.type), batch, keep)

    def identity(self, device: str) -> dict[str, Any]:
        """What the answers depend on: sha256 of every network, the normalisation, the precision."""
        held = [x for model in self.models for x in (*model.parameters(), *model.buffers())]
        versions = [(id(x), x._version, x.dtype) for x in held]
        if versions != self._hashed[0]:
            self._hashed = versions, [_sha256(model) for model in self.models]
        enabled, dtype = self._effective(device)
        precision = str(dtype).removeprefix("torch.") if enabled else "full"
        scales = [[list(map(float, values)) for values in pair] for pair in self.normalise or ()]
        return {"networks": self._hashed[1], "normalise": scales, "autocast": precision}

    def features(self, inputs: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (1, n, C), and features by name, of one teacher. Raises AerogelError where there are several."""
        if len(self.models) > 1:
            raise AerogelError(
                f"Teacher: features are one network's, got {len(self.models)} teachers; give that one alone, and the "
                "ensemble to losses on logits"
            )
        with Taps(self.models[0], names) as taps:
            logits = self.members(inputs)
        return logits, {name: wide(taps[name]) for name in names}

    def _run(self, model: nn.Module, inputs: Tensor) -> Any:
        weight = next((p for p in model.parameters() if p.is_floating_point()), None)
        inputs = self._normalised(inputs)
        if weight is not None and inputs.is_floating_point():
            inputs = inputs.to(weight.dtype)
        with torch.no_grad(), evaluating(model), self._precision(inputs.device.type):
            return model(inputs)

    def _precision(self, device: str) -> contextlib.AbstractContextManager[object]:
        """Casts of weights are not kept: those made here have no gradient, and a student may share the weights."""
        enabled, dtype = self._effective(device)
        return torch.autocast(device, dtype, enabled=enabled, cache_enabled=False)

    def _effective(self, device: str) -> tuple[bool, torch.dtype]:
        """Its own autocast, or the loop's."""
        if self.autocast is None:
            return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return self.autocast != "none", AUTOCAST.get(self.autocast, torch.bfloat16)

    def _normalised(self, inputs: Tensor) -> Tensor:
        """(x * std + mean of the batches - the teacher's mean) / its std."""
        if self._affine is None:
            return inputs
        factor, shift = (inputs.new_tensor(values) for values in self._affine)
        if inputs.ndim < 2 or inputs.shape[1] != len(factor):
            raise AerogelError(
                f"Teacher: normalise has {len(factor)} channels, inputs {tuple(inputs.shape)} have others in dimension "
                "1; give a mean and a std for each"
            )
        view = (-1, *[1] * (inputs.ndim - 2))
        return inputs * factor.view(view) + shift.view(view)


def logits_of(output: Any, who: str = "the network") -> Tensor:
    """A network's logits: what it gives, or its `.logits` (Hugging Face). Raises AerogelError where there are none."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise AerogelError(
            f"distill: {who} must give a tensor or something with .logits, got {type(output).__name__}; wrap it in a "
            "module that gives its logits"
        )
    return logits


def _sha256(model: nn.Module) -> str:
    """Of its structure as it prints, and of all its numbers, wherever they are."""
    found = hashlib.sha256(repr(model).encode())
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def wide(x: Tensor) -> Tensor:
    """In single precision at least: losses are sums over many numbers."""
    return x if x.dtype == torch.float64 else x.float()


def _affine(normalise: tuple[Scale, Scale]) -> tuple[list[float], list[float]]:
    """x of the batches to x of the teacher: factor and shift of each channel."""
    (mean, std), (own_mean, own_std) = normalise
    sizes = {len(mean), len(std), len(own_mean), len(own_std)}
    if len(sizes) != 1 or not all(value > 0 for value in (*std, *own_std)):
        raise AerogelError(
            f"Teacher: normalise must be two pairs (mean, std), a number a channel, std > 0, got {normalise}; for "
            "instance ((data.mean, data.std), (mean, std)) with the teacher's own last"
        )
    factor = [a / b for a, b in zip(std, own_std, strict=True)]
    return factor, [(a - b) / c for a, b, c in zip(mean, own_mean, own_std, strict=True)]
