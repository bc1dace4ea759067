"""Any of the losses together, as one objective: `Distil(teacher, {"kd": 0.9, "hard": 0.1})`.

It owns what its losses train beside the student (projectors, the embeddings of CRD, ...): the loop trains and
checkpoints them with the objective, and they never are part of the student. The teacher is no part of it either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.data import Batch
from aerogel.distill.attention import attention_loss
from aerogel.distill.checks import check_positive, check_temperature
from aerogel.distill.crd import Contrast
from aerogel.distill.dist import dist_loss
from aerogel.distill.dkd import dkd_loss
from aerogel.distill.features import channels
from aerogel.distill.function_matching import mixed
from aerogel.distill.gather import gathered
from aerogel.distill.hints import Projector, hint_loss
from aerogel.distill.logit_mse import logit_mse_loss
from aerogel.distill.nkd import nkd_loss
from aerogel.distill.pkt import pkt_loss
from aerogel.distill.relational import relational_loss
from aerogel.distill.review import Review
from aerogel.distill.self_distillation import Exit, confidence_weighted_loss, deep_supervision_loss
from aerogel.distill.similarity import similarity_loss
from aerogel.distill.soft_targets import soft_target_loss
from aerogel.distill.standardised import standardised_loss
from aerogel.distill.taps import bare, taps_of
from aerogel.distill.teachers import Teacher, logits_of, wide
from aerogel.distill.vid import Variational, vid_loss
from aerogel.errors import AerogelError, nearest
from aerogel.graph import evaluating
from aerogel.train.distributed import ALONE, World, current

Loss = Callable[..., Tensor]
LOGITS: dict[str, Loss] = {
    "kd": soft_target_loss, "standardised": standardised_loss, "logit_mse": logit_mse_loss, "dkd": dkd_loss,
    "nkd": nkd_loss, "dist": dist_loss, "confidence": confidence_weighted_loss,
}  # fmt: skip
FEATURES: dict[str, Loss] = {
    "at": attention_loss, "sp": similarity_loss, "rkd": relational_loss, "pkt": pkt_loss,
}  # fmt: skip
HEADS: dict[str, type[nn.Module]] = {
    "hint": Projector, "vid": Variational, "crd": Contrast, "review": Review, "exits": Exit,
}  # fmt: skip
TAKERS: dict[str, Callable[..., Any]] = {**LOGITS, **FEATURES, **HEADS, "exits": deep_supervision_loss}  # of options
LOSSES = ("hard", *LOGITS, *FEATURES, *HEADS)
LABELLED = frozenset({"hard", "dkd", "nkd", "confidence", "crd", "exits"})
RELATIONS = frozenset({"dist", "confidence", "sp", "rkd", "pkt", "crd"})  # what they compare is the whole batch

Taken = Mapping[str, str]  # the student's module -> the teacher's


@dataclass(frozen=True)
class Seen:
    """What student and teacher gave on one batch. members: (K, n, C), a teacher each; None without a teacher."""

    logits: Tensor
    members: Tensor | None
    ours: dict[str, Tensor]
    theirs: dict[str, Tensor]
    labels: Tensor
    world: World


class Distil(nn.Module):
    """The objective: `losses` are names of LOSSES with their weights; each comes back under its name, weighted.

    teacher: a network, several, a Teacher; None where only "hard" and "exits" are asked for.
    taps: {student's module: teacher's} for every loss on features, shallow to deep; or such a mapping for each of them
    by its name. "exits" reads the student's alone, a list will do.
    options: by name of the loss, what its function (its module, for "hint", "vid", "crd", "review") takes beside
    features and logits: {"dkd": {"beta": 2.0}}; "temperature" among them overrides this objective's.
    A teacher with a cache serves losses on logits, of images that are not mixed.
    mixup: function matching, both networks see mixed images; no loss may then read labels.
    student, example: where both are given, `prepare` is called with them.
    Raises AerogelError for what does not fit together, as each loss does, and as `prepare`.
    """

    def __init__(
        self,
        teacher: Teacher | nn.Module | Sequence[nn.Module] | None,
        losses: Mapping[str, float],
        temperature: float = 4.0,
        taps: Mapping[str, Any] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        mixup: bool = False,
        student: nn.Module | None = None,
        example: Tensor | Batch | None = None,
    ) -> None:
        super().__init__()
        check_temperature("Distil", temperature)
        self.losses, self.temperature, self.mixup = _checked_losses(losses, mixup), temperature, mixup
        self.teacher = teacher if teacher is None or isinstance(teacher, Teacher) else Teacher(teacher)
        if self.teacher is None and (without := sorted(self.losses.keys() - {"hard", "exits"})):
            raise AerogelError(f"Distil: {', '.join(without)} must have a teacher, got None; give one")
        self.options = _checked_options(options or {}, self.losses)
        self.taps = _checked_taps(taps or {}, self.losses)
        self._check_cache()
        self.heads = nn.ModuleDict()
        self._channels: dict[str, int] = {}  # of the features that the heads were built for
        if (student is None) != (example is None):
            raise AerogelError("Distil: student and example must be given together; leave both out, or call prepare")
        if student is not None and example is not None:
            self.prepare(student, example)

    def prepare(self, student: nn.Module, example: Tensor | Batch, seed: int = 0) -> None:
        """Builds what is trained beside the student, from one example batch; before the optimizer is made.

        The modules start from `seed`; the global random state, the student and the teacher stay as they are.
        Raises AerogelError when it was called before, and for every tap, feature and class that does not fit.
        """
        if self.heads:
            raise AerogelError("Distil: prepare must be called once, its modules are built; make a new objective")
        inputs = example.inputs if isinstance(example, Batch) else example
        keys = example.keys if isinstance(example, Batch) else None
        example = Batch(inputs, torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device), keys)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(bare(student)):
            torch.default_generator.manual_seed(seed)
            seen = self._see(bare(student), example)
            for name in self.losses.keys() & HEADS.keys():
                self._channels |= {one: channels(seen.ours[one]) for one in self.taps[name]}
            heads = {name: nn.ModuleList(self._build(name, seen)) for name in HEADS if name in self.losses}
            self.heads.update({name: head.to(seen.logits) for name, head in heads.items()})
            for name in self.losses:
                self._loss(name, seen)

    def forward(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if missing := sorted(self.losses.keys() & HEADS.keys() - self.heads.keys()):
            raise AerogelError(
                f"Distil: {', '.join(missing)} must be prepared before training: call prepare(student, example), or "
                "give both to Distil"
            )
        seen = self._see(student, batch._replace(inputs=mixed(batch.inputs), keys=None) if self.mixup else batch)
        with torch.autocast(batch.inputs.device.type, enabled=False):  # the losses are sums over many numbers
            return {name: weight * self._loss(name, seen) for name, weight in self.losses.items()}

    def _see(self, student: nn.Module, batch: Batch) -> Seen:
        ours = list(dict.fromkeys(one for taken in self.taps.values() for one in taken))
        theirs = list(
            dict.fromkeys(two for name, taken in self.taps.items() if name != "exits" for two in taken.values())
        )
        # a loop calls the student in training mode, and then every process does
        training = bare(student).training and torch.is_grad_enabled()
        members, features = None, dict[str, Tensor]()
        if self.teacher is not None and theirs:
            members, features = self.teacher.features(batch.inputs, theirs)
        elif self.teacher is not None:
            members = self.teacher.answers(batch, keep=training)
        with taps_of(student, ours) as taps:
            logits = wide(logits_of(student(batch.inputs), "the student"))
        found = {one: wide(taps[one]) for one in ours}
        self._check_channels(found)
        world = current() if training else ALONE
        members = None if members is None else members.to(logits)
        return Seen(logits, members, found, {k: v.to(logits.dtype) for k, v in features.items()}, batch.labels, world)

    def _check_cache(self) -> None:
        """Raises AerogelError where a cache of logits cannot answer for the teacher."""
        cache = None if self.teacher is None else self.teacher.cache
        if cache is None:
            return
        if self.mixup:
            raise AerogelError(
                "Distil: mixup must go without a cache, every step mixes images anew; leave the cache or mixup out"
            )
        if readers := [name for name in self.taps if name != "exits"]:
            raise AerogelError(
                f"Distil: {', '.join(readers)} must see the teacher's features, a cache holds logits alone; leave the "
                "cache out, or these losses"
            )
        if cache.top is None:
            return
        if whole := sorted(self.losses.keys() & {"logit_mse", "standardised"}):
            raise AerogelError(
                f"Distil: {', '.join(whole)} must see all logits, the cache keeps the {cache.top} largest; make one "
                "without top"
            )
        heats = {self.options[name].get("temperature", self.temperature) for name in self.losses.keys() & LOGITS.keys()}
        if heats - {cache.temperature}:
            told = ", ".join(f"{heat:g}" for heat in sorted(heats))
            raise AerogelError(
                f"Distil: a cache of the {cache.top} largest logits must be made for the temperature of the losses, "
                f"{told}, got one for {cache.temperature:g}; make another, or one without top"
            )

    def _check_channels(self, found: dict[str, Tensor]) -> None:
        for name, count in self._channels.items():
            if channels(found[name]) != count:
                raise AerogelError(
                    f"Distil: {name!r} must give {count} channels, as when it was prepared, got "
                    f"{channels(found[name])}; make a new objective for the changed student"
                )

    def _build(self, name: str, seen: Seen) -> list[nn.Module]:
        make, options = HEADS[name], self.options[name]
        ours = [seen.ours[one] for one in self.taps[name]]
        if name == "exits":
            return [make(one, seen.logits.shape[-1]) for one in ours]
        theirs = [seen.theirs[two] for two in self.taps[name].values()]
        if name == "review":
            return [make(ours, theirs, **options)]
        return [make(one, two, **options) for one, two in zip(ours, theirs, strict=True)]

    def _loss(self, name: str, seen: Seen) -> Tensor:
        if name == "hard":
            return F.cross_entropy(seen.logits, seen.labels)
        if name in LOGITS:
            return self._on_logits(name, seen)
        ours = [seen.ours[one] for one in self.taps[name]]
        options = self.options[name]
        if name == "exits":
            exits = [head(one) for head, one in zip(self._heads(name), ours, strict=True)]
            return deep_supervision_loss(exits, seen.logits, seen.labels, **{"temperature": self.temperature} | options)
        theirs = [seen.theirs[two] for two in self.taps[name].values()]
        if name == "review":
            return self._heads(name)[0](ours, theirs)
        if name in RELATIONS:
            ours, theirs = ([gathered(x, seen.world) for x in xs] for xs in (ours, theirs))
        pairs = list(zip(ours, theirs, strict=True))
        if name in FEATURES:
            return torch.stack([FEATURES[name](one, two, **options) for one, two in pairs]).sum()
        labels = gathered(seen.labels, seen.world) if name == "crd" else seen.labels
        found = [_with_head(name, head, *pair, labels) for head, pair in zip(self._heads(name), pairs, strict=True)]
        return torch.stack(found).sum()

    def _heads(self, name: str) -> list[nn.Module]:
        heads = self.heads[name]
        assert isinstance(heads, nn.ModuleList)
        return list(heads)

    def _on_logits(self, name: str, seen: Seen) -> Tensor:
        assert self.teacher is not None
        assert seen.members is not None
        options = dict(self.options[name])
        temperature = options.pop("temperature", self.temperature)
        given = [seen.logits, self.teacher.combined(seen.members, temperature)]
        if name in LABELLED:
            given.append(seen.labels)
        if name in RELATIONS:
            given = [gathered(x, seen.world) for x in given]
        if "temperature" in inspect.signature(LOGITS[name]).parameters:
            options["temperature"] = temperature
        return LOGITS[name](*given, **options)


def _with_head(name: str, head: nn.Module, ours: Tensor, theirs: Tensor, labels: Tensor) -> Tensor:
    if name == "hint":
        return hint_loss(head(ours), theirs)
    if name == "vid":
        mean, variance = head(ours)
        return vid_loss(mean, variance, theirs)
    return head(ours, theirs, labels)


def _checked_losses(losses: Mapping[str, float], mixup: bool) -> dict[str, float]:
    if not losses:
        raise AerogelError('Distil: losses must not be empty; {"kd": 0.9, "hard": 0.1} is usual')
    for name, weight in losses.items():
        if name not in LOSSES:
            raise AerogelError(f"Distil: there is no loss {name!r}; {nearest(name, LOSSES)}")
        check_positive("Distil", **{f"weight of {name}": weight})
    if mixup and (labelled := sorted(losses.keys() & LABELLED)):
        raise AerogelError(f"Distil: with mixup no loss may read labels, got {', '.join(labelled)}; leave them out")
    return dict(losses)


def _checked_options(
    options: Mapping[str, Mapping[str, Any]], losses: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """By name of every loss, those that have none too."""
    for name, given in options.items():
        if name not in losses:
            raise AerogelError(
                f"Distil: options are for losses that are asked for, got {name!r}; {nearest(name, losses)}"
            )
        known = _with_default(TAKERS[name]) if name in TAKERS else {}
        for key, value in given.items():
            if key not in known:
                raise AerogelError(f"Distil: {name} has no option {key!r}; {nearest(key, known)}")
            kinds = int if isinstance(known[key], int) else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise AerogelError(
                    f"Distil: {key} of {name} must be a {'whole ' if kinds is int else ''}number, got {value!r}; "
                    f"{known[key]} is usual"
                )
    return {name: dict(options.get(name, {})) for name in losses}


def _with_default(function: Callable[..., Any]) -> dict[str, float]:
    """Its options, numbers all of them."""
    return {key: p.default for key, p in inspect.signature(function).parameters.items() if p.default is not p.empty}


def _checked_taps(taps: Mapping[str, Any], losses: Mapping[str, float]) -> dict[str, dict[str, str]]:
    """By name of every loss on features: the student's module -> the teacher's."""
    readers = [name for name in losses if name in FEATURES or name in HEADS]
    own = any(not isinstance(value, str) for value in taps.values())
    if not readers and taps:
        raise AerogelError(f"Distil: taps are given but no loss reads features; add one of {', '.join(FEATURES)}")
    if own and (odd := sorted(set(taps) ^ set(readers))):
        raise AerogelError(
            f"Distil: taps by loss must name each loss on features ({', '.join(readers)}) and no other, got "
            f"{', '.join(taps)}; {'add' if odd[0] in readers else 'leave out'} {odd[0]}"
        )
    found: dict[str, dict[str, str]] = {}
    for name in readers:
        given = taps[name] if own else taps
        if name == "exits" and isinstance(given, list | tuple):
            given = {one: one for one in given}
        if not isinstance(given, Mapping) or not given or not all(isinstance(two, str) for two in given.values()):
            raise AerogelError(
                f"Distil: {name} must have taps, {{student's module: teacher's module}}, got {given!r}; names "
                "are those of named_modules()"
            )
        found[name] = dict(given)
    return found
