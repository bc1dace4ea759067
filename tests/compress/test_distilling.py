"""The parts of `aerogel distill`: its table of settings, who teaches, and what is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import aerogel as ag
from aerogel.compress.distil_settings import USUAL, parse_losses, parse_taps, usual
from aerogel.compress.distil_story import _against
from aerogel.compress.job import Job, open_job
from aerogel.compress.settings import Settings, resolve, to_toml
from aerogel.compress.teaching import Rescaled, open_school, open_teachers
from aerogel.compress.worth import CLASSES, confused
from aerogel.console import Console
from aerogel.data import batches
from aerogel.distill import LOSSES
from aerogel.errors import AerogelError
from aerogel.export import InputSpec, load_hf
from aerogel.report.taught import apart, confusion_map, disagreements, reliability

SMALL: dict[str, Any] = {"verb": "distill", "model": "lenet_300_100", "data": "digits", "input": (1, 8, 8)}


def job_of(*teachers: object, **lesson: Any) -> Job:
    options = {**SMALL, "distill": {"teacher": list(map(str, teachers)), **lesson}}
    return open_job(resolve(options, None), Console())


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two saved networks; they read images of 8 x 8, each with its own normalisation."""
    folder, found = tmp_path_factory.mktemp("teachers"), list[Path]()
    for number, (mean, std) in enumerate([(0.0, 1.0), (0.25, 0.5)]):
        torch.manual_seed(number)
        net = ag.nets.build("lenet_300_100", num_classes=10, in_channels=1, input_size=8)
        spec = InputSpec(shape=(1, 8, 8), mean=(mean,), std=(std,))
        found.append(ag.save(net, folder / f"{number}", input=spec, classes=tuple("0123456789")))
    return found


def expected(folder: Path, mean: float, std: float) -> torch.Tensor:
    """What a saved teacher says of the first test digits, normalised as it wants them."""
    images = ag.data.load("digits", size=(1, 8, 8)).test.images[:8].float() / 255
    with torch.no_grad():
        return ag.load(folder)((images - mean) / std)


def test_a_teacher_reads_images_as_it_was_trained_to(teachers: list[Path]) -> None:
    job = job_of(teachers[1])
    inputs = next(batches(job.data, "test", 8)).inputs
    torch.testing.assert_close(open_school(job).teacher(inputs), expected(teachers[1], 0.25, 0.5)[: len(inputs)])


def test_teachers_with_unlike_normalisations_are_one(teachers: list[Path]) -> None:
    job = job_of(*teachers, combine="geometric", shares=[1.0, 3.0])
    school, inputs = open_school(job), next(batches(job.data, "test", 8)).inputs
    n = len(inputs)
    whole = 0.25 * expected(teachers[0], 0.0, 1.0)[:n] + 0.75 * expected(teachers[1], 0.25, 0.5)[:n]
    torch.testing.assert_close(school.teacher(inputs), whole)
    assert all(isinstance(model, Rescaled) for model in school.teacher.models)


def test_weights_go_to_the_teachers_that_are_no_folder_in_their_order(teachers: list[Path], tmp_path: Path) -> None:
    """A saved folder as weights says how images are normalised, too; a bare file leaves that to mean and std."""
    torch.manual_seed(9)
    net = ag.nets.build("lenet_300_100", num_classes=10, in_channels=1, input_size=8)
    torch.save(net.state_dict(), tmp_path / "bare.pt")
    job = job_of("lenet_300_100", teachers[0], "lenet_300_100", mean=[0.5], std=[2.0],
                 teacher_weights=[str(teachers[1]), str(tmp_path / "bare.pt")])  # fmt: skip
    found = open_teachers(job)
    assert [one.name for one in found] == ["lenet_300_100", "0", "lenet_300_100"]
    assert [one.scale for one in found] == [((0.25,), (0.5,)), ((0.0,), (1.0,)), ((0.5,), (2.0,))]
    for one, folder in zip(found[:2], (teachers[1], teachers[0]), strict=True):
        held = ag.load(folder).state_dict()
        assert all(torch.equal(tensor, held[name]) for name, tensor in one.model.state_dict().items())
    assert torch.equal(next(found[2].model.parameters()), next(net.parameters()))
    with pytest.raises(AerogelError, match="zoo without weights knows nothing"):
        open_teachers(job_of("lenet_300_100", "lenet_300_100", teacher_weights=[str(teachers[1])]))


