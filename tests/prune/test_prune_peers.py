"""benchmarks/prune_peers.py: it reads what was cut from the numbers, and its page says what its results do."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from families import FAMILIES
from reference import named
from strategies import IMAGE, Around
from torch import nn

from aerogel.prune import cut


@pytest.fixture(scope="module")
def script(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("prune_peers")


def test_what_is_left_is_read_from_the_numbers(script: ModuleType) -> None:
    net = script.distinct(Around(lambda net, x: x))
    made = cut(net, (IMAGE.double(),), target={"channels": 0.5})
    kept = script.kept_by_values(named(net), named(made.model))
    assert kept.keys() == made.kept.keys()
    for name, dims in kept.items():
        for ours, read in zip(made.kept[name], dims, strict=True):
            assert (ours is None) == (read is None)
            assert ours is None or torch.equal(ours, read)


def test_numbers_that_were_not_there_are_told(script: ModuleType) -> None:
    net = script.distinct(nn.Linear(4, 3))
    with pytest.raises(LookupError, match="weight holds other numbers than before"):
        script.kept_by_values({"weight": net.weight}, {"weight": net.weight[:2] + 1})


def test_heads_are_found_by_the_names_of_layers(script: ModuleType) -> None:
    net, _, _ = FAMILIES["llama"]()
    names = {module: name for name, module in net.named_modules()}
    found = {names[module].rpartition(".")[2]: heads for module, heads in script.heads_of(net).items()}
    assert found == {"q_proj": 4, "k_proj": 2, "v_proj": 2}
    assert script.heads_of(Around(lambda net, x: x)) == {}


def test_the_page_says_what_the_results_say(script: ModuleType) -> None:
    held = json.loads(script.RESULTS.read_text())
    assert script.table(held) in script.PAGE.read_text()


def test_no_network_of_the_results_was_cut_wrongly(script: ModuleType) -> None:
    held = json.loads(script.RESULTS.read_text())["networks"]
    assert held.keys() == script.NETWORKS.keys()
    for name, row in held.items():
        for way, said in row["aerogel"]["errors"].items():
            assert float(said) <= 1e-4, f"{name}, {way}: {said}"


@pytest.mark.parametrize("name", ["resnet", "llama"])
def test_a_network_of_the_table_is_still_cut_as_far(script: ModuleType, name: str) -> None:
    """What the table says can be cut is what coupling finds today."""
    held = json.loads(script.RESULTS.read_text())["networks"][f"hf {name}"]["aerogel"]
    net, args, kwargs = FAMILIES[name]()
    total, exact, inexact = script.rows(net, script.couple(script.capture(net, args, kwargs)))
    assert (total, exact, inexact) == (held["rows"], held["exact"], held["inexact"])
