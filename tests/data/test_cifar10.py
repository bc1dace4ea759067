"""CIFAR-10's parquet files: tiny tables, whole and damaged."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aerogel.data.cifar10 import read_folder
from aerogel.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def jpeg(grey: int, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, (grey, 0, 255 - grey) if mode == "RGB" else grey).save(file, "JPEG", quality=95)
    return file.getvalue()


def write(path: Path, files: list[Any], labels: list[Any]) -> None:
    images = [{"bytes": data, "path": None} for data in files]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(images, kind), "label": pa.array(labels, pa.int64())}), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, n in (("train", 40), ("test", 10)):
        write(tmp_path / f"{name}.parquet", [jpeg(6 * i) for i in range(n)], [i % 10 for i in range(n)])
    return tmp_path


def test_whole_set_is_read(folder: Path) -> None:
    dataset = read_folder(folder, val=10)
    assert dataset.name == "cifar10"
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (30, 10, 10)
    assert dataset.input_shape == (3, 32, 32)
    assert dataset.classes[3] == "cat"
    assert torch.bincount(dataset.val.labels).tolist() == [1] * 10
    for i, image in enumerate(dataset.test.images.int()):
        expected = torch.tensor([6 * i, 0, 255 - 6 * i]).view(3, 1, 1)
        assert (image - expected).abs().max() <= 4  # JPEG


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<html>", "row 1 of .*test.parquet is no image of 32x32"),
        (b"", "row 1 of .*test.parquet is no image of 32x32"),
        (None, "row 1 of .*test.parquet is no image of 32x32"),
        (jpeg(9)[:300], "row 1 of .*test.parquet is no image of 32x32"),
        (jpeg(9, (32, 31)), "is no image of 32x32 .it is 32x31.; get the file again"),
    ],
)
def test_bad_image_is_named_by_row(data: bytes | None, message: str, folder: Path) -> None:
    write(folder / "test.parquet", [jpeg(5), data], [0, 1])
    with pytest.raises(DataError, match=message):
        read_folder(folder, val=10)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 10], "must hold labels 0..9, got 0..10"),
        ([-1, 3], "got -1..3"),
        ([0, None], "a label in every row"),
    ],
)
def test_bad_labels_are_refused(labels: list[int | None], message: str, folder: Path) -> None:
    write(folder / "test.parquet", [jpeg(5), jpeg(6)], labels)
    with pytest.raises(DataError, match=message):
        read_folder(folder, val=10)


@pytest.mark.parametrize(
    "columns",
    [
        {"img": [b"x"], "label": [1]},
        {"image": [b"x"], "label": [1]},
        {"image": [{"path": "x"}], "label": [1]},
        {"image": [{"bytes": b"x"}], "label": ["cat"]},
        {"image": [{"bytes": b"x"}]},
    ],
)
def test_other_columns_are_refused(columns: dict[str, list[Any]], folder: Path) -> None:
    pq.write_table(pa.table(columns), folder / "train.parquet")
    with pytest.raises(DataError, match=r"train.parquet must have the columns image .* and label"):
        read_folder(folder, val=10)


@pytest.mark.parametrize("keep", [0, 50, 2000])
def test_cut_off_file_is_refused(keep: int, folder: Path) -> None:
    path = folder / "train.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"train.parquet cannot be read .* corrupt"):
        read_folder(folder, val=10)


def test_rows_stay_rows(folder: Path) -> None:
    image = Image.new("RGB", (32, 32))
    image.paste((255, 255, 255), (0, 0, 32, 16))  # the top half is white
    file = io.BytesIO()
    image.save(file, "JPEG")
    write(folder / "test.parquet", [file.getvalue()], [0])
    found = read_folder(folder, val=10).test.images[0]
    assert found[:, :16].min() > 250
    assert found[:, 16:].max() < 5


def test_grey_image_becomes_rgb(folder: Path) -> None:
    write(folder / "test.parquet", [jpeg(100, mode="L")], [0])
    image = read_folder(folder, val=10).test.images[0]
    assert np.ptp(image.numpy(), axis=0).max() == 0


def test_missing_pyarrow_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'pip install "aerogel\[parquet\]"'):
        read_folder(folder, val=10)
