"""Several backends for one model: which one a search runs on, and what its recipes are on the others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from raysq.capabilities import OpCapability
from raysq.graph import ModelGraph
from raysq.kernels.base import Backend, Selective
from raysq.recipe import FP32, Approach, OpConfig, Precision, Recipe
from raysq.source import Source

__all__ = ["AUTO", "CHEAPEST_FIRST", "carried", "seeded"]

AUTO = "auto"  # in place of a backend's name: all that are installed
CHEAPEST_FIRST = ("onednn", "ipex", "openvino")  # by what a build costs: 0.3, 0.5 to 7 and 2.5 s were measured
ENOUGH = 0.9  # of the work that any of them has int8 kernels for: the rest is no reason to search on a slower one


def seeded(engines: Sequence[Backend], graph: ModelGraph, approaches: Collection[Approach]) -> list[Backend]:
    """Return the backends, in front the one to search on: the first that has int8 kernels for most of the model.

    Args:
        engines: in the order of what their builds cost.
        graph: the calls of the model.
        approaches: those that are searched.
    """
    work = [_work(engine, graph, set(approaches)) for engine in engines]
    chosen = next(e for e, done in zip(engines, work, strict=True) if done >= ENOUGH * max(work))
    return [chosen, *(engine for engine in engines if engine is not chosen)]


def _work(engine: Backend, graph: ModelGraph, approaches: set[Approach]) -> int:
    """Return the multiplications of the calls that have int8 kernels, one at least for each."""

    def has(capability: OpCapability | None) -> bool:
        return capability is not None and bool(
            Precision.INT8 in capability.precisions and approaches & set(capability.approaches)
        )

    ops = engine.capabilities().ops
    return sum(max(call.macs, 1) for call in graph.calls if has(ops.get(call.op)))


def carried(recipe: Recipe, source: Source, engine: Backend) -> Recipe:
    """Return a recipe as another backend can run it; what it can't is in fp32, unsmoothed or untransformed there."""
    capabilities, graph = engine.capabilities(), source.graph
    unseen = engine.unseen(source) if isinstance(engine, Selective) else {}

    def runs(name: str, config: OpConfig) -> bool:
        return name not in unseen and not capabilities.why_not(graph[name].op, config)

    smoothing = {n: alpha for n, alpha in recipe.smoothing.items() if capabilities.may_smooth_group(graph, n)}
    return replace(
        recipe,
        ops={name: config if runs(name, config) else FP32 for name, config in recipe.ops.items()},
        smoothing=smoothing,
        transforms=tuple(t for t in recipe.transforms if t in capabilities.transforms),
    )
