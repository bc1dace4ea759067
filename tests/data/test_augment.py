"""Augmentations on images whose one bright pixel shows where everything went."""

from __future__ import annotations

import pytest
import torch

from aerogel.data.augment import AUGMENTS, find_augment
from aerogel.errors import AerogelError

N, H, W = 2000, 16, 20
ROW, COLUMN = 7, 12


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def deltas(name: str) -> torch.Tensor:
    """(N, 2): how far the bright pixel of each image went, down and right."""
    images = torch.zeros(N, 3, H, W, dtype=torch.uint8)
    images[:, :, ROW, COLUMN] = torch.tensor([50, 100, 200], dtype=torch.uint8)
    moved = AUGMENTS[name](images, seeded())
    where = moved[:, 0].nonzero()
    assert torch.equal(where[:, 0], torch.arange(N))  # each image keeps exactly one
    assert torch.equal(moved[where[:, 0], :, where[:, 1], where[:, 2]], images[:, :, ROW, COLUMN])
    return where[:, 1:] - torch.tensor([ROW, COLUMN])


def test_shift_moves_by_up_to_two_each_way_and_reaches_all_25() -> None:
    moves = deltas("shift")
    assert moves.abs().max() == 2
    assert len(moves.unique(dim=0)) == 25
    counts = torch.bincount((moves + 2) @ torch.tensor([5, 1]), minlength=25)
    assert counts.min() > 80 * 0.5  # 80 expected of each, standard deviation 9
    assert counts.max() < 80 * 1.5


def test_crop_flip_moves_by_up_to_four_and_mirrors_half() -> None:
    moves = deltas("crop_flip")
    assert moves[:, 0].abs().max() == 4
    mirrored_column = W - 1 - COLUMN  # 7: a mirrored pixel lands 1..9, an upright one 8..16
    upright = moves[:, 1] + COLUMN > mirrored_column + 4
    mirrored = moves[:, 1] + COLUMN < COLUMN - 4
    assert set((moves[upright | mirrored, 1] + COLUMN).tolist()) == {*range(3, 8), *range(12, 17)}
    assert 0.8 < upright.sum() / mirrored.sum() < 1.25


@pytest.mark.parametrize(("name", "pad"), [("shift", 2), ("crop_flip", 4)])
def test_each_image_is_a_window_of_its_zero_padded_self(name: str, pad: int) -> None:
    images = torch.randint(1, 256, (40, 3, 9, 7), dtype=torch.uint8, generator=seeded(5))
    changed = AUGMENTS[name](images, seeded(6))
    for before, after in zip(images, changed, strict=True):
        padded = torch.nn.functional.pad(before, (pad,) * 4)
        windows = [
            window
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
            for window in [padded[:, top : top + 9, left : left + 7]]
        ]
        if name == "crop_flip":
            windows += [window.flip(2) for window in windows]
        assert sum(torch.equal(after, window) for window in windows) == 1


@pytest.mark.parametrize("name", sorted(AUGMENTS))
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 3, 2, 9), (0, 1, 4, 4)])
def test_type_and_shape_stay_and_the_input_is_untouched(name: str, shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(1))
    kept = images.clone()
    changed = AUGMENTS[name](images, seeded(2))
    assert changed.dtype == torch.uint8
    assert changed.shape == shape
    assert torch.equal(images, kept)
    assert torch.equal(changed, AUGMENTS[name](images, seeded(2)))


def test_none_changes_nothing() -> None:
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(AUGMENTS["none"](images, seeded()), images)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(AerogelError, match="unknown name 'crop_filp'; did you mean crop_flip"):
        find_augment("crop_filp")
