"""Any network: every convolutional one of NETS and every family of Hugging Face is cut exactly, or told why not.

At 10, 30, 50 and 90 % of the channels removed, and half of them in five steps, at random: the cut network computes
what the masked one does, on other random numbers than those that `cut` proves itself with. Whatever stays whole has
its reason. A selection runs in `make test`, all of it in `make conformance`.
"""

from __future__ import annotations

from typing import Any

import pytest
from families import NETWORKS, WAYS, Case, cut_at_random, random_like, unexplained
from reference import answers, largest, masked, masked_but_for_norms
from strategies import assert_sliced

from aerogel.cost import count
from aerogel.errors import CutError
from aerogel.graph import capture
from aerogel.prune import cut
from aerogel.prune.coupling import couple
from aerogel.prune.proof import TOLERANCE

OTHER_STATISTICS = ("hf convnextv2",)  # a mean over channels that is no module of its own
SOME = ("lenet5", "shufflenet_v1", "hf resnet", "hf swin", "hf vit", "hf bert", "hf llama")


def cut_is_exact(case: Case, keep: float, steps: int, **options: Any) -> None:
    net, _, inputs = case
    if all(group.inexact for group in couple(capture(net, (), inputs)).groups):
        with pytest.raises(CutError, match=r"more groups pass a statistic .*: allow_inexact=True cuts them too"):
            cut(net, (), inputs, target={"channels": keep})
        return
    found = cut_at_random(case, keep, steps, **options)
    assert found.proof <= TOLERANCE
    assert found.error <= TOLERANCE
    assert found.shown, "what was removed makes no difference: nothing was shown"
    assert all(found.made.frozen.values())
    assert_sliced(net, found.net, {name: dims for name, dims in found.kept.items() if name in net.state_dict()})
    assert found.made.after == count(capture(found.net, (), inputs))


@pytest.mark.parametrize("name", SOME)
def test_some_networks_are_cut_exactly(name: str) -> None:
    cut_is_exact(NETWORKS[name](), 0.5, 1)


def test_one_is_cut_exactly_step_by_step() -> None:
    cut_is_exact(NETWORKS["hf vit"](), 0.5, 3)


@pytest.mark.parametrize("name", SOME)
def test_of_some_networks_nothing_is_passed_over_in_silence(name: str) -> None:
    net, args, kwargs = NETWORKS[name]()
    assert unexplained(net, couple(capture(net, args, kwargs))) == []


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "steps"), WAYS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_cut_exactly(name: str, keep: float, steps: int) -> None:
    cut_is_exact(NETWORKS[name](), keep, steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_passed_over_in_silence(name: str) -> None:
    net, args, kwargs = NETWORKS[name]()
    assert unexplained(net, couple(capture(net, args, kwargs))) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_width_of_heads_is_cut_exactly(name: str) -> None:
    cut_is_exact(NETWORKS[name](), 0.5, 1, heads="width")


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_what_cannot_be_exact_is_cut_only_when_it_may_and_tells_the_difference(name: str) -> None:
    net, args, kwargs = NETWORKS[name]()
    both = cut(net, args, kwargs, target={"channels": 0.6}, criterion="random", allow_inexact=True)
    assert both.max_error <= TOLERANCE
    x = random_like(kwargs, 1)
    got = answers(both.model, x)
    told, plain = both.difference, largest(answers(masked(net, both.kept), x), got)
    assert (told > TOLERANCE) == (plain > TOLERANCE), "a difference is told where there is one"
    error = largest(answers(masked_but_for_norms(net, both.model, both.kept), x), got)
    if name in OTHER_STATISTICS:
        assert error < float("inf")
    else:
        assert error <= TOLERANCE, "the statistics of norms are all that is not exact"
