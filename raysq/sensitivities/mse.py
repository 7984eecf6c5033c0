"""The noise that int8 adds at each call's output, relative to its signal, from the statistics alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from numpy.typing import NDArray
from torch import Tensor

from raysq.arithmetic import QParams, qparams
from raysq.calibration.minmax import MinMax
from raysq.calibration.mse import expected_error
from raysq.graph import OpType
from raysq.layer import TINY, fields, noise_to_signal, outputs, rounded, tensor
from raysq.recipe import Approach
from raysq.weight import channel_axis, parameters_of, weight_of, weight_params

if TYPE_CHECKING:
    from raysq.graph import Call, ModelGraph
    from raysq.histogram import Histogram
    from raysq.recipe import OpConfig, Recipe
    from raysq.source import Source
    from raysq.stats import CalibrationStats, TensorStats

__all__ = ["MSE", "relative_errors"]

ROWS = 128  # used per call: the error is then known to about 10 %, and calls differ by orders of magnitude


@dataclass(frozen=True)
class MSE:
    """The squared error of each call's output over its squared signal, from sampled rows: no forward pass."""

    name: ClassVar[str] = "mse"
    one_pass: ClassVar[bool] = True

    def scores(
        self, source: Source, recipe: Recipe, calls: Sequence[str] | None = None, floats: Collection[str] = ()
    ) -> dict[str, float]:
        """Return the noise-to-signal ratio of each call; see `Sensitivity`."""
        scaled = source.under(recipe)
        assert scaled.stats is not None  # there is no sensitivity without calibration
        errors = relative_errors(scaled.graph, scaled.stats, parameters_of(scaled.model), recipe)
        return {name: error for name, error in errors.items() if calls is None or name in calls}


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
        if recipe.config(call.name).is_int8 and all(name in stats.tensors for name in call.tensors)
    }


def _relative_error(
    call: Call, inputs: list[TensorStats], weights: Mapping[str, NDArray[Any]], config: OpConfig
) -> float:
    params = [_input_params(stats, config) for stats in inputs]
    weight = _weight(call, weights)
    rows = [tensor(stats.rows[:ROWS]) for stats in inputs]
    if call.op is OpType.ADD and len(rows) == 2 and rows[0].shape == rows[1].shape and rows[0].numel():
        return noise_to_signal(rows[0] + rows[1], rounded(rows[0], params[0]) + rounded(rows[1], params[1]))
    operands = [_histogram_noise(s.histogram, p) for s, p in zip(inputs, params, strict=True) if config.reads_int8]
    if weight is None:
        return sum(operands)
    int8_weight = rounded(weight, weight_params(weight.numpy(), config.weight, channel_axis(call)))
    read = fields(call, rows[0], weight) if rows else None
    if read is None:
        return sum(operands) + noise_to_signal(weight, int8_weight)
    signal = outputs(call, read, weight)
    return noise_to_signal(signal, outputs(call, rounded(read, params[0]) if config.reads_int8 else read, int8_weight))


def _input_params(stats: TensorStats, config: OpConfig) -> QParams:
    grid = config.activation.grid
    algorithm = MinMax() if config.approach is Approach.DYNAMIC else config.activation.algorithm
    return qparams(*algorithm.activation_range(stats, grid), grid)


def _weight(call: Call, weights: Mapping[str, NDArray[Any]]) -> Tensor | None:
    if call.weight is None or call.weight not in weights:
        return None
    return tensor(weight_of(call, weights[call.weight]))


def _histogram_noise(histogram: Histogram, p: QParams) -> float:
    centres = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    signal = float(histogram.counts @ centres**2) / max(histogram.total, 1)
    return float(expected_error(histogram, p)[0]) / max(signal, TINY)
