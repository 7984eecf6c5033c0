"""One call with a weight, computed on the rows that calibration sampled of its input: what int8 does to its output.

rows     (n, *row_shape)              what the call reads at n sampled positions
matrix   (groups, inputs, outputs)    its weight, so that output = rows @ matrix
output   (groups, n, outputs)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysq.arithmetic import QParams

if TYPE_CHECKING:
    from raysq.graph import Call

__all__ = [
    "TINY",
    "fields",
    "grouped",
    "matrix",
    "noise_to_signal",
    "outputs",
    "rounded",
    "scale_and_zero",
    "tensor",
    "unmatrix",
]

TINY = float(np.finfo(np.float32).tiny)


def tensor(values: NDArray[Any]) -> Tensor:
    """Return a tensor on the same memory, or a copy where that is read-only, as in Ray's object store."""
    return torch.from_numpy(values if values.flags.writeable else values.copy()).float()


def fields(call: Call, rows: Tensor, weight: Tensor) -> Tensor | None:
    """Return the rows as this call reads them, None where they were sampled for another window or not at all."""
    if call.op.is_conv and not call.op.is_transposed and rows.shape[2:] != weight.shape[2:]:
        if any(size > 1 for size in weight.shape[2:]):
            return None
        for axis in range(2, rows.dim()):  # a 1x1 beside a 3x3 that reads the same tensor
            rows = rows.narrow(axis, rows.shape[axis] // 2, 1)
    read = len(weight) if call.op.is_transposed else weight[0].numel() * call.groups
    return rows if len(rows) and rows[0].numel() == read else None


def outputs(call: Call, rows: Tensor, weight: Tensor) -> Tensor:
    """Return what the call makes of its rows, without its bias; a transposed convolution has one per kernel place."""
    return grouped(call, rows) @ matrix(call, weight)


def grouped(call: Call, rows: Tensor) -> Tensor:
    """Return rows as (groups, n, inputs)."""
    return rows.reshape(len(rows), call.groups, -1).transpose(0, 1)


def matrix(call: Call, weight: Tensor) -> Tensor:
    """Return a weight as (groups, inputs, outputs); several stacked ones keep that axis in front."""
    stack = weight.shape[: weight.dim() - len(call.weight_shape)]
    values = weight.reshape(*stack, call.groups, call.weight_shape[0] // call.groups, -1)
    return values if call.op.is_transposed else values.mT


def unmatrix(call: Call, values: Tensor) -> Tensor:
    """Return (groups, inputs, outputs) in the weight's shape; several stacked ones keep that axis in front."""
    return (values if call.op.is_transposed else values.mT).reshape(*values.shape[:-3], *call.weight_shape)


def scale_and_zero(p: QParams, dims: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point in a shape that broadcasts against a tensor of `dims` axes."""
    shape = [-1 if axis == p.axis else 1 for axis in range(dims)]
    scale, zero = (torch.from_numpy(np.asarray(v)).reshape(shape) for v in (p.scale, p.zero_point))
    return scale, zero


def rounded(values: Tensor, p: QParams) -> Tensor:
    """Quantize and dequantize, as `raysq.arithmetic` to the bit; torch's fake-quantize takes 5 times as long."""
    scale, zero = scale_and_zero(p, values.dim())
    levels: Tensor = (values * (1 / scale)).round_().add_(zero).clamp_(p.grid.qmin, p.grid.qmax)
    return levels.sub_(zero).mul_(scale)


def noise_to_signal(exact: Tensor, noisy: Tensor) -> float:
    """Return the squared error relative to the squared signal."""
    return float((exact - noisy).square().sum()) / max(float(exact.square().sum()), TINY)
