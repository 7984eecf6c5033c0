"""The range without its rarest values, at both ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from raysq.calibration.base import Calibrator
from raysq.errors import RecipeError

if TYPE_CHECKING:
    from raysq.arithmetic import Grid
    from raysq.histogram import Histogram
    from raysq.stats import TensorStats

__all__ = ["Percentile"]


@dataclass(frozen=True)
class Percentile(Calibrator):
    """Percentiles of the histogram at both ends, as the percentile calibration of Wu et al. 2020 (arXiv:2004.09602).

    The two ends are cut by themselves: 0.01 % of the values lie above hi and 0.01 % below lo for 99.99. After a
    ReLU lo stays at 0, since more than that share of the values does.

    Attributes:
        percent: share of values below hi and above lo, in (50, 100]; 100 cuts nothing.

    Raises:
        RecipeError: `percent` out of its range.
    """

    name: ClassVar[str] = "percentile"

    percent: float = 99.99

    def __post_init__(self) -> None:
        if isinstance(self.percent, bool) or not isinstance(self.percent, int | float):
            raise RecipeError(f"`percentile` takes a number, got {self.percent!r}.")
        if not 50 < self.percent <= 100:
            meant = 100 * self.percent if 0.5 < self.percent < 1 else 100 - self.percent
            hint = f" Did you mean {meant:g}?" if 50 < meant < 100 else ""
            raise RecipeError(f"`percentile` takes a percentage in (50, 100], got {self.percent}.{hint}")
        object.__setattr__(self, "percent", float(self.percent))

    def activation_range(self, stats: TensorStats, grid: Grid) -> tuple[float, float]:
        """Return the two percentiles."""
        if not stats.histogram.total:
            return 0.0, 0.0
        lo = quantile(stats.histogram, 1 - self.percent / 100)
        hi = quantile(stats.histogram, self.percent / 100)
        lo, hi = np.clip([lo, hi], stats.minimum, stats.maximum)
        return float(lo), float(hi)

    def __str__(self) -> str:
        return f"{self.name}({self.percent!r})"


def quantile(histogram: Histogram, share: float) -> float:
    """Return the value below which this share of the counted ones lies, evenly spread within each bin."""
    upto = np.cumsum(histogram.counts)
    target = share * upto[-1]
    place = int(np.searchsorted(upto, target))
    into = 1 - (upto[place] - target) / max(histogram.counts[place], 1)
    return float((histogram.first + place + into) * histogram.width)
