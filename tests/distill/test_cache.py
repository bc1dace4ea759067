"""A cache of teacher outputs: the same losses and weights as live, no teacher pass twice, and no wrong answer ever."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cache_ranks import RECIPE, Asked, trained
from distil_ranks import Net, some_digits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import aerogel.train.steps as loop
from aerogel.data import Batch, Dataset, batches
from aerogel.distill import Distil, Teacher, TeacherCache, soft_target_loss
from aerogel.distill.cache_rows import HEADER, Layout, framed, frames, marks
from aerogel.errors import AerogelError
from aerogel.train import Recipe, fit, load_checkpoint, save_checkpoint, start, steps

SHIFT = RECIPE.model_copy(update={"augment": "shift"})
PLAIN = RECIPE.model_copy(update={"augment": "none"})
DATA = some_digits()
N = len(DATA.train)  # 63


def equal(one: Net, other: Net) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_same_as_live_to_the_bit_where_every_view_is_new(tmp_path: Path, accumulate: int) -> None:
    recipe = SHIFT.model_copy(update={"accumulate": accumulate})
    losses = {"kd": 0.9, "hard": 0.1}  # with parts, relations see a part of the batch: the same anyway
    live, student, _, _ = trained(None, recipe, DATA, losses)
    for run in (1, 2):
        told, found, teacher, cache = trained(tmp_path / "answers", recipe, DATA, losses)
        assert told == live
        assert equal(found, student)
        assert cache is not None
        new = 2 * N if run == 1 else 0
        assert (cache.asked, cache.found) == (new, 2 * N - new)
        # on top of that each run asks about two images of noise, and the first about three: may their order change?
        assert teacher.images - new == (5 if run == 1 else 2)


def test_without_augmentation_every_image_is_asked_for_once(tmp_path: Path) -> None:
    """In the second epoch an answer is one that was given beside other images, whose rounding it keeps."""
    live = trained(None, PLAIN, DATA)[0]
    first, found, _, cache = trained(tmp_path / "answers", PLAIN, DATA)
    assert cache is not None
    assert (cache.asked, cache.found) == (N, N)
    for ours, theirs in zip(first, live, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)
    other = PLAIN.model_copy(update={"seed": 5, "batch_size": 17, "epochs": 3})  # the images are the same
    second, again, teacher, _ = trained(tmp_path / "answers", PLAIN, DATA)
    assert second == first
    assert equal(again, found)
    assert teacher.passes == 1  # about two images of noise
    assert trained(tmp_path / "answers", other, DATA)[2].passes == 1


def test_answers_in_half_precision_and_of_several_teachers(tmp_path: Path) -> None:
    live = trained(None, SHIFT, DATA, {"kd": 1.0})[0]
    first = trained(tmp_path / "answers", SHIFT, DATA, {"kd": 1.0}, kept="fp16")[0]
    second, _, teacher, _ = trained(tmp_path / "answers", SHIFT, DATA, {"kd": 1.0}, kept="fp16")
    assert teacher.passes == 1  # about two images of noise
    assert second == first
    assert first != live
    for ours, theirs in zip(first, live, strict=True):
        assert ours["kd"] == pytest.approx(theirs["kd"], abs=2e-3)
    nets = [Asked(1), Asked(2)]
    for combine in ("arithmetic", "geometric"):  # how they are combined is no part of what they answer
        objective = Distil(
            Teacher(nets, [1, 3], combine, cache=TeacherCache(tmp_path / "two", DATA, PLAIN)), {"kd": 1.0}
        )
        told: list[float] = []
        fit(start(Net(), objective, DATA, PLAIN), DATA, on_step=lambda s, told=told: told.append(s.losses["kd"]))
        plain = Distil(Teacher(nets, [1, 3], combine), {"kd": 1.0})
        expected: list[float] = []
        fit(start(Net(), plain, DATA, PLAIN), DATA, on_step=lambda s, to=expected: to.append(s.losses["kd"]))
        assert told == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 60), classes=st.integers(2, 50))
def test_half_precision_moves_no_probability_further_than_it_says(seed: int, scale: float, classes: int) -> None:
    z = scale * torch.randn(2, 5, classes, generator=torch.Generator().manual_seed(seed)) + 7
    layout = Layout(2, classes, "float32", "fp16")
    found = layout.unpacked(layout.packed(torch.arange(5), torch.arange(5), z))
    limit = (1 / math.e + math.log(classes)) / 2048 * 1.01 + 1e-6
    for heat in (0.5, 1.0, 4.0, 20.0):
        moved = (found.double() / heat).softmax(-1) - (z.double() / heat).softmax(-1)
        assert moved.abs().max() <= limit


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), top=st.integers(1, 9), heat=st.sampled_from([1.0, 4.0, 20.0]))
def test_the_largest_logits_keep_their_gradients(seed: int, top: int, heat: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher = 6 * torch.randn(1, 4, 10, generator=generator, dtype=torch.float64)
    student = torch.randn(4, 10, generator=generator, dtype=torch.float64).requires_grad_()
    layout = Layout(1, 10, "float64", "exact", top, heat)
    found = layout.unpacked(layout.packed(torch.arange(4), torch.arange(4), teacher))
    ours, theirs = (torch.autograd.grad(soft_target_loss(student, x[0], heat), student)[0] for x in (found, teacher))
    kept = teacher[0].topk(top).indices
    torch.testing.assert_close(ours.gather(1, kept), theirs.gather(1, kept), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.sum(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)  # so do the others


def test_a_cache_of_the_largest_trains(tmp_path: Path) -> None:
    options = {"top": 3, "temperature": 3.0, "kept": "fp16"}
    first = trained(tmp_path / "answers", PLAIN, DATA, {"kd": 1.0}, **options)[0]
    second, _, teacher, _ = trained(tmp_path / "answers", PLAIN, DATA, {"kd": 1.0}, **options)
    assert first == second
    assert teacher.passes == 1  # about two images of noise


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Also where it stopped in the middle of a write, or resumes from a checkpoint in the middle of an epoch."""
    unbroken = trained(tmp_path / "whole", SHIFT, DATA)[1]

    def begin() -> tuple[loop.State, Asked]:
        teacher = Asked()
        cache = TeacherCache(tmp_path / "answers", DATA, SHIFT)
        objective = Distil(Teacher(teacher, cache=cache), {"kd": 0.9, "hard": 0.1, "dist": 1.0}, 3.0)
        return start(Net(), objective, DATA, SHIFT), teacher

    broken, _ = begin()
    for step in steps(broken, DATA):
        if step.number == 1:
            save_checkpoint(tmp_path / "checkpoints", broken)
        if step.number == 2:
            break
    [file] = (tmp_path / "answers" / "views" / "000000").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])  # the second step's 21 rows are lost, the first's are there
    resumed, teacher = begin()
    load_checkpoint(tmp_path / "checkpoints", resumed)
    before = teacher.images
    fit(resumed, DATA)
    assert isinstance(resumed.model, Net)
    assert equal(resumed.model, unbroken)
    assert teacher.images - before == 2 * N - 21
    assert len(list((tmp_path / "answers" / "views" / "000000").iterdir())) == 2  # nothing is appended to a torn file


