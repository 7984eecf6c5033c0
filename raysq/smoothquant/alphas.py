"""The alpha of each group that loses least, by the error that int8 makes in the layers that read it.

vectors     (candidates, channels)              scales
losses      (calls, candidates)                 noise-to-signal ratio of each call's output
rows        (groups, n, inputs)                 what a call reads
matrix      (groups, inputs, outputs)           its weight
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysq.arithmetic import QParams, qparams
from raysq.errors import RecipeError
from raysq.layer import TINY, fields, grouped, matrix, rounded, tensor, unmatrix
from raysq.recipe import Approach, Granularity
from raysq.smoothing import SharedCriterion, Smoothing
from raysq.smoothquant.blockwise import refined_alphas
from raysq.smoothquant.rescaled import divided
from raysq.smoothquant.scales import largest_activations, largest_weights, smoothing_scales
from raysq.smoothquant.unseen import clipping_error
from raysq.weight import channel_axis, parameters_of, weight_of

if TYPE_CHECKING:
    from raysq.graph import Call, ModelGraph
    from raysq.recipe import Recipe, TensorConfig
    from raysq.smoothquant.groups import Group
    from raysq.source import Source

__all__ = ["advised_alphas", "smoothable", "tuned_alphas"]

log = logging.getLogger("raysq")

Vector = NDArray[np.float32]

ROWS = 256  # used per call: the error is then known to about 7 %, neighbouring alphas differ by less than they matter
AT_ONCE = 1 << 24  # weights of all candidates together: 64 MiB
COMBINE: Mapping[SharedCriterion, Callable[..., Any]] = {
    SharedCriterion.MEAN: np.mean,
    SharedCriterion.MIN: np.min,
    SharedCriterion.MAX: np.max,
}
ADVISED = Smoothing(alpha_step=0.2)  # candidates: their errors form a flat valley
ABSORBED_GAIN = 0.9  # smoothing that costs nothing is advised where it leaves at most this share of the error
COMPUTED_GAIN = 0.5  # one multiplication per value should buy more
NEGLIGIBLE = 1e-4  # noise-to-signal ratio (40 dB) below which a multiplication is not worth its time


def tuned_alphas(source: Source, smoothing: Smoothing, recipe: Recipe) -> dict[str, float]:
    """Return the alpha of each group that feeds linear layers which a recipe runs in int8.

    The error is that of the recipe's own scales, on the rows sampled from all calibration batches.

    Args:
        source: the model and its statistics.
        smoothing: one alpha for all, or how they are found; of a list the first is taken.
        recipe: how each call is quantized.

    Raises:
        RecipeError: there are no calibration statistics.
    """
    groups = [source.graph.groups[name] for name in smoothable(source.graph, recipe)]
    if not isinstance(smoothing.alpha, str):
        alpha = smoothing.alpha[0] if isinstance(smoothing.alpha, tuple) else smoothing.alpha
        return {group.name: float(alpha) for group in groups}
    scorer = _Scorer(source.under(recipe.with_smoothing({})), recipe)
    combine = COMBINE[smoothing.shared_criterion]
    candidates: dict[str, list[float]] = {}
    found = {}
    for group in groups:
        candidates[group.name] = scorer.candidates(group, smoothing)
        losses = combine(scorer.losses(group, scorer.scales(group, candidates[group.name])), axis=0)
        found[group.name] = candidates[group.name][int(np.argmin(losses))]  # the first of equals
    return refined_alphas(source, recipe, found, candidates) if smoothing.enable_blockwise_loss else found


def advised_alphas(source: Source, recipe: Recipe) -> dict[str, float]:
    """Return the alpha of each group that is better smoothed: where outliers are seen, and it pays.

    Convolutions are smoothed too, where that costs nothing.
    """
    if source.stats is None:
        return {}
    scorer = _Scorer(source.under(recipe.with_smoothing({})), recipe)
    found = {}
    for group in (source.graph.groups[name] for name in smoothable(source.graph, recipe)):
        candidates = ADVISED.grid
        vectors = np.concatenate([np.ones((1, group.channels), np.float32), scorer.scales(group, candidates)])
        plain, *smoothed = scorer.losses(group, vectors).mean(axis=0)
        best = int(np.argmin(smoothed))
        gain = ABSORBED_GAIN if group.producers else COMPUTED_GAIN if plain > NEGLIGIBLE else 0.0
        if smoothed[best] < gain * plain:
            found[group.name] = candidates[best]
    try:
        source.under(recipe.with_smoothing(found))
    except RecipeError as exc:
        log.warning("no smoothing is advised: %s", exc)
        return {}
    return found


def smoothable(graph: ModelGraph, recipe: Recipe) -> list[str]:
    """Return the groups that have a call that reads int8; without convolutions that would need a multiplication."""
    return [
        name
        for name, group in graph.groups.items()
        if any(recipe.config(call).reads_int8 for call in group.calls)
        and (group.producers or not any(graph[call].op.is_conv for call in group.calls))
    ]


class _Scorer:
    """Computes what int8 costs the calls of a group under many vectors of scales at once."""

    def __init__(self, source: Source, recipe: Recipe) -> None:
        if source.stats is None:
            raise RecipeError("smoothing needs calibration statistics; quantize with calibration data.")
        self._source, self._stats, self._recipe = source, source.stats, recipe
        self._parameters = parameters_of(source.model)
        self._latest: tuple[object, Any] = (None, None)

    def candidates(self, group: Group, smoothing: Smoothing) -> list[float]:
        """Return the alphas to compare, the initial one first."""
        initial = smoothing.init_alpha
        if isinstance(initial, str):
            initial = min(max(self._balance(group), smoothing.alpha_min), smoothing.alpha_max)
        return list(dict.fromkeys([float(initial), *smoothing.grid]))

    def scales(self, group: Group, alphas: Sequence[float]) -> Vector:
        """Return the scales of each alpha."""
        calls = [self._source.graph[name] for name in group.calls]
        activations, weights = largest_activations(group, self._stats), largest_weights(calls, self._parameters)
        return np.stack([smoothing_scales(activations, weights, alpha) for alpha in alphas])

    def losses(self, group: Group, vectors: Vector) -> NDArray[np.float64]:
        """Return the loss of each int8 call of which something is known under each vector of scales."""
        known = [n for call in self._int8(group) if (n := self._call_losses(call, vectors)) is not None]
        return np.stack(known or [np.zeros(len(vectors))])

    def _int8(self, group: Group) -> list[Call]:
        return [self._source.graph[name] for name in group.calls if self._recipe.config(name).is_int8]

    def _balance(self, group: Group) -> float:
        """Return the activations' share of the error that int8 makes where alpha is 0.5."""
        vectors = self.scales(group, [0.5])
        parts = []
        for activation in (True, False):
            losses = [self._call_losses(call, vectors, activation, not activation) for call in self._int8(group)]
            parts.append(sum(float(loss[0]) for loss in losses if loss is not None))
        return round(parts[0] / max(sum(parts), TINY), 2)

    def _activation_params(self, name: str, vectors: Vector, config: TensorConfig) -> QParams:
        """Return scale and zero point of a divided activation, one of each per vector; calls share them."""
        key = (name, vectors.tobytes(), config)
        if key != self._latest[0]:
            parts = (divided(self._stats.tensors[name], vector) for vector in vectors)
            low, high = np.transpose([config.algorithm.activation_range(part, config.grid) for part in parts])
            self._latest = key, qparams(low, high, config.grid, axis=0)
        found: QParams = self._latest[1]
        return found

    def _call_losses(
        self, call: Call, vectors: Vector, activation: bool = True, weight: bool = True
    ) -> NDArray[np.float64] | None:
        """Return the noise-to-signal ratio of a call's output, (candidates,); None where its input was not sampled."""
        config = self._recipe.config(call.name)
        values = tensor(weight_of(call, self._parameters[str(call.weight)]))
        stats = self._stats.tensors.get(call.tensors[0])
        read = None if stats is None else fields(call, tensor(stats.rows[:ROWS]), values)
        if stats is None or read is None:
            return None
        rows, exact_weights = grouped(call, read), matrix(call, values)
        taps = rows.shape[2] * call.groups // vectors.shape[1]
        exact = rows @ exact_weights
        found = []
        for part in np.array_split(vectors, min(len(vectors), -(-len(vectors) * values.numel() // AT_ONCE))):
            scales = tensor(part).repeat_interleave(taps, dim=1).reshape(len(part), call.groups, -1)
            inputs, weights = rows / scales[:, :, None], exact_weights * scales[..., None]
            unseen = torch.zeros(len(part))
            if activation:
                params = self._activation_params(call.tensors[0], part, config.activation)
                inputs = rounded(inputs, params)
                if config.approach is Approach.STATIC:  # dynamic ranges clip nothing
                    clipped = tensor(clipping_error(stats, params, part)).repeat_interleave(taps, dim=1)
                    unseen = rows.shape[1] * (clipped @ exact_weights.square().sum(dim=2).flatten())
            if weight:
                weights = matrix(call, _rounded(unmatrix(call, weights), config.weight, channel_axis(call)))
            found.append((inputs @ weights - exact).square().sum(dim=(1, 2, 3)) + unseen)
        return torch.cat(found).double().numpy() / max(float(exact.square().sum()), TINY)


def _rounded(stacked: Tensor, config: TensorConfig, axis: int) -> Tensor:
    """Quantize stacked weights, each with scales of its own, and dequantize."""
    moved = stacked.movedim(1 + axis, 1)
    channels = moved.shape[1] if config.granularity is Granularity.PER_CHANNEL else 1
    rows = moved.reshape(len(moved) * channels, -1)
    low, high = config.algorithm.weight_range(rows.numpy(), config.grid)
    return rounded(rows, qparams(low, high, config.grid, axis=0)).reshape(moved.shape).movedim(1, 1 + axis)
