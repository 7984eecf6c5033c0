"""Ends an evaluation once it is clear whether the goal is held: against the fp32 model, item by item."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysq.betting import Bet, lower_bound
from raysq.errors import EvaluationError, OptionError
from raysq.goal import Goal, Objective
from raysq.scores import UNBOUNDED, Bounds, Floats, Part, Units, widened

__all__ = ["Early", "Rejection", "Watch"]

BOUNDS = "`bounds` must be a pair (low, high) that every item's score lies in, such as (0, 1) or (0, math.inf)"
OTHER_ITEMS = (
    "the evaluation must give batches of the same sizes for every model, and these are not those that it gave for the "
    "fp32 model."
)


@dataclass(frozen=True)
class Rejection:
    """When an evaluation may end before its last item.

    Attributes:
        bounds: what each item's score lies in, low < high, either may be infinite; None: [0, 1] if the fp32 model's
            are boolean, else nothing is known, and nothing ends early. That a recipe fails needs the bound on the good
            side (0 for a loss), that it passes the other one.
        error_rate: probability at most, in (0, 0.5), with which a recipe that holds the goal is rejected; for each
            recipe by itself, over the order of the items.
        shuffled: whether the items come in random order; else a recipe is rejected only when it would fail even if
            the rest were perfect.
        stop_passing: whether a recipe that passes is taken at that error rate too, without scoring the rest.

    Raises:
        OptionError: a value out of its range.
    """

    bounds: Bounds | None = None
    error_rate: float = 0.01
    shuffled: bool = True
    stop_passing: bool = False

    def __post_init__(self) -> None:
        if self.bounds is not None:
            object.__setattr__(self, "bounds", _pair(self.bounds))
        rate = self.error_rate
        if not isinstance(rate, int | float) or not 0 < rate < 0.5:
            raise OptionError(f"`error_rate` must lie in (0, 0.5), got {rate!r}. 1 % is 0.01.")
        for name in ("shuffled", "stop_passing"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")

    @property
    def stated(self) -> Bounds:
        """The bounds as they were stated; infinite where they weren't."""
        return self.bounds or UNBOUNDED


@dataclass(frozen=True)
class Early:
    """How an evaluation ended before its last item.

    Attributes:
        fails: whether it loses too much; else it passes.
        accuracy: the score that is to be expected: that of fp32 less what was lost so far.
        bound: what the drop is at least where it fails, at most where it passes, at the error rate.
        std: standard error of the drop.
        seen: items scored.
        items: of so many.
    """

    fails: bool
    accuracy: float
    bound: float
    std: float
    seen: int
    items: int


class Watch:
    """Follows one evaluation; it changes with every part that comes in.

    Args:
        rejection: when it may end.
        reference: the fp32 model's scores.
        goal: how much may be lost; it has no other metrics.
    """

    def __init__(self, rejection: Rejection, reference: Units, goal: Goal) -> None:
        self._rejection = rejection
        self._reference = reference
        self._goal = goal
        self._counts = reference.counts
        self._sign = 1.0 if goal.higher_is_better else -1.0
        units = len(reference.sums)
        self._lost = np.empty(units)  # in the order in which they came
        self._units, self._items = 0, 0  # so far
        self._per_unit = reference.items / units
        ends = np.array([self._sign * (reference.sums - self._counts * end) for end in widened(reference.bounds)])
        self._ends = ends.min(axis=0), ends.max(axis=0)  # what each unit may lose at least, at most
        self._sure = np.array([end.sum() for end in self._ends])  # what all will have lost at least, at most
        self._floor, self._ceiling = float(ends.min()), float(ends.max())
        self._allowed = goal.allowed(reference.mean) * self._per_unit
        self._against = Bet(self._allowed, self._floor, units)
        self._for = Bet(-self._allowed, -self._ceiling, units)

    @property
    def rejects(self) -> bool:
        """Whether the bounds allow that it ever ends with a recipe that fails."""
        return math.isfinite(self._floor)

    def saw(self, part: Part, metric: str) -> None:
        """Take in what a part of the evaluation gave.

        Raises:
            EvaluationError: it isn't of the same items as with the fp32 model.
        """
        here = slice(self._units, self._units + len(part.sizes))
        if not np.array_equal(self._counts[here], part.sizes):
            raise EvaluationError(OTHER_ITEMS)
        lost = self._sign * (self._reference.sums[here] - part.sums[metric])
        self._lost[here] = lost
        self._units += len(lost)
        self._items += int(part.sizes.sum())
        known = [float(end[here].sum()) for end in self._ends]
        self._sure += [float(lost.sum()) - end if math.isfinite(end) else 0.0 for end in known]
        self._against.add(lost)
        self._for.add(-lost)

    def ended(self) -> None:
        """Make sure that what came is all that came for the fp32 model.

        Raises:
            EvaluationError: it isn't.
        """
        if self._units < len(self._counts):
            raise EvaluationError(OTHER_ITEMS)

    @property
    def verdict(self) -> Early | None:
        """How it ends here; None: it goes on."""
        total = self._allowed * len(self._counts)
        fails = bool(self._sure[0] > total) or self._convinced(self._against)
        passes = self._rejection.stop_passing and self._may_pass
        passes = passes and (bool(self._sure[1] <= total) or self._convinced(self._for))
        if not (fails or passes) or not 0 < self._units < len(self._counts):
            return None
        lost = self._lost[: self._units]
        accuracy = self._reference.mean - self._sign * float(lost.mean()) / self._per_unit
        if self._goal.holds(self._goal.drop(accuracy, self._reference.mean)) is fails:
            return None  # what is told of a trial must not contradict its verdict
        return Early(
            fails=fails,
            accuracy=accuracy,
            bound=self._as_drop(self._bound(lost, fails)),
            std=abs(self._as_drop(_standard_error(lost, len(self._counts)))),
            seen=self._items,
            items=self._reference.items,
        )

    @property
    def _may_pass(self) -> bool:
        """Whether an estimate of a good recipe is enough: not where accuracy decides among the good ones."""
        return Objective.ACCURACY not in self._goal.objectives

    def _convinced(self, bet: Bet) -> bool:
        return self._rejection.shuffled and bet.convinces(self._rejection.error_rate)

    def _bound(self, lost: Floats, fails: bool) -> float:
        """Return what each unit loses at least where it fails, at most where it passes."""
        units, risk = len(self._counts), self._rejection.error_rate
        least, most = (float(sure) / units for sure in self._sure)
        if fails:
            return max(least, lower_bound(lost, self._floor, units, risk) if self._rejection.shuffled else least)
        return min(most, -lower_bound(-lost, -self._ceiling, units, risk) if self._rejection.shuffled else most)

    def _as_drop(self, lost: float) -> float:
        """Return what units lose on average as the goal counts it."""
        reference = self._reference.mean
        return self._goal.drop(reference - self._sign * lost / self._per_unit, reference)


def _standard_error(values: Floats, size: int) -> float:
    """Return that of the mean of values drawn without replacement; of a single one, that it may be all wrong."""
    if len(values) == 1:
        return abs(float(values[0]))
    left = 1 - len(values) / size
    return float(values.std(ddof=1)) * math.sqrt(left / len(values))


def _pair(bounds: Any) -> Bounds:
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError) as exc:
        raise OptionError(f"{BOUNDS}; got {bounds!r}.") from exc
    if not low < high:
        raise OptionError(f"{BOUNDS}; got {bounds!r}.")
    return low, high