def test_two_at_once_share_their_rows(tmp_path: Path) -> None:
    def member() -> TeacherCache:
        return TeacherCache(tmp_path / "answers", DATA, PLAIN)

    one, other, teacher = member(), member(), Teacher(Asked())
    for number, batch in enumerate(batches(DATA, "train", 9)):
        cache = (one, other)[number % 2]
        cache.members(teacher.members, teacher.identity("cpu"), batch, keep=True)
    copied = pickle.loads(pickle.dumps(one))
    for cache in (one, other, copied, member()):
        before = cache.asked
        for batch in batches(DATA, "train", 21, seed=4, shuffle=True, epoch=2):
            found = cache.members(teacher.members, teacher.identity("cpu"), batch, keep=True)
            torch.testing.assert_close(found, teacher.members(batch.inputs), rtol=1e-12, atol=1e-12)
        assert cache.asked == before


def frame() -> tuple[bytes, Layout]:
    layout = Layout(1, 3, "float32", "exact")
    rows = torch.arange(4)
    return framed(layout.packed(rows, rows, torch.randn(1, 4, 3)), bytes(32)), layout


def test_every_flipped_bit_of_a_frame_is_found() -> None:
    whole, layout = frame()
    assert len(list(frames(memoryview(whole + whole), 0, bytes(32), layout, "f"))) == 2
    for place in range(len(whole)):
        for bit in (1, 128):
            spoilt = bytearray(whole + whole)
            spoilt[place] ^= bit
            with pytest.raises(AerogelError, match=r"f is damaged .*; delete this file, its rows are made anew"):
                list(frames(memoryview(spoilt), 0, bytes(32), layout, "f"))
    for end in range(len(whole)):  # a torn end is not read
        assert len(list(frames(memoryview(whole + whole[:end]), 0, bytes(32), layout, "f"))) == 1
    with pytest.raises(AerogelError, match="f was written for another cache"):
        list(frames(memoryview(whole), 0, b"1" * 32, layout, "f"))


