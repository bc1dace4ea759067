"""Tar shards: the samples that are in them, wherever they lie, and shards that are damaged or hostile."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from aerogel.data import Dataset, batches, load
from aerogel.data.files import Lazy
from aerogel.data.shards import expand
from aerogel.errors import DataError

SIZE = (3, 8, 8)


def png(number: int, mode: str = "RGB") -> bytes:
    """A plain image that tells its number."""
    out = io.BytesIO()
    Image.new(mode, (10, 10), (number % 256, number // 256, 77)).save(out, "PNG")
    return out.getvalue()


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
    """Two members each; classes 0 and 1 in turn."""
    members = []
    for number in range(first, first + count):
        members += [(f"{number:05}.png", png(number)), (f"{number:05}.cls", b"%d\n" % (number % 2))]
    return members


def numbers(data: Dataset, name: str = "train") -> list[int]:
    pixels = getattr(data, name).rows(slice(None))[:, :2, 0, 0].int()
    return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of other sizes, 0..59, and a test shard, 100..109."""
    root = tmp_path_factory.mktemp("shards")
    for number, (first, count) in enumerate(((0, 30), (30, 5), (35, 25))):
        write(root / f"train-{number:02}.tar", samples(first, count))
    write(root / "test.tar", samples(100, 10))
    return root


@pytest.mark.parametrize("lazy", [False, True])
def test_every_sample_comes_with_its_label(lazy: bool, shards: Path) -> None:
    spec = f"wds:{shards}/train-{{00..02}}.tar@{shards}/test.tar"
    data = load(spec, size=SIZE, lazy=lazy)
    assert data.name == spec
    assert isinstance(data.train.images, Lazy) == lazy
    assert data.classes == ("0", "1")
    assert sorted(numbers(data) + numbers(data, "val")) == list(range(60))
    assert numbers(data, "test") == list(range(100, 110))
    for name in ("train", "val", "test"):
        assert [number % 2 for number in numbers(data, name)] == getattr(data, name).labels.tolist()
    assert data.bad_files == ()


def test_lazy_shards_are_the_set_in_memory_for_any_workers_and_ranks(shards: Path) -> None:
    spec = f"wds:{shards}/train-{{00,01,02}}.tar"
    held, lazy = load(spec, size=SIZE), load(spec, size=SIZE, lazy=True)
    assert held.fingerprint() == lazy.fingerprint()
    assert (held.mean, held.std) == (lazy.mean, lazy.std)
    whole = list(batches(held, "train", 10, shuffle=True, augment="shift"))
    for rank in range(3):  # as many processes as shards, whose sizes differ
        part = list(batches(lazy, "train", 10, shuffle=True, augment="shift", rank=rank, ranks=3, workers=rank))
        assert all(torch.equal(a.inputs, b.inputs[rank::3]) for a, b in zip(part, whole, strict=True))


def test_labels_may_be_texts_or_json_and_samples_lie_in_folders(tmp_path: Path) -> None:
    members = []
    for number in range(20):
        label = json.dumps({"label": ("cat", "dog")[number % 2], "more": [1]}).encode()
        members += [(f"a/b.c/{number:03}.json", label), (f"a/b.c/{number:03}.jpg", png(number))]
        members += [(f"a/b.c/{number:03}.seg.png", b"a mask, not the image")]
    write(tmp_path / "a.tar", members)
    data = load(f"wds:{tmp_path}/a.tar", size=SIZE)
    assert data.classes == ("cat", "dog")
    assert data.bad_files == ()
    found = sorted(number for name in ("train", "val", "test") for number in numbers(data, name))
    assert found == list(range(20))


def test_bad_samples_are_listed_with_a_reason(tmp_path: Path) -> None:
    strange: list[tuple[str, bytes]] = [
        ("nolabel.png", png(1)),
        ("noimage.cls", b"1"),
        ("two.png", png(2)), ("two.jpg", png(2)), ("two.cls", b"1"),
        ("blank.png", png(2)), ("blank.cls", b" \n"),
        ("deep.png", png(2)), ("deep.json", b"[" * 100_000),
        ("list.png", png(2)), ("list.json", b'{"cls": [1]}'),
        ("true.png", png(2)), ("true.json", b'{"cls": true}'),
        ("long.png", png(2)), ("long.cls", b"1" * (2 << 20)),
        ("page.png", b"<html>"), ("page.cls", b"1"),
        ("empty.png", b""), ("empty.cls", b"0"),
    ]  # fmt: skip
    write(tmp_path / "a.tar", samples(0, 60) + strange)
    data = load(f"wds:{tmp_path}/a.tar", size=SIZE)
    reasons = {Path(path).name: reason for path, reason in data.bad_files}
    assert reasons == {
        "nolabel": "not a sample: no .cls and no .json",
        "noimage": "not a sample: no image",
        "two": "not a sample: more than one image",
        "blank": "not a sample: an empty label",
        "deep": reasons["deep"],
        "list": 'not a sample: its .json has no "cls" or "label" that is an integer or a text',
        "true": 'not a sample: its .json has no "cls" or "label" that is an integer or a text',
        "long": "not a sample: a label of 2097152 bytes",
        "page.png": "its content is none of JPEG, PNG, BMP, WEBP, GIF, TIFF",
        "empty.png": "an empty file",
    }
    assert reasons["deep"].startswith("not a sample: ")
    assert len(data.train) + len(data.val) + len(data.test) == 60


