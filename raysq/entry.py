"""One op of the list that IPEX 1.x saved as `configure.json`: what is quantized, by which numbers, and what feeds it.

Ops have no module names there. They are told apart by their order, within their kind: the third "linear" is the third
linear layer that runs. Tensors are named by the op that makes them, "conv2d0.output0", or, where no op does, by the
first that reads them, "conv2d0.input0".
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raysq import calibration
from raysq.arithmetic import Grid, QParams, qparams
from raysq.errors import RecipeError, StorageError
from raysq.graph import Call, ModelGraph, OpType
from raysq.plan import CallPlan, Planner
from raysq.recipe import (
    FP32,
    Approach,
    Granularity,
    OpConfig,
    Precision,
    QuantDType,
    Recipe,
    Scheme,
    TensorConfig,
)

if TYPE_CHECKING:
    from raysq.stats import CalibrationStats

__all__ = ["Entry", "describe", "kind_of", "matched", "plans", "read", "write"]

KINDS = {op.value.replace("_", ""): op for op in OpType} | {
    "booleandispatch": OpType.MAX_POOL,  # what `F.max_pool2d` prints as
    "maxpool2d": OpType.MAX_POOL,
    "maxpool3d": OpType.MAX_POOL,
    "avgpool2d": OpType.AVG_POOL,
    "avgpool3d": OpType.AVG_POOL,
    "adaptiveavgpool2d": OpType.AVG_POOL,
    "adaptiveavgpool3d": OpType.AVG_POOL,
}
MIN_MAX = "min_max"  # as IPEX spells it; raysq's other algorithms keep their own names
GRIDS = {QuantDType.U8: Grid(0, 255, symmetric=False), QuantDType.S8: Grid(-128, 127, symmetric=True)}


@dataclass(frozen=True)
class Entry:
    """An op as the file lists it; the fields are its keys, in its order.

    Attributes:
        id: its place among the ops.
        name: its kind.
        algorithm: what its ranges were calibrated by.
        weight_granularity: "per_channel" or "per_tensor".
        input_scales: of each input, quantized or not.
        input_zero_points: likewise.
        output_scales: of each output.
        output_zero_points: likewise.
        weight_scales: of each weight, one per channel or a single one; none for an op that runs in float.
        input_quantized_dtypes: "uint8" or "int8".
        output_quantized_dtypes: likewise.
        inputs_quantized: whether each input is quantized before the op.
        outputs_quantized: whether each output is after it.
        inputs_flow: names of the tensors it reads.
        outputs_flow: names of the tensors it makes.
    """

    id: int
    name: str
    algorithm: str
    weight_granularity: str
    input_scales: tuple[float, ...]
    input_zero_points: tuple[int, ...]
    output_scales: tuple[float, ...]
    output_zero_points: tuple[int, ...]
    weight_scales: tuple[tuple[float, ...], ...]
    input_quantized_dtypes: tuple[str, ...]
    output_quantized_dtypes: tuple[str, ...]
    inputs_quantized: tuple[bool, ...]
    outputs_quantized: tuple[bool, ...]
    inputs_flow: tuple[str, ...]
    outputs_flow: tuple[str, ...]

    @classmethod
    def from_dict(cls, data: Any) -> Entry:
        """Read the JSON form; keys that it doesn't know are left out.

        Raises:
            RecipeError: a key is missing or holds something else.
        """
        if not isinstance(data, dict):
            raise RecipeError(f"an op of IPEX's list is an object, got {data!r}.")
        for field in fields(cls):
            kind = list if field.type.startswith("tuple") else int if field.type == "int" else str
            if not isinstance(data.get(field.name), kind):
                raise RecipeError(
                    f"an op of IPEX's list needs {field.name!r}, a {kind.__name__}; got {data.get(field.name)!r}."
                )
        entry = cls(**{field.name: _frozen(data[field.name]) for field in fields(cls)})
        for side, lists in (
            ("input", (entry.input_scales, entry.input_zero_points, entry.input_quantized_dtypes)),
            ("output", (entry.output_scales, entry.output_zero_points, entry.output_quantized_dtypes)),
        ):
            flags = getattr(entry, f"{side}s_quantized")
            if not all(isinstance(flag, bool) for flag in flags):
                raise RecipeError(f"`{side}s_quantized` of {entry.label} holds true and false, got {list(flags)}.")
            if any(len(values) != len(flags) for values in lists):
                raise RecipeError(
                    f"{entry.label} has {len(flags)} {side}s, but not as many scales, zero points, types."
                )
        return entry

    @property
    def label(self) -> str:
        """Kind and number, as tensors are named after it."""
        return f"{self.name}{self.id}"

    @property
    def is_int8(self) -> bool:
        """Whether its kernel can run in int8: all that it reads is quantized, or of a sum what isn't accumulated."""
        if not self.inputs_quantized:  # it reads integers as they are
            return any(self.outputs_quantized)
        return (any if kind_of(self.name) is OpType.ADD else all)(self.inputs_quantized)

    @property
    def config(self) -> OpConfig:
        """What a recipe says of it: everything but the numbers themselves."""
        dtypes = self.input_quantized_dtypes or self.output_quantized_dtypes
        dtype = _choice(QuantDType, dtypes[0], self.label) if dtypes else QuantDType.U8
        algorithm = calibration.parse("minmax" if self.algorithm == MIN_MAX else self.algorithm)
        scheme = Scheme.AFFINE if dtype is QuantDType.U8 else Scheme.SYMMETRIC
        granularity = _choice(Granularity, self.weight_granularity, self.label)
        weight = TensorConfig(QuantDType.S8, Scheme.SYMMETRIC, granularity)
        return OpConfig(Precision.INT8, Approach.STATIC, TensorConfig(dtype, scheme, algorithm=algorithm), weight)


