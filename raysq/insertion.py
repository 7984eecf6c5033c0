"""Runs a model with quantization put around its calls, as a plan says: what every float-graph backend shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysq.arithmetic import QParams
from raysq.copies import state
from raysq.graph import activation_axis
from raysq.intercept import Operands, Site
from raysq.plan import CallPlan
from raysq.recipe import Approach, Precision, TensorConfig

__all__ = ["Insertion", "Numerics"]


class Numerics(Protocol):
    """How a backend rounds; each function returns values of the input's type and shape."""

    def activation(self, x: Tensor, params: QParams) -> Tensor:
        """Round an activation to the integers of `params`."""

    def dynamic(self, x: Tensor, config: TensorConfig) -> Tensor:
        """Round an activation to integers that cover the range of this very tensor."""

    def weight(self, w: Tensor, params: QParams) -> Tensor:
        """Round a weight."""


class Insertion:
    """Computes each call in the precision that its plan gives: an `on_call` of the interceptor."""

    def __init__(self, plans: Mapping[str, CallPlan], numerics: Numerics) -> None:
        self._plans = plans
        self._numerics = numerics
        self._smoothed: dict[tuple[int, int, int, bytes], tuple[Tensor, Tensor, Any]] = {}

    def __call__(self, site: Site, operands: Operands) -> Any:
        """Compute one call."""
        plan = self._plans.get(site.name)
        if plan is not None and plan.multiplier is not None:
            operands = self._multiplied(site, operands, plan.multiplier)
        if plan is None or plan.reason or plan.config.precision is Precision.FP32:
            return operands.run(operands.activations, operands.weights)
        if plan.config.precision is Precision.BF16:
            activations = [a.to(torch.bfloat16) for a in operands.activations]
            weights = [w.to(torch.bfloat16) for w in operands.weights]
            return _to_float(operands.run(activations, weights))
        if plan.config.approach is Approach.DYNAMIC:
            activations = [self._numerics.dynamic(a, plan.config.activation) for a in operands.activations]
        else:
            activations = [
                a if p is None else self._numerics.activation(a, p)
                for a, p in zip(operands.activations, plan.inputs, strict=True)
            ]
        params = plan.weights or {}
        exact = operands.weights if plan.rounded is None else (torch.from_numpy(plan.rounded),)
        weights = [self._numerics.weight(w, params[i]) if i in params else w for i, w in enumerate(exact)]
        result = operands.run(activations, weights, None if plan.shift is None else torch.from_numpy(plan.shift))
        return result if plan.output is None else self._rounded(result, plan.output)

    def _multiplied(self, site: Site, operands: Operands, factors: NDArray[np.float32]) -> Operands:
        """Smooth the first activation, once for all calls that share it: they then share its integers too."""
        first, *others = operands.activations
        trace = torch._C._get_tracing_state()  # a model may be traced twice, with the same tensors
        key = (id(first), state(first), id(trace), factors.tobytes())
        if key not in self._smoothed:
            shape = [1] * first.dim()
            shape[activation_axis(site.op, first.dim())] = -1
            self._smoothed[key] = (first * torch.from_numpy(factors).reshape(shape), first, trace)  # keeps the ids
        return replace(operands, activations=(self._smoothed[key][0], *others))

    def _rounded(self, result: Any, params: QParams) -> Any:
        if isinstance(result, Tensor):
            return self._numerics.activation(result, params)
        return (self._numerics.activation(result[0], params), *result[1:])  # an LSTM's last states stay in float


def _to_float(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.float()
    return tuple(_to_float(r) for r in result)
