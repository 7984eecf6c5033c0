"""Turns what Ray Tune reports into records: on disk first, then on the screen."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

from ray import tune
from ray.tune.experiment import Trial

from raysq.journal import Entry, Journal
from raysq.prepared import MACHINE
from raysq.result import TrialRecord
from raysq.space import SearchSpace
from raysq.tuning.live import Progress
from raysq.tuning.records import record

__all__ = ["Recorder"]

log = logging.getLogger("raysq")


class Recorder(tune.Callback):
    """A Ray Tune callback that keeps every trial that ended; a line is on disk before anyone sees it.

    Args:
        space: what is searched; gives the recipe of a trial that was lost without a report.
        journal: where the lines go, None for nowhere.
        progress: gets the records.
        show: called with each record afterwards.
    """

    def __init__(
        self, space: SearchSpace, journal: Journal | None, progress: Progress, show: Callable[[TrialRecord], None]
    ) -> None:
        self._space = space
        self._journal = journal
        self._progress = progress
        self._show = show
        self._first = len(progress.records)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray writes its callbacks to a snapshot that nobody reads; files and screens can't be pickled

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Count a trial as running."""
        self._progress.running.add(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Keep a trial that ended by itself or by a stopper."""
        self._keep(trials, trial, error=False)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Keep a trial whose worker was lost too often."""
        self._keep(trials, trial, error=True)

    def _keep(self, trials: list[Trial], trial: Trial, error: bool) -> None:
        self._progress.running.discard(trial.trial_id)
        config, result = dict(trial.config), dict(trial.last_result or {})
        number = config.pop("trial", None)
        seen = config.pop("seen", None)
        kept = record(
            self._first + trials.index(trial) if number is None else number,
            config,
            result,
            recipe=self._space.recipe(config),
            error=error,
        )
        if error and (cause := trial.get_pickled_error()) is not None:
            kept = replace(kept, reason=f"{kept.reason}: {_first_line(cause)}")
        entry = Entry(
            kept,
            seen=len(self._progress.records) if seen is None else seen,
            pairs=tuple((a, b) for a, b in json.loads(result.get("pairs", "[]"))),
            environment={key: result[key] for key in MACHINE if key in result},
            ended_s=self._progress.spent_s,
        )
        if self._journal is not None:
            self._journal.append(entry)
        self._progress.records.append(kept)
        log.debug("trial %d (%s): %s, %s %s", kept.trial, kept.label, kept.status, kept.stage, kept.reason)
        self._show(kept)


def _first_line(cause: Exception) -> str:
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"
