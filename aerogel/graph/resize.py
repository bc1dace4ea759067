"""Gives a module new weights of another shape and keeps its attributes true (channels, groups, features).

Used when channels are cut and when a saved, cut network is rebuilt from its table of shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.graph.capture import tensor_names


def resize(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Puts `tensors` {fully-qualified name: new data} into `model`, in place; tied weights stay tied.

    Raises AerogelError naming a weight that the model lacks.
    """
    names = tensor_names(model)
    unknown = set(tensors) - set(names.values())
    if unknown:
        raise AerogelError(
            f"resize: {type(model).__name__} has no weight {sorted(unknown)[0]}; was it another network's?"
        )
    new: dict[int, Tensor] = {}  # one new tensor for every old one, however many modules share it
    touched: list[str] = []
    for path, module in model.named_modules():
        changed = False
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for key, old in store.items():
                data = None if old is None else tensors.get(names[id(old)])
                if data is None or old is None:
                    continue
                if id(old) not in new:
                    is_parameter = isinstance(old, nn.Parameter)
                    new[id(old)] = nn.Parameter(data, old.requires_grad) if is_parameter else data
                store[key] = new[id(old)]
                changed = True
        if changed:
            touched.append(path.partition(".parametrizations.")[0])  # whose weight is computed from what changed
    for path in dict.fromkeys(touched):
        fit_attributes(model.get_submodule(path))
    return model


def fit_attributes(module: nn.Module) -> None:
    """Sets the attributes that repeat a weight's shape. A module class without a row holds none we know of."""
    for kind, fit in FITS.items():
        if isinstance(module, kind):
            fit(module)


def _convolution(conv: nn.Conv2d) -> None:
    out, per_group = conv.weight.shape[:2]
    if conv.groups == conv.in_channels and conv.groups > 1:  # depthwise: as many groups as channels are left
        conv.groups = out * conv.in_channels // conv.out_channels
    conv.in_channels, conv.out_channels = per_group * conv.groups, out


def _transposed(conv: nn.ConvTranspose2d) -> None:
    inputs, each = conv.weight.shape[:2]
    if conv.groups == conv.in_channels and conv.groups > 1:
        conv.groups = inputs
    conv.in_channels, conv.out_channels = inputs, each * conv.groups


def _linear(layer: nn.Linear) -> None:
    layer.out_features, layer.in_features = layer.weight.shape


def _channel_norm(norm: nn.BatchNorm2d) -> None:
    sized = norm.weight if norm.weight is not None else norm.running_mean
    if sized is not None:
        norm.num_features = sized.shape[0]


def _layer_norm(norm: nn.LayerNorm) -> None:
    if norm.weight is not None:
        norm.normalized_shape = tuple(norm.weight.shape)


def _group_norm(norm: nn.GroupNorm) -> None:
    if norm.weight is not None:
        if norm.num_groups > 1:  # whole groups go
            norm.num_groups = len(norm.weight) * norm.num_groups // norm.num_channels
        norm.num_channels = len(norm.weight)


def _embedding(table: nn.Embedding) -> None:
    table.num_embeddings, table.embedding_dim = table.weight.shape


def _slope(activation: nn.PReLU) -> None:
    activation.num_parameters = len(activation.weight)


def _recurrent(layer: Any) -> None:
    layer.input_size, layer.hidden_size = layer.weight_ih_l0.shape[1], layer.weight_hh_l0.shape[1]
    layer._init_flat_weights()


def _attention(layer: nn.MultiheadAttention) -> None:
    """Its code takes the width of a head from that of the input: heads go whole where that fits, else they narrow."""
    width = layer.out_proj.weight.shape[0]
    if width % layer.head_dim == 0:
        layer.num_heads = width // layer.head_dim
    layer.head_dim = width // layer.num_heads
    layer.embed_dim = width
    if layer.in_proj_weight is not None:
        layer.kdim = layer.vdim = width


