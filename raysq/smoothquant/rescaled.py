"""A model whose activations are divided by scales: the weights make up for it, so that in fp32 nothing changes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raysq.copies import shared_copy
from raysq.errors import RecipeError, unknown
from raysq.histogram import HistogramBuilder
from raysq.inspection import ROUNDING, same_outputs
from raysq.recipe import Recipe, Transform
from raysq.simulated import simulating
from raysq.smoothquant.scales import equalization_scales, largest_activations, largest_weights, smoothing_scales
from raysq.structure import output_tensors
from raysq.weight import parameters_of, weight_of

if TYPE_CHECKING:
    from raysq.graph import Call
    from raysq.source import Source
    from raysq.stats import CalibrationStats, TensorStats

__all__ = ["divided", "rescaled", "scaled_by", "under"]

log = logging.getLogger("raysq")

Vector = NDArray[np.float32]

SAMPLED_BINS = 1024  # 4 for each of 255 steps; finer ones would stay empty, as there are some 10^5 values


def under(source: Source, recipe: Recipe) -> Source:
    """Return the model equalized and then smoothed, as a recipe says, and make sure that in fp32 it is the same.

    The record of a forward doesn't see all that one can do to a tensor: scripted functions, `vmap`, `h[:, 0] = 1`.
    Where the example inputs show that an absorbed division was read by such, it is computed instead.

    Raises:
        RecipeError: an unknown group, fixed scales of another length, smoothing without statistics; the model can't
            be scaled.
    """
    scaled = scaled_by(source, recipe)
    if scaled is source or _is_exact(source, scaled):
        return scaled
    if source.absorb and recipe.smoothing and Transform.EQUALIZATION not in recipe.transforms:
        log.warning("smoothing scales can't be absorbed, as the model does more than was recorded: they are computed.")
        return under(replace(source, absorb=False), recipe)
    raise RecipeError(
        "this recipe's scales change what the model computes in fp32: it reads activations or weights in ways that "
        "can't be recorded (scripted functions, vmap, item assignment). Leave smoothing and equalization away."
    )


def scaled_by(source: Source, recipe: Recipe) -> Source:
    """Return the model equalized and then smoothed, as a recipe says; equalization is absorbed in any case.

    Raises:
        RecipeError: an unknown group, fixed scales of another length, smoothing without statistics.
    """
    if Transform.EQUALIZATION in recipe.transforms:
        scales = equalization_scales(source.graph, parameters_of(source.model))
        source = replace(rescaled(replace(source, absorb=True), scales), absorb=source.absorb)
    if not recipe.smoothing:
        return source
    parameters, groups = parameters_of(source.model), source.graph.groups
    scales = {}
    for name, alpha in recipe.smoothing.items():
        if name not in groups:
            raise RecipeError(unknown("group to smooth:", name, groups))
        group = groups[name]
        if isinstance(alpha, tuple):
            if len(alpha) != group.channels:
                raise RecipeError(f"smoothing of {name!r} needs {group.channels} scales, got {len(alpha)}.")
            scales[name] = np.asarray(alpha, np.float32)
        elif source.stats is None:
            raise RecipeError("smoothing needs calibration statistics; quantize with calibration data.")
        else:
            largest = largest_weights((source.graph[call] for call in group.calls), parameters)
            scales[name] = smoothing_scales(largest_activations(group, source.stats), largest, alpha)
    return rescaled(source, scales)


def rescaled(source: Source, scales: Mapping[str, Vector]) -> Source:
    """Return a model in which the activations of each group are divided by its scales, and their statistics.

    Weights that don't change are shared with the source.

    Args:
        source: the model; it isn't changed.
        scales: by group, (channels,), positive.
    """
    parameters = parameters_of(source.model)
    changed: dict[str, Vector] = {}
    multipliers = dict(source.multipliers)
    calls = dict(source.graph.by_name)
    tensors: dict[str, tuple[str, Vector]] = {}
    results: dict[str, Vector] = {}

    def writable(name: str) -> Vector:
        return changed.setdefault(name, parameters[name].copy())

    for name, vector in scales.items():
        group = source.graph.groups[name]
        for call in _distinct(group.calls, source):
            _scale(weight_of(call, writable(str(call.weight))), call, vector, axis=1)
        if group.producers and source.absorb:
            for call in _distinct([p.call for p in group.producers if p.call is not None], source):
                _scale(weight_of(call, writable(str(call.weight))), call, np.float32(1) / vector, axis=0)
            for parameter in (v for p in group.producers for v in p.vectors):
                values = writable(parameter)
                values /= vector.reshape(values.shape)
            tensors.update({tensor: (tensor, vector) for tensor in group.tensors})
            results.update(dict.fromkeys(group.results, vector))
        else:  # others may read the activation as it is
            for call in (source.graph[name] for name in group.calls):
                multipliers[call.name] = multipliers.get(call.name, np.float32(1)) / vector
                smoothed = f"{call.tensors[0]} smoothed"
                tensors[smoothed] = (call.tensors[0], vector)
                calls[call.name] = replace(call, tensors=(smoothed, *call.tensors[1:]))
    graph = replace(source.graph, calls=tuple(calls.values())) if calls != source.graph.by_name else source.graph
    stats = source.stats
    if stats is not None:
        stats = _all_divided(stats, tensors, results)
    model = _with(source.model, changed, {name for node in graph.nodes for name in node.parameters})
    return replace(source, model=model, graph=graph, stats=stats, multipliers=multipliers)


def _distinct(calls: Iterable[str], source: Source) -> list[Call]:
    """Return one call for each weight: a module that is called twice has one."""
    found: dict[tuple[object, int], Call] = {}
    for name in calls:
        call = source.graph[name]
        found.setdefault((call.weight, call.weight_start), call)
    return list(found.values())


def _scale(weight: Vector, call: Call, vector: Vector, axis: int) -> None:
    """Multiply the input (axis 1) or output (axis 0) channels of a call's weight in place."""
    along = axis != call.op.is_transposed
    size = len(weight) // call.groups
    for number, factors in enumerate(vector.reshape(call.groups, -1)):
        part = weight[number * size : (number + 1) * size]
        shape = [1] * part.ndim
        shape[1 if along else 0] = -1
        part *= factors.reshape(shape)


