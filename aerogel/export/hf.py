"""Hugging Face's architectures from a configuration alone: on the meta device, with no weights and no download.

    hf:vit                                       the default configuration of that type
    hf:bert:num_hidden_layers=2,hidden_size=128  with entries of one's own
    hf:PATH                                      a config.json, or a folder that holds one
    hf:vit:architecture=ViTForImageClassification

Without `architecture` a file's own first one is built, else the type's base model without a head. The network can be
counted, not run: it has no numbers. Caches of keys and values are off: one forward pass is what is counted. Needs the
extra `hf` (transformers). Code that a configuration names is never run.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerogel import nets
from aerogel.errors import AerogelError, nearest
from aerogel.files import read_json
from aerogel.graph.capture import quiet
from aerogel.imports import one_line

PREFIX = "hf:"
TOKENS = 128  # of text, where --input gives no other number
META = torch.device("meta")
# Entries that count parts of a network. Of others, -1 may mean the last one, or none.
_COUNTED = re.compile(
    r"(?!.*(?:window|chunk))(?:.*_)?"
    r"(?:layers|n_layer|heads|n_head|experts|blocks|stages|depth|channels|size|dim|d_model|embeddings|positions)"
)


def open_hf(text: str) -> nn.Module:
    """The network that `hf:...` names, in eval mode on the meta device. Raises AerogelError in one line."""
    transformers = _transformers()
    source, _, options = text.removeprefix(PREFIX).partition(":")
    entries = nets.parse(f"hf:{options}")[1] if options else {}
    architecture = entries.pop("architecture", None)
    with quiet():
        config = _config(transformers, text, source, entries)
        held = getattr(config, "architectures", None) or [None]
        build = _builder(transformers, text, config, architecture or held[0])
        for part in [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]:
            if hasattr(part, "use_cache"):
                part.use_cache = False
        try:
            with META:
                model: nn.Module = build(config)
        except ImportError as error:
            what = one_line(error).partition(".")[0]
            raise AerogelError(f"model {text!r}: {what}; install it, or give a config.json that needs none") from error
        except Exception as error:  # a configuration may hold anything
            if "Unrecognized configuration class" in str(error):
                stem = type(config).__name__.removesuffix("Config")
                known = [name for name in dir(transformers) if name.startswith(f"{stem}For")]
                raise AerogelError(
                    f"model {text!r}: {config.model_type} has no base model; add architecture=..., {nearest('', known)}"
                ) from error
            raise AerogelError(f"model {text!r} cannot be built: {one_line(error)}; change that entry") from error
    return model.eval()


def load_hf(text: str) -> tuple[nn.Module, tuple[float, ...] | None, tuple[float, ...] | None]:
    """`hf:FOLDER`, a classifier as Hugging Face saves one, with its weights, in eval mode; and the mean and std of the
    folder's preprocessor_config.json, None without one.

    Read from this machine, safetensors alone. Raises AerogelError when it is no such folder, or cannot be read.
    """
    folder = _path(text.removeprefix(PREFIX))
    if folder is None or not (folder / "config.json").is_file():
        raise AerogelError(
            f"model {text!r} has no weights: it is no folder with config.json and model.safetensors; save the network "
            "with save_pretrained(FOLDER) and name hf:FOLDER, as nothing is downloaded"
        )
    transformers = _transformers()
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
            build: Any = _builder(transformers, text, config, (getattr(config, "architectures", None) or [None])[0])
            network = getattr(build, "__self__", transformers.AutoModel)
            model, told = network.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True,
            )  # fmt: skip
    except AerogelError:
        raise
    except Exception as error:  # whatever lies in the folder
        raise AerogelError(f"model {text!r} cannot be loaded: {one_line(error)}; is it whole?") from error
    if lacking := sorted(map(str, told["missing_keys"])):
        raise AerogelError(f"model {text!r}: its weights lack {lacking[0]}; train that head, and save it again")
    mean, std = scale_of(folder / "preprocessor_config.json", getattr(config, "num_channels", 3)) or (None, None)
    return model.eval(), mean, std


def scale_of(file: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std of pixels from 0 to 1 by which a preprocessor_config.json has images normalised; None where it is
    absent or does not say.

    Pixels from 0 to 255 times rescale_factor, then (x - image_mean) / image_std; do_rescale and do_normalize can switch
    either off. Raises AerogelError for numbers that are none.
    """
    held = read_json(file) if file.is_file() else {}
    if not isinstance(held, dict) or held.get("rescale_offset"):
        raise AerogelError(f"{file}: such preprocessing is not known; remove it, and say mean and std yourself")
    plain = held.get("do_normalize") is False
    found: list[Any] = [0.0, 1.0] if plain else [held.get("image_mean"), held.get("image_std")]
    if None in found:
        return None
    try:
        factor = 255 * held.get("rescale_factor", 1 / 255) if held.get("do_rescale", True) else 255.0
        mean, std = (tuple(x / factor for x in (one if isinstance(one, list) else [one] * channels)) for one in found)
        good = len(mean) == len(std) > 0 and all(map(math.isfinite, mean)) and all(0 < x < math.inf for x in std)
    except (TypeError, ZeroDivisionError):
        good = False
    if not good:
        raise AerogelError(f"{file}: image_mean and image_std must be numbers, as many of both, std > 0; mend it")
    return mean, std


