"""What one pass over the calibration data leaves behind: enough to quantize under any recipe without another.

channel_*   (channels,) float32      rows    (n, *row_shape) float32     counts  (bins,) int64
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysq.histogram import Histogram

__all__ = ["CalibrationStats", "Item", "TensorStats"]


@dataclass(frozen=True)
class TensorStats:
    """Statistics of one activation over all samples; values that are not finite or beyond 1e30 are left out.

    Attributes:
        channel_min: smallest value per channel (inf where none was seen).
        channel_max: largest value per channel (-inf where none was seen).
        channel_mean: mean per channel.
        moving_min: moving average over batches of the smallest value, constant 0.01 (torch's observer).
        moving_max: the same of the largest.
        histogram: all values.
        rows: sampled positions, aligned across the calls of a model: row i of every tensor belongs to the same
            sample and the same relative place in it. For a convolution a row is its receptive field (C, *kernel).
    """

    channel_min: NDArray[np.float32]
    channel_max: NDArray[np.float32]
    channel_mean: NDArray[np.float32]
    moving_min: float
    moving_max: float
    histogram: Histogram
    rows: NDArray[np.float32]

    @property
    def minimum(self) -> float:
        """Smallest value, 0 where none was seen."""
        low = float(self.channel_min.min())
        return low if np.isfinite(low) else 0.0

    @property
    def maximum(self) -> float:
        """Largest value, 0 where none was seen."""
        high = float(self.channel_max.max())
        return high if np.isfinite(high) else 0.0


@dataclass(frozen=True)
class Item:
    """One whole calibration sample, kept to replay the model or one of its blocks on it.

    Attributes:
        args: positional arguments of the model for this sample alone, tensors as numpy, batch axis 1.
        kwargs: keyword arguments likewise.
        blocks: path of a block to the (args, kwargs) that it got for this sample; kept for the first items only.
        target: its label, None where calibration has none.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    blocks: Mapping[str, tuple[tuple[Any, ...], Mapping[str, Any]]]
    target: Any = None


@dataclass(frozen=True)
class CalibrationStats:
    """All statistics of one pass, numpy throughout so that Ray shares them without a copy.

    Attributes:
        tensors: statistics of each activation, by the name that `Call.tensors` gives it.
        outputs: (min, max, mean) per channel of each call's output, by call name.
        items: a seeded uniform sample of whole calibration samples.
        samples: number of samples seen.
        batches: number of batches seen.
        fingerprint: digest of the data seen.
    """

    tensors: Mapping[str, TensorStats]
    outputs: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]]
    items: tuple[Item, ...]
    samples: int
    batches: int
    fingerprint: str