def test_a_damaged_file_stops_the_run_and_its_loss_costs_its_rows_alone(tmp_path: Path) -> None:
    whole = trained(tmp_path / "answers", PLAIN, DATA)[0]
    [file] = (tmp_path / "answers" / "views" / "000000").iterdir()
    held = bytearray(file.read_bytes())
    held[HEADER.size + 77] ^= 4
    file.write_bytes(held)
    with pytest.raises(AerogelError, match=rf"{file.name} is damaged between bytes {HEADER.size} and .* sha256"):
        trained(tmp_path / "answers", PLAIN, DATA)
    file.unlink()
    assert trained(tmp_path / "answers", PLAIN, DATA)[0] == whole


def other_pixels() -> Dataset:
    split = dataclasses.replace(DATA.train, images=DATA.train.images.flip(0))  # type: ignore[union-attr]
    return dataclasses.replace(DATA, train=split)


CHANGED = [
    ("data", {"data": other_pixels()}, PLAIN, r"for another data set \(train \w{20}\.\.\. instead of"),
    ("scale", {"data": dataclasses.replace(DATA, std=(0.5,))}, PLAIN, r"for another data set \(std"),
    (
        "augment",
        {},
        SHIFT,
        r"for another augmentation, seed or batch size \(augment none instead of shift, batch_size None",
    ),
    ("teacher", {"seed": 2}, PLAIN, r"for another teacher \(networks"),
    (
        "precision",
        {},
        PLAIN.model_copy(update={"autocast": "bf16"}),
        r"for another teacher \(autocast full instead of bf",
    ),
    ("format", {"kept": "fp16"}, PLAIN, r"for another format \(kept exact instead of fp16\)"),
    ("top", {"top": 2, "temperature": 3.0}, PLAIN, r"for another format \(temperature None instead of 3\.0, top None"),
]


@pytest.mark.parametrize(("more", "recipe", "message"), [row[1:] for row in CHANGED], ids=[row[0] for row in CHANGED])
def test_a_cache_made_for_anything_else_is_refused(
    more: dict[str, Any], recipe: Recipe, message: str, tmp_path: Path
) -> None:
    trained(tmp_path / "answers", PLAIN, DATA, {"kd": 1.0})
    options = {"data": DATA, "losses": {"kd": 1.0}} | more
    with pytest.raises(AerogelError, match=f"answers was made {message}.*; name another folder, or delete this one"):
        trained(tmp_path / "answers", recipe, **options)


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("batch_size", 20)])
def test_seed_and_batch_size_matter_where_images_are_changed(name: str, value: int, tmp_path: Path) -> None:
    trained(tmp_path / "answers", SHIFT, DATA)
    with pytest.raises(
        AerogelError, match=f"for another augmentation, seed or batch size .{name} .* instead of {value}"
    ):
        trained(tmp_path / "answers", SHIFT.model_copy(update={name: value}), DATA)


def test_a_teacher_that_changes_is_noticed(tmp_path: Path) -> None:
    net = Asked()
    teacher, batch = Teacher(net, cache=TeacherCache(tmp_path / "a", DATA, PLAIN)), next(batches(DATA, "train", 9))
    before = teacher.answers(batch, keep=True)
    assert torch.equal(teacher.answers(batch, keep=True), before)
    with torch.no_grad():
        net.head.bias.add_(1)
    with pytest.raises(AerogelError, match=r"for another teacher \(networks"):
        teacher.answers(batch, keep=True)


class Tuned(nn.Module):
    """Holds a number that neither its weights nor its name show."""

    def __init__(self, times: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(DATA.train.images.shape[1:].numel(), 10)).double()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.double()) * self.times


def test_a_teacher_whose_code_or_numbers_changed_is_noticed(tmp_path: Path) -> None:
    (batch,) = batches(DATA, "train", N)

    def answers(times: float) -> Tensor:
        cache = TeacherCache(tmp_path / "answers", DATA, PLAIN)
        return Teacher(Tuned(times), cache=cache).answers(batch, keep=True)

    first = answers(1.0)
    with pytest.raises(AerogelError, match=r"with which .*answers was made and answers otherwise \(logits differ by"):
        answers(1.5)
    assert torch.equal(answers(1.0), first)


