"""A weight as torch's quantized tensor, which every int8 kernel of torch and oneDNN Graph reads."""

from __future__ import annotations

import torch
from torch import Tensor

from raysq.arithmetic import QParams

__all__ = ["quantized_weight"]


def quantized_weight(w: Tensor, params: QParams) -> Tensor:
    """Return a weight as a quantized tensor."""
    grid = params.grid
    dtype = torch.qint8 if grid.qmin < 0 else torch.quint8
    scale = torch.from_numpy(params.scale).double()
    zero = torch.from_numpy(params.zero_point).long()
    if grid.steps < 255:
        shape = [-1 if d == params.axis else 1 for d in range(w.dim())] if params.axis is not None else []
        low, high = (grid.qmin - zero) * scale, (grid.qmax - zero) * scale
        w = torch.minimum(torch.maximum(w, low.float().reshape(shape)), high.float().reshape(shape))
    if params.axis is None:
        return torch.quantize_per_tensor(w, float(scale), int(zero), dtype)
    return torch.quantize_per_channel(w, scale, zero, params.axis, dtype)
