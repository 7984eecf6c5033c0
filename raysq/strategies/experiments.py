"""The experiments of a search in a file that Optuna's tools read."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import optuna
from optuna.distributions import distribution_to_json
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from raysq.errors import StorageError
from raysq.goal import Goal
from raysq.result import Status, TrialRecord
from raysq.space import SearchSpace
from raysq.strategies.optuna_searcher import CONSTRAINT, excess, unannounced
from raysq.tuning.domains import distributions

__all__ = ["opened", "track"]

RECIPE = "recipe"  # attribute of a trial: the digest of what it ran, which a study holds once


def opened(path: Path, name: str, space: SearchSpace, goal: Goal) -> optuna.Study:
    """Return the study of a search, made if there is none.

    Raises:
        StorageError: the file can't be used, or its study of that name is of another space or goal.
    """
    described = json.dumps({key: distribution_to_json(value) for key, value in distributions(space).items()})
    search = {"space": hashlib.sha256(described.encode()).hexdigest()[:16], "goal": str(goal)}
    try:
        with unannounced():
            storage = JournalStorage(JournalFileBackend(str(path)))
            study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    except (OSError, ValueError) as exc:
        raise StorageError(f"{path} can't be used as an Optuna journal: {exc}. Pass another `storage`.") from exc
    if not study.user_attrs:
        for key, value in search.items():
            study.set_user_attr(key, value)
    differ = [key for key, value in search.items() if study.user_attrs.get(key) != value]
    if differ:
        raise StorageError(
            f"{path} has experiments named {name!r} of another {' and '.join(differ)}. Pass another `experiment_name`."
        )
    return study


def track(path: Path, name: str, space: SearchSpace, goal: Goal, record: TrialRecord) -> None:
    """Add a trial that ended; one of a recipe that the study has already is passed over.

    Raises:
        StorageError: as `opened` has it.
    """
    study = opened(path, name, space, goal)
    if any(trial.user_attrs[RECIPE] == record.recipe.digest for trial in study.get_trials(deepcopy=False)):
        return
    lost = record.status is Status.FAILED or not math.isfinite(goal.cost(record)) or not math.isfinite(record.loss)
    config, found = space.config(record.recipe), distributions(space)
    about = {"label": record.label, "accuracy": record.accuracy, "latency_ms": record.latency_ms, "why": record.reason}
    study.add_trial(
        create_trial(
            state=TrialState.FAIL if lost else TrialState.COMPLETE,
            value=None if lost else goal.cost(record),
            params={key: config[key] for key in found},
            distributions=found,
            constraints=None if lost else {CONSTRAINT: excess(goal, record)},
            user_attrs={RECIPE: record.recipe.digest, **about},
        )
    )
