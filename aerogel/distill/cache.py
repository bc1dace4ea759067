"""What a teacher answers, kept on the disk: a second run asks it nothing, and gets the same gradient.

    cache = TeacherCache("answers/", data, recipe)
    objective = Distil(Teacher(big, cache=cache), {"kd": 0.9, "hard": 0.1})

A row belongs to (image, augmentation): a batch's keys (aerogel.data.Batch) name image and epoch, and under one seed,
augmentation and batch size the epoch says how the image was changed. Without augmentation all epochs share one
row an image. A cache that knows an image by its place alone answers for another crop than the student sees, which is a
fixed teacher (Beyer et al. 2022, arXiv:2106.05237: 78.1 instead of 81.2 % after 1,200 epochs on ImageNet). So the
inputs' own mark is kept too, and compared whenever a row is read.

The folder: cache.json says what it was made for (data, views, teacher, what is kept); anything else is refused by name.
It also holds what the teacher said of two images of noise, and every run asks that once more: code, plain numbers and
libraries, which no hash of weights shows, would make another teacher too.
views/EPOCH/*.rows, a file a process, that only grow (cache_rows.py): several processes, a run that was killed, and two
runs at once add to one cache. Files are mapped, and their sha256 compared when they are first read. In memory: 12
bytes an image.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aerogel.data import Batch, Dataset
from aerogel.distill.cache_index import Index
from aerogel.distill.cache_rows import Layout, Records, framed, marks
from aerogel.distill.checks import check_temperature
from aerogel.errors import AerogelError, nearest
from aerogel.files import check_free, fsync, read_json, write_json
from aerogel.train.recipe import Recipe

VERSION = 1
KEPT = ("exact", "fp16")
MANIFEST = "cache.json"
CLOSE = 0.02  # of the largest logit: a probe's answer by another machine, or in bf16
SECONDS = 30.0  # of rows that a loss of power may take
PARTS = {
    "data": "another data set", "views": "another augmentation, seed or batch size", "teacher": "another teacher",
    "kept": "another format",
}  # fmt: skip


def probe(inputs: Tensor) -> Tensor:
    """Two images of noise, always the same, as the inputs are: (n, ...) -> (2, ...)."""
    noise = torch.randn((2, *inputs.shape[1:]), generator=torch.Generator().manual_seed(0))
    return noise.to(inputs)


class TeacherCache:
    """The rows in `folder`, which is made when the first is written, for training on `data` by `recipe`.

    kept: "exact", the numbers as the teacher gave them, or "fp16", in half the bytes (cache_rows.py tells the cost).
    top: keep the so many largest logits alone, for losses at the one `temperature`.
    asked, found: images of training that the teacher was asked for, and that it was not.
    Raises AerogelError for a bad argument. What the folder was made for is compared at the first batch.
    """

    def __init__(
        self,
        folder: Path | str,
        data: Dataset,
        recipe: Recipe,
        kept: str = "exact",
        top: int | None = None,
        temperature: float | None = None,
    ) -> None:
        if kept not in KEPT:
            raise AerogelError(f"TeacherCache: kept must be exact or fp16, got {kept!r}; {nearest(kept, KEPT)}")
        if (top is None) != (temperature is None) or (top is not None and top < 1):
            raise AerogelError(
                f"TeacherCache: top must be >= 1 and go with the temperature of the losses, got {top=}, "
                f"{temperature=}; leave both out to keep every logit"
            )
        if temperature is not None:
            check_temperature("TeacherCache", temperature)
        augment = data.augment if recipe.augment is None else recipe.augment
        views: dict[str, Any] = {"augment": augment}
        if augment != "none":
            views |= {"seed": recipe.seed, "batch_size": recipe.batch_size}
        self.folder = Path(folder).absolute()
        self.name, self.kept, self.top, self.temperature = data.name, kept, top, temperature
        self.augmented, self.images = augment != "none", len(data.train)
        self.passes = math.ceil(recipe.epochs) if self.augmented else 1
        self.asked = self.found = 0
        self._for = {
            "data": {"train": data.train.fingerprint, "mean": data.mean, "std": data.std},
            "views": views,
            "kept": {"kept": kept, "top": top, "temperature": temperature},
        }
        self._forget()

    def _forget(self) -> None:
        """What belongs to this process alone."""
        self._layout: Layout | None = None
        self._owner = b""
        self._teacher: dict[str, Any] | None = None
        self._probed = False
        self._view = -1
        self._mine: Path | None = None
        self._written, self._synced = False, 0.0

    def __getstate__(self) -> dict[str, Any]:
        """To another process, or a copy: the same question, nothing opened."""
        own = ("_layout", "_owner", "_teacher", "_probed", "_view", "_mine", "_written", "_synced", "_index")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, held: dict[str, Any]) -> None:
        vars(self).update(held)
        self._forget()

    def check(self, teacher: dict[str, Any]) -> None:
        """Raises AerogelError unless the folder is this cache's, or can still be made; as the first batch does."""
        self._open(teacher)
        if self._layout is None:
            above = next(path for path in (self.folder, *self.folder.parents) if os.path.lexists(path))
            if not above.is_dir():
                raise AerogelError(f"cache: cannot make {self.folder}, {above} is no folder; name another folder")
            check_free(self.folder, 1, "teacher outputs")

    def members(self, ask: Callable[[Tensor], Tensor], teacher: dict[str, Any], batch: Batch, keep: bool) -> Tensor:
        """The teachers' logits for the batch: (K, n, C). What is not there is asked, and kept.

        ask: (n, ...) -> (K, n, C). teacher: what the answers depend on. keep: this is training; else nothing is
        written, and the teacher is asked wherever inputs or precision are not those of training.
        Raises AerogelError for a batch without keys, a folder made for anything else, damaged files, and inputs that
        are not those that a row was made from.
        """
        if not keep and (batch.keys is None or self._precision(teacher) != teacher["autocast"]):
            return ask(batch.inputs)
        self._open(teacher)
        if self._layout is not None and not self._probed:
            self._check_probe(ask(probe(batch.inputs)))
        if not keep and not self._of_training(batch):
            return ask(batch.inputs)
        places, own = self._places(batch), marks(batch.inputs).cpu()
        there = self._lookup(places)
        if not keep and not (there.all() and (self._read(places)["mark"] == own.numpy()).all()):
            return ask(batch.inputs)
        found = None if there.all() else self._ask(ask, batch, places, own, there)
        assert self._layout is not None
        records = np.empty(len(there), self._layout.record)
        if there.any():
            records[there] = self._read(places[there])
            self._check_marks(records[there], own.numpy()[there])
        if found is not None:
            records[~there] = found
        self.found += int(there.sum()) if keep else 0
        return self._layout.unpacked(records).to(batch.inputs.device)

    def sync(self) -> None:
        """Returns once every row that this process wrote is on the disk."""
        if self._mine is not None and self._written:
            fsync(self._mine)
        self._written, self._synced = False, time.monotonic()

    # ------------------------------------------------------------ what it is for

    def _precision(self, teacher: dict[str, Any]) -> Any:
        """In which the answers were given, or are going to be."""
        held = self._teacher
        if held is None and (self.folder / MANIFEST).exists():
            held = self._held()["teacher"]
        return (held or teacher).get("autocast")

    def _open(self, teacher: dict[str, Any]) -> None:
        """Compares what the folder was made for, once for each teacher."""
        if teacher == self._teacher:
            return
        wanted = {**self._for, "teacher": teacher}
        self._owner = hashlib.sha256(_text(wanted).encode()).digest()
        empty = _is_empty(self.folder)  # before the manifest is looked for, which another process may just be writing
        if (self.folder / MANIFEST).exists():
            self._layout = self._checked(wanted)
        elif not empty:
            raise AerogelError(f"cache: {self.folder} is there and is no cache of teacher outputs; name a new folder")
        self._teacher, self._probed = teacher, False

    def _check_probe(self, said: Tensor) -> None:
        """Raises AerogelError where the teacher answers otherwise than when the folder was made."""
        held = torch.tensor(self._held()["probe"], dtype=said.dtype, device=said.device)
        far = float((said - held).abs().max()) if said.shape == held.shape else math.inf
        if not far <= CLOSE * float(held.abs().max()):
            raise AerogelError(
                f"cache: the teacher has the weights with which {self.folder} was made and answers otherwise (logits "
                f"differ by {far:.3g}): its code or its settings have changed; name another folder, or delete this one"
            )
        self._probed = True

    def _held(self) -> dict[str, Any]:
        """The manifest. Raises AerogelError where it is none."""
        path = self.folder / MANIFEST
        held = read_json(path)
        parts = [*PARTS, "rows"]
        whole = isinstance(held, dict) and isinstance(held.get("probe"), list)
        if not whole or any(not isinstance(held.get(part), dict) for part in parts):
            raise AerogelError(f"cache: {path} is no cache's; name another folder")
        if held.get("version") != VERSION:
            raise AerogelError(f"cache: {path} is of version {held.get('version')}, not {VERSION}; name another folder")
        return held

    def _checked(self, wanted: dict[str, Any]) -> Layout:
        """The layout of a folder that was made for just this. Raises AerogelError naming what differs."""
        held = self._held()
        for part, what in PARTS.items():
            ours, theirs = json.loads(_text(wanted[part])), held[part]
            if ours != theirs:
                names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
                told = ", ".join(f"{n} {_short(theirs.get(n))} instead of {_short(ours.get(n))}" for n in names)
                raise AerogelError(
                    f"cache: {self.folder} was made for {what} ({told}); name another folder, or delete this one"
                )
        try:
            layout = Layout(**held["rows"])
            whole = layout.record.itemsize > 0 and (layout.kept, layout.top, layout.temperature) == (
                self.kept, self.top, self.temperature,
            )  # fmt: skip
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            raise AerogelError(
                f"cache: {self.folder / MANIFEST} is damaged, its rows are of no known form; name another folder, or "
                "delete this one"
            )
        return layout

    def _begin(self, logits: Tensor, probed: Tensor) -> Layout:
        """The layout that the first answer asks for; writes what the folder is for."""
        members, _, classes = logits.shape
        if self.top is not None and self.top >= classes:
            raise AerogelError(
                f"TeacherCache: top must be < {classes}, the classes of the teacher, got {self.top}; leave it out"
            )
        dtype = str(logits.dtype).removeprefix("torch.")
        layout = Layout(members, classes, dtype, self.kept, self.top, self.temperature)
        need = self.images * self.passes * layout.record.itemsize
        check_free(self.folder, need, f"teacher outputs of {self.images * self.passes:,} images")
        wanted = {**self._for, "teacher": self._teacher}
        if not (self.folder / MANIFEST).exists():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise AerogelError(
                    f"cache: cannot make {self.folder}: {error.strerror}; name another folder"
                ) from error
            about = {"data": self.name, "images": self.images}
            write_json(self.folder / MANIFEST, {"version": VERSION, "about": about, **wanted,
                                                  "rows": asdict(layout), "probe": probed.tolist()})  # fmt: skip
        return self._checked(wanted)  # another process may have been first

    # ------------------------------------------------------------ rows

    def _of_training(self, batch: Batch) -> bool:
        """Whether the keys may be those of a training batch: another split can have more images than training has."""
        keys = batch.keys
        return keys is None or len(keys) == 0 or int(keys.min()) // self.images == int(keys.max()) // self.images

    def _places(self, batch: Batch) -> np.ndarray:
        """Of the batch's images in the view's index: int64 (n,). Turns to that view."""
        if batch.keys is None:
            raise AerogelError(
                "cache: batches must say which images they hold; take those of aerogel.data.batches, or give "
                "Batch(inputs, labels, keys)"
            )
        keys = batch.keys.cpu().numpy()
        epochs = np.unique(keys // self.images)
        if keys.shape != (len(batch.inputs),) or len(epochs) > 1 or (keys < 0).any():
            raise AerogelError(
                f"cache: keys must be epoch * {self.images} + place, >= 0, a key an image, of one epoch, got "
                f"{_short(keys.tolist())}; take those of aerogel.data.batches"
            )
        view = int(epochs[0]) if self.augmented and len(epochs) else 0
        if view != self._view:
            self.sync()
            self._mine, self._view = None, view
            self._index = Index(self.images)
        return keys % self.images

    def _lookup(self, places: np.ndarray) -> np.ndarray:
        """Which rows are there: bool (n,). Looks for what other processes have written meanwhile."""
        there = self._index.file[places] >= 0
        if self._layout is None or there.all():
            return there
        for path in sorted(self._rows_folder.glob("*.rows")):
            if path != self._mine:
                self._index.take(path, self._owner, self._layout)
        return self._index.file[places] >= 0

    @property
    def _rows_folder(self) -> Path:
        return self.folder / "views" / f"{self._view:06d}"

    def _read(self, places: np.ndarray) -> Records:
        assert self._layout is not None
        return self._index.read(places, self._layout)

    def _ask(
        self, ask: Callable[[Tensor], Tensor], batch: Batch, places: np.ndarray, own: Tensor, there: np.ndarray
    ) -> Records:
        """Asks for the rows that are not there, and adds them to this process's file."""
        assert batch.keys is not None
        missing = torch.from_numpy(~there)
        some = missing.to(batch.inputs.device)
        logits = ask(batch.inputs[some] if there.any() else batch.inputs)
        if self._layout is None:
            self._layout = self._begin(logits, ask(probe(batch.inputs)))
            self._probed = True
        now = (logits.shape[0], logits.shape[2], str(logits.dtype).removeprefix("torch."))
        if now != (self._layout.members, self._layout.classes, self._layout.dtype):
            raise AerogelError(f"cache: {self.folder} holds {self._layout}, the teacher gives {now}; name another one")
        records = self._layout.packed(batch.keys.cpu()[missing], own[missing], logits)
        self._write(records, places[~there])
        self.asked += len(records)
        return records

    def _write(self, records: Records, places: np.ndarray) -> None:
        """One frame, in one write. After an error the next one goes to a new file: this one's end may be torn."""
        path = self._mine or self._rows_folder / f"{secrets.token_hex(6)}.rows"
        self._mine = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                left = memoryview(framed(records, self._owner))
                end = os.fstat(handle).st_size + len(left)
                while left:
                    left = left[os.write(handle, left) :]
            finally:
                os.close(handle)
        except OSError as error:
            raise AerogelError(
                f"cache: cannot write {path}: {error.strerror or error}; make room and start again: what was kept stays"
            ) from error
        self._mine, self._written = path, True
        self._index.add(path, places, end - records.nbytes, records.itemsize)
        if time.monotonic() - self._synced > SECONDS:
            self.sync()

    def _check_marks(self, records: Records, own: np.ndarray) -> None:
        if (wrong := records["mark"] != own).any():
            raise AerogelError(
                f"cache: {int(wrong.sum())} of {len(own)} images are not those that {self.folder} answers for, the "
                f"first by key {int(records['key'][wrong][0])}: the batches are of another split or seed, or something "
                "changes the inputs on their way; take those of aerogel.data.batches, or train without a cache"
            )


def _is_empty(folder: Path) -> bool:
    """Whether nothing is there yet but what another process may be writing this moment."""
    if not folder.is_dir():
        return not os.path.lexists(folder)
    return all(item.name.startswith(".") for item in folder.iterdir())


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _short(value: Any) -> str:
    """Of hashes and lists the beginning."""
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
