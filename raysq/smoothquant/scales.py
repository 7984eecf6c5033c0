"""From the largest activations and weights of each channel to the scales that an activation is divided by.

activations, weights, scales    (channels,) float32
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raysq.weight import weight_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from raysq.graph import Call, ModelGraph
    from raysq.smoothquant.groups import Group
    from raysq.stats import CalibrationStats

__all__ = ["equalization_scales", "largest_activations", "largest_weights", "smoothing_scales"]

Vector = NDArray[np.float32]

WIDEST = np.float32(2**20)  # a scale beyond it would push a channel's other values out of float32's precision
ROUNDS = 30  # of equalization; streams only meet at convolutions that end one and begin another
CONVERGED = 1e-3


def smoothing_scales(activations: Vector, weights: Vector, alpha: float) -> Vector:
    """Return the scales that move a share of the difficulty from activations to weights.

    s_j = max|X_j|^alpha / max|W_j|^(1-alpha): Xiao et al. 2022, SmoothQuant, equation 4. Dead channels, where either
    is 0 or not finite, have scale 1: nothing was seen that could be divided.

    Args:
        activations: largest magnitude of each channel.
        weights: largest magnitude of the weights that read each channel.
        alpha: 0 leaves all difficulty to the activations, 1 to the weights.

    Raises:
        ValueError: alpha outside of [0, 1].

    Example:
        >>> smoothing_scales(np.float32([16, 1, 0]), np.float32([1, 1, 1]), 0.5).tolist()
        [4.0, 1.0, 1.0]
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must lie in [0, 1], got {alpha}.")
    return _alive(
        activations, weights, activations.astype(np.float64) ** alpha, weights.astype(np.float64) ** (1 - alpha)
    )


def equalization_scales(graph: ModelGraph, weights: Mapping[str, Vector]) -> dict[str, Vector]:
    """Return the scales that make the channels of neighbouring layers equally wide, by group.

    s_j = sqrt(r1_j / r2_j), r1 the largest weight that makes a channel and r2 the largest that reads it: Nagel et al.
    2019, Data-Free Quantization Through Weight Equalization and Bias Correction, equation 11. A layer that ends one
    group and begins another couples them, so all are repeated until nothing changes, as in the paper.

    Args:
        graph: the calls; only groups that convolutions and linear layers make are equalized.
        weights: parameters by their name in the state dict.
    """
    groups = [g for g in graph.groups.values() if g.producers and all(p.call for p in g.producers)]
    scales = {group.name: np.ones(group.channels, np.float32) for group in groups}
    made = {group.name: [graph[str(p.call)] for p in group.producers] for group in groups}
    divided = {call.name: group.name for group in groups for call in made[group.name]}
    read_by = {name: group.name for group in groups for name in group.calls}

    def wide(call: Call, axis: int) -> Vector:
        """Return the largest weight along the input (1) or output (0) channels, as scaled so far."""
        values = _magnitudes(call, weights)  # (groups, outputs, inputs)
        shape = (call.groups, -1)
        if call.name in divided:
            values = values / scales[divided[call.name]].reshape(shape)[:, :, None]
        if call.name in read_by:
            values = values * scales[read_by[call.name]].reshape(shape)[:, None, :]
        return np.asarray(values.max(axis=1 if axis else 2).reshape(-1))

    for _ in range(ROUNDS):
        change = 0.0
        for group in groups:
            making = np.max([wide(call, 0) for call in made[group.name]], axis=0)
            reading = np.max([wide(graph[name], 1) for name in group.calls], axis=0)
            step = _alive(making, reading, np.sqrt(making), np.sqrt(reading))
            scales[group.name] = scales[group.name] * step
            change = max(change, float(np.abs(np.log(step)).max()))
        if change < CONVERGED:
            break
    return scales


def largest_activations(group: Group, stats: CalibrationStats) -> Vector:
    """Return the largest magnitude of each channel over all activations of a group, 0 where none was seen."""
    seen = [stats.tensors[name] for name in group.tensors if name in stats.tensors]
    found = [np.maximum(np.abs(s.channel_min), np.abs(s.channel_max)) for s in seen]
    largest = np.max(found, axis=0) if found else np.zeros(group.channels)
    return np.where(np.isfinite(largest), largest, 0).astype(np.float32)


def largest_weights(calls: Iterable[Call], weights: Mapping[str, Vector]) -> Vector:
    """Return the largest weight that reads each channel, over all calls of a group."""
    largest = [_magnitudes(call, weights).max(axis=1).reshape(-1) for call in calls]
    return np.asarray(np.max(largest, axis=0), np.float32)


def _magnitudes(call: Call, weights: Mapping[str, Vector]) -> Vector:
    """Return the largest magnitude over the kernel, (groups, outputs, inputs)."""
    weight = np.abs(weight_of(call, weights[str(call.weight)]))
    flat = weight.reshape(*weight.shape[:2], -1).max(axis=2)
    if call.op.is_transposed:
        return np.asarray(flat.reshape(call.groups, -1, flat.shape[1]).swapaxes(1, 2))
    return np.asarray(flat.reshape(call.groups, -1, flat.shape[1]))


def _alive(one: Vector, other: Vector, above: NDArray[np.float64], below: NDArray[np.float64]) -> Vector:
    """Return above / below, and 1 where a channel is dead on either side."""
    alive = (one > 0) & (other > 0) & np.isfinite(one) & np.isfinite(other)
    ratio = np.divide(above, below, out=np.ones_like(above), where=alive)
    return np.clip(ratio, 1 / WIDEST, WIDEST).astype(np.float32)
