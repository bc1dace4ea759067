"""Whole networks, ours and Hugging Face's, against a formula written by hand or a published number; both counts agree.

Hand formulas are multiply-accumulates of a batch of one. Published MACs are rounded by their sources: torchvision's
documentation ("GFLOPS" of its weights, which are multiply-accumulates) to 0.001, papers to 0.1 and less.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from aerogel import nets
from aerogel.cost import count, verify
from aerogel.export import example_inputs, open_model
from aerogel.graph import capture


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class Found(NamedTuple):
    params: int
    macs: int


def counted(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
    """What `count` finds; everything has a formula, and the second count agrees module by module."""
    cost = count(capture(model, args, kwargs))
    assert cost.uncounted == {}
    second = verify(model, args, kwargs, cost)
    assert (second.agrees, second.differs, second.reason) == (True, {}, "")
    assert second.macs == cost.macs
    assert cost.arena_bytes >= cost.peak_bytes > 0
    return Found(cost.params, cost.macs)


def hugging_face(text: str, given: str | None = None) -> Found:
    opened = open_model(f"hf:{text}", counting=True)
    return counted(opened.model, *example_inputs(opened, given))


# ---------------------------------------------------------------- ours, as torchvision documents its own

TORCHVISION = {  # parameters exactly, 10^9 MACs to three places
    "vgg11:batch_norm=false": (132_863_336, 7.609),
    "vgg16:batch_norm=false": (138_357_544, 15.470),
    "resnet18": (11_689_512, 1.814),
    "resnet34": (21_797_672, 3.664),
    "resnet50": (25_557_032, 4.089),
    "mobilenet_v2": (3_504_872, 0.301),
    "mobilenet_v3_large": (5_483_032, 0.217),
    "mobilenet_v3_small": (2_542_856, 0.057),
    "mnasnet_b1": (4_383_312, 0.314),
    "shufflenet_v2": (2_278_604, 0.145),
    "shufflenet_v2:width=0.5": (1_366_792, 0.040),
    "densenet121": (7_978_856, 2.834),
}
LONG = {"densenet121", "mobilenet_v3_large", "mobilenet_v3_small", "shufflenet_v2:width=0.5", "resnet34", "mnasnet_b1"}


@pytest.mark.parametrize("text", [pytest.param(t, marks=pytest.mark.slow if t in LONG else ()) for t in TORCHVISION])
def test_our_networks(text: str) -> None:
    name, args = nets.parse(text)
    with torch.device("meta"):
        net: Any = nets.build(name, **args).eval()
        x = torch.zeros(1, 3, 224, 224)
    found = counted(net, (x,), {})
    assert (found.params, round(found.macs / 1e9, 3)) == TORCHVISION[text]


# ---------------------------------------------------------------- Hugging Face's, by published numbers

HEAD = "num_labels=1000"
EXACT = {  # torchvision: vit_b_16, swin_t, convnext_tiny, resnet50, mobilenet_v2; parameters, 10^9 MACs to three places
    f"vit:architecture=ViTForImageClassification,{HEAD}": (86_567_656, 17.564),
    f"swin:architecture=SwinForImageClassification,{HEAD}": (28_288_354, 4.491),
    f"convnext:architecture=ConvNextForImageClassification,{HEAD}": (28_589_128, 4.456),
    f"resnet:architecture=ResNetForImageClassification,{HEAD}": (25_557_032, 4.089),
    f"mobilenet_v2:architecture=MobileNetV2ForImageClassification,{HEAD}": (3_504_872, 0.301),
}
PAPERS = {  # input, 10^6 parameters and 10^9 MACs as printed
    # Howard et al. 2017, MobileNets, table 4
    f"mobilenet_v1:architecture=MobileNetV1ForImageClassification,{HEAD}": ("3,224,224", "4.2", "0.569"),
    # Mehta, Rastegari 2021, MobileViT-S at 256
    f"mobilevit:architecture=MobileViTForImageClassification,{HEAD}": ("3,256,256", "5.6", "2.0"),
    # Woo et al. 2023, ConvNeXt V2-T, the parameters; the MACs are those of ConvNeXt-T
    f"convnextv2:architecture=ConvNextV2ForImageClassification,{HEAD}": ("3,224,224", "28.6", "4.456"),
    # Yu et al. 2022, PoolFormer-S12
    f"poolformer:architecture=PoolFormerForImageClassification,{HEAD}": ("3,224,224", "12", "1.8"),
    # Wang et al. 2021, PVT-Tiny
    f"pvt:architecture=PvtForImageClassification,{HEAD}": ("3,224,224", "13.2", "1.9"),
    # Yang et al. 2022, FocalNet-T (SRF)
    f"focalnet:architecture=FocalNetForImageClassification,{HEAD}": ("3,224,224", "28.4", "4.4"),
    # Radosavovic et al. 2020, RegNetY-4.0GF
    f"regnet:architecture=RegNetForImageClassification,{HEAD}": ("3,224,224", "20.6", "4.0"),
    # Xie et al. 2021, SegFormer-B0 on ADE20K at 512
    "segformer:architecture=SegformerForSemanticSegmentation,num_labels=150": ("3,512,512", "3.8", "8.4"),
}
HEAVY = {"swin", "mobilevit", "pvt", "focalnet", "regnet", "segformer"}


def cases(table: dict[str, Any]) -> list[Any]:
    names = {text: text.partition(":")[0] for text in table}
    return [pytest.param(t, id=name, marks=pytest.mark.slow if name in HEAVY else ()) for t, name in names.items()]


@pytest.mark.parametrize("text", cases(EXACT))
def test_parameters_and_macs_of_torchvisions_networks(text: str) -> None:
    found = hugging_face(text, "3,224,224")
    assert (found.params, round(found.macs / 1e9, 3)) == EXACT[text]


@pytest.mark.parametrize("text", cases(PAPERS))
def test_parameters_and_macs_of_the_papers(text: str) -> None:
    given, *printed = PAPERS[text]
    found = hugging_face(text, given)
    for number, told in zip((found.params / 1e6, found.macs / 1e9), printed, strict=True):
        assert f"{number:.{len(told.partition('.')[2])}f}" == told


# ---------------------------------------------------------------- transformers, by hand


def attention(queries: int, keys: int, width: int, inner: int) -> int:
    """Queries and outputs of `queries` tokens, keys and values of `keys`, scores and their weighted sums."""
    return (queries + keys) * 2 * width * inner + 2 * queries * keys * inner


def block(tokens: int, width: int, hidden: int) -> int:
    """Self-attention as wide as the model, and two layers with `hidden` between them."""
    return attention(tokens, tokens, width, width) + 2 * tokens * width * hidden


def image(size: int, patch: int, width: int) -> int:
    """Square patches of three channels, each times one matrix."""
    return (size // patch) ** 2 * patch**2 * 3 * width


def gated(tokens: int, width: int, hidden: int, heads: int, key_heads: int, head: int) -> int:
    """Llama's layer: fewer heads for keys and values than for queries, three matrices behind them."""
    projections = tokens * width * head * 2 * (heads + key_heads)
    return projections + 2 * tokens**2 * heads * head + 3 * tokens * width * hidden


