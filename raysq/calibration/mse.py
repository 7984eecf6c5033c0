"""The range that loses least: rounding error inside against clipping error outside.

edges   (bins + 1,) float64        errors   (candidates,) float64
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from raysq.arithmetic import QParams, qparams
from raysq.calibration.base import Calibrator
from raysq.calibration.clipping import best_clipping

if TYPE_CHECKING:
    from raysq.arithmetic import Grid
    from raysq.histogram import Histogram
    from raysq.stats import TensorStats

__all__ = ["MSE", "expected_error"]

# a weight's range is cut by at most 70 %, in steps of 2 %; GPTQ stops at 80 %
SHRINKS = np.linspace(1.0, 0.3, 36, dtype=np.float32)
BLOCK = 1 << 16  # weights at once: 256 KiB stays in cache, 3 times as fast as a whole matrix


@dataclass(frozen=True)
class MSE(Calibrator):
    """Least expected squared error, as torch's `HistogramObserver`, but over both ends and with exact integrals.

    Weights: least squared error per channel over ranges that shrink from both ends alike, as GPTQ's grid search.
    """

    name: ClassVar[str] = "mse"

    def activation_range(self, stats: TensorStats, grid: Grid) -> tuple[float, float]:
        """Return the range of the least expected squared error."""

        def cost(lo: NDArray[np.float64], hi: NDArray[np.float64]) -> NDArray[np.float64]:
            return expected_error(stats.histogram, qparams(lo, hi, grid))

        return best_clipping(cost, stats.minimum, stats.maximum, grid.symmetric)

    def weight_range(self, weight: NDArray[Any], grid: Grid) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the range of the least squared error of each channel."""
        lo, hi = weight.min(axis=1).astype(np.float32), weight.max(axis=1).astype(np.float32)
        low, high = lo, hi
        if grid.symmetric:
            high = np.maximum(-low, high)
            low = -high
        errors = np.array([_squared_error(weight, qparams(low * s, high * s, grid)) for s in SHRINKS])
        shrink = SHRINKS[errors.argmin(axis=0)]
        return np.maximum(low * shrink, lo), np.minimum(high * shrink, hi)


def expected_error(
    histogram: Histogram,
    p: QParams,  # (candidates,) or ()
) -> NDArray[np.float64]:
    """Return the mean squared error of quantizing the counted values, for each scale; 0 where none was counted.

    Values are taken as evenly spread within their bin, and the error is integrated exactly over it, so a bin may
    be wider than a quantization step. With u = x / scale, rounded and clamped to k, the integral of (u - k)^2 up
    to u is (u - k)^3 / 3 + k / 12.
    """
    scale = np.atleast_1d(p.scale).astype(np.float64)[:, None]
    zero = np.atleast_1d(p.zero_point)[:, None]
    u = histogram.edges / scale
    k = np.rint(u)
    np.maximum(k, p.grid.qmin - zero, out=k)  # np.clip takes three times as long
    np.minimum(k, p.grid.qmax - zero, out=k)
    u -= k
    integral = u * u * u / 3 + k / 12
    errors: NDArray[np.float64] = np.diff(integral, axis=1) @ histogram.counts * scale[:, 0] ** 3
    return errors / (histogram.width * max(histogram.total, 1))


def _squared_error(weight: NDArray[Any], p: QParams) -> NDArray[np.float64]:
    """Return the sum of squared errors per channel, (channels,)."""
    errors = np.zeros(len(weight))
    scale, zero = p.scale[:, None], p.zero_point[:, None].astype(np.float32)
    rows = max(1, BLOCK // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        for x in np.array_split(weight[part], -(-weight[part].size // BLOCK), axis=1):
            error = x * (1 / scale[part])
            np.rint(error, out=error)
            np.clip(error, p.grid.qmin - zero[part], p.grid.qmax - zero[part], out=error)
            error *= scale[part]
            error -= x
            errors[part] += np.einsum("ij,ij->i", error, error)
    return errors
