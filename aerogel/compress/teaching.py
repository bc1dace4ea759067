"""Who teaches, and what: the teachers as the user named them, and the objective that they and the losses make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.compress.job import Job
from aerogel.compress.settings import without_folders
from aerogel.data import batches
from aerogel.distill import Distil, Teacher, TeacherCache
from aerogel.distill.teachers import Scale, logits_of
from aerogel.errors import AerogelError
from aerogel.export import load_hf, open_model, read_config, saved_folder
from aerogel.export.hf import PREFIX
from aerogel.export.saved import CONFIG
from aerogel.imports import one_line


@dataclass(frozen=True)
class One:
    """A teacher. scale: the mean and std of the images that it was trained on, None where nothing says it."""

    name: str
    model: nn.Module
    scale: Scale | None


@dataclass(frozen=True)
class School:
    """The teachers one by one, all as one, and what the student is to learn from them."""

    teachers: list[One]
    teacher: Teacher
    objective: Distil

    @property
    def models(self) -> list[nn.Module]:
        return [one.model for one in self.teachers]


class Logits(nn.Module):
    """A network that gives its logits and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return logits_of(self.model(inputs))


class Rescaled(nn.Module):
    """A teacher beside others that were trained with another normalisation."""

    def __init__(self, model: nn.Module, normalise: tuple[Scale, Scale] | None) -> None:
        super().__init__()
        self.model = model
        self._teacher = Teacher(model, normalise=normalise)

    def extra_repr(self) -> str:
        return f"normalise={self._teacher.normalise}"

    def forward(self, inputs: Tensor) -> Tensor:
        return self._teacher(inputs)


def open_school(job: Job) -> School:
    """Raises AerogelError for whatever does not fit: a teacher, a loss, a tap."""
    found = open_teachers(job)
    teacher = as_one(job, found)
    _check_cache(job, teacher)
    return School(found, teacher, _objective(job, teacher))


def open_teachers(job: Job) -> list[One]:
    """Every teacher of the settings. Raises AerogelError for one without weights, or that does not fit the data."""
    lesson = job.settings.lesson
    files = iter(lesson.teacher_weights)
    with torch.random.fork_rng(devices=[]):
        found = [_open(job, text, files) for text in lesson.teacher]
    if left := list(files):
        raise AerogelError(
            f"--teacher-weights {left[0]} is left over: give one for each --teacher that is no saved folder, in their "
            "order"
        )
    for one in found:
        _check(job, one)
    if (given := _given_scale(job)) is not None and all(one.scale != given for one in found):
        raise AerogelError(
            f"mean and std under [distill] are for teachers that do not say so themselves, {found[0].name} does: "
            f"{found[0].scale}; leave them out"
        )
    return found


def as_one(job: Job, found: list[One]) -> Teacher:
    """All of them as one; each reads images normalised as when it was trained."""
    lesson, own, cache = job.settings.lesson, (job.data.mean, job.data.std), _cache(job)
    scales = [None if one.scale is None or one.scale == own else (own, one.scale) for one in found]
    if len(found) > 1 and any(scale != scales[0] for scale in scales):
        models = [Rescaled(one.model, scale) for one, scale in zip(found, scales, strict=True)]
        return Teacher(models, lesson.shares, lesson.combine, lesson.autocast, cache=cache)
    return Teacher([one.model for one in found], lesson.shares, lesson.combine, lesson.autocast, scales[0], cache)


def identities(job: Job, school: School) -> dict[str, Any]:
    """{"teacher", "student"}: sha256 of every network as a run begins with it."""
    return {"teacher": school.teacher.identity("cpu"), "student": Teacher(job.opened.model).identity("cpu")}


def _cache(job: Job) -> TeacherCache | None:
    lesson = job.settings.lesson
    if lesson.cache is None:
        return None
    heat = None if lesson.cache_top is None else lesson.temperature
    return TeacherCache(lesson.cache, job.data, job.settings.train, lesson.cache_kept, lesson.cache_top, heat)


