"""CIFAR-10 as JPEG files inside parquet tables.

Krizhevsky 2009, "Learning multiple layers of features from tiny images". 50,000 training images, of which
5,000 validate here, and 10,000 test images of 3x32x32. The pixels went through JPEG: they differ slightly
from the original binary files, so results are reported as "CIFAR-10 (JPEG)".

Columns: `image`, a struct whose field `bytes` is one image file, and `label`, 0..9.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aerogel.data.dataset import Dataset, Split
from aerogel.data.prepare import assemble, find_files
from aerogel.errors import DataError
from aerogel.imports import one_line

NUM_VAL = 5_000
FILES = ("train.parquet", "test.parquet")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ORIGIN = "https://www.cs.toronto.edu/~kriz/cifar.html (as parquet: image.bytes holds a JPEG, label 0..9)"


def cifar10() -> Dataset:
    return read_folder(find_files("cifar10", "cifar10-jpeg", FILES, ORIGIN))


def read_folder(folder: Path, val: int = NUM_VAL) -> Dataset:
    """The set whose two parquet files lie in `folder`.

    Raises DataError naming the file that is not as it should be, or when pyarrow is not installed.
    """
    train, test = (_read_split(folder / file) for file in FILES)
    return assemble("cifar10", train, test, CLASSES, val=val, augment="crop_flip")


def _read_split(path: Path) -> Split:
    files, labels = _read_table(path)
    images = np.empty((len(files), 32, 32, 3), np.uint8)
    for row, data in enumerate(files):  # measured: threads make files this small slower, not faster
        try:
            images[row] = _decode(data)
        except Exception as error:  # Pillow raises anything at all on a damaged file
            raise DataError(
                f"load: row {row} of {path} is no image of 32x32 ({one_line(error)}); get the file again"
            ) from error
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise DataError(f"load: {path} must hold labels 0..9, got {labels.min()}..{labels.max()}; get it again")
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))


def _decode(data: bytes) -> np.ndarray:
    from PIL import Image

    image: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG",))
    if image.size != (32, 32):
        raise ValueError(f"it is {image.size[0]}x{image.size[1]}")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _read_table(path: Path) -> tuple[list[bytes], np.ndarray]:
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError('load: cifar10 needs pyarrow; pip install "aerogel[parquet]"') from error
    try:
        schema: Any = pq.read_schema(path)
        _check_schema(path, schema)
        table = pq.read_table(path, columns=["image", "label"])
        files = pc.struct_field(table["image"], "bytes").to_pylist()
        labels = table["label"].to_numpy()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"load: {path} cannot be read ({one_line(error)}); it is corrupt, get it again") from error
    if table["label"].null_count:
        raise DataError(f"load: {path} must have a label in every row; get it again")
    return files, labels.astype(np.int64)


def _check_schema(path: Path, schema: Any) -> None:
    import pyarrow.types as kinds

    names = set(schema.names)
    image = schema.field("image").type if "image" in names else None
    whole = image is not None and kinds.is_struct(image) and image.get_field_index("bytes") >= 0
    if not whole or "label" not in names or not kinds.is_integer(schema.field("label").type):
        raise DataError(
            f"load: {path} must have the columns image (a struct with the field bytes) and label (integers), "
            f"got {', '.join(sorted(names))}; convert it"
        )
