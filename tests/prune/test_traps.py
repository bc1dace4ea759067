"""Traps for the proof: networks in which a wrong index hides, and numbers that must, or must not, follow a cut."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import aerogel as ag
from aerogel.errors import CutError
from aerogel.prune import cut

IMAGE = (torch.zeros(2, 3, 6, 6),)


class Hidden(nn.Module):
    """A branch that splits 16 channels by a number in the code: its layer `a` must never be cut."""

    def __init__(self, scale: float = 1.0, pooled: bool = False, last: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(1, 12, 1)
        self.gamma, self.norm, self.out = nn.Parameter(torch.tensor(scale)), nn.LayerNorm(12), nn.Linear(12, 4)
        self.pooled = pooled
        nn.init.constant_(self.b.weight, last) if last == 0 else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.a(x).relu()
        x = x + self.gamma * self.b(2 * h[:, :8].sum(1, True) - h[:, 8:].sum(1, True))
        x = x.mean((2, 3))
        return self.out(self.norm(x) if self.pooled else x)


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (Hidden(), {}),
        (Hidden(scale=1e-6), {}),
        (Hidden(last=0.0), {}),
        (Hidden(pooled=True), {"allow_inexact": True}),
    ],
    ids=["plain", "tiny layer scale", "last weights zero", "behind a pool and a norm"],
)
def test_a_wrong_index_is_seen_however_it_is_hidden(net: nn.Module, options: dict[str, Any]) -> None:
    with pytest.raises(
        CutError, match=r"'a' names no channels that can be cut: a stays whole \(cut and masked .* differ"
    ):
        cut(net, IMAGE, target={"channels": 0.6}, ratios={"a": 0.5}, criterion="l1", **options)


def test_a_small_output_beside_a_large_one_is_compared_too() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.box, self.score = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(2, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h = torch.cat([2 * h[:, :8].sum(1, True), h[:, 8:].sum(1, True)], 1)
            return torch.cat([self.box(x) * 20000, self.score(h).sigmoid()], 1)

    with pytest.raises(CutError, match=r"a stays whole \(cut and masked outputs differ"):
        cut(Detector(), IMAGE, target={"channels": 1.0}, ratios={"a": 0.5})


def test_words_that_are_all_the_same_do_not_hide_keys() -> None:
    class Keys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(20, 12)
            self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            q, k, v = (f(x) for f in (self.q, self.k, self.v))
            return self.o((q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v)

    with pytest.raises(CutError, match=r"q stays whole \(cut and masked outputs differ"):  # its scale follows the width
        cut(Keys(), (torch.zeros(1, 8, dtype=torch.long),), target={"channels": 0.9}, ratios={"q": 0.5})


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.aux = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).relu()
        y = self.c(self.b(h).relu())
        return (y, self.aux(h)) if self.training else y


def test_a_branch_that_only_training_takes_protects_what_it_reads() -> None:
    made = cut(Auxiliary(), (torch.zeros(2, 4),), target={"channels": 0.7}, ranking="local")
    assert made.model.a.out_features == 16
    assert "in training, which takes other branches" in made.frozen["a"]
    assert made.model.b.out_features < 16
    made.model.train()(torch.zeros(2, 4))


# ---------------------------------------------------------------- numbers


def test_every_field_of_a_config_follows_whatever_their_order() -> None:
    class Config(SimpleNamespace):
        def to_dict(self) -> dict[str, Any]:
            return vars(self)

    class Mlp(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.config, self.intermediate_size = config, config.intermediate_size
            self.up, self.down = nn.Linear(4, config.intermediate_size), nn.Linear(config.intermediate_size, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu())

    net = Mlp(Config(ffn_dim=8, top_k=8, intermediate_size=8, seed=8))
    made = cut(net, (torch.zeros(2, 4),), target={"channels": 0.5})
    assert vars(made.model.config) == {"ffn_dim": 4, "top_k": 8, "intermediate_size": 4, "seed": 8}
    assert made.model.intermediate_size == 4
    assert net.config.intermediate_size == 8


def test_numbers_that_only_happen_to_be_a_width_stay() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    net.every, net.bits = 8, 8
    made = cut(net, (torch.zeros(2, 5),), target={"channels": 0.5})
    assert (made.model.every, made.model.bits, made.model[0].out_features) == (8, 8, 4)


def test_a_class_derived_from_a_layer_has_the_layers_numbers() -> None:
    class Mine(nn.Conv2d):
        pass

    net = nn.Sequential(nn.Conv2d(3, 16, 1), Mine(16, 16, 3, groups=2), nn.Conv2d(16, 2, 1))
    made = cut(net, IMAGE, target={"channels": 0.9}, ratios={"1": 0.5})
    layer = made.model[1]
    assert layer.weight.shape == (layer.out_channels, layer.in_channels // layer.groups, 3, 3)


def test_norms_without_scales_have_the_right_numbers() -> None:
    norms = nn.InstanceNorm2d(16), nn.GroupNorm(4, 8, affine=False)
    net = nn.Sequential(nn.Conv2d(3, 16, 1), norms[0], nn.Conv2d(16, 8, 1), norms[1], nn.Conv2d(8, 2, 1))
    made = cut(net, IMAGE, target={"channels": 0.5}, ranking="local")
    assert made.model[1].num_features == made.model[0].out_channels == 8
    assert (made.model[3].num_groups, made.model[3].num_channels) == (2, 4)


def test_an_averages_own_counters_stay() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    net.steps = 0
    average = AveragedModel(net)
    average.module.steps = 500
    made = cut(net, (torch.zeros(2, 5),), target={"channels": 0.5})
    made.apply_to(average)
    assert average.module.steps == 500
    assert average.module[0].out_features == 4


def test_a_network_with_moving_numbers_is_saved(tmp_path: Any) -> None:
    net = ag.nets.build("lenet5", num_classes=10, in_channels=1)
    net.seen = [0]
    net.seen.append(1)
    ag.save(net, tmp_path / "whole")
    assert "numbers" not in (tmp_path / "whole" / "config.json").read_text()


def test_a_cut_can_be_pickled() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    made = cut(net, (torch.zeros(2, 5),), target={"channels": 0.5})
    again = pickle.loads(pickle.dumps(made))
    assert again.after == made.after == ag.cost.count(ag.capture(copy.deepcopy(made.model), (torch.zeros(2, 5),)))


def test_a_network_without_numbers_is_refused() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(CutError, match=r"weights on the meta device.*load_state_dict"):
        cut(net, (torch.zeros(2, 5, device="meta"),), target={"channels": 0.5})


def test_the_larger_of_two_is_no_statistic() -> None:
    class Maxout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.max(*self.a(x).chunk(2, 1)))

    assert cut(Maxout(), IMAGE, target={"channels": 0.5}).model.a.out_channels == 8


def test_why_nothing_can_be_cut_is_said() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.Softmax(1), nn.Linear(8, 3))
    net[0].register_forward_hook(lambda module, args, out: out.logcumsumexp(1))
    with pytest.raises(CutError, match=r"nothing can be cut.*op logcumsumexp .* is not understood"):
        cut(net, (torch.zeros(2, 5),), target={"channels": 0.5})