FITS: dict[type | tuple[type, ...], Callable[..., None]] = {
    (nn.Conv1d, nn.Conv2d, nn.Conv3d): _convolution,
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d): _transposed,
    nn.Linear: _linear,
    (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm): _channel_norm,
    (nn.LayerNorm, nn.RMSNorm): _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
    nn.PReLU: _slope,
    nn.RNNBase: _recurrent,
    nn.MultiheadAttention: _attention,
}


_TOLD = {"groups", "in_channels", "num_groups", "num_heads", "head_dim", "num_features", "num_channels",
         "normalized_shape", "unflattened_size"}  # fmt: skip
_LAYERS = {"out_channels", "in_features", "out_features", "num_embeddings", "embedding_dim", "num_parameters",
           "input_size", "hidden_size", "embed_dim", "kdim", "vdim", "num_layers", "kernel_size", "stride", "padding",
           "dilation", "output_padding"}  # fmt: skip


def is_layers_own(module: nn.Module, name: str) -> bool:
    """Whether that number of a torch layer, or of a class derived from one, is set by FITS."""
    return isinstance(module, tuple(FITS)) and (name in _TOLD or name in _LAYERS)


def held_numbers(holder: object) -> dict[str, Any]:
    """The whole numbers, and lists and tuples of them, that a module of the user's or its config holds by name.

    Of torch's own layers those that their weights' shapes do not tell alone.
    """
    own = isinstance(holder, tuple(FITS)) or type(holder).__module__.startswith("torch.nn.")
    return {
        name: value
        for name, value in vars(holder).items()
        if not name.startswith("_")
        and (not own or name in _TOLD or name not in _LAYERS)
        and (not type(holder).__module__.startswith("torch.nn.") or name in _TOLD)
        and (type(value) is int or (type(value) in (list, tuple) and value and all(type(v) is int for v in value)))
    }


def holders(model: nn.Module) -> dict[str, object]:
    """What may hold numbers of the network's shapes: its modules by path, and their Hugging Face configs."""
    found: dict[str, object] = dict(model.named_modules())
    seen: set[int] = set()
    for path, module in model.named_modules():
        config = vars(module).get("config")
        if hasattr(config, "to_dict") and id(config) not in seen:
            seen.add(id(config))
            found.setdefault(f"{path}.config".lstrip("."), config)
    return found


def changed_numbers(before: nn.Module, after: nn.Module) -> dict[str, Any]:
    """{"module:name": the number in `after`} where it differs from the one in `before`, of two alike networks."""
    theirs, found = holders(before), {}
    for path, holder in holders(after).items():
        own = held_numbers(holder)
        for name, value in held_numbers(theirs.get(path, object)).items():
            if name in own and own[name] != value and _alike(own[name], value):
                found[f"{path}:{name}"] = own[name]
    return found


def _alike(one: Any, other: Any) -> bool:
    """Whether one may stand in the other's place: a number for a number, as many for as many."""
    if isinstance(one, list | tuple) or isinstance(other, list | tuple):
        return type(one) is type(other) and len(one) == len(other)
    return True


def set_numbers(model: nn.Module, numbers: Mapping[str, Any]) -> None:
    """Puts back what `changed_numbers` found. Raises AerogelError for a number that the network does not hold."""
    known = holders(model)
    for key, value in numbers.items():
        path, colon, name = key.rpartition(":")
        own = held_numbers(known[path]).get(name) if colon and path in known else None
        value = tuple(value) if isinstance(own, tuple) and isinstance(value, list) else value
        if own is None or not _alike(own, value):
            raise AerogelError(f"the table of numbers has {key!r}, the network has not; is it another network's?")
        setattr(known[path], name, value)


def sliced(tensor: Tensor, kept: tuple[Tensor | None, ...]) -> Tensor:
    """Only the kept indices (int64) of each dimension; None keeps a dimension whole."""
    data = tensor.detach()
    for dim, index in enumerate(kept):
        if index is not None:
            data = data.index_select(dim, index.to(data.device))
    if data.ndim == 4:
        _, channels, height, width = tensor.shape
        # is_contiguous cannot tell both orders apart where there is one channel, or one pixel
        if tensor.stride() == (height * width * channels, 1, width * channels, channels):
            data = data.to(memory_format=torch.channels_last)
    return data