def test_opening_teachers_does_not_change_what_the_student_begins_with(teachers: list[Path]) -> None:
    one, other = job_of(teachers[0]), job_of(*teachers)
    for job in (one, other):
        before = torch.get_rng_state()
        open_school(job)
        assert torch.equal(torch.get_rng_state(), before)
    ours, theirs = one.opened.model.state_dict(), other.opened.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_teacher_of_hugging_face(tmp_path: Path) -> None:
    """Saved by save_pretrained: its weights, its logits, and the normalisation beside it; nothing is downloaded."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=10
    )
    torch.manual_seed(0)
    made = transformers.ResNetForImageClassification(config).eval()
    made.save_pretrained(tmp_path / "hub")
    (tmp_path / "hub/preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.25]}')
    job = job_of(f"hf:{tmp_path}/hub", losses={"kd": 1.0, "at": 1.0}, taps={"classifier.0": "resnet.encoder"})
    with pytest.raises(AerogelError, match=r"resnet\.encoder' gives a BaseModelOutput\w*, not a tensor; say which"):
        open_school(job)
    job = job_of(f"hf:{tmp_path}/hub")
    school, inputs = open_school(job), next(batches(job.data, "test", 8)).inputs
    pixels = inputs * torch.tensor(job.data.std) + torch.tensor(job.data.mean)
    with torch.no_grad():
        torch.testing.assert_close(school.teacher(inputs), made((pixels - 0.5) / 0.25).logits)
    (tmp_path / "hub/model.safetensors").write_bytes(b"torn")
    with pytest.raises(AerogelError, match=r"hf:\S+hub' cannot be loaded: .*; is it whole\?"):
        load_hf(f"hf:{tmp_path}/hub")


def test_a_student_from_another_folder_does_not_change_how_a_silent_teacher_reads_images(
    teachers: list[Path], tmp_path: Path
) -> None:
    """Batches are normalised as the student's weights want it; a factory's teacher still gets the data's own."""
    (tmp_path / "net.py").write_text(
        "import torch, aerogel as ag\ndef made():\n    torch.manual_seed(3)\n"
        "    return ag.nets.build('lenet_300_100', num_classes=10, in_channels=1, input_size=8)\n"
    )
    digits = ag.data.load("digits", size=(1, 8, 8))
    for student in ({}, {"model": str(teachers[1])}):
        options = {**SMALL, **student, "distill": {"teacher": [f"{tmp_path}/net.py:made"]}}
        job = open_job(resolve(options, None), Console())
        school = open_school(job)
        said = school.teacher(next(batches(job.data, "test", 8)).inputs)
        with torch.no_grad():
            own = school.models[0](next(batches(digits, "test", 8)).inputs)
        torch.testing.assert_close(said, own)


@pytest.mark.parametrize(
    ("lesson", "message"),
    [
        (
            {"mean": [0.3], "std": [0.7]},
            r"mean and std under \[distill\] are for teachers that do not say so themselves",
        ),
        ({"cache_top": 10, "cache": "c"}, "cache_top must be < 10, the classes of digits, got 10; leave it out"),
        ({"cache_top": 3}, "cache_kept and cache_top say what a cache holds; give --cache FOLDER, or leave them out"),
        ({"cache_kept": "fp16"}, "cache_kept and cache_top say what a cache holds"),
        ({"cache": "file/c"}, r"cache: cannot make \S+file/c, \S+/file is no folder"),
        ({"options": {"kd": {"temperature": "hot"}}}, "temperature of kd must be a number, got 'hot'; 4.0 is usual"),
        ({"options": {"kd": {"temperature": True}}}, "temperature of kd must be a number, got True"),
    ],
)
def test_what_would_be_ignored_or_fail_in_training_is_refused_at_once(
    lesson: dict[str, Any], message: str, teachers: list[Path]
) -> None:
    Path("file").write_text("mine")
    with pytest.raises(AerogelError, match=message):
        open_school(job_of(teachers[1], **lesson))


def test_every_loss_has_a_usual_weight_and_labels_share_with_soft_targets() -> None:
    assert USUAL.keys() == set(LOSSES)
    assert parse_losses(["kd,hard"]) == {"kd": 0.9, "hard": 0.1}
    assert parse_losses(["hard", "dkd"]) == {"hard": 1.0, "dkd": 1.0}
    assert parse_losses(["kd"]) == {"kd": 1.0}
    assert parse_losses([" kd , dkd=2.0", "at"]) == {"kd": 1.0, "dkd": 2.0, "at": 1000.0}
    assert parse_losses(["standardised,hard"]) == {"standardised": 9.0, "hard": 0.1}
    assert usual("crd", ["hard"]) == 0.8


