"""Sets of the datasets library, from folders and files on disk; no test needs the network."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from aerogel.data import Dataset, batches, load
from aerogel.data.files import Lazy
from aerogel.errors import DataError

datasets = pytest.importorskip("datasets")

SIZE = (3, 8, 8)


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path) -> Iterator[None]:
    def refused(*args: Any, **options: Any) -> None:
        raise AssertionError("the network was asked")

    with (
        patch.object(socket, "getaddrinfo", refused),
        patch.object(socket, "create_connection", refused),
        patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),  # it would try again and again
        patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        patch.object(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf"),
    ):
        yield


def png(number: int) -> dict[str, Any]:
    out = io.BytesIO()
    Image.new("RGB", (10, 10), (number, 5, 77)).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def table(first: int, count: int, names: tuple[str, ...] = ("cat", "dog"), **columns: Any) -> Any:
    """Plain images that tell their number; classes 0 and 1 in turn."""
    rows = range(first, first + count)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(names)))
    held = {"image": [png(row) for row in rows], "label": [row % 2 for row in rows]}
    return datasets.Dataset.from_dict(held, features=features)


def numbers(data: Dataset, name: str) -> list[int]:
    return getattr(data, name).rows(slice(None))[:, 0, 0, 0].tolist()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    datasets.DatasetDict(train=table(0, 40), test=table(100, 10), validation=table(150, 10)).save_to_disk(root / "dict")
    table(0, 40).save_to_disk(root / "one")
    (root / "parquet").mkdir()
    table(0, 40).to_parquet(root / "parquet" / "train-00000-of-00001.parquet")
    table(100, 10).to_parquet(root / "parquet" / "test-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", ["dict", "parquet"])
def test_splits_classes_and_labels(name: str, lazy: bool, saved: Path) -> None:
    data = load(f"hf:{saved}/{name}", size=SIZE, lazy=lazy)
    assert isinstance(data.train.images, Lazy) == lazy
    assert data.classes == ("cat", "dog")
    assert sorted(numbers(data, "train") + numbers(data, "val")) == list(range(40))
    assert numbers(data, "test") == list(range(100, 110))
    for part in ("train", "val", "test"):
        assert [number % 2 for number in numbers(data, part)] == getattr(data, part).labels.tolist()


def test_the_same_set_from_any_file_in_memory_or_not_by_any_worker(saved: Path) -> None:
    specs = [f"hf:{saved}/one", f"hf:{saved}/dict@train", f"hf:{saved}/parquet/train-00000-of-00001.parquet"]
    prints = {load(spec, size=SIZE, lazy=lazy).fingerprint() for spec in specs for lazy in (False, True)}
    assert len(prints) == 1
    held, lazy = load(specs[0], size=SIZE), load(specs[0], size=SIZE, lazy=True)
    options = {"shuffle": True, "augment": "shift", "seed": 1}
    for ours, theirs in zip(
        batches(lazy, "train", 7, workers=2, **options), batches(held, "train", 7, **options), strict=True
    ):
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.labels, theirs.labels)


def test_splits_are_chosen_by_name(saved: Path) -> None:
    assert numbers(load(f"hf:{saved}/dict@train,validation", size=SIZE), "test") == list(range(150, 160))
    data = load(f"hf:{saved}/dict@test", size=SIZE)
    assert sorted(number for name in ("train", "val", "test") for number in numbers(data, name)) == [*range(100, 110)]


def test_rows_that_cannot_be_read_are_listed(tmp_path: Path) -> None:
    good = table(0, 60)
    bad = [{"bytes": b"<html>", "path": None}, {"bytes": b"", "path": None}, {"bytes": None, "path": "/dev/zero"}, None]
    held = {"image": [*good.cast_column("image", datasets.Image(decode=False))["image"], *bad[:2]],
            "label": [*good["label"], 0, 1]}  # fmt: skip
    datasets.Dataset.from_dict(held, features=good.features).save_to_disk(tmp_path / "set")
    data = load(f"hf:{tmp_path}/set", size=SIZE)
    assert [reason for _, reason in data.bad_files] == [
        "its content is none of JPEG, PNG, BMP, WEBP, GIF, TIFF",
        "an empty file",
    ]
    assert data.bad_files[0][0] == f"hf:{tmp_path}/set@train row 60"
    from aerogel.data.hub import TableFiles

    rows = [{"image": held} for held in bad]
    files = TableFiles("hf:x", rows, "image")
    for row, reason in ((2, "neither an image nor the path of a file"), (3, "the row has no image")):
        with pytest.raises(DataError, match=reason):
            files.open(row)


def test_images_of_other_libraries_tables_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = [("b", "a", "c")[row % 3] for row in range(30)]
    pq.write_table(pa.table({"image": [png(row) for row in range(30)], "labels": labels}), tmp_path / "a.parquet")
    data = load(f"hf:{tmp_path}/a.parquet", size=SIZE)
    assert data.classes == ("a", "b", "c")
    for name in ("train", "val", "test"):
        found = [data.classes[label] for label in getattr(data, name).labels.tolist()]
        assert found == [labels[number] for number in numbers(data, name)]


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("dict@tets", "has no split 'tets'; did you mean test"),
        ("dict@train,train", "takes two different splits at most, got 'train,train'"),
        ("dict@train,test,validation", "takes two different splits at most"),
        ("nothing", r"nothing is neither there nor the name of a set on the hub"),
    ],
)
def test_a_wrong_name_is_refused(rest: str, message: str, saved: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(f"hf:{saved}/{rest}", size=SIZE)


def test_a_hub_name_without_network_is_one_clear_line() -> None:
    with pytest.raises(DataError, match=r"hf:nobody/nothing cannot be had \(.*which needs the network once"):
        load("hf:nobody/nothing", size=SIZE)


def save(path: Path, columns: dict[str, Any], kinds: dict[str, Any]) -> str:
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).save_to_disk(path)
    return f"hf:{path}"


def test_columns_that_are_not_an_image_and_a_label_are_refused(tmp_path: Path) -> None:
    image, coarse = datasets.Image(), datasets.ClassLabel(names=["a", "b"])
    pictures = [png(row) for row in range(4)]
    fine = {"image": pictures, "fine": [0, 1, 0, 1], "coarse": [0, 0, 1, 1]}
    spec = save(tmp_path / "two", fine, {"image": image, "fine": coarse, "coarse": coarse})
    with pytest.raises(DataError, match=r"one column of images and one of labels .*, got image, fine, coarse; select"):
        load(spec, size=SIZE)
    spec = save(
        tmp_path / "none",
        {"text": ["x"] * 4, "label": [0, 1, 0, 1]},
        {"text": datasets.Value("string"), "label": coarse},
    )
    with pytest.raises(DataError, match="got text, label"):
        load(spec, size=SIZE)
    hidden = {"image": pictures * 5, "label": [0, 1, 0, 1] * 4 + [0, 1, -1, -1]}
    spec = save(tmp_path / "hidden", hidden, {"image": image, "label": coarse})
    with pytest.raises(DataError, match="has the label -1, which is no class"):
        load(spec, size=SIZE)
    spec = save(
        tmp_path / "float",
        {"image": pictures, "label": [0.5] * 4},
        {"image": image, "label": datasets.Value("float32")},
    )
    with pytest.raises(DataError, match="must all be integers or all be texts, got float"):
        load(spec, size=SIZE)


def test_splits_must_be_alike(tmp_path: Path) -> None:
    datasets.DatasetDict(train=table(0, 20), test=table(0, 4, ("dog", "cat"))).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="@test must have the columns and classes of train; make them alike"):
        load(f"hf:{tmp_path}/set", size=SIZE)


def test_a_damaged_table_is_told(saved: Path, tmp_path: Path) -> None:
    content = (saved / "parquet" / "train-00000-of-00001.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a.parquet cannot be had \("):
        load(f"hf:{tmp_path}/a.parquet", size=SIZE)


def test_without_the_library_the_error_says_how_to_get_it() -> None:
    with (
        patch.dict("sys.modules", datasets=None),
        pytest.raises(DataError, match=r'needs the datasets library; pip install "aerogel\[hf\]"'),
    ):
        load("hf:anything", size=SIZE)
