"""What each call of a model takes in each precision, and what it costs to come into int8 before it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from raysq.errors import BackendError
from raysq.graph import SHAPE_CHANGES, Call, ModelGraph
from raysq.kernels.base import Profiling
from raysq.prediction import REMAINDER, typical
from raysq.recipe import Precision

if TYPE_CHECKING:
    from raysq.kernels.base import Backend
    from raysq.prepared import Prepared
    from raysq.result import Baseline

__all__ = ["OpTimes", "measured_times", "neighbours", "typical_times"]

log = logging.getLogger("raysq")

FUSED = {  # elementwise functions that run as part of the int8 kernel before them
    *("relu", "relu6", "hardtanh", "leaky_relu", "elu", "gelu", "silu", "hardswish", "sigmoid", "tanh", "clamp"),
    *SHAPE_CHANGES,
}
TYPICAL_ENTRY = 0.05  # of a call's fp32 time; measured 0.02 (a linear of 384) to 0.2 (a 1x1 convolution on 32x32)


@dataclass(frozen=True)
class OpTimes:
    """Times of single calls as shares of the whole model's in the fastest fp32.

    Attributes:
        shares: by call, then by precision; int8 without what it costs to quantize what it reads.
        entries: by call, what that costs where nothing before it runs in int8.
        neighbours: (call, call that reads its result) with nothing between them that int8 can't pass.
    """

    shares: Mapping[str, Mapping[Precision, float]]
    entries: Mapping[str, float]
    neighbours: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OpTimes:
        """Read plain data, as a journal holds it.

        Raises:
            TypeError, ValueError, KeyError, AttributeError: malformed data.
        """
        shares = {call: {Precision(p): float(v) for p, v in of.items()} for call, of in data["shares"].items()}
        entries = {call: float(value) for call, value in data["entries"].items()}
        return cls(shares, entries, tuple((str(a), str(b)) for a, b in data["neighbours"]))

    def share(self, call: str, precision: Precision) -> float:
        """Return the share of a call; what was not measured takes what fp32 does."""
        known = self.shares.get(call, {})
        return known.get(precision, known.get(Precision.FP32, 0.0))


def typical_times(graph: ModelGraph) -> OpTimes:
    """Return a guess from the multiply-accumulates alone."""
    total = sum(call.macs for call in graph.calls) or 1
    shares = {
        call.name: {p: (1 - REMAINDER) * call.macs / total * typical(call, p) for p in Precision}
        for call in graph.calls
    }
    entries = {name: TYPICAL_ENTRY * share[Precision.FP32] for name, share in shares.items()}
    return OpTimes(shares, entries, tuple(neighbours(graph)))


def measured_times(prepared: Prepared, engine: Backend, baseline: Baseline) -> OpTimes | None:
    """Time the calls of a model, in int8 as the default recipe has them; None where the backend can't.

    What could not be timed keeps the ratio to fp32 that it has typically.
    """
    if not isinstance(engine, Profiling) or not prepared.space.default().int8_calls:
        return None
    source = replace(prepared.source, args=prepared.latency_args, kwargs=dict(prepared.latency_kwargs))
    guess = typical_times(source.graph)
    shares, entries = dict(guess.shares), dict(guess.entries)
    try:
        found = engine.call_times(source, prepared.space.default())
    except (BackendError, RuntimeError) as exc:
        log.info("single calls can't be timed, their times are guessed: %s", exc)
        return None
    for name, timed in found.items():
        fp32 = timed.ms[Precision.FP32] / baseline.latency_ms
        usual = {p: fp32 * typical(source.graph[name], p) for p in Precision}
        shares[name] = usual | {p: ms / baseline.latency_ms for p, ms in timed.ms.items()}
        entries[name] = timed.entry_ms / baseline.latency_ms
    return OpTimes(shares, entries, guess.neighbours)


def neighbours(graph: ModelGraph) -> Iterator[tuple[str, str]]:
    """Yield the pairs of calls of which the second reads what the first makes, elementwise functions apart."""
    for call in graph.calls:
        for maker in _makers(graph, call):
            yield maker, call.name


def _makers(graph: ModelGraph, call: Call) -> Iterator[str]:
    node = graph.node_of.get(call.name)
    for value in node.inputs[: len(call.tensors)] if node else ():
        maker = graph.makers.get(value)
        while maker is not None and maker.call is None and maker.function in FUSED and maker.inputs:
            maker = graph.makers.get(maker.inputs[0])
        if maker is not None and maker.call is not None:
            yield maker.call