def test_taps_keep_their_order() -> None:
    assert list(parse_taps(["b.1 = c", "a=d[0]"]).items()) == [("b.1", "c"), ("a", "d[0]")]


def test_settings_are_written_back_and_read_as_the_same(tmp_path: Path) -> None:
    lesson = {"teacher": ["a", "b"], "losses": {"kd": 0.5, "review": 2.0}, "taps": {"review": {"x.1": "y", "x.0": "z"}},
              "options": {"review": {}}, "shares": [1.0, 2.0], "mean": [0.5], "std": [0.2]}  # fmt: skip
    settings = resolve({**SMALL, "distill": lesson}, None)
    text = to_toml(settings)
    assert "criterion" not in text
    (tmp_path / "config.toml").write_text(text)
    again = resolve({}, tmp_path / "config.toml")
    assert again == settings
    assert list(again.lesson.taps["review"]) == ["x.1", "x.0"]
    over = resolve({"distill": {"temperature": 2.0}}, tmp_path / "config.toml")
    assert (over.lesson.temperature, over.lesson.losses) == (2.0, {"kd": 0.5, "review": 2.0})


def test_the_command_line_wins_over_the_files_table(tmp_path: Path) -> None:
    (tmp_path / "some.toml").write_text("[distill]\nteacher = ['x']\ntemperature = 8.0\n[distill.losses]\nkd = 1.0\n")
    found = resolve({**SMALL, "distill": {"losses": {"dist": 2.0}}}, tmp_path / "some.toml")
    assert (found.lesson.temperature, found.lesson.losses) == (8.0, {"dist": 2.0})
    assert isinstance(found, Settings)


def test_an_interval_is_told_by_the_word_for_its_side() -> None:
    assert _against({"value": 0.5, "low": -0.1, "high": 1.1}, "behind", "ahead of") == "0.50 pt [-0.10, 1.10] behind"
    assert _against({"value": -0.5, "low": -1.1, "high": 0.1}, "behind", "ahead of") == "0.50 pt [-0.10, 1.10] ahead of"


def test_of_many_classes_the_report_holds_those_that_part_most(teachers: list[Path]) -> None:
    job, wide = job_of(teachers[0]), CLASSES + 20
    names = [f"class {i}" for i in range(wide)]
    object.__setattr__(job.data, "classes", tuple(names))
    answers = nn.functional.one_hot(torch.arange(wide), wide).float()
    student = answers.roll(1, dims=0).where(torch.arange(wide)[:, None] >= wide - 10, answers)
    found = confused(job, student, answers)
    assert (found["of"], len(found["classes"]), len(found["counts"])) == (wide, CLASSES, CLASSES)
    assert set(names[-11:]) <= set(found["classes"])
    assert sum(map(sum, found["counts"])) == CLASSES
    assert found["counts"][-1][-2:] == [1, 0]


def test_plots_of_what_is_broken_are_left_out_and_of_much_is_drawn_what_matters() -> None:
    assert confusion_map({}) is None
    assert confusion_map({"classes": ["a"], "counts": [[1, 2]]}) is None
    assert confusion_map({"classes": ["a", "b"], "counts": [[1, None], [0, 1]]}) is None
    assert disagreements({"classes": ["a"], "counts": "many"}) == []
    assert reliability({"teacher": None, "student": {"counts": []}}) is None
    counts = [[50 if a == b else 0 for b in range(60)] for a in range(60)]
    counts[7][9], counts[40][3] = 5, 2
    found: dict[str, Any] = {"of": 60, "classes": [f"<b>{i}" for i in range(60)], "counts": counts}
    drawn = confusion_map(found)
    assert drawn is not None
    assert {3, 7, 9, 40} <= set(apart(counts, 40))
    assert "the 40 of 60 classes" in drawn["caption"]
    assert "&lt;b&gt;" in drawn["layout"]["xaxis"]["ticktext"][0]
    assert disagreements(found) == [
        {"teacher": "<b>7", "student": "<b>9", "count": 5}, {"teacher": "<b>40", "student": "<b>3", "count": 2},
    ]  # fmt: skip
