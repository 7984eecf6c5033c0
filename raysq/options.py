"""Frozen option values: what is asked of the search, of a timing, of the workers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from raysq.errors import EvaluationError, OptionError, unknown

__all__ = ["Criterion", "Goal", "Latency", "Workers"]

SLACK = 1e-9  # equality passes: float rounding must not turn a drop of exactly the tolerance into a failure


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


class Criterion(StrEnum):
    """How a loss of accuracy is counted."""

    RELATIVE = "relative"
    ABSOLUTE = "absolute"


@dataclass(frozen=True)
class Goal:
    """What a recipe must hold to be feasible.

    With baseline b and score a, higher better: drop = b - a (absolute) or (b - a) / |b| (relative), negated
    where lower is better. Feasible: drop <= tolerance, equality included.

    Attributes:
        tolerance: how much may be lost, >= 0; relative: a share of the baseline, below 1.
        criterion: "relative" or "absolute".
        higher_is_better: False for losses, perplexity and the like.
        metric: which of the scores counts where eval_fn returns several; None takes "accuracy" or the only one.

    Raises:
        OptionError: a value out of its range.
    """

    tolerance: float = 0.01
    criterion: Criterion = Criterion.RELATIVE
    higher_is_better: bool = True
    metric: str | None = None

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

    def drop(self, accuracy: float, baseline: float) -> float:
        """Return how much was lost, negative if something was gained.

        Raises:
            EvaluationError: a relative loss against a baseline of 0.
        """
        lost = baseline - accuracy if self.higher_is_better else accuracy - baseline
        if self.criterion is Criterion.ABSOLUTE:
            return lost
        if baseline == 0:
            raise EvaluationError(
                'the fp32 score is 0, so a relative loss is undefined. Use `criterion="absolute"` and a tolerance '
                "in the score's own unit."
            )
        return lost / abs(baseline)

    def holds(self, drop: float) -> bool:
        """Whether a drop is within the tolerance; a NaN is not."""
        return drop <= self.tolerance + SLACK

    def __str__(self) -> str:
        if self.criterion is Criterion.RELATIVE:
            return f"at most {self.tolerance:.3%} relative loss"
        return f"at most {self.tolerance:g} absolute loss"


@dataclass(frozen=True)
class Latency:
    """How latency is measured: interleaved pairs of fp32 and int8 until the ratio is sharp or time is up.

    Attributes:
        budget_s: seconds a timing in a trial should take, > 0; up to four times as many where the ratio stays unclear.
        final_budget_s: seconds for the timing of the winner, > 0.
        ci_width: stop as soon as the 95 % interval of the ratio is narrower than this share of it, > 0.

    Raises:
        OptionError: a value that is not positive.
    """

    budget_s: float = 1.0
    final_budget_s: float = 3.0
    ci_width: float = 0.02

    def __post_init__(self) -> None:
        for name in ("budget_s", "final_budget_s", "ci_width"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"`Latency.{name}` must be positive, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Workers:
    """Where trials run.

    Attributes:
        cpus_per_trial: CPUs that Ray reserves for a trial, >= 1; None: as many as threads.
        max_failures: how often a trial whose worker was lost is tried again on a fresh one, >= 0.

    Raises:
        OptionError: a value out of its range.
    """

    cpus_per_trial: int | None = None
    max_failures: int = 1

    def __post_init__(self) -> None:
        if self.cpus_per_trial is not None and self.cpus_per_trial < 1:
            raise OptionError(f"`Workers.cpus_per_trial` must be at least 1, got {self.cpus_per_trial}.")
        if self.max_failures < 0:
            raise OptionError(f"`Workers.max_failures` must be at least 0, got {self.max_failures}.")
