"""The noise that int8 adds at each call's output, relative to its signal, from the statistics alone.

rows    (n, *row_shape)                 what the call reads at n sampled positions
matrix  (groups, inputs, outputs)       its weight, so that output = rows @ matrix
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysq.arithmetic import QParams, qparams
from raysq.calibration.minmax import MinMax
from raysq.calibration.mse import expected_error
from raysq.graph import OpType
from raysq.plan import channel_axis, weight_of, weight_params
from raysq.recipe import Approach

if TYPE_CHECKING:
    from raysq.graph import Call, ModelGraph
    from raysq.histogram import Histogram
    from raysq.recipe import OpConfig, Recipe
    from raysq.stats import CalibrationStats, TensorStats

__all__ = ["relative_errors"]

ROWS = 128  # used per call: the error is then known to about 10 %, and calls differ by orders of magnitude
TINY = float(np.finfo(np.float32).tiny)


def relative_errors(
    graph: ModelGraph, stats: CalibrationStats, weights: Mapping[str, NDArray[Any]], recipe: Recipe
) -> dict[str, float]:
    """Return the noise-to-signal ratio of the output of each call that the recipe runs in int8.

    Calls with a weight, and sums, are simulated on the sampled rows. Of the others (and where the rows don't fit the
    weight) the ratio is the sum of those of the operands, as if their errors were independent.

    Args:
        graph: the calls.
        stats: their activations.
        weights: arrays by their name in the state dict.
        recipe: how each call is quantized.
    """
    return {
        call.name: _relative_error(call, [stats.tensors[t] for t in call.tensors], weights, recipe.config(call.name))
        for call in graph.calls
        if recipe.config(call.name).is_int8 and all(tensor in stats.tensors for tensor in call.tensors)
    }


def _relative_error(
    call: Call, inputs: list[TensorStats], weights: Mapping[str, NDArray[Any]], config: OpConfig
) -> float:
    params = [_input_params(tensor, config) for tensor in inputs]
    weight = _weight(call, weights)
    rows = [_tensor(tensor.rows[:ROWS]) for tensor in inputs]
    if call.op is OpType.ADD and len(rows) == 2 and rows[0].shape == rows[1].shape and rows[0].numel():
        return _noise_to_signal(rows[0] + rows[1], _rounded(rows[0], params[0]) + _rounded(rows[1], params[1]))
    operands = [_histogram_noise(tensor.histogram, p) for tensor, p in zip(inputs, params, strict=True)]
    if weight is None:
        return sum(operands)
    rounded = _rounded(weight, weight_params(weight.numpy(), config.weight, channel_axis(call)))
    fields = _fields(call, rows[0], weight) if rows else None
    if fields is None:
        return sum(operands) + _noise_to_signal(weight, rounded)
    signal = _product(call, fields, weight)
    return _noise_to_signal(signal, _product(call, _rounded(fields, params[0]), rounded))


def _input_params(stats: TensorStats, config: OpConfig) -> QParams:
    grid = config.activation.grid
    algorithm = MinMax() if config.approach is Approach.DYNAMIC else config.activation.algorithm
    return qparams(*algorithm.activation_range(stats, grid), grid)


def _weight(call: Call, weights: Mapping[str, NDArray[Any]]) -> Tensor | None:
    if call.weight is None or call.weight not in weights:
        return None
    return _tensor(weight_of(call, weights[call.weight]))


def _tensor(values: NDArray[Any]) -> Tensor:
    """Return a tensor on the same memory, or a copy where that is read-only, as in Ray's object store."""
    return torch.from_numpy(values if values.flags.writeable else values.copy()).float()


def _fields(call: Call, rows: Tensor, weight: Tensor) -> Tensor | None:
    """Return the rows as this call reads them, None where they were sampled for another window or not at all."""
    if call.op.is_conv and not channel_axis(call) and rows.shape[2:] != weight.shape[2:]:
        if any(size > 1 for size in weight.shape[2:]):
            return None
        for axis in range(2, rows.dim()):  # a 1x1 beside a 3x3 that reads the same tensor
            rows = rows.narrow(axis, rows.shape[axis] // 2, 1)
    read = len(weight) if channel_axis(call) else weight[0].numel() * call.groups
    return rows if len(rows) and rows[0].numel() == read else None


def _product(call: Call, rows: Tensor, weight: Tensor) -> Tensor:
    """Return the outputs, (groups, n, outputs); of a transposed convolution each kernel place is an output."""
    groups, inputs = call.groups, rows[0].numel() // call.groups
    matrix = weight.reshape(groups, inputs, -1) if channel_axis(call) else weight.reshape(groups, -1, inputs).mT
    return rows.reshape(len(rows), groups, inputs).transpose(0, 1) @ matrix


def _rounded(values: Tensor, p: QParams) -> Tensor:
    """Quantize and dequantize, as `raysq.arithmetic` to the bit; torch's fake-quantize takes 5 times as long."""
    shape = [-1 if axis == p.axis else 1 for axis in range(values.dim())]
    scale, zero = (torch.from_numpy(np.asarray(v)).reshape(shape) for v in (p.scale, p.zero_point))
    levels: Tensor = (values * (1 / scale)).round_().add_(zero).clamp_(p.grid.qmin, p.grid.qmax)
    return levels.sub_(zero).mul_(scale)


def _noise_to_signal(exact: Tensor, noisy: Tensor) -> float:
    return float((exact - noisy).square().sum()) / max(float(exact.square().sum()), TINY)


def _histogram_noise(histogram: Histogram, p: QParams) -> float:
    centres = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    signal = float(histogram.counts @ centres**2) / max(histogram.total, 1)
    return float(expected_error(histogram, p)[0]) / max(signal, TINY)
