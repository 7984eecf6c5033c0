"""Times the calls of a model inside of it: in float as eager calls, in int8 as the primitives of a built model."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raysq.graph import Call
from raysq.intercept import Interceptor, Operands, Site
from raysq.kernels.base import CallTime
from raysq.kernels.cpu import has_bf16
from raysq.kernels.profile import Primitive, profile
from raysq.recipe import Precision
from raysq.source import Source

if TYPE_CHECKING:
    from raysq.kernels.base import BuiltModel

__all__ = ["call_times", "float_times", "int8_times"]

RUNS = 5  # of the whole model; the fastest counts: what disturbs a run makes it slower only
ENTRY = (0.1, 64, torch.quint8)  # scale, zero point and type: what integers come out takes no time


def call_times(
    source: Source, built: BuiltModel, verbose: Callable[[], AbstractContextManager[object]], around_ms: float = 0.0
) -> dict[str, CallTime]:
    """Return the times of the calls of a model in float, and in int8 of those that a built model runs so.

    Args:
        source: the model.
        built: a recipe, built.
        verbose: makes oneDNN print while it is entered.
        around_ms: what the framework spends around each int8 primitive.
    """
    run = partial(built.model, *source.args, **source.kwargs)
    runs = [profile(run, verbose()) for _ in range(RUNS)]
    int8 = int8_times(runs, [call for call in source.graph.calls if built.executed.get(call.name) is Precision.INT8])
    floats = [Precision.FP32, Precision.BF16] if has_bf16() else [Precision.FP32]
    return {
        name: replace(timed, ms={**timed.ms, Precision.INT8: around_ms + int8[name]}) if name in int8 else timed
        for name, timed in float_times(source, floats).items()
    }


def float_times(source: Source, precisions: Sequence[Precision]) -> dict[str, CallTime]:
    """Return the times of all calls in some float precisions, and what it takes to quantize what they read."""
    found: dict[str, dict[Precision, float]] = defaultdict(dict)
    entries: dict[str, float] = {}

    def timed(site: Site, operands: Operands) -> Any:
        floats = [x for x in operands.activations if x.is_floating_point()]
        entries[site.name] = min(entries.get(site.name, float("inf")), _ms(partial(_quantized, floats))[0])
        result = None
        for precision in precisions:
            dtype = torch.bfloat16 if precision is Precision.BF16 else torch.float32
            activations, weights = ([t.to(dtype) for t in of] for of in (operands.activations, operands.weights))
            ms, made = _ms(partial(operands.run, activations, weights))
            found[site.name][precision] = min(found[site.name].get(precision, float("inf")), ms)
            result = made if precision is Precision.FP32 else result
        return result

    model = source.channels_last
    with torch.no_grad():
        for _ in range(RUNS):
            with Interceptor(model, timed, out_of_place=source.graph.out_of_place):
                model(*source.args, **source.kwargs)
    return {name: CallTime(ms, entries[name]) for name, ms in found.items()}


def int8_times(profiles: Sequence[Sequence[Primitive]], calls: Sequence[Call]) -> dict[str, float]:
    """Return the fastest time of each call that a primitive can be found for.

    Primitives run in the order of the calls, so the next one with a call's number of multiply-accumulates is its own.

    Args:
        profiles: the primitives of several runs.
        calls: those that ran in int8, in execution order.
    """
    found: dict[str, float] = {}
    for primitives in profiles:
        left: Mapping[int, list[float]] = defaultdict(list)
        for primitive in primitives:
            if primitive.is_int8:
                left[primitive.macs].append(primitive.ms)
        for call in calls:
            if left[call.macs]:
                found[call.name] = min(found.get(call.name, float("inf")), left[call.macs].pop(0))
    return found


def _ms(run: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = run()
    return 1000 * (time.perf_counter() - begun), result


def _quantized(activations: Sequence[Tensor]) -> list[Tensor]:
    return [torch.quantize_per_tensor(x, *ENTRY) for x in activations]
