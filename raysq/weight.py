"""The weight of a call: in which of the model's parameters it lies, and its scale and zero point."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raysq.arithmetic import QParams, qparams
from raysq.recipe import Granularity, TensorConfig

if TYPE_CHECKING:
    from torch import nn

    from raysq.graph import Call

__all__ = ["channel_axis", "parameters_of", "weight_of", "weight_params"]


def parameters_of(model: nn.Module) -> dict[str, NDArray[np.float32]]:
    """Return every parameter by each of its names, on the same memory."""
    return {name: p.detach().numpy() for name, p in model.named_parameters(remove_duplicate=False)}


def weight_of(call: Call, parameter: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a call's weight from a parameter that holds it; those of an LSTM all have its first one's rows."""
    if call.weight_transposed:
        return parameter.T
    return parameter[call.weight_start : call.weight_start + call.weight_shape[0]]


def channel_axis(call: Call) -> int:
    """Return the axis of a weight that its output channels run along."""
    return int(call.op.is_transposed)


def weight_params(weight: NDArray[np.float32], config: TensorConfig, axis: int) -> QParams:
    """Return scale and zero point of a weight, one per channel of `axis` or one in all."""
    per_channel = config.granularity is Granularity.PER_CHANNEL
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1) if per_channel else weight.reshape(1, -1)
    low, high = config.algorithm.weight_range(rows, config.grid)
    if per_channel:
        return qparams(low, high, config.grid, axis)
    return qparams(low[0], high[0], config.grid)
