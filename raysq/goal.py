"""What a search is for: the losses that a recipe may have, and what is made small among those that keep to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from raysq.errors import EvaluationError, OptionError, unknown

if TYPE_CHECKING:
    from raysq.result import TrialRecord

__all__ = ["SLACK", "Criterion", "Goal", "Objective"]

SLACK = 1e-9  # equality passes: float rounding must not turn a drop of exactly the tolerance into a failure


class Criterion(StrEnum):
    """How a loss of accuracy is counted."""

    RELATIVE = "relative"
    ABSOLUTE = "absolute"

    def shown(self, drop: float) -> str:
        """Return a loss as a phrase."""
        return f"{drop:+.2%} loss" if self is Criterion.RELATIVE else f"{drop:+.4g} loss"


class Objective(StrEnum):
    """What can be made small; all but accuracy as a ratio to the fastest fp32 form."""

    LATENCY = "latency"
    ACCURACY = "accuracy"
    SIZE = "size"
    MEMORY = "memory"

    def of(self, record: TrialRecord) -> float:
        """Return a trial's value, infinite where it is unknown.

        Latency is the upper end of its interval, so that luck in timing wins nothing; accuracy the primary metric's
        drop as its criterion counts it, negative where something was gained.
        """
        match self:
            case Objective.LATENCY:
                return record.latency_bound
            case Objective.ACCURACY:
                value = record.accuracy_drop
            case Objective.SIZE:
                value = record.size_ratio
            case Objective.MEMORY:
                value = record.memory_ratio
        return math.inf if value is None else value


FASTEST: Mapping[str, float] = MappingProxyType({Objective.LATENCY: 1.0})


@dataclass(frozen=True)
class Goal:
    """What a recipe must hold to be feasible, and what makes one feasible recipe better than another.

    With baseline b and score a, higher better: drop is `b - a` (absolute) or `(b - a) / |b|` (relative), negated
    where lower is better. Feasible: drop <= tolerance, equality included, for this metric and for all others.

    Attributes:
        tolerance: how much may be lost, >= 0; relative: a share of the baseline, below 1.
        criterion: "relative" or "absolute".
        higher_is_better: False for losses, perplexity and the like.
        metric: which of the scores counts where eval_fn returns several; None takes "accuracy" or the only one that
            is not among the others.
        others: further metrics of the dict that eval_fn returns, each with a goal of its own, of which tolerance,
            criterion and direction count: {"recall": Goal(0.02, "absolute")}.
        objectives: "latency", "accuracy", "size", "memory" with their weights, > 0: the feasible recipe with the
            smallest weighted sum wins. Latency, size and peak memory are ratios to the fastest fp32 form.
        confirm: evaluates as eval_fn does, on data that it doesn't see: the winner must hold there as well.

    Raises:
        OptionError: a value out of its range.

    Example:
        >>> goal = Goal(0.01, others={"recall": Goal(0.02, "absolute")}, objectives={"latency": 1, "size": 0.5})
    """

    tolerance: float = 0.01
    criterion: Criterion = Criterion.RELATIVE
    higher_is_better: bool = True
    metric: str | None = None
    others: Mapping[str, Goal] = field(default_factory=dict)
    objectives: Mapping[str, float] = field(default_factory=lambda: FASTEST)
    confirm: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "criterion", Criterion(self.criterion))
        except ValueError as exc:
            raise OptionError(unknown("criterion", self.criterion, [c.value for c in Criterion])) from exc
        if not isinstance(self.higher_is_better, bool):
            raise OptionError(f"`higher_is_better` must be True or False, got {self.higher_is_better!r}.")
        if isinstance(self.tolerance, bool) or not isinstance(self.tolerance, int | float):
            raise OptionError(f"`tolerance` must be a number, got {self.tolerance!r}.")
        top = 1.0 if self.criterion is Criterion.RELATIVE else math.inf
        if not 0 <= self.tolerance < top:
            hint = " A relative tolerance is a share: 1 % is 0.01." if self.criterion is Criterion.RELATIVE else ""
            raise OptionError(f"`tolerance` must lie in [0, {top:g}), got {self.tolerance}.{hint}")
        if self.confirm is not None and not callable(self.confirm):
            raise OptionError(f"`confirm` must be a function of one argument, the model; got {self.confirm!r}.")
        object.__setattr__(self, "others", MappingProxyType(_others(self.others, self.metric)))
        object.__setattr__(self, "objectives", MappingProxyType(_weights(self.objectives)))

    def __hash__(self) -> int:
        return hash(tuple(tuple(v.items()) if isinstance(v, Mapping) else v for v in self._values))

    def __reduce__(self) -> tuple[Any, ...]:
        values = (dict(v) if isinstance(v, Mapping) else v for v in self._values)
        return Goal, tuple(values)  # a mapping proxy can't be pickled

    @property
    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    def drop(self, accuracy: float, baseline: float) -> float:
        """Return how much was lost of this metric, negative if something was gained.

        Raises:
            EvaluationError: a relative loss against a baseline of 0.
        """
        lost = baseline - accuracy if self.higher_is_better else accuracy - baseline
        if self.criterion is Criterion.ABSOLUTE:
            return lost
        if baseline == 0:
            raise EvaluationError(
                f"the fp32 {self.metric or 'score'} is 0, so a relative loss is undefined. Use "
                '`criterion="absolute"` and a tolerance in its own unit.'
            )
        return lost / abs(baseline)

    def holds(self, drop: float) -> bool:
        """Whether a drop is within the tolerance; a NaN is not."""
        return drop <= self.tolerance + SLACK

    def allowed(self, baseline: float) -> float:
        """Return the most that may be lost, in the metric's own unit."""
        return (self.tolerance + SLACK) * (abs(baseline) if self.criterion is Criterion.RELATIVE else 1.0)

    def cost(self, record: TrialRecord) -> float:
        """Return what is made small: the weighted sum of the objectives, infinite where one of them is unknown."""
        return sum(weight * Objective(name).of(record) for name, weight in self.objectives.items())

    @property
    def front(self) -> tuple[Objective, ...]:
        """What a Pareto front is over: latency, accuracy, and the other objectives."""
        always = (Objective.LATENCY, Objective.ACCURACY)
        return tuple(o for o in Objective if o in always or o in self.objectives)

    @property
    def own(self) -> str:
        """What may be lost of this metric, as a phrase."""
        if self.criterion is Criterion.RELATIVE:
            return f"at most {self.tolerance:.3%} relative loss"
        return f"at most {self.tolerance:g} absolute loss"

    def __str__(self) -> str:
        return ", ".join([self.own, *(f"{goal.own} of {name}" for name, goal in self.others.items())])


