"""A range that follows the batches slowly: an outlier in one batch hardly moves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from raysq.calibration.base import Calibrator

if TYPE_CHECKING:
    from raysq.arithmetic import Grid
    from raysq.stats import TensorStats

__all__ = ["MovingAverage"]


@dataclass(frozen=True)
class MovingAverage(Calibrator):
    """Moving average over batches of minimum and maximum, as torch's `MovingAverageMinMaxObserver` (constant 0.01)."""

    name: ClassVar[str] = "moving_average"

    def activation_range(self, stats: TensorStats, grid: Grid) -> tuple[float, float]:
        """Return the moving averages of the smallest and the largest value."""
        moving = np.nan_to_num([stats.moving_min, stats.moving_max])  # not finite where no batch had a value
        lo, hi = np.clip(moving, stats.minimum, stats.maximum)
        return float(lo), float(hi)