BY_HAND: dict[str, tuple[str | None, int]] = {
    "bert:num_hidden_layers=3": ("128", 3 * block(128, 768, 3072) + 768**2),  # the pooler sees one token
    "roberta:num_hidden_layers=2": ("50", 2 * block(50, 768, 3072) + 768**2),
    "distilbert:n_layers=2": ("50", 2 * block(50, 768, 3072)),
    "electra:num_hidden_layers=2": ("50", 50 * 128 * 256 + 2 * block(50, 256, 1024)),
    "albert:num_hidden_layers=2": ("50", 50 * 128 * 4096 + 2 * block(50, 4096, 16384) + 4096**2),
    "gpt2:n_layer=2": ("64", 2 * block(64, 768, 3072)),
    "gpt2:n_layer=2,architecture=GPT2LMHeadModel": ("64", 2 * block(64, 768, 3072) + 64 * 768 * 50257),
    "opt:num_hidden_layers=2": ("64", 2 * block(64, 768, 3072)),
    "llama:num_hidden_layers=2": ("64", 2 * gated(64, 4096, 11008, 32, 32, 128)),
    "mistral:num_hidden_layers=2": ("64", 2 * gated(64, 4096, 14336, 32, 8, 128)),
    "qwen3:num_hidden_layers=2": ("64", 2 * gated(64, 4096, 22016, 32, 32, 128)),
    "t5:num_layers=2": ("40", 2 * (2 * block(40, 512, 2048) + attention(40, 40, 512, 512))),
    "bart:encoder_layers=1,decoder_layers=1": ("40", 2 * block(40, 1024, 4096) + attention(40, 40, 1024, 1024)),
    "deit:num_hidden_layers=2": (None, image(224, 16, 768) + 2 * block(198, 768, 3072) + 768**2),
    "beit:num_hidden_layers=2": (None, image(224, 16, 768) + 2 * block(197, 768, 3072)),
    "dinov2:num_hidden_layers=2": (None, image(224, 14, 768) + 2 * block(257, 768, 3072)),
    "fnet:num_hidden_layers=2": ("128", 2 * 2 * 128 * 768 * 3072 + 128 * 768**2 + 768**2),
}


