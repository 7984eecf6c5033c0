"""Uniform quantization: the formulas from a range to a scale and a zero point, and to integers and back.

    q = clamp(round(x * (1 / scale)) + zero_point, qmin, qmax)    round: half to even, as the CPU kernels do
    x̂ = (q - zero_point) * scale

    affine      lo, hi widened to include 0;  scale = (hi - lo) / (qmax - qmin)
                zero_point = clamp(qmin - round(lo / scale), qmin, qmax)
    symmetric   a = max(|lo|, |hi|);          scale = a / ((qmax - qmin) / 2)
                zero_point = 0 for s8, 128 for u8 (64 when the range is reduced)

    grid        s8 [-128, 127]   u8 [0, 255]   reduced (7 bits): s8 [-64, 63]   u8 [0, 127]

These are torch.ao.quantization's observers and quantize functions (2.8), which the tests compare bit for bit; they
multiply by the float32 reciprocal, which decides how the largest magnitude of a symmetric range, a tie, is rounded.
Torch has no symmetric u8 with a reduced range: its min-max observers refuse it, `HistogramObserver` leaves the zero
point at 128, outside of [0, 127].

INC's quantization guide prints other formulas, which err in these places. It multiplies by the scale instead of
dividing. It scales affine s8 by 127 where the type has 255 steps. It scales symmetric u8 by 255 where half of
that, 127.5, is on each side of its zero point 128. It doesn't widen the range to include zero, without which zero
padding and ReLU get a rounding error of their own. It neither rounds nor clamps the zero point, nor clamps q. And
what overflows on CPUs without VNNI isn't an fp16 intermediate but the int16 sum of two u8 x s8 products (2 * 255 *
128 > 32767), which VNNI adds up in int32.
A symmetric range is divided by (qmax - qmin) / 2 = 127.5 as torch does it (the guide's 127 for s8 is as sound), so
the largest magnitude may clamp by half a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["EPS", "Grid", "QParams", "dequantize", "qparams", "quantize"]

EPS = np.finfo(np.float32).eps  # smallest scale, torch's own: an all-zero tensor would give 0


@dataclass(frozen=True)
class Grid:
    """The integers that a quantized tensor may take.

    Attributes:
        qmin: smallest integer, -128, -64 or 0.
        qmax: largest integer, 127, 63, 255 or 127.
        symmetric: whether the zero point is fixed in the middle.
    """

    qmin: int
    qmax: int
    symmetric: bool

    @property
    def steps(self) -> int:
        """Number of steps between the smallest and the largest integer."""
        return self.qmax - self.qmin

    @property
    def middle(self) -> int:
        """The zero point of symmetric quantization."""
        return 0 if self.qmin < 0 else (self.qmax + 1) // 2


@dataclass(frozen=True)
class QParams:
    """Scale and zero point of one tensor.

    Attributes:
        scale: float32, (channels,) or () for a whole tensor; always positive.
        zero_point: int32, of the same shape; always within the grid.
        grid: the integers in use.
        axis: the axis that `channels` runs along, None for a whole tensor.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    grid: Grid
    axis: int | None = None


def qparams(lo: Any, hi: Any, grid: Grid, axis: int | None = None) -> QParams:
    """Return scale and zero point for values in [lo, hi].

    Args:
        lo: smallest value, a scalar or (channels,).
        hi: largest value, of the same shape, not below `lo`.
        grid: the integers to map to.
        axis: the axis that channels run along, None for one scale.

    Raises:
        ValueError: a bound that is not finite, or `hi` below `lo`.

    Example:
        >>> p = qparams(-1.0, 3.0, Grid(0, 255, symmetric=False))
        >>> float(p.scale), int(p.zero_point)
        (0.01568627543747425, 64)
    """
    low = np.minimum(np.asarray(lo, np.float32), np.float32(0))
    high = np.maximum(np.asarray(hi, np.float32), np.float32(0))
    if not (np.isfinite(low).all() and np.isfinite(high).all()) or np.any(np.asarray(hi) < np.asarray(lo)):
        raise ValueError(f"a range needs finite bounds in order, got [{lo}, {hi}].")
    if grid.symmetric:
        scale = np.maximum(np.maximum(-low, high) / np.float32(grid.steps / 2), EPS)
        zero = np.full(scale.shape, grid.middle, np.int32)
    else:
        scale = np.maximum((high - low) / np.float32(grid.steps), EPS)
        zero = np.clip(grid.qmin - np.round(low / scale), grid.qmin, grid.qmax).astype(np.int32)
    return QParams(np.asarray(scale, np.float32), np.asarray(zero, np.int32), grid, axis)


def quantize(x: NDArray[Any], p: QParams) -> NDArray[np.int32]:
    """Return the integers of `x`, of any shape; values out of range clamp, NaN becomes the zero point."""
    scale, zero = _along(p, x.ndim)
    q = np.round(np.nan_to_num(x * (1 / scale))) + zero
    return np.asarray(np.clip(q, p.grid.qmin, p.grid.qmax), np.int32)


def dequantize(q: NDArray[np.int32], p: QParams) -> NDArray[np.float32]:
    """Return the values that the integers stand for, float32."""
    scale, zero = _along(p, q.ndim)
    return ((q - zero) * scale).astype(np.float32)


def _along(p: QParams, ndim: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    if p.axis is None:
        return p.scale, p.zero_point
    shape = [1] * ndim
    shape[p.axis] = -1
    return p.scale.reshape(shape), p.zero_point.reshape(shape)
