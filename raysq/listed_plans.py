"""Plans as a list of ops for IPEX 1.x's `configure.json`, and such a list, edited by hand or not, as plans."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raysq.arithmetic import Grid, QParams, qparams
from raysq.errors import RecipeError
from raysq.graph import Call, ModelGraph, OpType
from raysq.listed_op import MIN_MAX, ListedOp, kind_of, member
from raysq.plan import CallPlan, Planner
from raysq.recipe import FP32, Approach, QuantDType, Recipe

if TYPE_CHECKING:
    from raysq.stats import CalibrationStats

__all__ = ["GRIDS", "listed", "matched", "plans"]

GRIDS = {QuantDType.U8: Grid(0, 255, symmetric=False), QuantDType.S8: Grid(-128, 127, symmetric=True)}


def listed(graph: ModelGraph, plans: Mapping[str, CallPlan], stats: CalibrationStats | None) -> dict[str, ListedOp]:
    """Return the op of each call, by the call's name.

    What stays in float is described too, in 8 bits over its whole range, so that its flags can be set by hand.

    Args:
        graph: the model's calls.
        plans: their plans.
        stats: their statistics; None leaves out the scales of what isn't quantized.
    """
    labels = {call.name: f"{call.op}{number}" for number, call in enumerate(graph.calls)}
    return {
        call.name: _op(number, call, plans.get(call.name, CallPlan(FP32)), stats, _flow(call, graph, labels))
        for number, call in enumerate(graph.calls)
    }


def _op(
    number: int, call: Call, plan: CallPlan, stats: CalibrationStats | None, inputs_flow: tuple[str, ...]
) -> ListedOp:
    runs = plan.config.is_int8 and not plan.reason
    given = plan.inputs if runs else ()
    planned = given or (None,) * len(call.tensors)
    grid = replace(plan.config.activation, reduce_range=False).grid
    inputs = [p or _whole_range(t, stats, grid) for p, t in zip(planned, call.tensors, strict=True)]
    output = (plan.output if runs else None) or _result_range(call, stats, grid)
    return ListedOp(
        id=number,
        name=call.op.value,
        algorithm=str(plan.config.activation.algorithm).replace("minmax", MIN_MAX),
        weight_granularity=plan.config.weight.granularity.value,
        input_scales=tuple(float(p.scale) for p in inputs),
        input_zero_points=tuple(int(p.zero_point) for p in inputs),
        output_scales=(float(output.scale),),
        output_zero_points=(int(output.zero_point),),
        weight_scales=tuple(
            tuple(p.scale.reshape(-1).tolist()) for _, p in sorted((plan.weights or {}).items()) if runs
        ),
        input_quantized_dtypes=tuple(_dtype(p) for p in inputs),
        output_quantized_dtypes=(_dtype(output),),
        inputs_quantized=tuple(p is not None for p in planned),
        outputs_quantized=(runs and plan.output is not None,),
        inputs_flow=inputs_flow,
        outputs_flow=(f"{call.op}{number}.output0",),
    )


def _flow(call: Call, graph: ModelGraph, labels: Mapping[str, str]) -> tuple[str, ...]:
    names = []
    for position, tensor in enumerate(call.tensors):
        maker, _ = graph.producer(call.name, position)
        reader, _, of_reader = tensor.rpartition("/")
        names.append(f"{labels[maker.name]}.output0" if maker else f"{labels[reader]}.input{of_reader}")
    return tuple(names)


def _whole_range(tensor: str, stats: CalibrationStats | None, grid: Grid) -> QParams:
    seen = stats.tensors.get(tensor) if stats else None
    return qparams(seen.minimum, seen.maximum, grid) if seen else qparams(0, 0, grid)


def _result_range(call: Call, stats: CalibrationStats | None, grid: Grid) -> QParams:
    low, high, _ = stats.outputs[call.name] if stats and call.name in stats.outputs else (np.zeros(1),) * 3
    known = bool(np.isfinite(low).any())
    return qparams(low.min() if known else 0, high.max() if known else 0, grid)


def _dtype(params: QParams) -> str:
    return (QuantDType.S8 if params.grid.qmin < 0 else QuantDType.U8).value


def matched(ops: Iterable[ListedOp], graph: ModelGraph) -> dict[str, ListedOp]:
    """Return the op of each call that has one, by the call's name; kinds that raysq doesn't know are left out.

    Raises:
        RecipeError: the file lists more or fewer ops of a kind than the model has.
    """
    by_kind: dict[OpType, list[ListedOp]] = defaultdict(list)
    for op in sorted(ops, key=lambda op: op.id):
        kind = kind_of(op.name)
        if kind is not None:
            by_kind[kind].append(op)
    found: dict[str, ListedOp] = {}
    for kind, group in by_kind.items():
        calls = [call for call in graph.calls if call.op is kind]
        if len(calls) != len(group) or any(
            len(call.tensors) != len(op.inputs_quantized) for call, op in zip(calls, group, strict=True)
        ):
            raise RecipeError(
                f"the file describes another model: it lists {len(group)} ops of kind {kind}, the model has "
                f"{len(calls)}, or they read other numbers of tensors. Calibrate this model anew."
            )
        found.update({call.name: op for call, op in zip(calls, group, strict=True)})
    return found


def plans(ops: Mapping[str, ListedOp], planner: Planner) -> dict[str, CallPlan]:
    """Return the plan that each op says, with its own numbers.

    Weights whose scales don't fit the op's granularity, as after an edit of it, get those of their whole range.

    Args:
        ops: by call name.
        planner: of the model, which knows its weights; it needs no statistics.

    Raises:
        RecipeError: a scale or a zero point that no grid has.
    """
    configs = {name: op.config for name, op in ops.items()}
    dynamic = Recipe({name: replace(config, approach=Approach.DYNAMIC) for name, config in configs.items()})
    weights = {name: plan.weights for name, plan in planner.plan(dynamic).items()}
    planned = {}
    for name, op in ops.items():
        inputs = _params(op, "input", op.input_scales, op.input_zero_points, op.input_quantized_dtypes)
        outputs = _params(op, "output", op.output_scales, op.output_zero_points, op.output_quantized_dtypes)
        kept = tuple(p if flag else None for p, flag in zip(inputs, op.inputs_quantized, strict=True))
        output = outputs[0] if any(op.outputs_quantized) else None
        if op.is_int8 or any(p is not None for p in (*kept, output)):
            scaled = _weights(weights[name] or {}, op.weight_scales) if op.is_int8 else {}
            planned[name] = CallPlan(configs[name], kept, scaled, output)
        else:
            planned[name] = CallPlan(FP32)
    return planned


def _params(
    op: ListedOp, side: str, scales: Sequence[float], zero_points: Sequence[int], dtypes: Sequence[str]
) -> list[QParams]:
    params = []
    for scale, zero_point, dtype in zip(scales, zero_points, dtypes, strict=True):
        grid = GRIDS[member(QuantDType, dtype, op.label)]
        if not 0 < scale < float("inf") or not grid.qmin <= zero_point <= grid.qmax:
            raise RecipeError(
                f"an {side} of {op.label} has scale {scale} and zero point {zero_point}: {dtype} needs a positive "
                f"scale and a zero point in [{grid.qmin}, {grid.qmax}]."
            )
        params.append(QParams(np.asarray(scale, np.float32), np.asarray(zero_point, np.int32), grid))
    return params


def _weights(found: Mapping[int, QParams], scales: Sequence[Sequence[float]]) -> dict[int, QParams]:
    if len(scales) != len(found):
        return dict(found)
    return {
        position: replace(params, scale=_shaped(scale, params.scale))
        for (position, params), scale in zip(sorted(found.items()), scales, strict=True)
    }


def _shaped(scale: Sequence[float], like: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(scale, np.float32).reshape(like.shape) if len(scale) == like.size else like
