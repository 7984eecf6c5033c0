"""Copies of a model that share its tensors: to swap modules or parameters in, or for another layout of some weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

__all__ = ["cloned", "channels_last", "shared_copy", "state"]

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the weight's dimensions
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def cloned(*inputs: Any) -> Any:
    """Return what a model is called with, its tensors copied: a forward may change them."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)


def state(tensor: Tensor) -> int:
    """Return a number that grows whenever a tensor is changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def shared_copy(model: nn.Module) -> nn.Module:
    """Return a copy whose modules are its own, and whose parameters and buffers are the model's."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def channels_last(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
    """Return a copy with convolution weights in channels_last, or the model where there are none or it fails so."""
    if not any(isinstance(m, CONVOLUTIONS) for m in model.modules()):
        return model
    copied = shared_copy(model)
    for module in copied.modules():
        if isinstance(module, CONVOLUTIONS):
            weight = module.weight.detach()
            module.weight = nn.Parameter(weight.contiguous(memory_format=LAYOUTS[weight.dim()]), requires_grad=False)
    try:
        with torch.no_grad():
            copied(*args, **kwargs)
    except RuntimeError:  # a `view` of what a convolution returns
        return model
    return copied
