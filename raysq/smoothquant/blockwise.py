"""Alphas by the error of whole blocks: each block is replayed on its kept inputs, with its calls in simulated int8."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from raysq.intercept import Interceptor
from raysq.kernels.insertion import Insertion
from raysq.kernels.reference import Numerics
from raysq.layer import TINY
from raysq.smoothquant.rescaled import scaled_by

if TYPE_CHECKING:
    from raysq.kernels.base import Source
    from raysq.plan import CallPlan
    from raysq.recipe import Recipe

__all__ = ["refined_alphas"]


def refined_alphas(
    source: Source, recipe: Recipe, alphas: Mapping[str, float], candidates: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Return the alphas with which the outputs of the blocks err least.

    Block by block, group by group in execution order, each candidate is tried with all other groups of the block as
    they are by then. Groups outside of blocks, and those of blocks of which no input was kept, keep their alpha.

    Args:
        source: the model, its statistics and the inputs kept of its blocks, masks and other keywords included.
        recipe: how each call is quantized.
        alphas: where to start, by group.
        candidates: alphas to compare by group; the first wins ties.
    """
    found = dict(alphas)
    for path in source.graph.blocks:
        inside = f"{path}."
        groups = [n for n in found if all(c.startswith(inside) for c in source.graph.groups[n].calls)]
        block = _Block(source, path)
        if not block.inputs:
            continue
        for name in groups:
            errors = []
            for alpha in candidates[name]:
                tried = {n: found[n] for n in groups} | {name: alpha}
                errors.append(block.error(recipe.with_smoothing(tried)))
            found[name] = candidates[name][int(np.argmin(errors))]
    return found


class _Block:
    """A block of the model with the inputs that it got, and what it made of them in fp32."""

    def __init__(self, source: Source, path: str) -> None:
        self._source = replace(source, absorb=False)  # the kept inputs are those of a block that nothing divides
        self._path = path
        items = source.stats.items if source.stats is not None else ()
        self.inputs = [tree_map(_tensor, item.blocks[path]) for item in items if path in item.blocks]
        self._exact = self._outputs(source, {})

    def error(self, recipe: Recipe) -> float:
        """Return the noise-to-signal ratio of the block's outputs under a recipe."""
        scaled = scaled_by(self._source, replace(recipe, transforms=()))
        noise = signal = 0.0
        for exact, noisy in zip(self._exact, self._outputs(scaled, scaled.planner.plan(recipe)), strict=True):
            noise += float((exact - noisy).square().sum())
            signal += float(exact.square().sum())
        return noise / max(signal, TINY)

    def _outputs(self, source: Source, plans: Mapping[str, CallPlan]) -> list[Tensor]:
        block = source.model.get_submodule(self._path)
        outputs: list[Tensor] = []
        for args, kwargs in self.inputs:
            insertion: Callable[..., Any] = Insertion(plans, Numerics())
            with torch.no_grad(), Interceptor(source.model, insertion, out_of_place=source.graph.out_of_place):
                leaves = tree_leaves(block(*args, **kwargs))
            outputs += [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
        return outputs


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
