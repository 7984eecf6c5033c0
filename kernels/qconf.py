"""Writes plans into IPEX's qconf JSON, from which `load_qconf_summary` runs a model without calibration.

A summary lists the ops of each module, by index. A module's own op is found by the module's path; functional ops by
their order of execution, since IPEX traces models with FX where it can and all functions then belong to the root.
Tensor ids count up as a model runs, so the id of an op's result gives that order.

A qconf holds scales, and kernels clamp to eight bits: where a recipe uses seven (CPUs without VNNI), values outside of
the calibrated range are clamped later than in raysq's own build, as they are with IPEX's `reduce_range` observers.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raysq.arithmetic import QParams
from raysq.errors import BackendError
from raysq.graph import Call, ModelGraph, OpType
from raysq.listed_op import kind_of
from raysq.listed_plans import listed
from raysq.plan import CallPlan
from raysq.recipe import Approach, Precision, QuantDType, Rounding, Scheme

if TYPE_CHECKING:
    from raysq.recipe import Recipe
    from raysq.stats import CalibrationStats

__all__ = ["FACTOR", "Op", "fill", "is_smoothed", "match", "ops_of", "why_not"]

Info = dict[str, Any]

FACTOR = "smooth_quant_scaling_factor"
SCALES = ("scale", "zero_point", FACTOR)
# "<class 'torch.nn.modules.conv.Conv2d'>", "<built-in method matmul of type object at 0x7f…>", "<method 'add' of …>"
OP_TYPE = re.compile(r"<class '(?:\w+\.)*(\w+)'>|<(?:built-in )?(?:method|function) '?(\w+)")


@dataclass(frozen=True)
class Op:
    """One quantizable op of a summary, and the module whose tensor ids it shares; relu and the like have no kind."""

    module: str
    info: Info
    kind: OpType | None

    @property
    def order(self) -> int:
        """Grows as the model runs."""
        return int(self.info["output_tensor_infos"][0]["id"])


def why_not(recipe: Recipe) -> tuple[str, ...]:
    """Say what a qconf can't express of a recipe; empty if it can express all of it.

    What depends on the model shows only when the file is written: IPEX sees no 1-d convolutions, for one.
    """
    reasons = []
    int8 = [config for config in recipe.ops.values() if config.is_int8]
    if any(config.precision is Precision.BF16 for config in recipe.ops.values()):
        reasons.append("bf16 is global in IPEX (autocast), a qconf has no bf16 per op")
    if any(config.approach is not Approach.STATIC for config in int8):
        reasons.append("dynamic and weight-only quantization are chosen by a qconfig mapping, not by the qconf")
    if any(config.rounding is not Rounding.NEAREST for config in int8):
        reasons.append("a qconf holds scales, not weights: adaptive rounding is lost")
    if any((c.activation.dtype, c.activation.scheme) == (QuantDType.S8, Scheme.AFFINE) for c in int8):
        reasons.append("IPEX runs s8 activations symmetric only")
    reasons.extend(f"{t.value} changes weights, which a qconf does not hold" for t in recipe.transforms)
    return tuple(reasons)


def is_smoothed(qconf: Mapping[str, Any]) -> bool:
    """Whether some op's input is multiplied, for which a model must be prepared with IPEX's smooth mapping."""
    infos = (op.info["input_tensor_infos"] for op in ops_of(qconf))
    return any(FACTOR in tensor for tensors in infos for tensor in tensors if tensor)


def fill(
    summary: Mapping[str, Any],
    graph: ModelGraph,
    plans: Mapping[str, CallPlan],
    stats: CalibrationStats | None = None,
) -> dict[str, Any]:
    """Return a summary in which every call runs as planned, and everything else in fp32.

    Each op also says what IPEX 1.x's file would say of it, which call it is, and which group it is smoothed with; IPEX
    ignores such keys.

    Args:
        summary: what `save_qconf_summary` wrote for the prepared model; it isn't changed. Where a plan multiplies its
            input, the model must have been prepared with `get_smooth_quant_qconfig_mapping()`, here and by the user.
        graph: the model's calls.
        plans: their plans.
        stats: what the ranges of results are read from.

    Raises:
        BackendError: IPEX doesn't see a call that is planned in int8, or can't multiply its input.
    """
    filled: dict[str, Any] = copy.deepcopy(dict(summary))
    ops = sorted(ops_of(filled), key=lambda op: op.order)
    for op in ops:
        _leave_in_float(op.info)
    for module in filled.values():
        module["nonq_op_infos"] = {}  # they configure nothing, and folded batch norms would have to be among them
        for info in module["layer_output_infos"]:
            _forget(info)
    int8 = [name for name, plan in plans.items() if plan.config.is_int8 and not plan.reason]
    found = match(ops, graph.calls, int8)
    ids = _Ids(ops)
    groups = {call: name for name, group in graph.groups.items() for call in group.calls}
    for name in int8:
        _quantize(name, found[name], plans[name], ids)
        if plans[name].multiplier is not None and name in groups:
            found[name].info["smoothing"] = groups[name]
    in_list = listed(graph, plans, stats)
    for name, op in found.items():
        op.info.update(asdict(in_list[name]), call=name)
    for op in ops:
        for info in op.info["output_tensor_infos"]:
            if "scale" not in info:  # a pool whose reader rounds the result is not given a second rounding
                info["inf_dtype"] = ids.read_as.get(info["id"], info["inf_dtype"])
    return filled


def ops_of(summary: Mapping[str, Any]) -> Iterator[Op]:
    """Return every quantizable op of a summary."""
    for module, infos in summary.items():
        for info in infos["q_op_infos"].values():
            name = OP_TYPE.match(info["op_type"])
            spelled = (name[1] or name[2]) if name else ""
            yield Op(module, info, kind_of(spelled))


def _leave_in_float(info: Info) -> None:
    for key in ("input_tensor_infos", "weight_tensor_infos", "output_tensor_infos"):
        for tensor in info[key]:
            _forget(tensor)


def _forget(tensor: Info) -> None:
    """Set a tensor back to its own type; a scale left behind would be loaded for other readers of its id."""
    for key in SCALES:
        tensor.pop(key, None)
    for key in ("inf_dtype", "force_dtype"):
        if key in tensor:
            tensor[key] = tensor["orig_dtype"]


def match(ops: Sequence[Op], calls: Sequence[Call], int8: Sequence[str]) -> dict[str, Op]:
    """Return the op of each call; calls that run in float need none.

    Args:
        ops: in execution order.
        calls: likewise.
        int8: names of calls that need one.

    Raises:
        BackendError: one of them has none.
    """
    own: dict[tuple[str, OpType], list[Op]] = defaultdict(list)
    functional: dict[OpType, list[Op]] = defaultdict(list)
    for op in ops:
        if op.kind is not None and op.info["op_type_is_module"]:
            own[op.info["fqn"], op.kind].append(op)
        elif op.kind is not None:
            functional[op.kind].append(op)
    groups: dict[tuple[str | None, OpType], list[Call]] = defaultdict(list)
    for call in calls:
        is_own = (call.module, call.op) in own
        groups[call.module if is_own else None, call.op].append(call)
    found: dict[str, Op] = {}
    for (module, kind), group in groups.items():
        seen = functional[kind] if module is None else own[module, kind]
        if len(seen) == len(group):
            found.update({call.name: op for call, op in zip(group, seen, strict=True)})
        elif missing := [call.name for call in group if call.name in int8]:
            raise BackendError(
                f"IPEX's own quantization sees {len(seen)} calls of {kind} where raysq sees {len(group)}, "
                f"{', '.join(missing)} among them, so a qconf can't name them. Keep them in float."
            )
    return found


class _Ids:
    """Tensor ids, of which each holds one scale per module: the last one that is loaded wins."""

    def __init__(self, ops: Sequence[Op]) -> None:
        tensors = [t for op in ops for key in ("input_tensor_infos", "output_tensor_infos") for t in op.info[key] if t]
        self._fresh = itertools.count(1 + max((t["id"] for t in tensors), default=0))
        self._scales: dict[tuple[str, int], Info] = {}
        self.read_as: dict[int, str] = {}

    def rename(self, tensor: Info) -> None:
        """Give a tensor an id that nothing else has."""
        tensor["id"] = next(self._fresh)

    def share(self, module: str, tensor: Info) -> None:
        """Keep a quantized input's id where its other readers agree on the scale, else give it one of its own."""
        chosen = {key: tensor.get(key) for key in ("inf_dtype", *SCALES)}
        if self._scales.setdefault((module, tensor["id"]), chosen) == chosen:
            self.read_as[tensor["id"]] = tensor["inf_dtype"]
        else:
            self.rename(tensor)


