"""Who follows a search beside the journal: Ray's loggers, Optuna studies, and callbacks of the user's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ray import tune
from ray.tune.logger import LoggerCallback

from raysq.goal import Goal
from raysq.result import TrialRecord
from raysq.space import SearchSpace
from raysq.tuning.loggers import Logged
from raysq.tuning.study import OptunaStudy

__all__ = ["Follower", "Followers"]

Follower = tune.Callback | OptunaStudy


class Followers:
    """What was passed as `callbacks`, each kind as it is told of trials.

    Args:
        given: the callbacks.
        directory: the run's.
        space: what is searched.
        goal: of the search.
        earlier: trials that ended before the run was resumed.

    Attributes:
        callbacks: those that Ray Tune calls.
    """

    def __init__(
        self, given: Sequence[Follower], directory: Path, space: SearchSpace, goal: Goal, earlier: Iterable[TrialRecord]
    ) -> None:
        self.callbacks: list[tune.Callback] = []
        self._studies: list[OptunaStudy] = []
        for follower in given:
            if isinstance(follower, OptunaStudy):
                follower.begin(directory.name, space, goal, earlier)
                self._studies.append(follower)
            elif isinstance(follower, LoggerCallback):
                self.callbacks.append(Logged(follower, directory, space))
            else:
                self.callbacks.append(follower)

    def tell(self, record: TrialRecord) -> None:
        """Tell the studies of a trial that ended."""
        for study in self._studies:
            study.add(record)
