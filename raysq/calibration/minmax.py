"""The whole observed range: nothing is clipped, outliers widen every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from raysq.calibration.base import Calibrator

if TYPE_CHECKING:
    from raysq.arithmetic import Grid
    from raysq.stats import TensorStats

__all__ = ["MinMax"]


@dataclass(frozen=True)
class MinMax(Calibrator):
    """Smallest and largest value, as torch's `MinMaxObserver` and `PerChannelMinMaxObserver`."""

    name: ClassVar[str] = "minmax"

    def activation_range(self, stats: TensorStats, grid: Grid) -> tuple[float, float]:
        """Return the smallest and the largest value seen."""
        return stats.minimum, stats.maximum

    def weight_range(self, weight: NDArray[Any], grid: Grid) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the smallest and the largest weight of each channel."""
        return weight.min(axis=1).astype(np.float32), weight.max(axis=1).astype(np.float32)