def _check_cache(job: Job, teacher: Teacher) -> None:
    """Raises AerogelError when its folder was made for anything else, or cannot hold what is to be kept."""
    top, classes = job.settings.lesson.cache_top, job.data.num_classes
    if top is not None and top >= classes:
        raise AerogelError(f"cache_top must be < {classes}, the classes of {job.data.name}, got {top}; leave it out")
    if teacher.cache is not None:
        how = job.settings.train.autocast
        with torch.autocast("cpu", torch.float16 if how == "fp16" else torch.bfloat16, enabled=how != "none"):
            teacher.cache.check(teacher.identity("cpu"))


def _objective(job: Job, teacher: Teacher) -> Distil:
    """The losses, with what they train beside the student. Raises AerogelError as `Distil` and its `prepare` do."""
    lesson = job.settings.lesson
    made = Distil(teacher, lesson.losses, lesson.temperature, lesson.taps, lesson.options, lesson.mixup)
    made.prepare(job.opened.model, some(job), job.settings.seed)
    return made


def some(job: Job) -> Tensor:
    """Two images as training has them."""
    return next(batches(job.data, "train", min(2, len(job.data.train)))).inputs


def _given_scale(job: Job) -> Scale | None:
    lesson = job.settings.lesson
    return None if lesson.mean is None or lesson.std is None else (lesson.mean, lesson.std)


def _open(job: Job, text: str, files: Iterator[str]) -> One:
    data, name = job.data, without_folders(text)
    own = _given_scale(job) or job.own_scale  # the student's weights may have brought another one for the batches
    if text.startswith(PREFIX):
        model, mean, std = load_hf(text)
        return One(name, model, own if mean is None or std is None else (mean, std))
    weights = None if Path(text).is_dir() else next(files, None)
    opened = open_model(text, input_shape=data.input_shape, num_classes=data.num_classes, weights=weights,
                        trust=job.settings.trust)  # fmt: skip
    if not opened.trained and opened.factory is None:
        raise AerogelError(
            f"--teacher {text}: a network of the zoo without weights knows nothing; train it first (aerogel train "
            f"{text} --data {data.name} --out teacher, then --teacher teacher), or give --teacher-weights FILE"
        )
    said = opened.input
    if weights is not None and (Path(weights) / CONFIG).is_file():
        said = read_config(weights).input
    if said is not None and tuple(said.shape) != data.input_shape:
        size, here = (",".join(map(str, shape)) for shape in (said.shape, data.input_shape))
        raise AerogelError(f"--teacher {text} reads images of {size}, {data.name} has {here}; pass --input {size}")
    _check_classes(job, text)
    return One(name, opened.model, own if said is None else (said.mean, said.std))


def _check_classes(job: Job, text: str) -> None:
    """Raises AerogelError when a saved teacher was trained to tell other classes apart, or in another order."""
    folder = saved_folder(text)
    held = tuple(read_config(folder).classes) if folder else ()
    if len(held) == job.data.num_classes and held != job.data.classes:
        at = next(i for i, (a, b) in enumerate(zip(held, job.data.classes, strict=True)) if a != b)
        raise AerogelError(
            f"--teacher {text} calls class {at} {held[at]!r}, {job.data.name} calls it {job.data.classes[at]!r}; take "
            "a teacher of the same classes in the same order"
        )


def _check(job: Job, one: One) -> None:
    """Raises AerogelError unless it gives logits of the data's classes for the data's images."""
    images, classes = some(job), job.data.num_classes
    try:
        (logits,) = Teacher(one.model).members(images)
    except AerogelError as error:
        raise AerogelError(f"--teacher {one.name}: {error}") from error
    except Exception as error:  # a network of the user's own may raise anything
        size = ",".join(map(str, job.data.input_shape))
        raise AerogelError(
            f"--teacher {one.name} cannot read images of {size}: {one_line(error)}; pass --input, or another teacher"
        ) from error
    if tuple(logits.shape) != (len(images), classes):
        raise AerogelError(
            f"--teacher {one.name} tells {logits.shape[1]} classes apart, {job.data.name} has {classes}; take a "
            "teacher that was trained on them"
        )
