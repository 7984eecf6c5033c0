"""A calibrator picks the range of values that a quantized tensor covers, from statistics alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from raysq.errors import RecipeError

if TYPE_CHECKING:
    from raysq.arithmetic import Grid
    from raysq.stats import TensorStats

__all__ = ["Calibrator"]


class Calibrator(ABC):
    """A pure function from statistics to a range; each is a frozen dataclass in a file of its own.

    `activation_range` is called once per tensor and recipe, in a trial: it must cost milliseconds.
    """

    name: ClassVar[str]

    @abstractmethod
    def activation_range(self, stats: TensorStats, grid: Grid) -> tuple[float, float]:
        """Return (lo, hi) of a whole tensor, finite, lo <= hi, within the observed range.

        An empty tensor (no finite value was seen) gives (0, 0).
        """

    def weight_range(
        self,
        weight: NDArray[Any],  # (channels, values), one row per scale
        grid: Grid,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return (lo, hi), each (channels,).

        Raises:
            RecipeError: this algorithm is for activations only.
        """
        raise RecipeError(f"algorithm {self} picks ranges of activations; weights take 'minmax' or 'mse'.")

    def __str__(self) -> str:
        return self.name
