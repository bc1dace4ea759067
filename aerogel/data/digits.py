"""The 1,797 handwritten digits that scikit-learn carries: no file, no network needed.

Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits" (its test part). 8x8 pixels with
values 0..16, here scaled to 0..255 and resized (bilinear) to 1x28x28, so that networks for MNIST take them.
Split, stratified: 539 test (30 %), 189 validation (15 % of the rest), 1,069 training images.
"""

from __future__ import annotations

import torch

from aerogel.data.dataset import Dataset, Split
from aerogel.data.prepare import assemble, carve, resize_images

CLASSES = tuple("0123456789")


def digits() -> Dataset:
    from sklearn.datasets import load_digits  # imported here: it takes a second

    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels * (255 / 16)).round().to(torch.uint8).view(-1, 1, 8, 8)
    everything = Split(resize_images(small, (1, 28, 28)), torch.from_numpy(labels).long())
    rest, test = carve(everything, round(0.3 * len(everything)))
    return assemble("digits", rest, test, CLASSES, val=round(0.15 * len(rest)), augment="shift")
