"""Latency as the objective, accuracy as the constraint, each experiment tracked: what SigOpt's service offered."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from optuna.samplers import GPSampler

from raysq.errors import OptionError, StorageError
from raysq.result import TrialRecord
from raysq.strategies import experiments
from raysq.strategies.bayesian import gp_sampler
from raysq.strategies.sampled import STARTUP_TRIALS, Modelled

__all__ = ["Constrained"]

log = logging.getLogger("raysq")


class Constrained(Modelled):
    """Constrained expected improvement of Gaussian processes over the whole space, calls in float included.

    Gaussian processes, as `bayesian` has them, rather than TPE: they find more with few trials, and their kernel
    takes options without order as they are. Every experiment that ends is logged in a line, and added to `storage`,
    an Optuna journal: `optuna.load_study(study_name=experiment_name, storage=JournalStorage(JournalFileBackend(file)))`
    or optuna-dashboard show it while the search runs and afterwards. The file is written, never read for proposals; a
    recipe stands in it once, so that a search that is resumed, or repeated with another `name`, adds what is new.

    Unlike INC, whose `sigopt` needs an account of a service that has closed and hands the adaptor configs that it
    can't read, it runs here, by the budget of the search instead of 100 trials; "sigopt" is another name of it, which
    takes `sigopt_experiment_name`, and passes over `sigopt_api_token` and `sigopt_project_id` with a warning.

    Args:
        experiment_name: of the run and its directory, and of the study in `storage`; None: the time, and "raysq".
        storage: path of the journal, whose directory exists; None: none is written.
        startup_trials: random trials before it models anything, >= 1.

    Raises:
        OptionError: a value out of its range.
        StorageError: there is no such directory; later, a file that holds another search under that name.
    """

    name: ClassVar[str] = "constrained"

    def __init__(
        self,
        experiment_name: str | None = None,
        storage: str | Path | None = None,
        startup_trials: int = STARTUP_TRIALS,
    ) -> None:
        super().__init__(startup_trials, fallback=True)
        if experiment_name is not None and not (isinstance(experiment_name, str) and experiment_name):
            raise OptionError(f"`experiment_name` must be a name, got {experiment_name!r}.")
        self.experiment_name = experiment_name
        self.storage = None if storage is None else Path(storage)
        if self.storage is not None and not self.storage.absolute().parent.is_dir():
            raise StorageError(f"`storage` must lie in a directory that exists, got {self.storage}. Make it first.")

    def sampler(self) -> GPSampler:
        """Return Optuna's Gaussian processes."""
        return gp_sampler(self.seed, self.startup_trials)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Take a trial that ended into the history, the log and the file."""
        known = len(self.history)
        super().on_trial_complete(trial_id, result, error)
        for record in self.history[known:]:
            self._track(record)

    def learn(self, record: TrialRecord) -> None:
        """Take a trial that it didn't propose into the history, the log and the file."""
        super().learn(record)
        self._track(record)

    def _track(self, record: TrialRecord) -> None:
        name = self.experiment_name or "raysq"
        outcome = "failed: " + record.reason if record.reason else "passed" if record.feasible else "lost too much"
        ratio, accuracy = record.latency_ratio, record.accuracy
        log.info("%s %d: %s, accuracy %s, latency ratio %s", name, record.trial, outcome, accuracy, ratio)
        if self.storage is not None:
            experiments.track(self.storage, name, self.space, self.goal, record)
