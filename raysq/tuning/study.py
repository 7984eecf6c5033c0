"""The trials of a search as an Optuna study, for optuna-dashboard and Optuna's plots."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from raysq.errors import StorageError
from raysq.goal import Goal
from raysq.result import Status, TrialRecord
from raysq.space import SearchSpace
from raysq.strategies.optuna_searcher import CONSTRAINT, excess, unannounced
from raysq.tuning.domains import distributions
from raysq.tuning.guarded import Guarded

__all__ = ["OptunaStudy"]

KEY = "raysq"  # attribute of a trial: run and number


class OptunaStudy:
    """Adds each trial that ended to a study in an Optuna storage; goes among the `callbacks` of `raysq.tune`.

    It shows a search by any strategy, and none reads it: a killed run leaves no trial that runs for ever, and one that
    is resumed adds none twice. Its values are the goal's objectives, latency and accuracy loss at least; the accuracy
    constraint, the label and the measurements are attributes.

    Args:
        storage: URL of a database, or an Optuna storage.
        name: of the study; default the name of the run.

    Raises:
        StorageError: the storage can't be opened.

    Example:
        >>> raysq.tune(model, calib, eval_fn, callbacks=[raysq.OptunaStudy("sqlite:///study.db")])  # doctest: +SKIP
    """

    def __init__(self, storage: str | BaseStorage, name: str | None = None) -> None:
        self._name = name
        self._guarded = Guarded(type(self).__name__)
        try:
            self._storage = optuna.storages.get_storage(storage)
        except Exception as exc:  # databases raise errors of their own
            raise StorageError(
                f"can't open the Optuna storage {storage}: {exc}. Pass a URL such as 'sqlite:///study.db'."
            ) from exc

    def begin(self, run: str, space: SearchSpace, goal: Goal, earlier: Iterable[TrialRecord] = ()) -> None:
        """Open or make the study of a run, and add those of its trials that it lacks.

        Args:
            run: its name.
            space: what it searches.
            goal: whose objectives are the values.
            earlier: trials that ended before the run was resumed.
        """
        self._run, self._space, self._goal = run, space, goal
        self._distributions = distributions(space)
        self._guarded(self._open)
        for record in earlier:
            self.add(record)

    def add(self, record: TrialRecord) -> None:
        """Add a trial that ended, unless the study has it."""
        self._guarded(lambda: self._add(record))

    def _open(self) -> None:
        objectives = [objective.value for objective in self._goal.front]
        with unannounced():
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=self._name or self._run,
                directions=["minimize" for _ in objectives],
                load_if_exists=True,
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # it has been that since 3.2
            self._study.set_metric_names(objectives)
        self._known = {trial.user_attrs.get(KEY) for trial in self._study.get_trials(deepcopy=False)}

    def _add(self, record: TrialRecord) -> None:
        key = f"{self._run}/{record.trial}"
        if key not in self._known:
            self._study.add_trial(self._frozen(record, key))
            self._known.add(key)

    def _frozen(self, record: TrialRecord, key: str) -> FrozenTrial:
        params = {name: record.config[name] for name in self._distributions if name in record.config}
        values = [objective.of(record) for objective in self._goal.front]
        known = record.status is Status.FINISHED and all(map(math.isfinite, [*values, record.loss]))
        trial = create_trial(
            state=TrialState.COMPLETE if known else TrialState.FAIL,
            values=values if known else None,
            params=params,
            distributions={name: self._distributions[name] for name in params},
            user_attrs={KEY: key, **_attributes(record)},
            constraints={CONSTRAINT: excess(self._goal, record)} if known else None,
        )
        trial.datetime_complete = datetime.now()
        spent_s = record.build_s + record.eval_s + record.timing_s + record.waiting_s + record.overhead_s
        trial.datetime_start = trial.datetime_complete - timedelta(seconds=spent_s)
        return trial


def _attributes(record: TrialRecord) -> dict[str, Any]:
    """Return what is known of a trial besides its values."""
    known = {
        "label": record.label,
        "recipe": record.recipe.digest,
        "feasible": record.feasible,
        "stage": record.stage.value,
        "accuracy": record.accuracy,
        "latency_ms": record.latency_ms,
        "int8_calls": record.int8_calls,
        "node": record.node,
        "reason": record.reason,
    }
    return {name: value for name, value in known.items() if value not in (None, "")}
