"""Small random networks, ours and of the Hugging Face families, to hold cuts against; and what a cut makes of each.

    python tests/prune/families.py [NAME ...]

prints for each: seconds to capture, channels, how many can be cut, why the others cannot, and what became of
cutting 10, 30, 50, 90 % of them at once and half of them in five steps: the proof's error, or the exception.
Sizes differ wherever they may (hidden 32, inner 48, 5 classes ...), so that a wrong dimension shows.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from reference import Kept, answers, composed, largest, masked, named
from torch import Tensor, nn

from aerogel import nets
from aerogel.errors import CutError
from aerogel.graph import capture
from aerogel.prune import Cut, cut
from aerogel.prune.coupling import Coupling, couple

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Builder = Callable[[], Case]


def image(side: int = 32, number: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": torch.zeros(number, 3, side, side)}


def words(length: int = 7, name: str = "input_ids", vocabulary: int = 61) -> dict[str, Tensor]:
    return {name: (torch.arange(2 * length).view(2, length) * 5 + 2) % vocabulary}


# What most text configurations have in common.
TEXT = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = TEXT | {"max_position_embeddings": 16}
DECODER = TEXT | ENDS | {"max_position_embeddings": 16, "num_key_value_heads": 2, "use_cache": False}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 5}
VIT |= {"image_size": 32, "patch_size": 8}
SEQ2SEQ = {"vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "use_cache": False} | ENDS
SEQ2SEQ |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40}
SEQ2SEQ |= {"decoder_start_token_id": 1}
CLIP_TEXT = ENCODER | ENDS
STAGES = {"num_labels": 5, "hidden_sizes": [16, 24], "depths": [2, 2]}

# name -> (class, configuration's class, entries, example inputs)
MODELS: dict[str, tuple[str, str, Mapping[str, Any], Mapping[str, Any]]] = {
    "resnet": ("ResNetForImageClassification", "ResNetConfig",
               {"embedding_size": 12, "hidden_sizes": [16, 32], "depths": [2, 2], "num_labels": 5}, image()),
    "resnet basic": ("ResNetForImageClassification", "ResNetConfig",
                     {"embedding_size": 12, "hidden_sizes": [16, 24], "depths": [2, 2], "num_labels": 5,
                      "layer_type": "basic"}, image()),
    "regnet": ("RegNetForImageClassification", "RegNetConfig",
               {"embedding_size": 12, "hidden_sizes": [16, 24], "depths": [2, 2], "groups_width": 8,
                "num_labels": 5}, image()),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", STAGES | {"num_stages": 2}, image()),
    "convnextv2": ("ConvNextV2ForImageClassification", "ConvNextV2Config", STAGES | {"num_stages": 2}, image()),
    "mobilenet_v1": ("MobileNetV1ForImageClassification", "MobileNetV1Config",
                     {"depth_multiplier": 0.25, "image_size": 64, "num_labels": 5}, image(64)),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", "MobileNetV2Config",
                     {"depth_multiplier": 0.25, "image_size": 64, "num_labels": 5}, image(64)),
    "efficientnet": ("EfficientNetForImageClassification", "EfficientNetConfig",
                     {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320,
                      "num_labels": 5}, image(64)),
    "mobilevit": ("MobileViTForImageClassification", "MobileViTConfig",
                  {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 12, 16, 20, 24, 40],
                   "num_attention_heads": 4, "num_labels": 5}, image(64)),
    "mobilevitv2": ("MobileViTV2ForImageClassification", "MobileViTV2Config",
                    {"image_size": 64, "base_attn_unit_dims": [16, 24, 32], "n_attn_blocks": [1, 1, 1],
                     "width_multiplier": 0.25, "num_labels": 5}, image(64)),
    "swin": ("SwinForImageClassification", "SwinConfig",
             {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
              "window_size": 4, "mlp_ratio": 1.5, "num_labels": 5}, image()),
    "swinv2": ("Swinv2ForImageClassification", "Swinv2Config",
               {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
                "window_size": 4, "mlp_ratio": 1.5, "num_labels": 5}, image()),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT, image()),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", VIT, image()),
    "beit": ("BeitForImageClassification", "BeitConfig",
             VIT | {"out_indices": [1, 2], "use_relative_position_bias": True, "layer_scale_init_value": 0.1}, image()),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**VIT, "mlp_ratio": 2}, image()),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig",
                  {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 24],
                   "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
                   "decoder_hidden_size": 20, "num_labels": 5}, image()),
    "poolformer": ("PoolFormerForImageClassification", "PoolFormerConfig",
                   {"hidden_sizes": [16, 24], "depths": [2, 2], "patch_sizes": [7, 3], "strides": [4, 2],
                    "padding": [2, 1], "num_encoder_blocks": 2, "mlp_ratio": 2.0, "num_labels": 5}, image()),
    "levit": ("LevitForImageClassification", "LevitConfig",
              {"image_size": 64, "hidden_sizes": [16, 24], "num_attention_heads": [2, 3], "depths": [1, 1],
               "key_dim": [8, 8], "attention_ratio": [2, 2], "mlp_ratio": [2, 2], "num_labels": 5,
               "down_ops": [["Subsample", 8, 2, 4, 2, 2], [""]]}, image(64)),
    "pvt": ("PvtForImageClassification", "PvtConfig",
            {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1],
             "hidden_sizes": [16, 24], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [2, 4],
             "mlp_ratios": [2, 2], "num_labels": 5}, image()),
    "pvt_v2": ("PvtV2ForImageClassification", "PvtV2Config",
               {"image_size": 64, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1],
                "num_attention_heads": [2, 4, 4, 4], "mlp_ratios": [2, 2, 2, 2], "num_labels": 5}, image(64)),
    "cvt": ("CvtForImageClassification", "CvtConfig",
            {"embed_dim": [16, 24], "depth": [1, 2], "num_heads": [2, 3], "patch_sizes": [7, 3],
             "patch_stride": [4, 2], "patch_padding": [2, 1], "mlp_ratio": [2.0, 2.0],
             "attention_drop_rate": [0.0, 0.0], "drop_rate": [0.0, 0.0], "drop_path_rate": [0.0, 0.0],
             "qkv_bias": [True, True], "cls_token": [False, True], "qkv_projection_method": ["dw_bn", "dw_bn"],
             "kernel_qkv": [3, 3], "padding_kv": [1, 1], "stride_kv": [2, 2], "padding_q": [1, 1],
             "stride_q": [1, 1], "num_labels": 5}, image()),
    "glpn": ("GLPNForDepthEstimation", "GLPNConfig",
             {"num_encoder_blocks": 4, "depths": [1, 1, 1, 1], "sr_ratios": [8, 4, 2, 1],
              "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 3, 4], "mlp_ratios": [2, 2, 2, 2],
              "decoder_hidden_size": 16}, image(64)),
    "dpt": ("DPTForDepthEstimation", "DPTConfig",
            VIT | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 12, 16, 20],
                   "fusion_hidden_size": 16}, image()),
    "yolos": ("YolosForObjectDetection", "YolosConfig",
              VIT | {"image_size": [32, 32], "num_detection_tokens": 5}, image()),
    "sam encoder": ("SamVisionModel", "SamVisionConfig",
                    {"hidden_size": 32, "output_channels": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "image_size": 32, "patch_size": 4, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 48,
                     "num_pos_feats": 10}, image()),
    "clip vision": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", VIT | {"projection_dim": 20}, image()),
    "clip text": ("CLIPTextModelWithProjection", "CLIPTextConfig", CLIP_TEXT | {"projection_dim": 20}, words()),
    "siglip vision": ("SiglipVisionModel", "SiglipVisionConfig", VIT, image()),
    "bert": ("BertForMaskedLM", "BertConfig", ENCODER, words()),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig",
                   {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
                    "max_position_embeddings": 16, "num_labels": 5}, words()),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", ENCODER | {"embedding_size": 24}, words()),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", ENCODER | {"num_labels": 5}, words()),
    "electra": ("ElectraForTokenClassification", "ElectraConfig",
                ENCODER | {"embedding_size": 24, "num_labels": 5}, words()),
    "deberta": ("DebertaV2ForSequenceClassification", "DebertaV2Config",
                ENCODER | {"num_labels": 5, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, words()),
    "mobilebert": ("MobileBertForSequenceClassification", "MobileBertConfig",
                   ENCODER | {"embedding_size": 16, "intra_bottleneck_size": 16, "num_labels": 5,
                              "true_hidden_size": 16}, words()),
    "squeezebert": ("SqueezeBertForSequenceClassification", "SqueezeBertConfig",
                    ENCODER | {"embedding_size": 32, "num_labels": 5}, words()),
    "fnet": ("FNetForSequenceClassification", "FNetConfig", ENCODER | {"num_labels": 5}, words()),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config",
             {"vocab_size": 61, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48,
              "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}, words()),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig",
                 ENCODER | {"use_cache": False, "bos_token_id": 1, "eos_token_id": 2}, words()),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, words()),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER | {"sliding_window": 4}, words()),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER, words()),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER | {"head_dim": 12}, words()),
    "phi": ("PhiForCausalLM", "PhiConfig", DECODER, words()),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", DECODER, words()),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", DECODER | {"head_dim": 12}, words()),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", DECODER | {"head_dim": 12, "sliding_window": 4}, words()),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig",
                DECODER | {"num_local_experts": 3, "num_experts_per_tok": 2}, words()),
    "opt": ("OPTForCausalLM", "OPTConfig",
            {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, "num_attention_heads": 4,
             "max_position_embeddings": 16, "word_embed_proj_dim": 32, "use_cache": False} | ENDS, words()),
    "bloom": ("BloomForCausalLM", "BloomConfig",
              {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False} | ENDS, words()),
    "mamba": ("MambaForCausalLM", "MambaConfig",
              {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 6, "use_cache": False}
              | ENDS, words()),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
            "use_cache": False, "decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2},
           words() | words(5, "decoder_input_ids")),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ | {"max_position_embeddings": 16},
             words() | words(5, "decoder_input_ids")),
    "marian": ("MarianMTModel", "MarianConfig", SEQ2SEQ | {"max_position_embeddings": 16},
               words() | words(5, "decoder_input_ids")),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig",
                SEQ2SEQ | {"num_mel_bins": 10, "max_source_positions": 12, "max_target_positions": 16},
                {"input_features": torch.zeros(2, 10, 24)} | words(5, "decoder_input_ids")),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config",
                 ENCODER | {"conv_dim": [16, 20], "conv_stride": [5, 2], "conv_kernel": [10, 3],
                            "num_feat_extract_layers": 2, "num_conv_pos_embedding_groups": 4,
                            "num_conv_pos_embeddings": 16}, {"input_values": torch.zeros(2, 400)}),
    "hubert": ("HubertForCTC", "HubertConfig",
               ENCODER | {"conv_dim": [16, 20], "conv_stride": [5, 2], "conv_kernel": [10, 3],
                          "num_feat_extract_layers": 2, "num_conv_pos_embedding_groups": 4,
                          "num_conv_pos_embeddings": 16}, {"input_values": torch.zeros(2, 400)}),
    "ast": ("ASTForAudioClassification", "ASTConfig",
            VIT | {"num_mel_bins": 16, "max_length": 24, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
            {"input_values": torch.zeros(2, 24, 16)}),
}  # fmt: skip


def randomise(net: nn.Module, inputs: Mapping[str, Tensor]) -> nn.Module:
    """In place: weights that keep the signal's size, norms of their own for every channel; no number is 0 or 1.

    Fresh ones (deviation 0.02, scales 1, biases 0, layer scales 1e-5) would hide a wrong index, and so would
    statistics of a batch norm that no signal had: those are of one random batch.
    """
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif isinstance(tensor, nn.Parameter) and tensor.ndim > 1 and tensor[0].numel() > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif isinstance(tensor, nn.Parameter) and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5)
            elif isinstance(tensor, nn.Parameter) or name.endswith("running_mean"):
                tensor.normal_(0.1, 0.2)
        norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            net.train()(**random_like(inputs))
    for norm in norms:
        norm.momentum = 0.1
    return net.eval()


def random_like(inputs: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Random numbers for images and sound, random words for text, its last word as it was; masks stay."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, x in inputs.items():
        if x.is_floating_point():
            x = torch.randn(x.shape, generator=generator)
        elif name.endswith("input_ids"):
            x = torch.cat([torch.randint(3, 61, x[:, 1:].shape, generator=generator), x[:, -1:]], 1)
        drawn[name] = x
    return drawn


def _from(network: str, configuration: str, entries: Mapping[str, Any], inputs: Mapping[str, Any]) -> Builder:
    """What builds one row of MODELS."""

    def build() -> Case:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, configuration)(**entries)
        return randomise(getattr(transformers, network)(config), inputs), (), dict(inputs)

    return build


def _backbone() -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(embedding_size=12, hidden_sizes=[16, 32], depths=[1, 1], out_features=["stage2"])


def detr() -> Case:
    from transformers import DetrConfig, DetrForObjectDetection

    torch.manual_seed(0)
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=_backbone(), num_queries=5, d_model=32,
        encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=40, num_labels=5,
    )  # fmt: skip
    inputs = image(64) | {"pixel_mask": torch.ones(2, 64, 64, dtype=torch.long)}
    return randomise(DetrForObjectDetection(config), inputs), (), inputs


def upernet() -> Case:
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    torch.manual_seed(0)
    backbone = ConvNextConfig(
        hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = UperNetConfig(backbone_config=backbone, hidden_size=24, auxiliary_in_channels=16, num_labels=5)
    return randomise(UperNetForSemanticSegmentation(config), image(64)), (), image(64)


def clip() -> Case:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    config = CLIPConfig(text_config=CLIP_TEXT, vision_config=VIT, projection_dim=20)
    return randomise(CLIPModel(config), words() | image()), (), words() | image()


FAMILIES: dict[str, Builder] = {name: _from(*row) for name, row in MODELS.items()}
FAMILIES |= {"detr": detr, "upernet": upernet, "clip": clip}


SMALL = {"width": 0.25, "growth": 8, "num_classes": 5, "in_channels": 3}
SIDES = {"lenet5": 28, "alexnet": 67, "densenet40": 32, "densenet121": 32}


def of_zoo(name: str) -> Case:
    """One of aerogel's own, narrow where it can be, for small images."""
    torch.manual_seed(0)
    options = inspect.signature(nets.NETS[name]).parameters
    entries = {key: SMALL[key] for key in SMALL if key in options} | {"input_size": SIDES.get(name, 32)}
    inputs = {"x": torch.zeros(2, 3, entries["input_size"], entries["input_size"])}
    return randomise(nets.build(name, **entries), inputs), (), inputs


