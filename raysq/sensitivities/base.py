"""What a sensitivity is, and how calls are ranked by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

if TYPE_CHECKING:
    from raysq.graph import ModelGraph
    from raysq.recipe import Recipe
    from raysq.stats import CalibrationStats

__all__ = ["Sensitivity", "rank"]


class Sensitivity(Protocol):
    """A pure function from a recipe to what int8 costs each call; asked once per recipe before the search starts."""

    def __call__(
        self, graph: ModelGraph, stats: CalibrationStats, weights: Mapping[str, NDArray[Any]], recipe: Recipe
    ) -> dict[str, float]:
        """Return the cost by call name, in execution order, larger is worse, never NaN.

        Calls that the recipe leaves in float, and those that calibration never reached, are left out.
        """


def rank(errors: Mapping[str, float]) -> tuple[str, ...]:
    """Return the calls, the most sensitive first; where costs are equal, in the order given.

    Example:
        >>> rank({"a": 0.1, "b": 0.3, "c": 0.1})
        ('b', 'a', 'c')
    """
    return tuple(sorted(errors, key=lambda name: -errors[name]))
