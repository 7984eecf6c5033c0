"""Weights that a module computes on every call, as weight norm, spectral norm and pruning do, made plain parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["bake", "computed"]


def bake(model: nn.Module) -> nn.Module:
    """Give each computed weight its value for good, in place; what the model is a copy of goes on computing."""
    with torch.no_grad():
        for module in model.modules():
            if parametrize.is_parametrized(module):
                _bake_parametrized(module)
            for key, hook in list(module._forward_pre_hooks.items()):
                name = _computes(hook)
                if name is not None:
                    hook(module, ())
                    _make_parameter(module, name, module.__dict__.pop(name))
                    del module._forward_pre_hooks[key]
    return model


def computed(model: nn.Module) -> list[Tensor]:
    """Return the tensors that earlier calls left in modules: they hang in an autograd graph, and can't be copied."""
    values = [value for module in model.modules() for value in vars(module).values()]
    return [value for value in values if isinstance(value, Tensor) and not value.is_leaf]


def _bake_parametrized(module: nn.Module) -> None:
    """Do what `remove_parametrizations` does, which takes the property away from the model's class too."""
    assert isinstance(module.parametrizations, nn.ModuleDict)
    values = {name: getattr(module, name) for name in module.parametrizations}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        _make_parameter(module, name, value)


def _make_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    module.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=False))


def _computes(hook: object) -> str | None:
    """Return the name of the weight that a hook of torch's older functions (`weight_norm`, `prune`) computes."""
    if not type(hook).__module__.startswith("torch.nn.utils."):
        return None
    return getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