def _quantize(name: str, op: Op, plan: CallPlan, ids: _Ids) -> None:
    inputs: list[Info] = op.info["input_tensor_infos"]
    weights: list[Info] = op.info["weight_tensor_infos"] or inputs[1:]  # a function takes its weight as an argument
    activations = {i: params for i, params in enumerate(plan.inputs) if params is not None}
    for tensors, planned in ((inputs, activations), (weights, plan.weights or {})):
        for position, params in planned.items():
            if position >= len(tensors) or not tensors[position]:
                raise BackendError(f"{name} must pass its tensors by position: IPEX quantizes none by keyword.")
            _set(tensors[position], params)
    op.info["activation_observer"]["reduce_range"] = plan.config.activation.reduce_range
    if plan.multiplier is not None:
        _smooth(name, op, plan.multiplier)
    for position in activations:
        ids.share(op.module, inputs[position])
    if plan.output is not None:
        result = op.info["output_tensor_infos"][0]
        _set(result, plan.output)
        ids.rename(result)  # or IPEX lets the reader's scale replace the one that the kernel needs


def _smooth(name: str, op: Op, multiplier: NDArray[np.float32]) -> None:
    """Multiply the input of a linear layer by 1/s and its weight by s, as `convert` does before it rounds them."""
    if op.kind is not OpType.LINEAR or not op.info["op_type_is_module"]:
        raise BackendError(f"{name} is smoothed, which IPEX does to nn.Linear modules only. Keep it in float.")
    op.info["input_tensor_infos"][0][FACTOR] = multiplier.tolist()
    op.info["weight_tensor_infos"][0][FACTOR] = (1 / multiplier).tolist()


def _set(tensor: Info, params: QParams) -> None:
    dtype = "torch.qint8" if params.grid.qmin < 0 else "torch.quint8"
    tensor["inf_dtype"] = dtype
    if "force_dtype" in tensor:
        tensor["force_dtype"] = dtype
    tensor["scale"] = params.scale.reshape(-1).tolist()
    tensor["zero_point"] = params.zero_point.reshape(-1).tolist()
