"""Ray Tune's Optuna searcher, told what Optuna 5 can use: the constraint, and which trials failed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import TrialState, create_trial
from ray import cloudpickle
from ray.tune.search.optuna import OptunaSearch

from raysq.options import SLACK, Goal
from raysq.result import TrialRecord
from raysq.space import SearchSpace
from raysq.strategies.base import METRIC
from raysq.tuning.domains import distributions
from raysq.tuning.records import to_result

__all__ = ["ConstrainedOptuna"]

CONSTRAINT = "accuracy"  # Optuna: at most 0 is feasible


class ConstrainedOptuna(OptunaSearch):
    """Lowest latency ratio under the accuracy constraint, by any Optuna sampler that knows constraints.

    Ray's own class never passes a constraint on, tells an infeasible trial as a good one if it was stopped early,
    and leaves a trial that gave NaN running for ever.

    Args:
        space: what is searched.
        goal: whose tolerance is the constraint.
        sampler: any of Optuna's; TPE, GP and NSGA-II heed constraints.
        points: flat configs to suggest first; what isn't a dimension in them is passed over.

    Example:
        >>> searcher = ConstrainedOptuna(space, Goal(0.01), optuna.samplers.TPESampler())  # doctest: +SKIP
    """

    def __init__(
        self, space: SearchSpace, goal: Goal, sampler: BaseSampler, points: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        self._goal = goal
        self._distributions = distributions(space)
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would announce the study
        try:
            super().__init__(
                space=self._distributions,
                metric=METRIC,
                mode="min",
                sampler=sampler,
                points_to_evaluate=[self._point(config) for config in points],
            )
        finally:
            optuna.logging.set_verbosity(level)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Take no notice: what counts is how a trial ends."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna the value and the constraint, or that the trial failed."""
        trial = self._ot_trials.get(trial_id)
        if trial is None or trial_id in self._completed_trials:
            return
        outcome = None if error else self._outcome(result or {})
        if outcome is None:
            self._study.tell(trial, state=TrialState.FAIL)
            self._completed_trials.add(trial_id)
            return
        trial.set_constraint(CONSTRAINT, outcome[1])
        super().on_trial_complete(trial_id, result)

    def learn(self, config: Mapping[str, Any], record: TrialRecord) -> None:
        """Add a trial that another searcher suggested."""
        outcome = self._outcome(to_result(record))
        if outcome is None:
            return
        value, constraint = outcome
        self._study.add_trial(
            create_trial(
                value=value,
                params=self._point(config),
                distributions=self._distributions,
                constraints={CONSTRAINT: constraint},
            )
        )

    def save(self, checkpoint_path: str) -> None:
        """Write the whole state; unlike Ray's, with spaces and samplers that only cloudpickle can write."""
        Path(checkpoint_path).write_bytes(cloudpickle.dumps(self.__dict__))  # type: ignore[no-untyped-call]

    @property
    def _study(self) -> optuna.Study:
        study: optuna.Study = self._ot_study  # type: ignore[assignment]  # Ray sets it up when there is a space
        return study

    def _point(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {name: config[name] for name in self._distributions}

    def _outcome(self, result: Mapping[str, Any]) -> tuple[float, float] | None:
        """Return (latency ratio, constraint); None for a failed trial."""
        value, drop = result.get(METRIC), result.get("accuracy_drop")
        if value is None or drop is None or not math.isfinite(value) or not math.isfinite(drop):
            return None
        if result.get("status") == "failed":
            return None
        excess = float(drop) - self._goal.tolerance - SLACK
        if excess <= 0 and not result.get("feasible", True):
            excess = 1.0  # within the tolerance, but nothing runs in int8
        return float(value), excess
