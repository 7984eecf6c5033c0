"""Turns what Ray Tune reports into records: on disk first, then on the screen."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from raysq.errors import StorageError
from raysq.journal import Journal
from raysq.prepared import MACHINE
from raysq.result import TrialRecord
from raysq.run import Entry
from raysq.space import SearchSpace
from raysq.tuning.deadline import Hanging
from raysq.tuning.live import Progress
from raysq.tuning.records import record
from raysq.tuning.trial import GIVEN_UP
from raysq.tuning.unsaved import Unsaved

__all__ = ["Recorder"]

FAILURE = "Failure # "  # what stands before each failure that Ray writes down
HANGS = f"{Hanging.__name__}: "

log = logging.getLogger("raysq")


class Recorder(Unsaved, tune.Callback):
    """A Ray Tune callback that keeps every trial that ended; a line is on disk before anyone sees it.

    A trial that hung, or lost its worker too often, is given up: the worker that would try it once more only reports
    why. So searchers get a report of it too, and what the dead worker left on that node is read there.

    Args:
        space: what is searched; gives the recipe of a trial that was lost without a report.
        journal: where the lines go, None for nowhere.
        progress: gets the records.
        show: called with each record afterwards.
        max_failures: how often a trial whose worker was lost is tried again.
        before_s: seconds that the run took before it was resumed.
        tries_again: whether a trial that Ray gave up is suggested once more, by its number.
    """

    def __init__(
        self,
        space: SearchSpace,
        journal: Journal | None,
        progress: Progress,
        show: Callable[[TrialRecord], None],
        max_failures: int = 0,
        before_s: float = 0.0,
        tries_again: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self._space = space
        self._max_failures = max_failures
        self._before_s = before_s
        self._tries_again = tries_again
        self._journal = journal
        self._progress = progress
        self._show = show
        self._first = len(progress.records)
        self.broken: StorageError | None = None

    def is_broken(self) -> bool:
        """Whether the journal can't be written, so that the search must end: Ray Tune would try the trial again."""
        return self.broken is not None

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Count a trial as running."""
        self._progress.running.add(trial.trial_id)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Give a trial up that Ray would try again, if it hung or was tried often enough."""
        self._progress.running.discard(trial.trial_id)
        cause = _cause(trial)
        log.debug("a worker was lost: %s", cause)
        if cause.startswith(HANGS):
            trial.config[GIVEN_UP] = cause.removeprefix(HANGS)
        elif trial.num_failures > self._max_failures:
            times = f" {trial.num_failures} times" if trial.num_failures > 1 else ""
            trial.config[GIVEN_UP] = f"its worker was lost{times} ({cause})"

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Keep a trial that ended by itself or by a stopper."""
        self._keep(trials, trial, error=False)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Keep a trial whose worker was lost too often."""
        if self._tries_again(trial.config.get("trial", -1)):
            self._progress.running.discard(trial.trial_id)
            log.debug("trial %d was lost before it began: %s", trial.config["trial"], _cause(trial))
            return
        self._keep(trials, trial, error=True)

    def _keep(self, trials: list[Trial], trial: Trial, error: bool) -> None:
        self._progress.running.discard(trial.trial_id)
        config, result = dict(trial.config), dict(trial.last_result or {})
        config.pop(GIVEN_UP, None)
        number = config.pop("trial", None)
        seen = config.pop("seen", None)
        config.pop("avoid", None)
        kept = record(
            self._first + trials.index(trial) if number is None else number,
            config,
            result,
            recipe=self._space.recipe(config),
            error=error,
        )
        if error:
            kept = replace(kept, reason=f"{kept.reason}: {_cause(trial)}")
        entry = Entry(
            kept,
            seen=len(self._progress.records) if seen is None else seen,
            pairs=tuple((a, b) for a, b in json.loads(result.get("pairs", "[]"))),
            environment={key: result[key] for key in MACHINE if key in result},
            ended_s=self._before_s + self._progress.spent_s,
        )
        if self.broken is not None:
            return
        if self._journal is not None:
            try:
                self._journal.append(entry)
            except StorageError as exc:
                self.broken = exc
                return
        self._progress.records.append(kept)
        log.debug("trial %d (%s): %s, %s %s", kept.trial, kept.label, kept.status, kept.stage, kept.reason)
        self._show(kept)


def _cause(trial: Trial) -> str:
    """Return in one line why Ray says that a trial failed last: the whole of `Hanging`, the first line of what else.

    Ray keeps the failures of a trial in a file, one below the other, while the trial runs.
    """
    text = Path(trial.error_file).read_text() if trial.error_file else ""
    _, _, last = text.rpartition(FAILURE)
    lines = last.partition("\n")[2].strip().splitlines()
    if lines and HANGS in lines[-1]:
        return HANGS + lines[-1].partition(HANGS)[2]
    return lines[0] if lines else ""
