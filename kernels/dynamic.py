"""Dynamic quantization with torch's own modules: weights in int8, activations quantized at each call.

Only modules can be swapped, so a functional call or a module that is called twice stays in float.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.ao.nn import quantized as nnq
from torch.ao.nn.quantized import dynamic as nnqd
from torch.ao.nn.quantized.dynamic.modules.rnn import PackedParameter

from raysq.arithmetic import QParams
from raysq.copies import shared_copy
from raysq.graph import ModelGraph, OpType
from raysq.kernels.weights import quantized_weight
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
    swapped = shared_copy(model)
    uses = Counter(call.module for call in graph.calls)
    plans = dict(plans)
    for name in dynamic:
        call = graph[name]
        module = model.get_submodule(call.module)
        quantized = _quantized(module, call.op, plans[name]) if uses[call.module] == 1 else None
        if quantized is None:
            plans[name] = replace(
                plans[name],
                reason="dynamic quantization swaps modules; this call is no module's own, or torch has none for it",
            )
            continue
        factors = plans[name].multiplier
        if factors is not None:
            _multiply_input(quantized, factors)
        parent, _, attribute = call.module.rpartition(".")
        if not call.module:
            return quantized, plans
        setattr(swapped.get_submodule(parent), attribute, quantized)
    return swapped, plans


def _multiply_input(module: nn.Module, factors: NDArray[np.float32]) -> None:
    """Smooth what a module reads: it is no longer seen as a call, around which that would be done."""
    vector = torch.from_numpy(factors)
    module.register_forward_pre_hook(lambda _, args: (args[0] * vector, *args[1:]))


def _quantized(module: nn.Module, op: OpType, plan: CallPlan) -> nn.Module | None:
    """Return torch's dynamic form of a module with the plan's scales, or None if it has none."""
    params = plan.weights or {}
    if op is OpType.LINEAR and type(module) is nn.Linear:
        return _Linear(module, params[0], plan.config.activation.reduce_range)
    if op is OpType.LSTM and type(module) is nn.LSTM and module.bias and module.proj_size == 0:
        return _lstm(module, params, plan.config.activation.reduce_range)
    if op is OpType.EMBEDDING_BAG and type(module) is nn.EmbeddingBag and _sums(module):
        return _embedding_bag(module, params[0])
    return None


def _sums(module: nn.EmbeddingBag) -> bool:
    """Whether it adds whole bags: torch's quantized module ignores its mode, `padding_idx` and `max_norm`."""
    return module.mode == "sum" and module.padding_idx is None and module.max_norm is None


class _Linear(nnqd.Linear):
    """torch's dynamic linear, which always takes 7 bits, with as many as the recipe says."""

    def __init__(self, module: nn.Linear, params: QParams, reduce_range: bool) -> None:
        super().__init__(module.in_features, module.out_features, bias_=module.bias is not None, dtype=torch.qint8)  # type: ignore[no-untyped-call]
        self.set_weight_bias(quantized_weight(module.weight.detach(), params), module.bias)
        self.reduce_range = reduce_range

    def forward(self, x: Tensor) -> Tensor:
        """Quantize the input by its own range and multiply."""
        packed = self._packed_params._packed_params
        result: Tensor = torch.ops.quantized.linear_dynamic(x, packed, reduce_range=self.reduce_range)
        return result


def _lstm(module: nn.LSTM, params: Mapping[int, QParams], reduce_range: bool) -> nnqd.LSTM:
    lstm = nnqd.LSTM(
        module.input_size,
        module.hidden_size,
        module.num_layers,
        module.bias,
        module.batch_first,
        module.dropout,
        module.bidirectional,
        dtype=torch.qint8,
    )
    flat = [w.detach() for layer in module.all_weights for w in layer]  # w_ih, w_hh, b_ih, b_hh per layer and direction
    cells = []
    for i in range(0, len(flat), 4):
        biases = flat[i + 2 : i + 4]
        packed = [
            torch.ops.quantized.linear_prepack(quantized_weight(flat[i + j], params[i + j]), biases[j])
            for j in range(2)
        ]
        cell = torch.ops.quantized.make_quantized_cell_params_dynamic(*packed, *biases, reduce_range)
        cells.append(PackedParameter(cell))
    lstm._all_weight_values = nn.ModuleList(cells)
    return lstm


def _embedding_bag(module: nn.EmbeddingBag, params: QParams) -> nnq.EmbeddingBag:
    """Spell the plan's integers as torch's kernel reads them: rows of bytes, each with a float scale and offset."""
    rows = module.num_embeddings
    scale = torch.from_numpy(params.scale).float().expand(rows)
    offset = (torch.from_numpy(params.zero_point) - params.grid.qmin).float().expand(rows)
    weight = torch.quantize_per_channel(module.weight.detach(), scale, offset, 0, torch.quint8)
    return nnq.EmbeddingBag(
        rows,
        module.embedding_dim,
        module.max_norm,
        module.norm_type,
        module.scale_grad_by_freq,
        module.mode,
        module.sparse,
        weight,
        module.include_last_offset,
        torch.quint8,
    )
