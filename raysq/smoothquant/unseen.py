"""What values that calibration didn't see are expected to lose by clipping, under scales that fit those that it saw.

Divided by scales, each channel may fill the whole range, so that whatever is larger than the few values seen is
clipped; undivided only the largest channel's is. A new value exceeds the largest of n with probability 1 / (n + 1),
and by a distance whose distribution is about exponential far out in a tail (Pickands, Annals of Statistics 3, 1975).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysq.arithmetic import QParams
from raysq.stats import TensorStats

__all__ = ["clipping_error"]

Vector = NDArray[np.float32]


def clipping_error(stats: TensorStats, params: QParams, vectors: Vector) -> NDArray[np.float64]:
    """Return the mean squared error by clipping values that are still to come, (candidates, channels).

    Args:
        stats: of the undivided activation.
        params: scale and zero point of it divided by each candidate, (candidates,).
        vectors: the candidates' scales, (candidates, channels).
    """
    seen = float(stats.histogram.counts.sum()) / vectors.shape[1]
    rows = stats.rows.reshape(*stats.rows.shape[:2], -1)
    total = np.zeros(vectors.shape)
    for sign, edge in ((1.0, params.grid.qmax), (-1.0, params.grid.qmin)):
        largest = (sign * (stats.channel_max if sign > 0 else stats.channel_min)).clip(0.0).astype(np.float64)
        bound = sign * (edge - params.zero_point) * params.scale
        room = (bound.reshape(-1, 1) * vectors - largest).clip(0.0)
        excess = largest * _relative_spacing((sign * rows).max(axis=2))
        likely = np.exp(-room / np.where(excess > 0, excess, 1.0)) / (seen + 1)
        total += 2 * excess**2 * likely  # the mean square of an exponential distance
    return total


def _relative_spacing(rows: Vector) -> float:
    """Return the mean distance of the two largest of each channel, (n, channels), as a share of the largest.

    The same row may have been sampled twice, so they are the largest two that differ.
    """
    first = rows.max(axis=0, initial=0.0)
    second = np.where(rows < first, rows, 0.0).max(axis=0, initial=0.0)
    varies = (first > 0) & (second > 0)
    return float((1 - second[varies] / first[varies]).mean()) if varies.any() else 0.0
