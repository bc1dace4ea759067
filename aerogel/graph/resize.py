"""Gives a module new weights of another shape and keeps its attributes true (channels, groups, features).

Used when channels are cut and when a saved, cut network is rebuilt from its table of shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
    for module in model.modules():
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
            fit_attributes(module)
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


def _linear(layer: nn.Linear) -> None:
    layer.out_features, layer.in_features = layer.weight.shape


def _batch_norm(norm: nn.BatchNorm2d) -> None:
    sized = norm.weight if norm.weight is not None else norm.running_mean
    if sized is not None:
        norm.num_features = sized.shape[0]


FITS: dict[type | tuple[type, ...], Callable[..., None]] = {
    (nn.Conv1d, nn.Conv2d, nn.Conv3d): _convolution,
    nn.Linear: _linear,
    nn.modules.batchnorm._BatchNorm: _batch_norm,
}


def sliced(tensor: Tensor, kept: tuple[Tensor | None, ...]) -> Tensor:
    """Only the kept indices (int64) of each dimension; None keeps a dimension whole."""
    data = tensor.detach()
    for dim, index in enumerate(kept):
        if index is not None:
            data = data.index_select(dim, index.to(data.device))
    return data
