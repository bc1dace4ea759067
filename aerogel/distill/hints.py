"""Hints (FitNets). Romero, Ballas, Kahou, Chassang, Gatta, Bengio 2015, "FitNets: hints for thin deep nets",
arXiv:1412.6550, eq. 3.

loss = |r(student's feature) - teacher's feature|^2, r a trained regressor; here the mean over all numbers
Paper: r a convolution that gives the teacher's size, half the sum of squares, as a first stage of training.
Differs: r is 1 x 1 (a linear map of the channels at each place) and maps of two sizes are averaged to the smaller one;
the mean, at all times, as in RepDistiller, whose weight is 100.
"""

from __future__ import annotations

from torch import Tensor, nn

from aerogel.distill.features import channels, matched
from aerogel.errors import AerogelError


def hint_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of features with equal channels: (n, C), (n, C, H, W) or (n, tokens, C) -> ().

    Symmetric; 0 when they agree. Raises AerogelError for other channels, places that do not match, and a teacher whose
    features are not finite.
    """
    one, other = matched("hint_loss", projected, teacher)
    if one.shape != other.shape:
        raise AerogelError(
            f"hint_loss: features must have equally many channels, got {one.shape[2]} and {other.shape[2]}; "
            "put a Projector on the student's"
        )
    return (one - other).square().mean()


class Projector(nn.Module):
    """The student's channels to the teacher's, by an example of each: (n, C, ...) -> (n, C of the teacher, ...)."""

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        super().__init__()
        self.map = nn.Linear(channels(student), channels(teacher))

    def forward(self, feature: Tensor) -> Tensor:
        return along_channels(self.map, feature)


def along_channels(net: nn.Module, feature: Tensor) -> Tensor:
    """A network of the last dimension on the channels, wherever they are."""
    return net(feature.movedim(1, -1)).movedim(-1, 1) if feature.ndim == 4 else net(feature)
