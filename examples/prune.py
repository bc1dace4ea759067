"""Pruning from Python, on scikit-learn's digits: a scan, a cut with its recovery, and cuts between training steps.

    python examples/prune.py

1. what each coupled group of channels is worth, without retraining;
2. one cut to 30 % of the MACs: as it comes, with its norms measured again, and recovered from the uncut network;
3. the same goal in five cuts within one training, whose loop is ours: the optimizer is cut along.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

import aerogel as ag
from aerogel.data import Dataset, batches
from aerogel.distill import SoftTargets
from aerogel.prune import SCHEDULES, cut, cut_points, recalibrate, sensitivity
from aerogel.train import HardLabels, Recipe, accuracy, fit, start, steps

GOAL, CUTS = 0.3, 5


def main(epochs: float = 12) -> dict[str, float]:
    """Prints the tour; returns the accuracies on the validation images by name."""
    data, recipe = ag.data.load("digits"), Recipe(epochs=epochs)
    x = (torch.zeros(1, *data.input_shape),)
    torch.manual_seed(0)
    net = ag.nets.build("vgg11", width=0.125, num_classes=10, in_channels=1, input_size=28)
    fit(start(net, HardLabels(), data, recipe), data)
    found = {"uncut": accuracy(net, data, "val")}

    print("accuracy with 30, 60 and 90 % of one group's channels gone")
    scan = sensitivity(net, x, evaluate=lambda model: accuracy(model, data, "val"), shares=(0.3, 0.6, 0.9))
    for name, curve in scan.groups.items():
        print(f"  {name:<24}{curve.channels:>4} channels" + "".join(f"{value:>8.1f}" for value in curve.values))

    made = cut(net, x, target={"macs": GOAL})
    found["cut"] = accuracy(made.model, data, "val")
    recalibrate(made.model, batches(data, "train", 128))
    found["cut, norms measured again"] = accuracy(made.model, data, "val")
    ag.recover(made.model, teacher=net, data=data, recipe=recipe)
    found["cut, recovered"] = accuracy(made.model, data, "val")
    found["cut while training"] = accuracy(gradually(net, data, recipe), data, "val")

    print(f"\n{made.before.macs:,} -> {made.after.macs:,} MACs, cut = masked to {made.max_error:.1e}")
    for name, value in found.items():
        print(f"  {name:<28}{value:>8.2f} %")
    return found


def gradually(teacher: nn.Module, data: Dataset, recipe: Recipe) -> nn.Module:
    """A copy of the network in training, cut five times on the way."""
    x = (torch.zeros(1, *data.input_shape),)
    state = start(copy.deepcopy(teacher), SoftTargets(teacher), data, recipe)
    whole, points = ag.cost.count(ag.capture(teacher, x)).macs, cut_points(state.total, CUTS)
    for step in steps(state, data):
        if step.number not in points:
            continue
        share = SCHEDULES["gradual"](points.index(step.number) + 1, CUTS, GOAL)
        now = ag.cost.count(ag.capture(state.model, x)).macs
        made = cut(state.model, x, target={"macs": min(1.0, share * whole / now)})
        made.apply_to(state.optimizer)
        state.model = made.model
    return state.model


if __name__ == "__main__":
    main()
