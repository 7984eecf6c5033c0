"""Scores by unit, as an evaluation gives them part by part: a unit is an item, or a batch that is known as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysq.errors import EvaluationError

__all__ = ["ACCURACY", "UNBOUNDED", "Bounds", "Part", "Units", "check_sum", "gathered", "per_item", "widened"]

Floats = NDArray[np.float64]
Bounds = tuple[float, float]

ACCURACY = "accuracy"  # the metric's name where an evaluation gives none
UNBOUNDED: Bounds = (-math.inf, math.inf)
ROUNDING = 1e-6  # a bounded score computed in float32 may pass its bound by this share of the larger bound


@dataclass(frozen=True, eq=False)
class Part:
    """What a piece of an evaluation gave: some units, which follow those of the piece before it.

    Attributes:
        sums: by metric, the sum of the scores in each unit, (k,).
        sizes: items in each unit, (k,), >= 1.
        boolean: the metrics whose scores were all True or False.
    """

    sums: Mapping[str, Floats]
    sizes: NDArray[np.int64]
    boolean: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Units:
    """All scores of one model and metric.

    Attributes:
        sums: of the scores in each unit, (units,).
        sizes: items in each unit, (units,); None: one.
        bounds: no item's score lies outside.
    """

    sums: Floats
    sizes: NDArray[np.int64] | None = None
    bounds: Bounds = UNBOUNDED

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many items each unit has."""
        return np.ones(len(self.sums), np.int64) if self.sizes is None else self.sizes

    @property
    def items(self) -> int:
        """How many items there are in all."""
        return len(self.sums) if self.sizes is None else int(self.sizes.sum())

    @property
    def mean(self) -> float:
        """The score: the mean over all items."""
        return float(self.sums.sum()) / self.items

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Units:
        """Return the units of plain data, as `journal_lines.to_dict` makes it.

        Raises:
            TypeError, ValueError, KeyError: malformed data.
        """
        low, high = map(float, data["bounds"])
        sizes = None if data["sizes"] is None else np.array(data["sizes"], np.int64)
        return cls(np.array(data["sums"], np.float64), sizes, (low, high))


def gathered(parts: Iterable[Part], stated: Bounds) -> dict[str, Units]:
    """Return the units of a whole evaluation by metric, in the order in which they came.

    Args:
        parts: all of them, at least one.
        stated: what each item's score lies in; where that isn't known, scores that were all boolean lie in [0, 1].
    """
    kept = list(parts)
    counts = np.concatenate([part.sizes for part in kept])
    sizes = counts if (counts > 1).any() else None
    boolean = frozenset.intersection(*(part.boolean for part in kept)) if stated == UNBOUNDED else frozenset()
    return {
        name: Units(
            np.concatenate([part.sums[name] for part in kept]), sizes, (0.0, 1.0) if name in boolean else stated
        )
        for name in kept[0].sums
    }


def per_item(scores: Any, came: str, bounds: Bounds, n: int | None = None) -> tuple[Floats, bool]:
    """Return scores as numbers, and whether they were boolean.

    Args:
        scores: a tensor, array or list.
        came: where they came from, for messages.
        bounds: no score lies outside.
        n: how many there must be.

    Raises:
        EvaluationError: another shape or type, a number that is not finite, or outside of the bounds.
    """
    try:
        if isinstance(scores, Tensor):
            boolean, values = scores.dtype is torch.bool, scores.detach().to("cpu", torch.float64).numpy()
        else:
            array = np.asarray(scores)
            boolean, values = array.dtype == np.bool_, array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as exc:
        raise EvaluationError(f"{came} must be numbers, one for each item; got {type(scores).__name__}: {exc}") from exc
    if values.ndim != 1 or (n is not None and len(values) != n):
        wanted = "(n,)" if n is None else f"({n},)"
        raise EvaluationError(
            f"{came} must be one score for each item of the batch, of shape {wanted}; got shape {values.shape}. Reduce "
            "an item's own scores to one number: `scores.mean(dim=1)`."
        )
    _check(values, came, bounds)
    return values, bool(boolean)


def check_sum(total: float, n: int, came: str, bounds: Bounds) -> None:
    """Make sure that the sum of n scores is finite, and allows each to lie within its bounds.

    Raises:
        EvaluationError: it isn't, or doesn't.
    """
    _check(np.array([total / n]), came, bounds)


def _check(values: Floats, came: str, bounds: Bounds) -> None:
    if not np.isfinite(values).all():
        raise EvaluationError(f"{came} must be finite; one of them is {values[~np.isfinite(values)][0]}.")
    low, high = widened(bounds)
    outside = (values < low) | (values > high)
    if outside.any():
        raise EvaluationError(
            f"{came} must lie in the bounds ({bounds[0]:g}, {bounds[1]:g}), and one of them is "
            f"{values[outside][0]:g}. State `bounds` that every score keeps to, or none."
        )


def widened(bounds: Bounds) -> Bounds:
    """Return bounds that scores keep to which were rounded to float32."""
    by = ROUNDING * max((abs(b) for b in bounds if math.isfinite(b)), default=0.0)
    return bounds[0] - by, bounds[1] + by