@pytest.mark.parametrize("text", BY_HAND)
def test_by_hand(text: str) -> None:
    given, macs = BY_HAND[text]
    assert hugging_face(text, given).macs == macs


def test_the_encoder_of_whisper() -> None:
    """Radford et al. 2022, tiny: two convolutions over 3000 frames of 80 bins, the second with stride 2; 4 layers."""
    opened = open_model("hf:whisper", counting=True)
    encoder: Any = opened.model.get_encoder()  # type: ignore[operator]
    frames = torch.zeros(1, 80, 3000, device="meta")
    stem = 3000 * 384 * 80 * 3 + 1500 * 384 * 384 * 3
    assert counted(encoder, (), {"input_features": frames}).macs == stem + 4 * block(1500, 384, 1536)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mixture_of_experts(dtype: torch.dtype) -> None:
    """Jiang et al. 2024, Mixtral: of 8 experts each token goes through 2. In single precision transformers multiplies
    by a function of its own that has no form on the meta device: counted, not verified, and said so."""
    small = "hidden_size=32,num_hidden_layers=1,num_attention_heads=4,num_key_value_heads=2,intermediate_size=64"
    opened = open_model(f"hf:mixtral:{small}", counting=True)
    args, kwargs = example_inputs(opened, "10")
    model = opened.model.to(dtype)
    cost = count(capture(model, args, kwargs))
    assert cost.macs == gated(10, 32, 0, 4, 2, 8) + 10 * 32 * 8 + 10 * 2 * 3 * 32 * 64
    assert cost.uncounted == {}
    found = verify(model, args, kwargs, cost)
    assert found.agrees is (True if dtype == torch.bfloat16 else None)
    assert (found.reason == "") == (dtype == torch.bfloat16)


def test_clip_sees_an_image_and_a_text() -> None:
    """Radford et al. 2021, ViT-B/32: 50 tokens of 768, 77 of 512; both end in 512, and one product compares them."""
    found = hugging_face("clip")
    sees = image(224, 32, 768) + 12 * block(50, 768, 3072) + 768 * 512
    reads = 12 * block(77, 512, 2048) + 512**2
    assert found == Found(151_277_313, sees + reads + 512)


@pytest.mark.slow
def test_detr(tmp_path: Path) -> None:
    """Carion et al. 2020, DETR-R50: 41,302,368 parameters in its authors' training logs, which leave out the frozen
    stem and first stage; MACs by hand: ResNet-50, and a transformer of 8 x 8 places and 100 queries."""
    config = {"model_type": "detr", "architectures": ["DetrForObjectDetection"], "num_labels": 91,
              "backbone_config": {"model_type": "resnet", "out_features": ["stage4"]}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = hugging_face(str(tmp_path), "3,256,256")
    assert found.params == 41_302_368 + 9_408 + 212_992
    resnet = (4_089_184_256 - 2048 * 1000) * 64 // 49  # without its classifier; of 256 pixels instead of 224
    encoder = 6 * block(64, 256, 2048)
    decoder = 6 * (block(100, 256, 2048) + attention(100, 64, 256, 256))
    heads = 100 * (256 * 92 + 2 * 256**2 + 256 * 4)
    assert found.macs == resnet + 64 * 2048 * 256 + encoder + decoder + heads


def test_llama_7b() -> None:
    """Touvron et al. 2023: 6.7 billion parameters, of which two layers here and the other 30 by hand."""
    found = hugging_face("llama:architecture=LlamaForCausalLM,num_hidden_layers=2", "2048")
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert found.params + 30 * layer == 6_738_415_616
    assert found.macs == 2 * gated(2048, 4096, 11008, 32, 32, 128) + 2048 * 4096 * 32000


@pytest.mark.slow
def test_seven_billion_parameters_are_counted_in_two_gigabytes() -> None:
    """In a process of its own: the most memory it ever held, all of Python, torch and transformers with it."""
    code = (
        "import json, resource; from aerogel.report.cost_job import counted\n"
        "cost = counted('hf:llama', '2048', None, False).cost\n"
        "print(json.dumps([cost.params, cost.verified.agrees, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    params, agrees, kib = json.loads(done.stdout)
    assert params == 6_607_343_616  # Llama 7B has 6,738,415,616; less its head, 32,000 x 4,096
    assert agrees is True
    assert kib < 2 * 2**20