def describe(graph: ModelGraph, plans: Mapping[str, CallPlan], stats: CalibrationStats | None) -> dict[str, Entry]:
    """Return the entry of each call, by its name.

    What stays in float is described too, in 8 bits over its whole range, so that its flags can be set by hand.

    Args:
        graph: the model's calls.
        plans: their plans.
        stats: their statistics; None leaves out the scales of what isn't quantized.
    """
    labels = {call.name: f"{call.op}{number}" for number, call in enumerate(graph.calls)}
    return {
        call.name: _entry(number, call, plans.get(call.name, CallPlan(FP32)), stats, _flow(call, graph, labels))
        for number, call in enumerate(graph.calls)
    }


def _entry(
    number: int, call: Call, plan: CallPlan, stats: CalibrationStats | None, inputs_flow: tuple[str, ...]
) -> Entry:
    runs = plan.config.is_int8 and not plan.reason
    given = plan.inputs if runs else ()
    planned = given or (None,) * len(call.tensors)
    grid = replace(plan.config.activation, reduce_range=False).grid
    inputs = [p or _whole_range(t, stats, grid) for p, t in zip(planned, call.tensors, strict=True)]
    output = (plan.output if runs else None) or _result_range(call, stats, grid)
    return Entry(
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


def matched(entries: Iterable[Entry], graph: ModelGraph) -> dict[str, Entry]:
    """Return the entry of each call that has one, by the call's name; kinds that raysq doesn't know are left out.

    Raises:
        RecipeError: the file lists more or fewer ops of a kind than the model has.
    """
    listed: dict[OpType, list[Entry]] = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: entry.id):
        kind = kind_of(entry.name)
        if kind is not None:
            listed[kind].append(entry)
    found: dict[str, Entry] = {}
    for kind, group in listed.items():
        calls = [call for call in graph.calls if call.op is kind]
        if len(calls) != len(group) or any(
            len(call.tensors) != len(e.inputs_quantized) for call, e in zip(calls, group, strict=True)
        ):
            raise RecipeError(
                f"the file describes another model: it lists {len(group)} ops of kind {kind}, the model has "
                f"{len(calls)}, or they read other numbers of tensors. Calibrate this model anew."
            )
        found.update({call.name: entry for call, entry in zip(calls, group, strict=True)})
    return found


