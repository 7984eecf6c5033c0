"""The range that keeps the most information: entropy calibration.

edges   (candidates, levels + 1) int     bin numbers where the levels of each candidate begin
mass    (candidates, levels) int64       values per level
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from raysq.arithmetic import qparams
from raysq.calibration.base import Calibrator
from raysq.calibration.clipping import best_clipping

if TYPE_CHECKING:
    from raysq.arithmetic import Grid, QParams
    from raysq.histogram import Histogram
    from raysq.stats import TensorStats

__all__ = ["KL"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class KL(Calibrator):
    """Least KL divergence between values and quantized values, as TensorRT's entropy calibration (Migacz 2017).

    For a candidate range, P is the histogram inside, with what is outside added to its first and last bin in use;
    Q gives each bin in use the mean count of its level, made from what is inside alone, so that clipping costs.
    As in TensorRT, the bin at zero counts no more than its neighbours: zero itself has no rounding error.
    No candidate has steps finer than a bin, where P and Q would be equal.
    """

    name: ClassVar[str] = "kl"

    def activation_range(self, stats: TensorStats, grid: Grid) -> tuple[float, float]:
        """Return the range of the least divergence."""
        curve = _Cumulative.of(stats.histogram)

        def cost(lo: Floats, hi: Floats) -> Floats:
            return curve.divergence(qparams(lo, hi, grid))

        return best_clipping(cost, stats.minimum, stats.maximum, grid.symmetric)


@dataclass(frozen=True)
class _Cumulative:
    """Sums over the bins below each edge, (bins + 1,): a level's sum is one subtraction."""

    width: float
    first: int
    counts: NDArray[np.int64]
    below: NDArray[np.int64]  # values
    used: NDArray[np.int64]  # bins that hold a value
    entropy: Floats  # sum of n log n

    @classmethod
    def of(cls, histogram: Histogram) -> _Cumulative:
        counts = _without_zero_spike(histogram)
        sums = [np.concatenate(([0], np.cumsum(terms))) for terms in (counts, counts > 0, _xlogx(counts))]
        return cls(histogram.width, histogram.first, counts, *sums)

    def divergence(self, p: QParams) -> Floats:
        """Return KL(P || Q) for each scale, inf where nothing is inside or a step is finer than a bin."""
        levels = np.arange(p.grid.qmin, p.grid.qmax + 2) - p.zero_point[:, None] - 0.5
        starts = np.ceil(levels * (p.scale[:, None] / self.width) - 0.5) - self.first
        edges = np.clip(starts, 0, len(self.counts)).astype(np.int64)  # a bin is in the level of its centre
        mass = np.diff(self.below[edges], axis=1)
        used = np.diff(self.used[edges], axis=1)
        inside, total = mass.sum(axis=1), self.below[-1]
        possible = (inside > 0) & (p.scale >= self.width)
        log_q = np.log(np.maximum(mass, 1) / np.maximum(used, 1))

        first_outside = self.below[edges[:, 0]]
        last_outside = total - self.below[edges[:, -1]]
        positions = np.flatnonzero(self.counts)
        in_use = np.minimum(self.used[edges[:, 0]], len(positions) - 1), np.maximum(self.used[edges[:, -1]] - 1, 0)
        first_count, last_count = self.counts[positions[in_use[0]]], self.counts[positions[in_use[1]]]
        same = in_use[0] == in_use[1]
        p_log_p = self.entropy[edges[:, -1]] - self.entropy[edges[:, 0]]
        p_log_p += _xlogx(first_count + first_outside) - _xlogx(first_count)
        last_count = last_count + np.where(same, first_outside, 0)
        p_log_p += _xlogx(last_count + last_outside) - _xlogx(last_count)

        row, width = np.arange(len(mass)), mass.shape[1]
        p_log_q = (mass * log_q).sum(axis=1)
        p_log_q += first_outside * log_q[row, (used > 0).argmax(axis=1)]
        p_log_q += last_outside * log_q[row, width - 1 - (used[:, ::-1] > 0).argmax(axis=1)]
        divergence = (p_log_p - p_log_q) / max(total, 1) + np.log(np.maximum(inside, 1) / max(total, 1))
        return np.where(possible, divergence, np.inf)


def _without_zero_spike(histogram: Histogram) -> NDArray[np.int64]:
    counts, zero = histogram.counts.copy(), -histogram.first
    if 0 <= zero < len(counts):
        neighbours = np.delete(counts[max(zero - 1, 0) : zero + 2], min(zero, 1))
        if neighbours.any():
            counts[zero] = min(counts[zero], neighbours.max())
    return counts


def _xlogx(n: NDArray[np.int64]) -> Floats:
    logs: Floats = np.log(np.maximum(n, 1))
    return n * logs
