"""Which waiting trial Ray Tune gives a free worker to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController

__all__ = ["NewestFirst"]


class NewestFirst(FIFOScheduler):
    """Gives a free worker to the newest waiting trial, which has none.

    Ray's default gives it to the oldest and drops the worker that is being started for that. Where trials are shorter
    than a worker's start, which imports torch, workers on further nodes would never come up.
    """

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        """Return the newest of the trials that wait."""
        trials: list[Trial] = tune_controller.get_trials()  # type: ignore[no-untyped-call]
        return next((trial for trial in reversed(trials) if trial.status == Trial.PENDING), None)