def hf_inputs(model: nn.Module, given: str | None) -> dict[str, Tensor]:
    """Example inputs, by keyword, on the meta device: one image, text, or sound, as the configuration says.

    given: what the user typed for --input: C,H,W for images, a number of tokens for text (default 128), of samples
    for sound, of frames for spectra. Raises AerogelError where neither it nor the configuration says a size.
    """
    config: Any = model.config
    takes = inspect.signature(model.forward).parameters
    names = [getattr(model, "main_input_name", "input_ids")]
    if {"vision_config", "text_config"} <= vars(config).keys():
        names = ["pixel_values", "input_ids"]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        names.append("decoder_input_ids")
    lacking = [name for name in names if name not in _INPUTS or name not in takes]
    if lacking:
        raise AerogelError(
            f"example_inputs: {type(model).__name__} takes {lacking[0]}, which aerogel cannot make up; "
            "call aerogel.capture(model, (), {...}) with inputs of your own"
        )
    images = "pixel_values" in names
    found = {}
    for name in names:
        size = given if (name == "pixel_values") == images else None  # of an image and a text, the image's
        found[name] = _INPUTS[name](config, size)
    return found


def _transformers() -> Any:
    try:
        with quiet():
            import transformers
    except ImportError as error:
        raise AerogelError(
            f"hf: models need transformers, which cannot be imported ({one_line(error)}); "
            "install it with `pip install aerogel[hf]`"
        ) from error
    return transformers


def _config(transformers: Any, text: str, source: str, entries: dict[str, Any]) -> Any:
    """The configuration of a type or a path, with the user's entries, every one of which must exist in it.

    The name of a type means the type, also where a folder has that name: write ./vit for the folder.
    """
    types = list(transformers.CONFIG_MAPPING.keys())
    path = None if source in types else _path(source)
    if source not in types and path is None:
        raise AerogelError(
            f"model {text!r}: {source!r} is no model type of transformers {transformers.__version__}, "
            f"no folder and no file; {nearest(source, types)}"
        )
    try:
        if path is None:
            config = transformers.AutoConfig.for_model(source)
            changed = transformers.AutoConfig.for_model(source, **entries)
        else:
            config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
            changed = type(config)(**{**config.to_dict(), **entries})
    except Exception as error:
        raise AerogelError(f"model {text!r}: its configuration cannot be read: {one_line(error)}") from error
    properties = (name for name in dir(type(config)) if isinstance(getattr(type(config), name, None), property))
    known = {*config.to_dict(), *getattr(config, "attribute_map", {}), *properties}
    for entry, value in entries.items():
        if entry not in known:
            raise AerogelError(f"model {text!r}: {config.model_type} has no entry {entry!r}; {nearest(entry, known)}")
        usual = getattr(config, entry, None)
        counts = _COUNTED.fullmatch(entry) and isinstance(usual, int) and usual > 0
        if counts and isinstance(value, int) and value < 0:
            raise AerogelError(f"model {text!r}: {entry} must be >= 0, got {value}; without it, it is {usual}")
    return changed


