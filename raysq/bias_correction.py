"""Bias correction: what int8 shifts each output channel by on average, to be given back through the bias.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
https://arxiv.org/abs/1906.04721, section 4.2: E[W x] - E[Ŵ x̂], here empirical, over the sampled rows.

rows x, x̂    (n, *row_shape)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysq.layer import fields, outputs

if TYPE_CHECKING:
    from raysq.graph import Call

__all__ = ["output_shift"]


def output_shift(call: Call, exact: Tensor, int8: Tensor, weight: Tensor, int8_weight: Tensor) -> NDArray[np.float32]:
    """Return what to add to the bias, so that the quantized call's output is right on average over the rows.

    Zeros without rows, or where they don't fit the weight. A transposed convolution adds each place of its kernel to
    as many output positions as it has input positions: the mean over outputs is the sum over places, times inputs
    per output. That is exact without padding; with it, what falls off the border is counted too.

    Args:
        call: a linear or a convolution.
        exact: rows that the float model reads.
        int8: the same rows as the quantized model reads them.
        weight: float32, as the call has it.
        int8_weight: the same, rounded to its grid.

    Returns:
        float32, (output channels,).
    """
    channels = weight.shape[1] * call.groups if call.op.is_transposed else len(weight)
    x, noisy = fields(call, exact, weight), fields(call, int8, weight)
    if x is None or noisy is None:
        return np.zeros(channels, np.float32)
    means = (rows.double().mean(0, keepdim=True) for rows in (x, noisy))  # W E[x] = E[W x]
    difference = [outputs(call, mean, w.double()) for mean, w in zip(means, (weight, int8_weight), strict=True)]
    per_place = (difference[0] - difference[1]).reshape(channels, -1)
    shift = per_place.sum(1) * _inputs_per_output(call, weight.dim() - 2) if call.op.is_transposed else per_place[:, 0]
    return shift.to(torch.float32).numpy()


def _inputs_per_output(call: Call, axes: int) -> float:
    """Return positions that a transposed convolution reads over those that it writes."""
    return math.prod(call.input_shapes[0][-axes:]) / math.prod(call.output_shape[-axes:])