def _others(given: object, primary: str | None) -> dict[str, Goal]:
    if not isinstance(given, Mapping) or not all(isinstance(goal, Goal) for goal in given.values()):
        raise OptionError(f'`others` must be a dict such as {{"recall": Goal(0.02, "absolute")}}, got {given!r}.')
    found = {}
    for name, goal in given.items():
        if name == primary:
            raise OptionError(f"{name!r} is the goal's own metric: leave it out of `others`.")
        if goal.others or goal.confirm or goal.objectives != FASTEST or goal.metric not in (None, name):
            raise OptionError(
                f"of the goal of {name!r} only tolerance, criterion and higher_is_better count: give `metric`, "
                "`others`, `objectives` and `confirm` to the outer goal."
            )
        found[str(name)] = replace(goal, metric=str(name))
    return found


def _weights(given: object) -> dict[str, float]:
    if not isinstance(given, Mapping) or not given:
        raise OptionError(
            f'`objectives` must be a dict of weights such as {{"latency": 1, "size": 0.5}}, got {given!r}.'
        )
    found: dict[str, float] = {}
    for name, weight in given.items():
        try:
            objective = Objective(name)
        except ValueError as exc:
            raise OptionError(unknown("objective", name, [o.value for o in Objective])) from exc
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise OptionError(f"the weight of objective {name!r} must be positive, got {weight!r}.")
        found[objective] = weight
    return found
