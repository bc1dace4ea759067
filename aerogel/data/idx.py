"""MNIST and Fashion-MNIST, from their gzipped IDX files.

LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to document recognition"; Xiao, Rasul,
Vollgraf 2017, arXiv:1708.07747. 60,000 training images, of which 5,000 validate here, and 10,000 test images
of 1x28x28.

IDX: two zero bytes, a type (8 = unsigned byte), the number of dimensions, each dimension as a big-endian
uint32, then the values and nothing more.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from aerogel.data.dataset import Dataset, Split
from aerogel.data.prepare import assemble, find_files
from aerogel.errors import DataError

NUM_VAL = 5_000
FILES = tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
GZIP_RATIO = 1032  # deflate cannot shrink more than this


def mnist() -> Dataset:
    folder = find_files("mnist", "mnist", FILES, "https://ossci-datasets.s3.amazonaws.com/mnist/")
    return read_folder("mnist", folder, DIGITS, augment="shift")


def fashion_mnist() -> Dataset:
    origin = "https://github.com/zalandoresearch/fashion-mnist"
    folder = find_files("fashion_mnist", "fashion-mnist", FILES, origin)
    return read_folder("fashion_mnist", folder, CLOTHES, augment="crop_flip")


def read_folder(name: str, folder: Path, classes: tuple[str, ...], *, augment: str, val: int = NUM_VAL) -> Dataset:
    """The set whose four IDX files lie in `folder`. Raises DataError naming the file that is wrong."""
    train, test = (_read_split(folder, part, len(classes)) for part in ("train", "t10k"))
    return assemble(name, train, test, classes, val=val, augment=augment)


def read_idx(path: Path, dims: int) -> torch.Tensor:
    """The uint8 array of one gzipped IDX file with `dims` dimensions.

    Raises DataError naming the file when it is no gzip, is truncated or corrupt, has another magic number, or
    holds more or fewer values than its header says.
    """
    try:
        with gzip.open(path, "rb") as file:
            header = file.read(4 + 4 * dims)
            if header[:4] != bytes((0, 0, 8, dims)) or len(header) < 4 + 4 * dims:
                raise DataError(
                    f"read_idx: {path} must start with 0000080{dims} and {dims} dimensions, got "
                    f"{header.hex() or 'nothing'}; it is another file or corrupt, get it again"
                )
            shape = tuple(np.frombuffer(header, ">u4", offset=4).tolist())
            need = math.prod(shape)
            if need > GZIP_RATIO * path.stat().st_size:  # before so much is allocated
                raise DataError(
                    f"read_idx: {path} claims {shape} values, more than a file of its size can hold; "
                    "it is corrupt, get it again"
                )
            values = bytearray(file.read(need + 1))  # one more: a surplus shows, and the checksum is read
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"read_idx: {path} cannot be read ({error}); it is corrupt or cut off, get it again") from error
    if len(values) != need:
        found = "more" if len(values) > need else f"{len(values)}"
        raise DataError(f"read_idx: {path} must hold {need} values {shape}, got {found}; it is corrupt, get it again")
    return torch.from_numpy(np.frombuffer(values, np.uint8)).view(shape)


def _read_split(folder: Path, part: str, num_classes: int) -> Split:
    image_file, label_file = (folder / file for file in FILES if file.startswith(part))
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if len(images) != len(labels):
        raise DataError(
            f"load: {image_file} has {len(images)} images but {label_file.name} has {len(labels)} labels; "
            "they do not belong together, get both again"
        )
    if len(labels) and int(labels.max()) >= num_classes:
        raise DataError(
            f"load: {label_file} must hold labels below {num_classes}, got {int(labels.max())}; get it again"
        )
    return Split(images.unsqueeze(1), labels.long())
