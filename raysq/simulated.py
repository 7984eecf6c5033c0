"""Int8 simulated in float: the formulas of `raysq.arithmetic` as torch functions, and a model that computes by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raysq.arithmetic import Grid, QParams
from raysq.insertion import Insertion
from raysq.intercept import Interceptor
from raysq.layer import scale_and_zero

if TYPE_CHECKING:
    from raysq.plan import CallPlan
    from raysq.recipe import TensorConfig
    from raysq.source import Source

__all__ = ["Simulated", "simulating"]


def simulating(source: Source, plans: Mapping[str, CallPlan]) -> Interceptor:
    """Return a context in which a source's model computes its calls as planned, in simulated int8."""
    return Interceptor(source.model, Insertion(plans, Simulated()), out_of_place=source.graph.out_of_place)


class Simulated:
    """The `Numerics` of the simulation."""

    def activation(self, x: Tensor, params: QParams) -> Tensor:
        """Round an activation to the integers of `params`."""
        return _rounded(x, *scale_and_zero(params, x.dim()), params.grid)

    def dynamic(self, x: Tensor, config: TensorConfig) -> Tensor:
        """Round an activation to integers that cover the range of this very tensor."""
        grid = config.grid
        low, high = x.min().clamp(max=0.0), x.max().clamp(min=0.0)
        eps = torch.finfo(torch.float32).eps
        if grid.symmetric:
            scale = (torch.maximum(-low, high) / (grid.steps / 2)).clamp_min(eps)
            return _rounded(x, scale, torch.tensor(grid.middle), grid)
        scale = ((high - low) / grid.steps).clamp_min(eps)
        return _rounded(x, scale, (grid.qmin - torch.round(low / scale)).clamp(grid.qmin, grid.qmax), grid)

    def weight(self, w: Tensor, params: QParams) -> Tensor:
        """Round a weight."""
        return self.activation(w, params)


def _rounded(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    return ((torch.round(x / scale) + zero).clamp(grid.qmin, grid.qmax) - zero) * scale
