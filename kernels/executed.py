"""Reads from an executed TorchScript graph which call ran in which precision.

A node keeps the scope of the module that it was traced in, so the nodes of one kind in one module are that module's
calls of this kind, in order. A node inside of a oneDNN Graph partition whose operands are dequantized in that same
partition runs as an int8 kernel; outside of one it is a float op on rounded values, whatever the recipe wanted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from raysq.graph import Call, ModelGraph, OpType
from raysq.plan import CallPlan
from raysq.recipe import Precision

if TYPE_CHECKING:
    from raysq.kernels.base import BuiltModel

    Built = TypeVar("Built", bound=BuiltModel)

__all__ = ["NOT_FUSED", "ExecutedOp", "executed_ops", "executed_precisions", "key_of", "unfused", "without_unfused"]

FUSED_GROUP = "ipex::LlgaFusionGroup"
OPS = {  # part of a TorchScript op's name, and the kinds of call that it computes
    "conv": tuple(op for op in OpType if op.is_conv),
    "linear": (OpType.LINEAR,),
    "matmul": (OpType.MATMUL,),
    "bmm": (OpType.BMM,),
    "add": (OpType.ADD,),
    "max_pool": (OpType.MAX_POOL,),
    "avg_pool": (OpType.AVG_POOL,),
    "embedding_bag": (OpType.EMBEDDING_BAG,),
    "lstm": (OpType.LSTM,),
}
INT8_KINDS = {
    "quantized::add",
    "ipex::qadd",
    "ipex::qembedding_bag",
    "ipex::quantized_lstm",
    "quantized::linear_dynamic",
    "quantized::embedding_bag_byte",
    "aten::quantized_lstm",
}
NOT_FUSED = "no int8 kernel takes it here: it would run in float on rounded values"


def unfused(built: BuiltModel) -> dict[str, str]:
    """Return the calls of a build that no int8 kernel took, and that reason."""
    return {name: reason for name, reason in built.left_in_float.items() if reason == NOT_FUSED}


def without_unfused(build: Callable[[Mapping[str, str]], Built]) -> tuple[Built, Mapping[str, str]]:
    """Build, and once more with those calls in float that no int8 kernel took; return these beside the last build.

    Rounding what no int8 kernel takes costs accuracy and gains nothing.

    Args:
        build: takes the calls that stay in float, and why.
    """
    built = build({})
    idle = unfused(built)
    return (build(idle), idle) if idle else (built, idle)


@dataclass(frozen=True)
class ExecutedOp:
    """One op of the graph: which kind, in which module's scope (None if the scope is lost), and how it ran."""

    key: str
    module: str | None
    precision: Precision


def executed_precisions(
    graph: Any, model: ModelGraph, plans: Mapping[str, CallPlan]
) -> tuple[dict[str, Precision], dict[str, str]]:
    """Return each call's precision, and why those that should run in int8 or bf16 don't.

    Args:
        graph: `torch.jit.last_executed_optimized_graph()`, after the kernels were compiled.
        model: the calls.
        plans: what was asked of them.
    """
    scoped: dict[tuple[str, str], list[Precision]] = defaultdict(list)
    lost: dict[str, int] = defaultdict(int)
    for op in executed_ops(graph):
        if op.module is not None:
            scoped[op.module, op.key].append(op.precision)
        elif op.precision is Precision.INT8:
            lost[op.key] += 1
    executed: dict[str, Precision] = {}
    left: dict[str, str] = {}
    for call in model.calls:
        plan = plans[call.name]
        wanted = plan.config.precision
        if plan.reason or wanted is Precision.FP32:
            executed[call.name] = Precision.FP32
        else:
            executed[call.name] = _take(call, scoped, lost, wanted)
        if plan.reason:
            left[call.name] = plan.reason
        elif executed[call.name] is not wanted:
            left[call.name] = NOT_FUSED if wanted is Precision.INT8 else f"it runs in {executed[call.name]}"
    return executed, left


def _take(
    call: Call, scoped: Mapping[tuple[str, str], list[Precision]], lost: dict[str, int], wanted: Precision
) -> Precision:
    """Return how a call ran: the next op of its kind in its module, else one whose scope was lost."""
    key = key_of(call)
    own = scoped.get((call.module, key))
    if own:
        return own.pop(0)
    if wanted is Precision.INT8:
        if lost[key]:
            lost[key] -= 1
            return Precision.INT8
        return Precision.FP32
    return wanted


def key_of(call: Call) -> str:
    """Return the key of the ops that compute a call."""
    return next(key for key, kinds in OPS.items() if call.op in kinds)


def executed_ops(graph: Any, *, fused: bool = False) -> Iterator[ExecutedOp]:
    """Yield the ops of an executed graph that calls compute; `fused` is about what is inside of partitions."""
    for node in graph.nodes():
        kind = node.kind()
        if node.hasAttribute("Subgraph"):
            yield from executed_ops(node.g("Subgraph"), fused=kind == FUSED_GROUP)
        for block in node.blocks():
            yield from executed_ops(block, fused=fused)
        name = kind.split("::")[1]
        key = next((key for key in OPS if key in name and not kind.startswith("prim::")), None)
        if key is None or (key == "add" and not _is_tensor_sum(node, kind)):
            continue
        yield ExecutedOp(key, _module(node.scopeName()), _precision(node, kind, fused))


def _is_tensor_sum(node: Any, kind: str) -> bool:
    if kind != "aten::add" and kind != "aten::add_":
        return kind in INT8_KINDS
    shapes = [v.type() for v in list(node.inputs())[:2]]
    return all(t.kind() == "TensorType" for t in shapes)


def _precision(node: Any, kind: str, fused: bool) -> Precision:
    if kind in INT8_KINDS:
        return Precision.INT8
    inputs = [v.node() for v in node.inputs() if v.type().kind() == "TensorType"]
    operands = inputs[:2] if len(inputs) > 1 else inputs
    rounded = [n.kind() == "aten::dequantize" for n in operands]
    if fused and rounded and (any(rounded) if "add" in kind else all(rounded)):
        return Precision.INT8
    kinds = {str(v.type().scalarType()) for v in node.outputs() if v.type().kind() == "TensorType"}
    return Precision.BF16 if "BFloat16" in kinds else Precision.FP32


def _module(scope: str) -> str | None:
    """Return the module's path in the traced model from a scope such as "__module.model/__module.model.fc"."""
    if not scope:
        return None
    return scope.rsplit("/", 1)[-1].removeprefix("__module.").removeprefix("model").removeprefix(".")
