"""Ray Tune's Optuna searcher, told what Optuna 5 can use: the constraint, and which trials failed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import TrialState, create_trial
from ray import cloudpickle
from ray.tune.search.optuna import OptunaSearch

from raysq.goal import SLACK, Goal
from raysq.recipe import Recipe
from raysq.result import Status, TrialRecord
from raysq.space import SearchSpace
from raysq.strategies.base import METRIC
from raysq.tuning.domains import distributions
from raysq.tuning.records import record

__all__ = ["CONSTRAINT", "ConstrainedOptuna", "excess", "unannounced"]

CONSTRAINT = "accuracy"  # Optuna: at most 0 is feasible


@contextmanager
def unannounced() -> Iterator[None]:
    """Keep Optuna from announcing each study that is made inside the block."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


class ConstrainedOptuna(OptunaSearch):
    """Lowest cost, or the front of all objectives, under the accuracy constraint, by any of Optuna's samplers.

    Ray's own class never passes a constraint on, tells an infeasible trial as a good one if it was stopped early,
    and leaves a trial that gave NaN running for ever.

    Args:
        space: what is searched.
        goal: whose tolerances are the constraint, and whose objectives are made small.
        sampler: any of Optuna's; TPE, GP and NSGA-II heed constraints.
        points: flat configs to suggest first; what isn't a dimension in them is passed over.
        front: whether each of `goal.front` is a value of its own, for samplers that know several, instead of
            their weighted sum.

    Example:
        >>> searcher = ConstrainedOptuna(space, Goal(0.01), optuna.samplers.TPESampler())  # doctest: +SKIP
    """

    def __init__(
        self,
        space: SearchSpace,
        goal: Goal,
        sampler: BaseSampler,
        points: Iterable[Mapping[str, Any]] = (),
        front: bool = False,
    ) -> None:
        self._goal = goal
        self._front = goal.front if front else ()
        self._distributions = distributions(space)
        with unannounced():
            super().__init__(
                space=self._distributions,
                metric=list(self._front) or METRIC,
                mode=["min" for _ in self._front] or "min",
                sampler=sampler,
                points_to_evaluate=[self._point(config) for config in points],
            )

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Take no notice: what counts is how a trial ends."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna the values and the constraint, or that the trial failed."""
        trial = self._ot_trials.get(trial_id)
        if trial is None or trial_id in self._completed_trials:
            return
        lost = error or not result or result.get("status") == Status.FAILED
        outcome = None if lost else self._outcome(record(trial.number, {}, result, recipe=Recipe({})))
        if outcome is None:
            self._study.tell(trial, state=TrialState.FAIL)
            self._completed_trials.add(trial_id)
            return
        values, constraint = outcome
        trial.set_constraint(CONSTRAINT, constraint)
        self._study.tell(trial, values)
        self._completed_trials.add(trial_id)

    def learn(self, config: Mapping[str, Any], record: TrialRecord) -> None:
        """Add a trial that another searcher suggested."""
        outcome = self._outcome(record)
        if outcome is None or record.status is Status.FAILED:
            return
        values, constraint = outcome
        self._study.add_trial(
            create_trial(
                values=values,
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

    def _outcome(self, ended: TrialRecord) -> tuple[list[float], float] | None:
        """Return (values, constraint); None where one of them is unknown."""
        values = [objective.of(ended) for objective in self._front] or [self._goal.cost(ended)]
        if not all(map(math.isfinite, [*values, ended.loss])):
            return None
        return values, excess(self._goal, ended)


def excess(goal: Goal, ended: TrialRecord) -> float:
    """Return by how much a trial fails the goal: at most 0 where it is feasible."""
    lost = ended.loss - goal.tolerance - SLACK
    return 1.0 if lost <= 0 and not ended.feasible else lost  # within the tolerances, but nothing runs in int8
