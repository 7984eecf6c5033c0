"""What a backend can run on this CPU, per kind of call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raysq.graph import OpType
from raysq.recipe import Approach, Granularity, OpConfig, Precision, QuantDType, Rounding, Scheme, Transform

if TYPE_CHECKING:
    from raysq.graph import Call, ModelGraph

__all__ = ["Capabilities", "OpCapability"]


@dataclass(frozen=True)
class OpCapability:
    """What a backend can run for one kind of call, the first of each being its default."""

    precisions: tuple[Precision, ...]
    approaches: tuple[Approach, ...] = ()
    activations: tuple[tuple[QuantDType, Scheme], ...] = ()
    weights: tuple[tuple[QuantDType, Scheme], ...] = ()
    granularities: tuple[Granularity, ...] = ()


@dataclass(frozen=True)
class Capabilities:
    """What this CPU and this build of the backend can run.

    Attributes:
        backend: its name.
        ops: per kind of call; a kind that is missing stays in float.
        isa: instruction sets that matter, such as "avx512_vnni".
        reduce_range: whether int8 products can saturate here, so that 7 bits are the default and 8 are a choice.
        transforms: changes of the whole model that it builds.
        smooths: types of modules whose own calls may be smoothed; None: any call, and what makes an activation may
            absorb its scales.
    """

    backend: str
    ops: Mapping[OpType, OpCapability]
    isa: tuple[str, ...]
    reduce_range: bool
    transforms: tuple[Transform, ...] = tuple(Transform)
    smooths: tuple[str, ...] | None = None

    @property
    def approaches(self) -> set[Approach]:
        """The approaches that some kind of call has a kernel for."""
        return {approach for capability in self.ops.values() for approach in capability.approaches}

    def may_smooth(self, call: Call) -> bool:
        """Whether the input of a call may be divided by scales."""
        own = call.module != "" and call.name.partition("#")[0] == call.module
        return self.smooths is None or (own and call.module_type in self.smooths)

    def may_smooth_group(self, graph: ModelGraph, group: str) -> bool:
        """Whether the input that a group of calls shares may be divided by scales."""
        return all(self.may_smooth(graph[call]) for call in graph.groups[group].calls)

    def why_not(self, op: OpType, config: OpConfig) -> str:
        """Say why a kind of call can't run under a configuration; "" if it can."""
        capability = self.ops.get(op)
        if capability is None:
            return "" if config.precision is Precision.FP32 else f"{op} stays in fp32."
        if config.precision not in capability.precisions:
            return f"{op} runs in {', '.join(capability.precisions)}, not in {config.precision}."
        if not config.is_int8:
            return ""
        static = config.approach is Approach.STATIC
        if config.rounding is not Rounding.NEAREST and not (static and op.has_matrix):
            return f"{config.rounding} rounding is for static convolutions and linear layers."
        if config.approach not in capability.approaches:
            return f"{op} runs {' or '.join(capability.approaches)}, not {config.approach}."
        pair = (config.activation.dtype, config.activation.scheme)
        if capability.activations and pair not in capability.activations:
            return f"activations of {op} can't be {pair[0]} {pair[1]}."
        pair = (config.weight.dtype, config.weight.scheme)
        if op.has_weight and pair not in capability.weights:
            return f"weights of {op} can't be {pair[0]} {pair[1]}."
        if op.has_weight and config.weight.granularity not in capability.granularities:
            return f"weights of {op} can't be {config.weight.granularity}."
        return ""
