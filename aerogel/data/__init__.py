"""Image sets by name, from a folder, or from the user's own factory.

`load("mnist")`, then `batches(dataset, "train", 128)`. Named sets are looked for in $AEROGEL_DATA, then in
./data. Pillow, pyarrow and scikit-learn are imported when a set that needs them is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from aerogel.data.augment import AUGMENTS as AUGMENTS
from aerogel.data.batching import Batch as Batch
from aerogel.data.batching import batch_count as batch_count
from aerogel.data.batching import batches as batches
from aerogel.data.batching import normalise as normalise
from aerogel.data.cifar10 import cifar10
from aerogel.data.dataset import Dataset as Dataset
from aerogel.data.dataset import Split as Split
from aerogel.data.digits import digits
from aerogel.data.folder import load_folder
from aerogel.data.idx import fashion_mnist, mnist
from aerogel.data.prepare import assemble as assemble
from aerogel.data.prepare import check_size, resized
from aerogel.errors import AerogelError, nearest
from aerogel.imports import import_factory, user_error

SETS: dict[str, Callable[[], Dataset]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
}
FORMS = {
    "folder": "folder:PATH",
    "packed": "packed:FOLDER",
    "hf": "hf:NAME[@TRAIN,TEST]",
    "wds": "wds:SHARDS[@TEST_SHARDS]",
}
TITLES = {
    "digits": "digits",
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10 (JPEG)",
}


def load(spec: str, *, size: tuple[int, int, int] | None = None, lazy: bool = False) -> Dataset:
    """The set that `spec` names: a key of SETS, one of FORMS, or a factory: `file.py:factory`.

    A factory takes no argument and returns a Dataset. `size` (C, H, W): None keeps the set's own size (for a
    folder 3,224,224), otherwise images are resized and their channels converted. Image files that would not fit
    the memory are decoded as they are used; with `lazy`, so are those that would.
    Raises AerogelError for an unknown spec, a bad size or a failing factory; DataError when the data are
    absent, corrupt, or too large for the memory.
    """
    if size is not None:
        check_size(size)
    kind, colon, rest = spec.partition(":")
    if kind == "folder" and rest:
        return load_folder(rest, size, lazy=lazy)
    if kind == "hf" and rest:
        from aerogel.data.hub import load_hub

        return load_hub(rest, size, lazy=lazy)
    if kind == "wds" and rest:
        from aerogel.data.shards import load_shards

        return load_shards(rest, size, lazy=lazy)
    if kind == "packed" and rest:
        from aerogel.data.pack import load_packed

        dataset = load_packed(rest)
    elif spec in SETS:
        dataset = SETS[spec]()
    elif colon and kind not in FORMS:
        dataset = _from_factory(spec)
    else:
        known = [*SETS, *FORMS.values(), "file.py:factory", "package.module:factory"]
        raise AerogelError(f"load: unknown data set {spec!r}; {nearest(spec, known)}")
    return dataset if size is None else resized(dataset, size)


def _from_factory(spec: str) -> Dataset:
    factory = import_factory(spec)
    try:
        made = factory()
    except AerogelError:
        raise
    except Exception as error:
        raise user_error(spec, error) from error
    if not isinstance(made, Dataset):
        raise AerogelError(
            f"load: {spec!r} must return an aerogel.data.Dataset, got a {type(made).__name__}; "
            "aerogel.data.assemble makes one"
        )
    return dataclasses.replace(made, name=spec)