def _path(source: str) -> Path | None:
    """The file or folder of that name; None where there is none, or the text can name none."""
    try:
        path = Path(source).expanduser()
        return path if source and path.exists() else None
    except (OSError, RuntimeError):  # a name that is too long; ~ of a user who does not exist
        return None


def _builder(transformers: Any, text: str, config: Any, architecture: str | None) -> Callable[[Any], nn.Module]:
    """What makes the network of a configuration."""
    if architecture is None:
        return transformers.AutoModel.from_config
    found: Any = getattr(transformers, str(architecture), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise AerogelError(f"model {text!r}: transformers {transformers.__version__} has no network {architecture!r}")
    network: Any = found
    if not isinstance(config, network.config_class or object):
        raise AerogelError(f"model {text!r}: {architecture} is not built from a {config.model_type} configuration")
    return network._from_config


# ---------------------------------------------------------------- example inputs


def parse_size(text: str | None) -> tuple[int, int, int] | None:
    """C,H,W as three whole numbers. Raises AerogelError."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        rule = "--input must be C,H,W, three positive whole numbers"
        raise AerogelError(f"{rule}, got {text!r}; write --input 3,224,224")
    channels, height, width = map(int, parts)
    return channels, height, width


def _number(given: str | None, what: str) -> int | None:
    if given is None:
        return None
    if not (given.isdecimal() and int(given) > 0):
        raise AerogelError(
            f"--input must be a number of {what} for this network, got {given!r}; write --input {TOKENS}"
        )
    return int(given)


def _words(config: Any, given: str | None) -> Tensor:
    """(1, tokens) whole numbers; no more by default than there are positions for."""
    text = getattr(config, "text_config", None) or config
    places = [getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions", "n_positions")]
    most = min((n for n in places if isinstance(n, int) and n > 0), default=TOKENS)
    return torch.zeros(1, _number(given, "tokens") or min(TOKENS, most), dtype=torch.long, device=META)


def _image(config: Any, given: str | None) -> Tensor:
    """(1, C, H, W), of the size in the configuration."""
    held = [c for c in (config, getattr(config, "vision_config", None)) if c is not None]
    size: Any = next((c.image_size for c in held if getattr(c, "image_size", None)), None)
    shape = parse_size(given)
    if shape is not None:
        return torch.zeros(1, *shape, device=META)
    if size is None:
        raise AerogelError(
            f"--input C,H,W is needed: a {config.model_type} configuration holds no image size; write --input 3,224,224"
        )
    channels = next((c.num_channels for c in held if getattr(c, "num_channels", None)), 3)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, channels, height, width, device=META)


def _spectrum(config: Any, given: str | None) -> Tensor:
    """(1, mel bins, frames), twice the encoder's positions as Whisper has them."""
    positions = getattr(config, "max_source_positions", None)
    frames = _number(given, "frames") or (2 * positions if positions else None)
    bins = getattr(config, "num_mel_bins", None)
    if frames is None or bins is None:
        raise AerogelError(f"--input FRAMES is needed: a {config.model_type} configuration does not hold them")
    return torch.zeros(1, bins, frames, device=META)


def _sound(config: Any, given: str | None) -> Tensor:
    """(1, samples)."""
    samples = _number(given, "samples")
    if samples is None:
        raise AerogelError("--input SAMPLES is needed: the cost of sound depends on its length; write --input 16000")
    return torch.zeros(1, samples, device=META)


def _decoded(config: Any, given: str | None) -> Tensor:
    """(1, tokens) for the decoder, as many as the text has; behind images and sound the default number."""
    reads_text = not hasattr(config, "num_mel_bins") and not hasattr(config, "image_size")
    return _words(config, given if reads_text else None)


_INPUTS: dict[str, Callable[[Any, str | None], Tensor]] = {
    "input_ids": _words,
    "pixel_values": _image,
    "input_features": _spectrum,
    "input_values": _sound,
    "decoder_input_ids": _decoded,
}