def test_images_that_are_not_those_of_the_row_are_noticed(tmp_path: Path) -> None:
    teacher = Teacher(Asked(), cache=TeacherCache(tmp_path / "a", DATA, PLAIN))
    batch, val = next(batches(DATA, "train", 9)), next(batches(DATA, "val", 9))
    teacher.answers(batch, keep=True)
    changed = batch._replace(inputs=batch.inputs.roll(1, dims=2))
    for wrong in (changed, val):
        with pytest.raises(AerogelError, match=r"images are not those that .*a answers for, the first by key 0"):
            teacher.answers(wrong, keep=True)
        assert torch.equal(teacher.answers(wrong, keep=False), teacher.members(wrong.inputs))  # as in an evaluation
    with pytest.raises(AerogelError, match="batches must say which images they hold; take those of aerogel"):
        teacher.answers(Batch(*batch[:2]), keep=True)
    for keys in (batch.keys - 1, batch.keys[1:], batch.keys * N):  # type: ignore[operator,index]
        with pytest.raises(
            AerogelError, match=r"keys must be epoch \* 63 \+ place, >= 0, a key an image, of one epoch"
        ):
            teacher.answers(batch._replace(keys=keys), keep=True)


def test_marks_tell_images_apart_whatever_their_order_in_memory() -> None:
    x = torch.randn(50, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    found = marks(x)
    assert len(set(found.tolist())) == 50
    assert torch.equal(marks(x.contiguous(memory_format=torch.channels_last)), found)
    assert torch.equal(torch.cat([marks(part) for part in x.split(7)]), found)
    swapped = x.clone()
    swapped[0, 0, 0, 0], swapped[0, 0, 0, 1] = x[0, 0, 0, 1], x[0, 0, 0, 0]
    assert (marks(swapped) != found).tolist() == [True] + [False] * 49
    for dtype in (torch.float64, torch.bfloat16, torch.uint8, torch.int64):
        assert len(set(marks((100 * x).to(dtype)).tolist())) == 50
    assert marks(x[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("losses", "more", "kept", "message"),
    [
        ({"kd": 1.0}, {"mixup": True}, {}, "mixup must go without a cache, every step mixes images anew"),
        ({"at": 1.0, "kd": 1.0}, {"taps": {"one": "one"}}, {}, "at must see the teacher's features, a cache"),
        ({"logit_mse": 1.0, "kd": 1.0}, {}, {"top": 2, "temperature": 4.0}, "logit_mse must see all logits"),
        ({"kd": 1.0}, {}, {"top": 2, "temperature": 2.0}, "for the temperature of the losses, 4, got one for 2"),
    ],
)  # fmt: skip
def test_what_a_cache_cannot_serve_is_refused(
    losses: dict[str, float], more: dict[str, Any], kept: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AerogelError, match=message):
        Distil(Teacher(Net(6), cache=TeacherCache(tmp_path / "a", DATA, PLAIN, **kept)), losses, **more)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kept": "half"}, "kept must be exact or fp16, got 'half'"),
        ({"top": 3}, "top must be >= 1 and go with the temperature of the losses, got top=3, temperature=None"),
        ({"top": 0, "temperature": 1.0}, "top must be >= 1"),
        ({"top": 1, "temperature": 0.0}, "TeacherCache: temperature must be > 0"),
        ({"top": 10, "temperature": 3.0}, "top must be < 10, the classes of the teacher, got 10"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match=message):
        trained(tmp_path / "a", PLAIN, DATA, {"kd": 1.0}, **options)


def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AerogelError, match="is there and is no cache of teacher outputs; name a new folder"):
        trained(tmp_path, PLAIN, DATA)
    (tmp_path / "cache.json").write_text("{}")
    with pytest.raises(AerogelError, match=r"cache\.json is no cache's"):
        trained(tmp_path, PLAIN, DATA)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "cache.json"}
    trained(tmp_path / "a", PLAIN, DATA)
    held = json.loads((tmp_path / "a" / "cache.json").read_text())
    (tmp_path / "a" / "cache.json").write_text(json.dumps(held | {"version": 9}))
    with pytest.raises(AerogelError, match=r"cache\.json is of version 9, not 1"):
        trained(tmp_path / "a", PLAIN, DATA)