ZOO = [name for name in nets.NETS if name not in ("lenet_300_100", "mlp")]
NETWORKS: dict[str, Builder] = {name: lambda name=name: of_zoo(name) for name in ZOO} | {
    f"hf {name}": build for name, build in FAMILIES.items()
}


WAYS = ((0.9, 1), (0.7, 1), (0.5, 1), (0.1, 1), (0.5, 5))  # (share kept, in so many steps)


# ---------------------------------------------------------------- is anything passed over in silence?


def unexplained(net: nn.Module, coupling: Coupling) -> list[str]:
    """The parameter dimensions with an index that is in no group and has no reason; [] is what must be.

    The kernel's own height and width are no channels; a dimension of size 1 has nothing to lose.
    """
    kernels = {id(m.weight) for m in net.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    held: dict[tuple[str, int], set[int]] = {}
    for group in coupling.groups:
        for member in group.members:
            held.setdefault((member.target, member.dim), set()).update(member.index.flatten().tolist())
    missing = []
    for name, tensor in net.named_parameters():
        for dim in range(min(tensor.ndim, 2) if id(tensor) in kernels else tensor.ndim):
            size, key = tensor.shape[dim], f"{name} dim {dim}"
            explained = key in coupling.frozen or name in coupling.frozen
            free = size - len(held.get((name, dim), ()))
            if size > 1 and free and not explained:
                missing.append(f"{key}: {free} of {size}")
    return missing


# ---------------------------------------------------------------- what a cut makes of each


class Result(NamedTuple):
    """A network cut at random. proof: the largest error that cut itself found. error: that of the cut network against
    the masked one on other numbers. shown: whether what was removed makes a difference to the whole network."""

    net: nn.Module
    made: Cut
    kept: Kept
    proof: float
    error: float
    shown: bool


def cut_at_random(case: Case, keep: float, steps: int, **options: Any) -> Result:
    """To that share of the channels, or to the last one of every group where that is more, in so many steps."""
    net, _, inputs = case
    small, kept, proof = net, dict[str, tuple[Tensor | None, ...]](), 0.0
    ranks = {name: tensor.ndim for name, tensor in named(net).items()}
    for _ in range(steps):
        try:
            made = cut(small, (), inputs, target={"channels": keep ** (1 / steps)}, criterion="random", **options)
        except CutError as error:
            if kept and "nothing can be cut" in str(error):
                break  # every group is down to its last channel
            if "nothing can be cut" in str(error) or "out of reach" not in str(error):
                raise
            reach = float(str(error).partition("cutting reaches ")[2].partition(")")[0])
            made = cut(small, (), inputs, target={"channels": 1.01 * reach}, criterion="random", **options)
        small, kept, proof = made.model, composed(kept, made.kept, ranks), max(proof, made.max_error)
    reference, worst, shown = masked(net, kept), 0.0, False
    for seed in (1, 2):
        x = random_like(inputs, seed)
        expected = answers(reference, x)
        worst = max(worst, largest(expected, answers(small, x)))
        shown |= largest(expected, answers(net, x)) > 1e-3
    return Result(small, made, kept, proof, worst, shown)


def outcome(case: Case, keep: float, steps: int) -> tuple[str, dict[str, str]]:
    """(the largest error, or the exception; what was frozen at last) of a random cut."""
    try:
        found = cut_at_random(case, keep, steps)
    except Exception as error:  # the whole point is to see which
        return f"{type(error).__name__}: {str(error)[:250]}", {}
    return f"{max(found.error, found.proof):.1e}" if found.shown else "shows nothing", found.made.frozen


def reasons(frozen: Mapping[str, str]) -> Counter[str]:
    """How often each reason stands, the place of the op left out."""
    return Counter(re.sub(r" \(\S+\)", "", why) for why in frozen.values())


def tell(name: str, build: Builder) -> None:
    """Prints what becomes of one family."""
    case = net, args, kwargs = build()
    start = time.perf_counter()
    try:
        graph = capture(net, args, kwargs)
        captured = time.perf_counter() - start
        coupling = couple(graph)
    except Exception as error:
        print(f"== {name}: {type(error).__name__}: {error}", flush=True)
        return
    coupled = time.perf_counter() - start - captured
    units = sum(len(group) for group in coupling.groups)
    total, free, marked = rows(net, coupling)
    print(
        f"== {name}: capture {captured:.2f} s, couple {coupled:.2f} s; {len(coupling.groups)} groups, {units} channels"
    )
    print(f"     of {total} rows of the weights {free} can be cut, {marked} inexactly")
    for why, number in reasons(coupling.frozen).most_common():
        print(f"     {number:4d} x {why}")
    for why, number in reasons({group.name: group.inexact for group in coupling.groups}).most_common():
        if why:
            print(f"     {number:4d} x INEXACT {why}")
    missing = unexplained(net, coupling)
    if missing:
        print(f"     SILENT {len(missing)}: {'; '.join(missing[:6])}")
    for keep, steps in WAYS:
        start = time.perf_counter()
        said, frozen = outcome(case, keep, steps)
        how = "in 5 steps" if steps > 1 else "at once"
        print(f"   keep {keep} {how}: {said}  ({time.perf_counter() - start:.1f} s)")
        late = {group: why for group, why in frozen.items() if coupling.frozen.get(group) != why}
        by_proof = {g: why for g, why in late.items() if "differ" in why or "fails" in why}
        for group, why in list(by_proof.items())[:8]:
            print(f"        proof froze {group}: {why}")
        if len(by_proof) > 8:
            print(f"        ... and {len(by_proof) - 8} more")
    sys.stdout.flush()


def rows(net: nn.Module, coupling: Coupling) -> tuple[int, int, int]:
    """(all, those in an exact group, in an inexact one): indices of the first dimension of every weight matrix."""
    matrices = {name: len(p) for name, p in net.named_parameters() if p.ndim > 1}
    held = {False: 0, True: 0}
    for group in coupling.groups:
        held[bool(group.inexact)] += sum(m.index.size for m in group.members if m.dim == 0 and m.target in matrices)
    return sum(matrices.values()), held[False], held[True]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for name in sys.argv[1:] or NETWORKS:
        tell(name, NETWORKS[name])


if __name__ == "__main__":
    main()
