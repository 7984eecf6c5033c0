"""Keeps sums that oneDNN Graph computes in place from overwriting what their kernel still reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from raysq.graph import Call, ModelGraph, OpType
from raysq.plan import CallPlan

__all__ = ["apart"]


def apart(graph: ModelGraph, plans: Mapping[str, CallPlan]) -> dict[str, CallPlan]:
    """Return plans in which no sum and the kernel that it is fused into read the same integers.

    In `x + f(x)` the kernel of f writes the sum into the integers of x, which it reads itself, and the numbers are
    wrong (oneDNN Graph in IPEX 2.8, all instruction sets). A scale that differs in its last digit gives the sum
    integers of its own.
    """
    found = dict(plans)
    for call in graph.calls:
        plan = plans.get(call.name)
        if call.op is not OpType.ADD or plan is None or plan.reason or not plan.config.is_int8:
            continue
        inputs = list(plan.inputs)
        for place, params in enumerate(inputs):
            kernel = _kernel(graph, call, 1 - place)
            if params is not None and kernel is not None and call.tensors[place] in kernel.tensors:
                inputs[place] = replace(params, scale=np.nextafter(params.scale, np.float32(np.inf)))
        found[call.name] = replace(plan, inputs=tuple(inputs))
    return found


def _kernel(graph: ModelGraph, call: Call, place: int) -> Call | None:
    """Return the call that an operand comes from, functions of one tensor apart."""
    inputs = graph.node_of[call.name].inputs
    maker = graph.makers.get(inputs[place]) if place < len(inputs) else None
    while maker is not None and maker.call is None and len(maker.inputs) == 1:
        maker = graph.makers.get(maker.inputs[0])
    return None if maker is None or maker.call is None else graph.by_name[maker.call]
