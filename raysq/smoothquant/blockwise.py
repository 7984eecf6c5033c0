"""Alphas by the error of whole blocks: each block is replayed on its kept inputs, with its calls in simulated int8."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from raysq.layer import TINY
from raysq.recipe import Recipe
from raysq.simulated import simulating
from raysq.smoothquant.rescaled import scaled_by
from raysq.structure import tensors_in

if TYPE_CHECKING:
    from raysq.plan import CallPlan
    from raysq.source import Source

__all__ = ["refined_alphas"]

log = logging.getLogger("raysq")


def refined_alphas(
    source: Source, recipe: Recipe, alphas: Mapping[str, float], candidates: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Return the alphas with which the outputs of the blocks err least.

    Block by block, group by group in execution order, each candidate is tried with all other groups of the block as
    they are by then. Groups outside of blocks, and those of blocks of which no input was kept or that
    fail by themselves, keep their alpha.

    Args:
        source: the model, its statistics and the inputs kept of its blocks, masks and other keywords included.
        recipe: how each call is quantized.
        alphas: where to start, by group.
        candidates: alphas to compare by group; the first wins ties.
    """
    found = dict(alphas)
    for path in source.graph.blocks:
        inside = [call.name for call in source.graph.calls if f"{call.module}.".startswith(f"{path}.")]
        groups = [name for name in found if set(source.graph.groups[name].calls) <= set(inside)]
        try:
            block = _Block(source, path, recipe)
        except Exception as exc:  # a forward may fail in any way on its own
            log.warning("block %s can't be replayed by itself, its alphas are those of its layers: %s", path, exc)
            continue
        if not block.inputs:
            continue
        block.settle({name: found[name] for name in groups}, inside)
        for name in groups:
            calls = source.graph.groups[name].calls
            tried = [{n: found[n] for n in groups} | {name: alpha} for alpha in candidates[name]]
            best = int(np.argmin([block.error(smoothing, calls) for smoothing in tried]))
            found[name] = candidates[name][best]
            block.settle(tried[best], calls)
    return found


class _Block:
    """A block of the model with the inputs that it got, what it made of them in fp32, and how its calls are planned."""

    def __init__(self, source: Source, path: str, recipe: Recipe) -> None:
        self._source = replace(source, absorb=False)  # the kept inputs are those of a block that nothing divides
        self._path = path
        self._recipe = recipe
        items = source.stats.items if source.stats is not None else ()
        self.inputs = [tree_map(_tensor, item.blocks[path]) for item in items if path in item.blocks]
        self._exact = self._outputs(source, {})
        self._plans: dict[str, CallPlan] = {}

    def settle(self, smoothing: Mapping[str, float], calls: Sequence[str]) -> None:
        """Plan these calls under a smoothing from now on."""
        self._plans |= self._planned(scaled_by(self._source, Recipe({}, smoothing)), calls)

    def error(self, smoothing: Mapping[str, float], calls: Sequence[str]) -> float:
        """Return the noise-to-signal ratio of the block's outputs, these calls planned under a smoothing."""
        scaled = scaled_by(self._source, Recipe({}, smoothing))
        noise = signal = 0.0
        outputs = self._outputs(scaled, self._plans | self._planned(scaled, calls))
        for exact, noisy in zip(self._exact, outputs, strict=True):
            noise += float((exact - noisy).square().sum())
            signal += float(exact.square().sum())
        return noise / max(signal, TINY)

    def _planned(self, scaled: Source, calls: Sequence[str]) -> dict[str, CallPlan]:
        plans = scaled.planner.plan(Recipe({name: self._recipe.config(name) for name in calls}))
        return {name: plans[name] for name in calls}

    def _outputs(self, source: Source, plans: Mapping[str, CallPlan]) -> list[Tensor]:
        block = source.model.get_submodule(self._path)
        outputs: list[Tensor] = []
        for args, kwargs in self.inputs:
            with torch.no_grad(), simulating(source, plans):
                outputs += [t for t in tensors_in(block(*args, **kwargs)) if t.is_floating_point()]
        return outputs


def _tensor(value: Any) -> Any:
    if hasattr(value, "get_seq_length"):
        return None  # a key-value cache of transformers, which by now holds what the block itself wrote
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
