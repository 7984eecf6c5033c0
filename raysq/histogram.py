"""Histograms that grow without error: bins of a power-of-two width whose edges lie on its multiples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

__all__ = ["BINS", "LIMIT", "Histogram", "HistogramBuilder"]

BINS = 4096  # at most; after a merge at least half of them are in use, 8 bins for each of an int8 grid's steps
LIMIT = float(np.float32(1e30))  # attention masks of -3e38 are no data; as a float32, which compares equal to itself
CHUNK = 1 << 18  # values binned at once: 1 MiB stays in cache
INDEX_BITS = 24  # bin numbers stay below 2**24, the integers that float32 holds exactly
SMALLEST_EXPONENT = -100  # width of the bins of an all-zero tensor


@dataclass(frozen=True)
class Histogram:
    """Counts of values; bin i covers [(first + i) * width, (first + i + 1) * width).

    Attributes:
        width: of a bin, a power of two.
        first: number of the first bin.
        counts: values per bin, (bins,) int64, at most `BINS`; a single 0 where no value was seen.
    """

    width: float
    first: int
    counts: NDArray[np.int64]

    @property
    def edges(self) -> NDArray[np.float64]:
        """Bin edges, (bins + 1,)."""
        return np.arange(self.first, self.first + len(self.counts) + 1, dtype=np.float64) * self.width

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())


class HistogramBuilder:
    """Counts values batch by batch; when one falls outside, neighbouring bins merge until it fits.

    The result depends on the values alone, not on their order or on how they were split into batches: the width
    follows from the smallest and the largest of them, and merging pairs of bins loses nothing.

    Args:
        bins: at most this many.

    Example:
        >>> import torch
        >>> builder = HistogramBuilder()
        >>> builder.add(torch.tensor([0.0, 1.0, 4000.0, float("nan")]))
        >>> histogram = builder.build()
        >>> histogram.width, histogram.total
        (1.0, 3)
    """

    def __init__(self, bins: int = BINS) -> None:
        self._bins = bins
        self._lo = math.inf
        self._hi = -math.inf
        self._exponent = SMALLEST_EXPONENT
        self._first = 0
        self._counts = np.zeros(1, np.int64)

    def add(self, values: torch.Tensor) -> None:
        """Count values of any shape; those that are not finite or beyond `LIMIT` are left out."""
        flat = values.detach().reshape(-1).float()
        if not flat.numel():
            return
        lo, hi = (float(bound) for bound in flat.aminmax())
        if not (lo >= -LIMIT and hi <= LIMIT):  # so written, a NaN fails too
            return self.add(flat[flat.abs() <= LIMIT])
        self._grow(min(lo, self._lo), max(hi, self._hi))
        width = 2.0**self._exponent
        if width > 1:
            flat = flat.double()  # dividing a subnormal float32 could give -0.0, a bin too high
        for chunk in flat.chunk(-(-len(flat) // CHUNK)):
            bins = (chunk * (1 / width)).floor_().sub_(self._first)
            self._counts += bins.short().bincount(minlength=len(self._counts)).numpy()

    def build(self) -> Histogram:
        """Return what was counted so far."""
        return Histogram(2.0**self._exponent, self._first, self._counts.copy())

    def _grow(self, lo: float, hi: float) -> None:
        exponent = _exponent(lo, hi, self._bins)
        width = 2.0**exponent
        first, last = math.floor(lo / width), math.floor(hi / width)
        counts = np.zeros(last - first + 1, np.int64)
        if self._lo <= self._hi:
            shift = min(exponent - self._exponent, INDEX_BITS)  # bin numbers are shorter than that
            numbers = (self._first + np.arange(len(self._counts))) >> shift
            starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 1))
            counts[numbers[starts] - first] = np.add.reduceat(self._counts, starts)
        self._lo, self._hi, self._exponent, self._first, self._counts = lo, hi, exponent, first, counts


def _exponent(lo: float, hi: float, bins: int) -> int:
    """Return the exponent of the smallest width for which [lo, hi] fits, which never shrinks as the range grows."""
    top = max(-lo, hi)
    exponent = max(math.frexp(top)[1] - INDEX_BITS, SMALLEST_EXPONENT) if top else SMALLEST_EXPONENT
    while math.floor(hi / 2.0**exponent) - math.floor(lo / 2.0**exponent) >= bins:
        exponent += 1
    return exponent