def test_links_devices_and_names_that_climb_touch_nothing(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    write(path, [*samples(0, 20), ("../../climb.png", png(3)), ("../../climb.cls", b"1")])
    with tarfile.open(path, "a") as archive:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
        for name in ("link.cls", "hard.cls", "dev.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"1"))
    data = load(f"wds:{path}", size=SIZE)
    assert sorted(Path(path).name for path, _ in data.bad_files) == ["dev", "hard", "link"]
    assert len(data.train) + len(data.val) + len(data.test) == 21
    assert sorted(str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*")) == ["in", "in/a.tar", "secret.png"]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def cut_between_members(content: bytes) -> bytes:
    return content[: 2 * 1024]  # the first sample, whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "cut off or damaged|ends within|unexpected end"),
        (cut_between_members, "it has no end mark, so it is cut off or damaged"),
        (lambda content: b"", "empty file"),
        (lambda content: b"<html>404</html>" * 100, "file could not be opened successfully|invalid header|truncated"),
        (
            lambda content: content[:1024] + b"x" * 512 + content[1536:],
            "it has no end mark, so it is cut off or damaged",
        ),
    ],
    ids=["cut", "cut_between", "empty", "html", "garbage"],
)
def test_damaged_shards_are_named(change: Any, message: str, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(change((shards / "train-00.tar").read_bytes()))
    with pytest.raises(DataError, match=rf"load: .*a.tar cannot be read as an uncompressed tar file .*({message})"):
        load(f"wds:{tmp_path}/a.tar", size=SIZE)


def test_missing_compressed_and_repeated_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train-03.tar cannot be read as an uncompressed tar file \(.*No such file"):
        load(f"wds:{shards}/train-{{00..03}}.tar", size=SIZE)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(shards / "test.tar", "x.png")
    with pytest.raises(DataError, match=r"a.tar.gz cannot be read as an uncompressed tar file"):
        load(f"wds:{tmp_path}/a.tar.gz", size=SIZE)
    write(tmp_path / "twice.tar", samples(0, 3) + samples(0, 3))
    with pytest.raises(DataError, match=r"it holds 00000\.png twice"):
        load(f"wds:{tmp_path}/twice.tar", size=SIZE)


def test_labels_must_be_of_one_kind_and_known(shards: Path, tmp_path: Path) -> None:
    write(tmp_path / "mixed.tar", [*samples(0, 4), ("x.png", png(7)), ("x.cls", b"cat")])
    with pytest.raises(DataError, match="must all be integers or all be texts, got int, str"):
        load(f"wds:{tmp_path}/mixed.tar", size=SIZE)
    write(tmp_path / "other.tar", [*samples(0, 4), ("x.png", png(7)), ("x.cls", b"5")])
    with pytest.raises(DataError, match=r"other.tar has the label 5, which is no class of .*train-00.tar"):
        load(f"wds:{shards}/train-00.tar@{tmp_path}/other.tar", size=SIZE)


@pytest.mark.parametrize("rest", ["a@b@c", "@b", "a@"])
def test_two_patterns_at_most(rest: str) -> None:
    with pytest.raises(DataError, match="takes one @ at most and shards on each side"):
        load(f"wds:{rest}")


@given(first=st.integers(0, 50), more=st.integers(0, 20), width=st.integers(1, 6))
def test_a_range_counts_as_it_is_written(first: int, more: int, width: int) -> None:
    found = expand(f"a-{{{first:0{width}}..{first + more:0{width}}}}.tar")
    assert [int(name[2:-4]) for name in found] == list(range(first, first + more + 1))
    assert found[0] == f"a-{first:0{width}}.tar"
    assert found[-1] == f"a-{first + more:0{width}}.tar"


def test_braces() -> None:
    assert expand("a.tar") == ["a.tar"]
    assert expand("{x,y}-{0..1}.tar") == ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]
    assert expand("{8..11}") == ["8", "9", "10", "11"]
    for pattern, message in (
        ("a{0..1", "braces that do not match"),
        ("a}0{", "braces that do not match"),
        ("{{0..1}}", "braces that do not match"),
        ("a{}", "must have a range or alternatives in braces, got {}"),
        ("a{5}", "must have a range or alternatives in braces, got {5}"),
        ("a{5..2}", "must count upwards"),
        ("a{0..9999999}", "must count upwards, by at most 1,000,000"),
        ("a{0..9999}{0..9999}", "names more than 1,000,000 shards"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            expand(pattern)
