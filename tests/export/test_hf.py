"""Hugging Face's architectures from a configuration: no weights, no network, no code but transformers' own."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aerogel.cost import count
from aerogel.errors import AerogelError
from aerogel.export import Opened, example_inputs, open_model
from aerogel.export.hf import scale_of
from aerogel.graph import capture

TINY = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "vocab_size": 50, "max_position_embeddings": 20}  # fmt: skip
SMALL_VIT = "hf:vit:hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)


def opened(text: str) -> Opened:
    return open_model(text, counting=True)


def inputs(text: str, given: str | None = None) -> dict[str, tuple[int, ...]]:
    args, kwargs = example_inputs(opened(text), given)
    assert args == ()
    assert {tensor.device.type for tensor in kwargs.values()} == {"meta"}
    return {name: tuple(tensor.shape) for name, tensor in kwargs.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def test_a_type_with_entries_of_ones_own() -> None:
    found = opened(SMALL_VIT)
    assert (type(found.model).__name__, found.trained, found.factory, found.weightless) == (
        "ViTModel",
        False,
        None,
        True,
    )
    assert {p.device.type for p in found.model.parameters()} == {"meta"}
    assert not found.model.training
    assert found.model.config.hidden_size == 16  # type: ignore[union-attr]


def test_a_folder_a_file_and_entries_on_top(folder: Path) -> None:
    for text in (f"hf:{folder}", f"hf:{folder / 'config.json'}"):
        model: Any = opened(text).model
        assert (type(model).__name__, model.config.num_hidden_layers) == ("BertModel", 2)
    model = opened(f"hf:{folder}:num_hidden_layers=1,num_labels=7,architecture=BertForSequenceClassification").model
    assert (len(model.bert.encoder.layer), model.classifier.out_features) == (1, 7)


def test_an_entry_that_counts_nothing_may_be_negative() -> None:
    assert opened("hf:bert:num_hidden_layers=1,pad_token_id=-1").model.config.pad_token_id == -1  # type: ignore[union-attr]
    assert not list(opened("hf:bert:num_hidden_layers=0").model.encoder.layer)  # type: ignore[union-attr,operator]


def test_a_files_own_architecture_is_built(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(TINY | {"architectures": ["BertForMaskedLM"]}))
    assert type(opened(f"hf:{folder}").model).__name__ == "BertForMaskedLM"
    assert type(opened(f"hf:{folder}:architecture=BertModel").model).__name__ == "BertModel"


@pytest.mark.parametrize(
    ("text", "given", "shapes"),
    [
        (SMALL_VIT, None, {"pixel_values": (1, 3, 224, 224)}),
        (f"{SMALL_VIT},image_size=32,num_channels=1", None, {"pixel_values": (1, 1, 32, 32)}),
        ("hf:resnet", "3,64,48", {"pixel_values": (1, 3, 64, 48)}),
        ("hf:bert:num_hidden_layers=1", None, {"input_ids": (1, 128)}),
        ("hf:bert:num_hidden_layers=1,max_position_embeddings=20", None, {"input_ids": (1, 20)}),
        ("hf:bert:num_hidden_layers=1", "7", {"input_ids": (1, 7)}),
        ("hf:t5:num_layers=1", "9", {"input_ids": (1, 9), "decoder_input_ids": (1, 9)}),
        ("hf:whisper", None, {"input_features": (1, 80, 3000), "decoder_input_ids": (1, 128)}),
        ("hf:wav2vec2:num_hidden_layers=1", "16000", {"input_values": (1, 16000)}),
        ("hf:clip", None, {"pixel_values": (1, 3, 224, 224), "input_ids": (1, 77)}),
    ],
)
def test_example_inputs(text: str, given: str | None, shapes: dict[str, tuple[int, ...]]) -> None:
    assert inputs(text, given) == shapes


def test_what_it_opens_can_be_counted_without_a_cache() -> None:
    found = opened(
        "hf:llama:hidden_size=32,num_hidden_layers=1,num_attention_heads=4,intermediate_size=64,vocab_size=40"
    )
    graph = capture(found.model, *example_inputs(found, "5"))
    assert len(graph.outputs) == 1, "the last hidden state, and no keys and values"
    cost = count(graph)
    assert cost.macs == 5 * (4 * 32**2 + 3 * 32 * 64) + 2 * 5 * 5 * 32
    assert cost.params == 4 * 32**2 + 3 * 32 * 64 + 3 * 32 + 40 * 32


def test_inputs_of_the_other_forms() -> None:
    args, kwargs = example_inputs(open_model("lenet5"))
    assert (tuple(args[0].shape), kwargs, args[0].device.type) == ((1, 1, 28, 28), {}, "cpu")
    args, _ = example_inputs(open_model("lenet5"), "1,32,32")
    assert tuple(args[0].shape) == (1, 1, 32, 32)
    own = Opened(torch.nn.Linear(3, 3), "own.py:build", False)
    with pytest.raises(AerogelError, match=r"^--input C,H,W is needed: nothing says which input Linear takes$"):
        example_inputs(own)
    with pytest.raises(AerogelError, match=r"^--input must be C,H,W, three positive whole numbers, got '128'; write"):
        example_inputs(own, "128")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "hf:vitt",
            r"^model 'hf:vitt': 'vitt' is no model type of .*no folder and no file; did you mean vit ",
        ),
        ("hf:", r"^model 'hf:': '' is no model type"),
        ("hf:vit:hiden_size=3", r"^model .*: vit has no entry 'hiden_size'; did you mean hidden_size"),
        ("hf:vit:to_dict=3", r"^model .*: vit has no entry 'to_dict'; "),
        ("hf:vit:hidden_size", r"'hidden_size' is not KEY=VALUE$"),
        ("hf:vit:hidden_size=0", r"^model 'hf:vit:hidden_size=0' cannot be built: .*; change that entry$"),
        ("hf:vit:hidden_size=-4", r": hidden_size must be >= 0, got -4; without it, it is 768$"),
        ("hf:bert:num_hidden_layers=-1", r": num_hidden_layers must be >= 0, got -1; without it, it is 12$"),
        ("hf:gpt2:num_hidden_layers=-1", r": num_hidden_layers must be >= 0, got -1; "),
        ("hf:~nosuchuser/x", r": '~nosuchuser/x' is no model type of .*, no folder and no file; "),
        ("hf:" + 300 * "x", r" is no model type of .*, no folder and no file; "),
        ("hf:vit:hidden_size=many", r"^model 'hf:vit:hidden_size=many'"),
        ("hf:vit:architecture=ViTForEverything", r"has no network 'ViTForEverything'$"),
        ("hf:upernet", r"^model .*: upernet has no base model; add architecture=..., known: UperNetForSemanticSegment"),
        ("hf:vit:architecture=AutoConfig", r"has no network 'AutoConfig'$"),
        ("hf:vit:architecture=BertModel", r": BertModel is not built from a vit configuration$"),
        (
            "hf:detr",
            r"^model 'hf:detr': TimmBackbone requires the timm library .*; install it, or give a ",
        ),
    ],
)
def test_what_cannot_be_opened(text: str, message: str) -> None:
    with pytest.raises(AerogelError, match=message) as told:
        opened(text)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ("{", r"its configuration cannot be read: "),
        ("[]", r"its configuration cannot be read: "),
        ("{}", r"its configuration cannot be read: "),
        ('{"model_type": "nothing"}', r"its configuration cannot be read: "),
        (json.dumps(TINY | {"architectures": ["os.system"]}), r"has no network 'os.system'$"),
        (json.dumps(TINY | {"num_attention_heads": 3}), r"cannot be built: "),
    ],
)
def test_files_that_do_not_do(tmp_path: Path, held: str, message: str) -> None:
    (tmp_path / "config.json").write_text(held)
    with pytest.raises(AerogelError, match=message):
        opened(f"hf:{tmp_path}")


def test_code_beside_a_configuration_is_not_run(folder: Path) -> None:
    auto_map = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (folder / "config.json").write_text(json.dumps(TINY | {"auto_map": auto_map}))
    (folder / "own.py").write_text("open('exploded', 'w')\nraise SystemExit\n")
    assert type(opened(f"hf:{folder}").model).__name__ == "BertModel"
    (folder / "config.json").write_text(json.dumps(TINY | {"auto_map": auto_map, "model_type": "theirs"}))
    with pytest.raises(AerogelError, match=r"its configuration cannot be read: "):
        opened(f"hf:{folder}")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        (
            "hf:resnet",
            None,
            r"^--input C,H,W is needed: a resnet configuration holds no image size",
        ),
        ("hf:resnet", "224", r"^--input must be C,H,W, three positive whole numbers, got '224'"),
        ("hf:bert:num_hidden_layers=1", "3,4,4", r"^--input must be a number of tokens for this network, got '3,4,4'"),
        ("hf:bert:num_hidden_layers=1", "0", r"^--input must be a number of tokens for this network, got '0'"),
        ("hf:wav2vec2:num_hidden_layers=1", None, r"^--input SAMPLES is needed: "),
    ],
)
def test_sizes_that_do_not_do(text: str, given: str | None, message: str) -> None:
    found = opened(text)
    with pytest.raises(AerogelError, match=message):
        example_inputs(found, given)


def test_it_is_for_counting_alone() -> None:
    with pytest.raises(AerogelError, match=r"^model 'hf:vit' has no weights: .* file.py:factory that returns it$"):
        open_model("hf:vit")
    with pytest.raises(AerogelError, match=r"^model 'hf:vit' takes no --weights: "):
        open_model("hf:vit", weights="model.safetensors", counting=True)


def test_without_transformers_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AerogelError, match=r"^hf: models need transformers, .* `pip install aerogel\[hf\]`$"):
        opened("hf:vit")


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ({"image_mean": [0.5, 0.4], "image_std": [0.25, 0.2]}, ((0.5, 0.4), (0.25, 0.2))),
        ({"image_mean": 0.5, "image_std": 0.25, "rescale_factor": 0.00392156862745098}, ((0.5, 0.5), (0.25, 0.25))),
        ({"image_mean": [0.5, 0.4], "image_std": [0.25, 0.2], "do_normalize": False}, ((0.0, 0.0), (1.0, 1.0))),
        ({"image_mean": [1.0, 1.0], "image_std": [1.0, 1.0], "rescale_factor": 2 / 255}, ((0.5, 0.5), (0.5, 0.5))),
        ({"image_mean": [51.0, 0.0], "image_std": [255.0, 51.0], "do_rescale": False}, ((0.2, 0.0), (1.0, 0.2))),
        ({"size": 224}, None),
        (None, None),
    ],
    ids=["plain", "one number", "not normalised", "factor", "not rescaled", "says nothing", "absent"],
)
def test_the_normalisation_beside_a_saved_network(held: object, expected: object, tmp_path: Path) -> None:
    """Each as the image processors of transformers apply it: mean and std of pixels from 0 to 1."""
    file = tmp_path / "preprocessor_config.json"
    if held is not None:
        file.write_text(json.dumps(held))
    found = scale_of(file, 2)
    if found is None or expected is None:
        assert found is expected
        return
    for ours, theirs in zip(found, expected, strict=True):  # type: ignore[call-overload]
        assert ours == pytest.approx(theirs)


@pytest.mark.parametrize(
    "held",
    [[], {"image_mean": ["a"], "image_std": [1.0]}, {"image_mean": [0.5], "image_std": [0.0]},
     {"image_mean": [0.5, 0.5], "image_std": [1.0]}, {"image_mean": [0.5], "image_std": [1.0], "rescale_factor": 0},
     {"image_mean": [0.5], "image_std": [1.0], "rescale_factor": None}, {"rescale_offset": True}],
    ids=["list", "text", "zero", "lengths", "factor", "no factor", "offset"],
)  # fmt: skip
def test_a_normalisation_that_is_none_is_refused(held: object, tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(held))
    with pytest.raises(AerogelError, match=r"preprocessor_config\.json: .*; (mend it|remove it, and say mean)"):
        scale_of(file, 1)