def kind_of(name: str) -> OpType | None:
    """Return the kind of op that IPEX means by a name, None for kinds that raysq doesn't quantize."""
    return KINDS.get(name.lower().removesuffix("_").replace("_", ""))


def plans(entries: Mapping[str, Entry], planner: Planner) -> dict[str, CallPlan]:
    """Return the plan that each entry says, with its own numbers.

    Weights whose scales don't fit the entry's granularity, as after an edit of it, get those of their whole range.

    Args:
        entries: by call name.
        planner: of the model, which knows its weights; it needs no statistics.

    Raises:
        RecipeError: a scale or a zero point that no grid has.
    """
    configs = {name: entry.config for name, entry in entries.items()}
    dynamic = Recipe({name: replace(config, approach=Approach.DYNAMIC) for name, config in configs.items()})
    weights = {name: plan.weights for name, plan in planner.plan(dynamic).items()}
    planned = {}
    for name, entry in entries.items():
        inputs = _params(entry, "input", entry.input_scales, entry.input_zero_points, entry.input_quantized_dtypes)
        outputs = _params(entry, "output", entry.output_scales, entry.output_zero_points, entry.output_quantized_dtypes)
        kept = tuple(p if flag else None for p, flag in zip(inputs, entry.inputs_quantized, strict=True))
        output = outputs[0] if any(entry.outputs_quantized) else None
        if entry.is_int8 or any(p is not None for p in (*kept, output)):
            scaled = _weights(weights[name] or {}, entry.weight_scales) if entry.is_int8 else {}
            planned[name] = CallPlan(configs[name], kept, scaled, output)
        else:
            planned[name] = CallPlan(FP32)
    return planned


def _params(
    entry: Entry, side: str, scales: Sequence[float], zero_points: Sequence[int], dtypes: Sequence[str]
) -> list[QParams]:
    params = []
    for scale, zero_point, dtype in zip(scales, zero_points, dtypes, strict=True):
        grid = GRIDS[_choice(QuantDType, dtype, entry.label)]
        if not 0 < scale < float("inf") or not grid.qmin <= zero_point <= grid.qmax:
            raise RecipeError(
                f"an {side} of {entry.label} has scale {scale} and zero point {zero_point}: {dtype} needs a positive "
                f"scale and a zero point in [{grid.qmin}, {grid.qmax}]."
            )
        params.append(QParams(np.asarray(scale, np.float32), np.asarray(zero_point, np.int32), grid))
    return params


def _weights(found: Mapping[int, QParams], scales: Sequence[Sequence[float]]) -> dict[int, QParams]:
    if len(scales) != len(found):
        return dict(found)
    return {
        position: replace(params, scale=_shaped(listed, params.scale))
        for (position, params), listed in zip(sorted(found.items()), scales, strict=True)
    }


def _shaped(listed: Sequence[float], like: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(listed, np.float32).reshape(like.shape) if len(listed) == like.size else like


def read(path: str | Path) -> Any:
    """Return the JSON of a file.

    Raises:
        StorageError: there is none, or it holds something else.
    """
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as exc:
        raise StorageError(f"{path} holds no configuration: {exc}") from exc


def write(path: str | Path, entries: Iterable[Entry]) -> None:
    """Write entries as IPEX 1.x did.

    Raises:
        StorageError: the path can't be written.
    """
    try:
        Path(path).write_text(json.dumps([asdict(entry) for entry in entries], indent=4))
    except OSError as exc:
        raise StorageError(f"can't write {path}: {exc.strerror}. Pass another path.") from exc


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _choice(kind: Any, value: object, label: str) -> Any:
    try:
        return kind(value)
    except ValueError as exc:
        raise RecipeError(f"{label} says {value!r}, which must be one of {[m.value for m in kind]}.") from exc