@pytest.mark.parametrize(
    ("key", "value"),
    [("dtype", "float36"), ("dtype", "float16"), ("classes", "x"), ("members", -1), ("kept", "fp16"), ("extra", 1)],
)
def test_a_manifest_whose_rows_are_of_no_known_form_is_refused(key: str, value: object, tmp_path: Path) -> None:
    trained(tmp_path / "a", PLAIN, DATA, {"kd": 1.0})
    held = json.loads((tmp_path / "a" / "cache.json").read_text())
    held["rows"][key] = value
    (tmp_path / "a" / "cache.json").write_text(json.dumps(held))
    with pytest.raises(AerogelError, match=r"cache\.json is damaged, its rows are of no known form; name another"):
        trained(tmp_path / "a", PLAIN, DATA, {"kd": 1.0})


def test_a_folder_that_cannot_be_made_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    cache = TeacherCache(tmp_path / "file" / "a", DATA, PLAIN)
    with pytest.raises(AerogelError, match=r"cannot make \S+file/a, \S+/file is no folder; name another folder"):
        cache.check(Teacher(Net(6)).identity("cpu"))
    with pytest.raises(AerogelError, match=r"cannot make \S+file/a: Not a directory; name another folder"):
        trained(tmp_path / "file" / "a", PLAIN, DATA)


def test_a_manifest_that_another_process_writes_this_moment_is_no_foreign_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come between the look for the manifest and the look at what else lies there, in either order."""
    trained(tmp_path / "made", PLAIN, DATA)
    folder, exists = tmp_path / "a", Path.exists

    def then_written(path: Path) -> bool:
        found = exists(path)
        if path == folder / "cache.json" and not folder.exists():
            shutil.copytree(tmp_path / "made", folder)
        return found

    monkeypatch.setattr(Path, "exists", then_written)
    cache = TeacherCache(folder, DATA, PLAIN)
    cache.check(Teacher(Asked()).identity("cpu"))


def test_a_split_of_more_images_than_training_has_is_evaluated(tmp_path: Path) -> None:
    few = dataclasses.replace(DATA, train=DATA.train.subset(slice(0, 9)))
    teacher = Teacher(Asked(), cache=TeacherCache(tmp_path / "a", few, PLAIN))
    teacher.answers(next(batches(few, "train", 9)), keep=True)
    for batch in batches(few, "test", 7):
        assert torch.equal(teacher.answers(batch, keep=False), teacher.members(batch.inputs))


def test_a_full_disk_is_told_before_and_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=6000))
        with pytest.raises(AerogelError, match="teacher outputs of 63 images need"):
            trained(tmp_path / "a", PLAIN, DATA)
    real = os.write

    def torn(handle: int, data: Any) -> int:
        real(handle, data[:50])
        raise OSError(28, "No space left on device")

    teacher = Teacher(Asked(), cache=TeacherCache(tmp_path / "b", DATA, PLAIN))
    first, second = list(batches(DATA, "train", 30))[:2]
    teacher.answers(first, keep=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", torn)
        with pytest.raises(AerogelError, match=r"cannot write .*\.rows: No space left on device; make room and start"):
            teacher.answers(second, keep=True)
    expected = teacher.answers(second, keep=True)
    again = Teacher(Asked(), cache=TeacherCache(tmp_path / "b", DATA, PLAIN))
    assert torch.equal(again.answers(second, keep=True), expected)
    assert again.cache is not None
    assert again.cache.asked == 0


def processes(as_ranks: Callable[..., None], folder: Path, ranks: int) -> list[dict[str, Any]]:
    """The script in so many processes: what each rank found."""
    as_ranks(Path(__file__).with_name("cache_ranks.py"), ranks, folder)
    return [json.loads((folder / f"ranks{ranks}-rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.distributed
def test_each_process_writes_its_rows_and_reads_all(tmp_path: Path, as_ranks: Callable[..., None]) -> None:
    """Other rows in the second epoch, without augmentation; and one process goes on with what two have made."""
    live = trained(None, RECIPE, DATA)[0]
    first, second = processes(as_ranks, tmp_path, 2), processes(as_ranks, tmp_path, 2)
    alone = processes(as_ranks, tmp_path, 1)
    images: list[Tensor] = [torch.tensor([rank["images"] for rank in run]) for run in (first, second, alone)]
    assert int(images[0].sum()) in range(N, N + 11)  # each tries the images' order in memory on three, and two of noise
    assert images[1].tolist() == [2, 2]
    assert images[2].tolist() == [2]
    for run in (first, second, alone):
        for ours, theirs in zip(run[0]["losses"], live, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
