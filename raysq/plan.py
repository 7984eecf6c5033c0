"""From a recipe and the statistics to the numbers that kernels need: scale and zero point of every operand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raysq.adaround import adaround
from raysq.arithmetic import Grid, QParams, qparams
from raysq.bias_correction import output_shift
from raysq.graph import Call, OpType
from raysq.layer import fields, rounded, tensor
from raysq.recipe import Approach, OpConfig, Recipe, Rounding, TensorConfig, Transform
from raysq.weight import channel_axis, parameters_of, weight_of, weight_params

if TYPE_CHECKING:
    from torch import nn

    from raysq.source import Source

__all__ = ["CallPlan", "Planner"]

Floats = NDArray[np.float32]

POOLS = (OpType.MAX_POOL, OpType.AVG_POOL)
FULL_U8, FULL_S8 = Grid(0, 255, symmetric=False), Grid(-128, 127, symmetric=True)  # results are never read saturating


@dataclass(frozen=True)
class CallPlan:
    """How one call is computed.

    Attributes:
        config: what the recipe asks for.
        inputs: parameters of each activation; None for one that stays as it is (a sum's operand that comes straight
            from an accumulator), and for all of them where the approach isn't static.
        weights: parameters of each weight matrix by its position, empty for calls without one.
        output: parameters of the result where the int8 kernel returns integers only, else None.
        multiplier: (channels,) what its first activation is multiplied by, 1 / s of SmoothQuant, where nothing before
            it absorbed that; whatever precision it runs in.
        rounded: its weight on the integers that were chosen by looking at data; None for the nearest.
        shift: (output channels,) what its bias is shifted by to make up for the mean error of int8.
        reason: why the call can't be quantized after all, "" if it can.
    """

    config: OpConfig
    inputs: tuple[QParams | None, ...] = ()
    weights: Mapping[int, QParams] | None = None
    output: QParams | None = None
    multiplier: Floats | None = None
    rounded: Floats | None = None
    shift: Floats | None = None
    reason: str = ""


class Planner:
    """Plans recipes for one model; remembers ranges, so that the next recipe costs only what differs."""

    def __init__(self, source: Source) -> None:
        self._graph = source.graph
        self._stats = source.stats
        self._multipliers = source.multipliers
        self._weights = parameters_of(source.model)
        self._activation_cache: dict[tuple[str, TensorConfig], QParams] = {}
        self._weight_cache: dict[tuple[object, ...], QParams] = {}
        self._adaptations: dict[tuple[object, ...], tuple[Floats | None, Floats | None]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Planner:
        return self  # it changes in what it remembers only

    def with_weights(self, model: nn.Module) -> Planner:
        """Return a planner of the same activations for a model whose weights are others by now."""
        other = copy.copy(self)
        other._weights = parameters_of(model)
        other._weight_cache, other._adaptations = {}, {}
        return other

    def plan(self, recipe: Recipe, left_in_float: Mapping[str, str] | None = None) -> dict[str, CallPlan]:
        """Return the plan of every call of the graph; calls named in `left_in_float` stay there, for its reason."""
        plans: dict[str, CallPlan] = {}
        for call in self._graph.calls:
            reason = (left_in_float or {}).get(call.name)
            plan = CallPlan(recipe.config(call.name), reason=reason) if reason else self._call(call, recipe, plans)
            if call.name in self._multipliers:
                plan = replace(plan, multiplier=self._multipliers[call.name])
            plans[call.name] = plan
        return plans

    def _call(self, call: Call, recipe: Recipe, plans: Mapping[str, CallPlan]) -> CallPlan:
        config = recipe.config(call.name)
        if not config.is_int8:
            return CallPlan(config)
        weights = None
        if call.op.has_weight:
            weights = self._weight_params(call, config.weight)
            if weights is None:
                return CallPlan(config, reason="its weight is computed in the forward, not a parameter")
        if config.approach is not Approach.STATIC:
            return CallPlan(config, (None,) * len(call.tensors), weights)
        if self._stats is None:
            return CallPlan(config, reason="static quantization needs calibration statistics")
        if any(tensor not in self._stats.tensors for tensor in call.tensors):
            return CallPlan(config, reason="calibration never reached it")
        if call.op is OpType.LSTM:
            return self._lstm(call, config)
        if call.op is OpType.EMBEDDING_BAG:
            return CallPlan(config, (), weights, qparams(*self._result_range(call), FULL_S8))
        inputs: list[QParams | None] = [
            self._input(call, i, config.activation, plans) for i in range(len(call.tensors))
        ]
        if call.op is OpType.ADD:
            riding = next((i for i in range(2) if self._rides(call, i, plans)), None)
            if riding is not None:
                inputs[riding] = None
        plan = CallPlan(config, tuple(inputs), weights)
        return self._adapted(call, plan, Transform.BIAS_CORRECTION in recipe.transforms)

    def _adapted(self, call: Call, plan: CallPlan, corrected: bool) -> CallPlan:
        """Round the weight by looking at data and make up for the mean error, where that is asked for."""
        adaptive = plan.config.rounding is Rounding.ADAROUND
        if not (adaptive or corrected) or not call.op.has_matrix:
            return plan
        assert self._stats is not None and plan.inputs[0] is not None and plan.weights is not None
        key = (call.name, plan.config, corrected, float(plan.inputs[0].scale), int(plan.inputs[0].zero_point))
        if key not in self._adaptations:
            weight = tensor(weight_of(call, self._weights[str(call.weight)]))
            exact = fields(call, tensor(self._stats.tensors[call.tensors[0]].rows), weight)
            chosen = shift = None
            if exact is not None:
                int8 = rounded(exact, plan.inputs[0])
                if adaptive:
                    chosen = adaround(call, weight, plan.weights[0], exact, int8)
                if corrected:
                    int8_weight = rounded(weight if chosen is None else tensor(chosen), plan.weights[0])
                    shift = output_shift(call, exact, int8, weight, int8_weight)
            self._adaptations[key] = (chosen, shift)
        chosen, shift = self._adaptations[key]
        return replace(plan, rounded=chosen, shift=shift)

    def _lstm(self, call: Call, config: OpConfig) -> CallPlan:
        """Plan an LSTM for oneDNN's int8 kernel.

        It has one scale for what it reads, feeds back and returns, and one per row for both matrices of a layer:
        given two it computes with the first (outputs off by 31 steps where the matrices differ by a factor of 4).
        """
        assert self._stats is not None
        names = self._lstm_weights(call.module)
        if any("weight_hr" in name for name in names.values()):
            return CallPlan(config, reason="an LSTM with projections has no int8 kernel")
        grid = config.activation.grid
        low, high = config.activation.algorithm.activation_range(self._stats.tensors[call.tensors[0]], grid)
        least, most = self._result_range(call)
        shared = qparams(min(low, least), max(high, most), grid)
        weights = {}
        matrices = list(names.items())
        for (i, of_input), (j, of_state) in zip(matrices[::2], matrices[1::2], strict=True):
            both = np.concatenate([self._weights[of_input], self._weights[of_state]], axis=1)
            weights[i] = weights[j] = weight_params(both, config.weight, axis=0)
        return CallPlan(config, (shared,), weights, replace(shared, grid=FULL_U8 if grid.qmin == 0 else FULL_S8))

    def _result_range(self, call: Call) -> tuple[float, float]:
        assert self._stats is not None
        low, high, _ = self._stats.outputs[call.name]
        return float(low.min()), float(high.max())

    def _rides(self, call: Call, position: int, plans: Mapping[str, CallPlan]) -> bool:
        """Whether an operand of a sum comes straight from an int8 accumulator, so that rounding it would only hurt."""
        maker, alone = self._graph.producer(call.name, position)
        if maker is None or not alone or call.tensors[0] == call.tensors[1]:
            return False
        return maker.op.is_product and _runs_int8(plans[maker.name])

    def _input(self, call: Call, position: int, config: TensorConfig, plans: Mapping[str, CallPlan]) -> QParams:
        maker, _ = self._graph.producer(call.name, position)
        scaled = position == 0 and call.name in self._multipliers
        if maker is not None and maker.op in POOLS and _runs_int8(plans[maker.name]) and not scaled:
            inherited = plans[maker.name].inputs[0]  # pools keep the integers that they get
            if inherited is not None:
                return inherited
        key = (call.tensors[position], config)
        if key not in self._activation_cache:
            assert self._stats is not None
            grid = config.grid
            low, high = config.algorithm.activation_range(self._stats.tensors[key[0]], grid)
            self._activation_cache[key] = qparams(low, high, grid)
        return self._activation_cache[key]

    def _weight_params(self, call: Call, config: TensorConfig) -> dict[int, QParams] | None:
        if call.op is OpType.LSTM:
            names = self._lstm_weights(call.module)
        elif call.weight in self._weights:
            names = {0: call.weight}
        else:
            return None
        return {position: self._weight(name, call, config) for position, name in names.items()}

    def _lstm_weights(self, module: str) -> dict[int, str]:
        """Return the matrices among an LSTM's flat weights by position; its biases stay in float."""
        prefix = f"{module}." if module else ""
        names = [n for n in self._weights if n.rpartition(".")[0] == module and n.startswith(f"{prefix}")]
        return {i: n for i, n in enumerate(names) if self._weights[n].ndim == 2}

    def _weight(self, name: str, call: Call, config: TensorConfig) -> QParams:
        key = (name, call.op, call.weight_start, call.weight_shape, call.weight_transposed, config)
        if key not in self._weight_cache:
            weight = weight_of(call, self._weights[name])
            self._weight_cache[key] = weight_params(weight, config, channel_axis(call))
        return self._weight_cache[key]


def _runs_int8(plan: CallPlan) -> bool:
    return plan.config.is_int8 and not plan.reason
