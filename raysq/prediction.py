"""A guess of the latency ratio from the graph alone, for trials that are never timed."""

from __future__ import annotations

from collections.abc import Mapping

from raysq.graph import Call, ModelGraph
from raysq.recipe import Precision

__all__ = ["REMAINDER", "predicted_ratio", "typical"]

# Typical ratios to fp32 on one AVX-512 core: 0.43 TOPS int8, 0.16 bf16, 0.07 fp32 at best, less at real sizes.
TYPICAL = {Precision.INT8: 0.35, Precision.BF16: 0.6, Precision.FP32: 1.0}
DEPTHWISE_INT8 = 1.5  # a 3x3 depthwise convolution in oneDNN int8: 0.48 ms, in fp32: 0.31 ms
REMAINDER = 0.1  # share of the fp32 time outside the quantizable calls: norms, softmax, reshapes


def predicted_ratio(graph: ModelGraph, precisions: Mapping[str, Precision]) -> float:
    """Return the expected latency over the fastest fp32, weighing each call by its multiply-accumulates.

    Args:
        graph: the calls of the model.
        precisions: call name to the precision that it runs in; a missing one runs in fp32.

    Returns:
        A ratio in (0, 1.5); 1.0 for a graph without multiply-accumulates.
    """
    total = sum(call.macs for call in graph.calls)
    if not total:
        return 1.0
    weighted = sum(call.macs * typical(call, precisions.get(call.name, Precision.FP32)) for call in graph.calls)
    return REMAINDER + (1 - REMAINDER) * weighted / total


def typical(call: Call, precision: Precision) -> float:
    """Return a call's usual time in a precision over that in fp32."""
    if call.is_depthwise and precision is Precision.INT8:
        return DEPTHWISE_INT8
    return TYPICAL[precision]
