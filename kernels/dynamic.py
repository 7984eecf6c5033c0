"""Dynamic quantization with torch's own modules: weights in int8, activations quantized at each call.

Only modules can be swapped, so a functional call or a module that is called twice stays in float.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.ao.nn import quantized as nnq
from torch.ao.nn.quantized import dynamic as nnqd

from raysq.graph import ModelGraph, OpType
from raysq.plan import CallPlan
from raysq.recipe import Approach

__all__ = ["swap_dynamic"]


def swap_dynamic(
    model: nn.Module, graph: ModelGraph, plans: Mapping[str, CallPlan]
) -> tuple[nn.Module, dict[str, CallPlan]]:
    """Return a copy whose dynamic calls are quantized modules, and the plans, with reasons for those that can't be.

    The copy shares all other weights with the model; without a dynamic call it is the model itself.
    """
    dynamic = [
        n for n, p in plans.items() if p.config.is_int8 and p.config.approach is Approach.DYNAMIC and not p.reason
    ]
    if not dynamic:
        return model, dict(plans)
    swapped = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    uses = Counter(call.module for call in graph.calls)
    plans = dict(plans)
    for name in dynamic:
        call = graph[name]
        module = model.get_submodule(call.module)
        quantized = _quantized(module, call.op, plans[name]) if uses[call.module] == 1 else None
        if quantized is None:
            plans[name] = replace(
                plans[name], reason="dynamic quantization swaps modules; this call is not a module's own"
            )
            continue
        parent, _, attribute = call.module.rpartition(".")
        if not call.module:
            return quantized, plans
        setattr(swapped.get_submodule(parent), attribute, quantized)
    return swapped, plans


def _quantized(module: nn.Module, op: OpType, plan: CallPlan) -> nn.Module | None:
    """Return torch's dynamic form of a module, or None if it has none."""
    params = (plan.weights or {}).get(0)
    if op is OpType.LINEAR and type(module) is nn.Linear and params is not None:
        scale = torch.from_numpy(params.scale).double()
        zero = torch.from_numpy(params.zero_point).long()
        if params.axis is None:
            weight = torch.quantize_per_tensor(module.weight.detach(), float(scale), int(zero), torch.qint8)
        else:
            weight = torch.quantize_per_channel(module.weight.detach(), scale, zero, params.axis, torch.qint8)
        linear = nnqd.Linear(module.in_features, module.out_features, bias_=module.bias is not None, dtype=torch.qint8)
        linear.set_weight_bias(weight, module.bias)
        return linear
    if op is OpType.LSTM and type(module) is nn.LSTM and module.proj_size == 0:
        configured = copy.deepcopy(module)
        configured.qconfig = torch.ao.quantization.default_dynamic_qconfig
        return nnqd.LSTM.from_float(configured)  # type: ignore[no-any-return]
    if op is OpType.EMBEDDING_BAG and type(module) is nn.EmbeddingBag:
        configured_bag = copy.deepcopy(module)
        configured_bag.qconfig = torch.ao.quantization.float_qparams_weight_only_qconfig  # type: ignore[assignment]
        return nnq.EmbeddingBag.from_float(configured_bag)  # type: ignore[no-any-return]
    return None
