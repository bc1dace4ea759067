"""IDX files, whole and damaged in every way their header, length and checksum can tell."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from aerogel.data.idx import DIGITS, FILES, read_folder, read_idx
from aerogel.errors import DataError

HEADER = b"\0\0\x08"


def zipped(content: bytes) -> bytes:
    """The same bytes at any time: they name the test's case, which must be one in every process."""
    return gzip.compress(content, mtime=0)


def packed(array: np.ndarray) -> bytes:
    shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return HEADER + bytes([array.ndim]) + shape + array.astype(np.uint8).tobytes()


def write(folder: Path, index: int, array: np.ndarray) -> None:
    (folder / FILES[index]).write_bytes(gzip.compress(packed(array)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, n in ((0, 200), (1, 50)):
        write(tmp_path, 2 * part, rng.integers(0, 256, (n, 28, 28)))
        write(tmp_path, 2 * part + 1, np.arange(n) % 10)
    return tmp_path


def test_whole_set_is_read(folder: Path) -> None:
    dataset = read_folder("mnist", folder, DIGITS, augment="shift", val=20)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (180, 20, 50)
    assert dataset.input_shape == (1, 28, 28)
    assert torch.bincount(dataset.val.labels).tolist() == [2] * 10
    raw = gzip.decompress((folder / FILES[2]).read_bytes())[16:]
    assert dataset.test.images.numpy().tobytes() == raw
    assert dataset.test.labels.tolist() == [i % 10 for i in range(50)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got nothing; it is another file or corrupt"),
        (b"<html>not found</html>", "cannot be read"),
        (zipped(b"<html>not found</html>"), "must start with 00000803 and 3 dimensions, got 3c68746d"),
        (zipped(packed(np.zeros(4))), "must start with 00000803 and 3 dimensions, got 00000801"),
        (zipped(packed(np.zeros((1, 2, 3)))[:9]), "must start with 00000803 and 3 dimensions"),
        (zipped(packed(np.zeros((4, 2, 2)))[:-1]), r"must hold 16 values \(4, 2, 2\), got 15"),
        (zipped(packed(np.zeros((4, 2, 2))) + b"x"), r"must hold 16 values \(4, 2, 2\), got more"),
        (zipped(HEADER + b"\x03" + b"\xff" * 12), "more than a file of its size can hold"),
    ],
)
def test_wrong_content_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "some.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"read_idx: .*some.gz .*{message}"):
        read_idx(path, 3)


@pytest.mark.parametrize("keep", [5, 100, -9, -1])
def test_cut_off_gzip_is_refused(keep: int, folder: Path) -> None:
    path = folder / FILES[0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=f"{FILES[0]} .* corrupt"):
        read_folder("mnist", folder, DIGITS, augment="shift", val=20)


def test_flipped_bit_fails_the_checksum(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(packed(np.zeros((50, 9, 9))), compresslevel=0))
    content[-100] ^= 1
    (tmp_path / "flipped.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"flipped.gz cannot be read .*CRC"):
        read_idx(tmp_path / "flipped.gz", 3)


def test_counts_that_differ_and_labels_out_of_range_are_refused(folder: Path) -> None:
    write(folder, 1, np.zeros(199))
    with pytest.raises(DataError, match=f"{FILES[0]} has 200 images but {FILES[1]} has 199 labels"):
        read_folder("mnist", folder, DIGITS, augment="shift", val=20)
    write(folder, 1, np.full(200, 10))
    with pytest.raises(DataError, match=f"{FILES[1]} must hold labels below 10, got 10"):
        read_folder("mnist", folder, DIGITS, augment="shift", val=20)
