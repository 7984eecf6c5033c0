"""Ends trials that miss the accuracy goal before they are timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray.tune import Stopper

from raysq.errors import EvaluationError
from raysq.goal import Criterion, Goal

__all__ = ["AccuracyConstraintStopper", "StopAll"]


class AccuracyConstraintStopper(Stopper):
    """A `ray.tune.Stopper` for trials that report `accuracy` and `baseline_accuracy`.

    A trial whose loss exceeds the tolerance, or is NaN, ends at that report: it is not timed. What reports
    `feasible` as well must be feasible too. A trial once stopped stays stopped.

    Args:
        tolerance: how much accuracy may be lost, >= 0.
        criterion: "relative" (a share of the baseline) or "absolute".
        higher_is_better: False for losses.
        stop_at_first: end the whole run with the first trial that holds and is timed.

    Raises:
        OptionError: a value out of its range.

    Example:
        >>> stopper = AccuracyConstraintStopper(tolerance=0.01)
        >>> stopper("trial", {"accuracy": 0.90, "baseline_accuracy": 0.95})
        True
    """

    def __init__(
        self,
        tolerance: float = 0.01,
        criterion: str | Criterion = Criterion.RELATIVE,
        higher_is_better: bool = True,
        stop_at_first: bool = False,
    ) -> None:
        self.goal = Goal(tolerance, criterion, higher_is_better)  # type: ignore[arg-type]  # Goal parses it
        self.stop_at_first = stop_at_first
        self._stopped: set[str] = set()
        self._found = False

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Return whether this trial ends here; called by Ray Tune for every report.

        Raises:
            EvaluationError: the report lacks `accuracy` or `baseline_accuracy`.
        """
        if trial_id in self._stopped or result.get("status") == "failed":
            return True
        try:
            accuracy, baseline = result["accuracy"], result["baseline_accuracy"]
        except KeyError as exc:
            raise EvaluationError(
                f"AccuracyConstraintStopper needs `accuracy` and `baseline_accuracy` in every report, and {exc} is "
                f"missing; got {', '.join(sorted(result))}."
            ) from exc
        if not (self.goal.holds(self.goal.drop(accuracy, baseline)) and result.get("feasible", True)):
            self._stopped.add(trial_id)
            return True
        if self.stop_at_first and result.get("stage", "timed") == "timed":
            self._found = True
        return False

    def stop_all(self) -> bool:
        """Return whether the run ends: only with `stop_at_first`, after the first trial that holds and is timed."""
        return self._found


class StopAll(Stopper):
    """Ends the whole run when something has come about.

    Args:
        when: asked again and again; what was True once stays so.
    """

    def __init__(self, when: Callable[[], bool]) -> None:
        self._when = when

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Return False: no single trial ends here."""
        return False

    def stop_all(self) -> bool:
        """Return whether the run ends."""
        return self._when()