def _all_divided(
    stats: CalibrationStats, tensors: Mapping[str, tuple[str, Vector]], results: Mapping[str, Vector]
) -> CalibrationStats:
    new = {n: divided(stats.tensors[of], s) for n, (of, s) in tensors.items() if of in stats.tensors}
    outputs = {}
    for name, vector in results.items():
        if name in stats.outputs:
            low, high, mean = stats.outputs[name]
            outputs[name] = (low / vector, high / vector, mean / vector)
    return replace(stats, tensors={**stats.tensors, **new}, outputs={**stats.outputs, **outputs})


def divided(stats: TensorStats, vector: Vector) -> TensorStats:
    """Return the statistics of a divided activation: exact per channel, the histogram that of the sampled rows."""
    rows = stats.rows / vector.reshape(-1, *[1] * (stats.rows.ndim - 2))
    new = replace(
        stats,
        channel_min=stats.channel_min / vector,
        channel_max=stats.channel_max / vector,
        channel_mean=stats.channel_mean / vector,
        rows=rows,
    )
    histogram = HistogramBuilder(SAMPLED_BINS)
    histogram.add(torch.from_numpy(rows))
    shrunk = [
        after / before if before else 1.0
        for after, before in ((new.minimum, stats.minimum), (new.maximum, stats.maximum))
    ]
    return replace(
        new,
        histogram=histogram.build(),
        moving_min=stats.moving_min * shrunk[0],
        moving_max=stats.moving_max * shrunk[1],
    )


def _with(model: nn.Module, changed: Mapping[str, Vector], read: Set[str]) -> nn.Module:
    """Return a copy that has other values for some parameters and shares everything else.

    A tied parameter changes under its other names too, but for those under which it is read by itself.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    new = {name: nn.Parameter(torch.from_numpy(values), requires_grad=False) for name, values in changed.items()}
    for name, parameter in tuple(new.items()):
        tied = (other for other in named if named[other] is named[name] and other not in read)
        new.update((other, parameter) for other in tied if other not in changed)
    model = shared_copy(model)
    for name, parameter in new.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, parameter)
    return model


def _is_exact(source: Source, scaled: Source) -> bool:
    """Whether both compute the same from the example inputs, within rounding."""
    exact, same = (_outputs(of) for of in (source, scaled))
    return same_outputs(same, exact, ROUNDING)


def _outputs(source: Source) -> list[Tensor]:
    with torch.no_grad(), simulating(source, source.planner.plan(Recipe({}))):
        result = source.model(*source.args, **source.kwargs)
    return [t.detach() for t in output_tensors(result)]
