"""A recipe in OpenVINO's graph: FakeQuantize nodes where the plan rounds, in a clone of the model with marked places.

What `insertion.py` does to a model that is traced, done after the conversion: the next recipe costs no other one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysq.arithmetic import QParams
from raysq.graph import Call, ModelGraph, OpType, activation_axis
from raysq.kernels.ov_graph import WEIGHT, Marked
from raysq.kernels.ov_network import runtime
from raysq.plan import CallPlan

__all__ = ["inserted"]

Floats = NDArray[np.float32]
S8, U8 = (-128, 127), (0, 255)  # the only grids that int8 kernels are chosen for
BOUNDED_AXIS = 1  # the only one along which FakeQuantize may have a bound for each channel on CPUs


def inserted(marked: Marked, plans: Mapping[str, CallPlan]) -> Any:
    """Return an `openvino.Model` that computes each call as its plan says, in fp32 without one.

    Args:
        marked: the model; it is not changed.
        plans: by call.
    """
    runtime()
    from openvino._offline_transformations import compress_quantize_weights_transformation
    from openvino.passes import ConstantFolding, Manager

    model = marked.model.clone()
    rounding = _Rounding()
    plans = _before_pools(plans, marked.graph)
    for call, place, node in marked.places(model):
        node.output(0).replace(rounding.planned(node.input_value(0), call, place, plans.get(call.name)))
    passes = Manager()
    passes.register_pass(ConstantFolding())  # int8 kernels are chosen where a rounding's bounds are constants
    passes.run_passes(model)
    compress_quantize_weights_transformation(model)  # weights become int8 constants
    return model


def _before_pools(plans: Mapping[str, CallPlan], graph: ModelGraph) -> Mapping[str, CallPlan]:
    """Return the same plans, rounding before a max pool what would be rounded behind it.

    The largest of rounded values is the rounded largest value, so both compute the same bits. The pool then runs on
    integers, whatever the recipe has it in, and nothing stands between it and the call that reads them.
    """
    found = dict(plans)
    for call in reversed(graph.calls):
        for place, params in enumerate(found[call.name].inputs if call.name in found else ()):
            plan = found[call.name]
            pool, alone = graph.producer(call.name, place)
            if params is None or pool is None or pool.op is not OpType.MAX_POOL or not _rounds(plan):
                continue
            if place == 0 and plan.multiplier is not None:
                continue
            known = found.get(pool.name)
            if alone:
                found[pool.name] = CallPlan(plan.config, (params,))
            elif known is None or not _rounds(known) or known.inputs[0] is not params:
                continue
            found[call.name] = replace(plan, inputs=(*plan.inputs[:place], None, *plan.inputs[place + 1 :]))
    return found


def _rounds(plan: CallPlan) -> bool:
    return plan.config.is_int8 and not plan.reason


class _Rounding:
    """What stands at the marked places of one model; calls that share an input share its integers."""

    def __init__(self) -> None:
        from openvino import opset13

        self._ops = opset13
        self._made: dict[tuple[object, ...], Any] = {}

    def planned(self, x: Any, call: Call, place: int | str, plan: CallPlan | None) -> Any:
        """Return what a call's operand or result becomes under its plan.

        Args:
            x: an `openvino.Output`.
            call: whose it is.
            place: number of an activation, or WEIGHT, or OUTPUT.
            plan: of the call; None: fp32.
        """
        if plan is None:
            return x
        factors = plan.multiplier if place == 0 else None
        params = plan.inputs[place] if _rounds(plan) and isinstance(place, int) and place < len(plan.inputs) else None
        rank = x.get_partial_shape().rank.get_length()
        if params is not None and factors is not None and activation_axis(call.op, rank) % rank == BOUNDED_AXIS:
            return self._rounded(x, params, _along(BOUNDED_AXIS, rank, factors))
        if factors is not None:
            x = self._channelwise(self._ops.multiply, x, factors, call)
        if params is not None:
            return self._rounded(x, params)
        if isinstance(place, int) or not _rounds(plan):
            return x
        if place == WEIGHT:
            exact = x if plan.rounded is None else self._ops.constant(plan.rounded).output(0)
            return self._rounded(exact, plan.weights[0]) if plan.weights else x
        if plan.shift is not None:
            x = self._channelwise(self._ops.add, x, plan.shift, call)
        return x if plan.output is None else self._rounded(x, plan.output)

    def _channelwise(self, op: Any, x: Any, factors: Floats, call: Call) -> Any:
        key = _named(x), op.__name__, factors.tobytes()
        if key not in self._made:
            rank = x.get_partial_shape().rank.get_length()
            self._made[key] = op(x, _along(activation_axis(call.op, rank), rank, factors)).output(0)
        return self._made[key]

    def _rounded(self, x: Any, params: QParams, factors: Floats | None = None) -> Any:
        """Round to all eight bits what a smaller grid has clamped before: kernels for 7 bits don't exist.

        What is multiplied before has bounds of its own for each channel: with a product in front, OpenVINO 2026 gives
        wrong numbers for matrices whose shape is open.
        """
        grid, scale, zero = params.grid, params.scale, params.zero_point
        key = _named(x), scale.tobytes(), zero.tobytes(), params.axis, grid.qmin, grid.qmax, _bytes(factors)
        if key in self._made:
            return self._made[key]

        def bound(of: int) -> Floats:
            found = np.asarray((of - zero) * scale, np.float32)
            return found if params.axis is None else _along(params.axis, x.get_partial_shape().rank.get_length(), found)

        def before(bounds: Floats) -> Floats:
            return bounds if factors is None else bounds / factors

        y, (qmin, qmax) = x, S8 if grid.qmin < 0 else U8
        if grid.steps < qmax - qmin:
            least, most = bound(grid.qmin), bound(grid.qmax)
            if (least >= 0).all() and _is_only_read_here(y, "Relu"):
                y = y.get_node().input_value(0)  # what clamps to these does what the function did, and costs the same
            y = self._ops.maximum(self._ops.minimum(y, before(most)), before(least))
        low, high = bound(qmin), bound(qmax)
        rounded = self._ops.fake_quantize(y, before(low), before(high), low, high, qmax - qmin + 1)
        self._made[key] = rounded.output(0)
        return self._made[key]


def _bytes(values: Floats | None) -> bytes:
    return b"" if values is None else values.tobytes()


def _is_only_read_here(x: Any, kind: str) -> bool:
    """Whether a value is made by a kind of op, and nothing else reads it."""
    return x.get_node().get_type_name() == kind and len(x.get_target_inputs()) == 1


def _along(axis: int, rank: int, values: Floats) -> Floats:
    """Return values, (channels,), so that they broadcast along an axis."""
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def _named(x: Any) -> tuple[str, int]:
    return x.get_node().get_name(), x.get_index()
