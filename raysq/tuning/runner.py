"""Runs a search through Ray Tune, on this machine or on the cluster that it is launched on."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import ray
from ray import tune
from ray.tune.search import Searcher

from raysq.errors import OptionError
from raysq.job import Job
from raysq.journal import Entry, Journal, WarmStart
from raysq.options import Workers
from raysq.result import TrialRecord
from raysq.tuning.conductor import NOTHING, Conductor
from raysq.tuning.live import Progress, said, shown
from raysq.tuning.recorder import Recorder
from raysq.tuning.stopper import AccuracyConstraintStopper
from raysq.tuning.trial import bound, cpus_per_trial

__all__ = ["run", "session", "slots"]

SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # its table prints even when it is told to be silent
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # eval_fn may read files by relative paths
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # 20 ms a trial; the journal holds all they would write
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the journal is what a run resumes from
}
LOGGERS = ("ray", "ray.tune")

log = logging.getLogger("raysq")


def run(
    job: Job,
    *,
    workers: Workers,
    searcher: Searcher,
    max_trials: int,
    timeout_s: float | None = None,
    stop_at_first: bool = False,
    max_concurrent_trials: int | None = None,
    journal: Journal | None = None,
    earlier: Sequence[Entry] = (),
    warm_start: WarmStart = NOTHING,
    callbacks: Sequence[tune.Callback] = (),
    verbose: int = 1,
) -> list[TrialRecord]:
    """Search, and return all trials that ended, in that order: those of a warm start, of an earlier run, of this one.

    Ctrl-C ends the search and keeps what has ended. A trial whose worker was lost is tried again
    `workers.max_failures` times on a fresh one, then it is a failed record.

    Args:
        job: what all trials share.
        workers: what a trial reserves, and how often a lost one is tried again.
        searcher: a bound strategy, or any Ray Tune searcher; fresh, also where `earlier` is given.
        max_trials: how many trials there will be at most, those of the earlier run included, >= 1.
        timeout_s: seconds the search may take, > 0.
        stop_at_first: end with the first trial that meets the goal and is timed.
        max_concurrent_trials: at most this many at once, >= 1; default as many as there is room for.
        journal: gets a line for each trial that ended.
        earlier: the entries of the journal that is continued; they are replayed through the searcher.
        warm_start: what runs of before spare this one.
        callbacks: of Ray Tune, in addition.
        verbose: 0 silent, 1 progress, 2 what Ray logs too.

    Raises:
        OptionError: no node has room for a trial.
        EvaluationError, ModelError: what workers need can't be pickled.
        StorageError: the journal can't be written.
    """
    prepared, baseline, goal = job.prepared, job.baseline, job.goal
    conductor = Conductor(
        searcher, prepared.space, goal, max_trials, stop_at_first=stop_at_first, warm_start=warm_start
    )
    conductor.replay(earlier)
    with session(verbose), tempfile.TemporaryDirectory(prefix="raysq-") as scratch:
        room = slots(cpus_per_trial(prepared, workers))
        concurrent = min(room, max_concurrent_trials or room)
        trial_s = (prepared.build_s + baseline.eval_s) / concurrent + job.latency.budget_s  # timings run one by one
        known = [entry.record for entry in warm_start.entries]
        records = [entry.record for entry in earlier]
        progress = Progress(baseline, goal, max_trials, timeout_s, trial_s, records, known)
        with shown(progress, verbose) as show:
            recorder = Recorder(prepared.space, journal, progress, show)
            tuner = tune.Tuner(
                bound(job, workers),
                tune_config=tune.TuneConfig(
                    metric="latency_ratio",
                    mode="min",
                    search_alg=conductor,
                    num_samples=max_trials + 1,  # the conductor ends first, and says why
                    max_concurrent_trials=concurrent,
                    reuse_actors=True,
                    time_budget_s=timeout_s,
                ),
                run_config=tune.RunConfig(
                    name="run",
                    storage_path=scratch,  # Ray's own snapshot: nothing in it that the journal hasn't
                    stop=AccuracyConstraintStopper(
                        goal.tolerance, goal.criterion, goal.higher_is_better, stop_at_first
                    ),
                    callbacks=[recorder, *callbacks],
                    failure_config=tune.FailureConfig(max_failures=workers.max_failures),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    verbose=0,
                ),
            )
            with suppress(KeyboardInterrupt):
                tuner.fit()
    said(verbose)(f"the search ended: {conductor.ended or 'interrupted, or out of time'}")
    return [*known, *progress.records]


def slots(cpus: int) -> int:
    """Return how many trials of `cpus` CPUs fit on the nodes of the running cluster.

    Raises:
        OptionError: not a single one.
    """
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    sizes = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    room = sum(size // cpus for size in sizes)
    if not room:
        raise OptionError(
            f"a trial reserves {cpus} CPUs and the largest Ray node offers {max(sizes, default=0)}. Lower "
            "`num_threads` or `Workers.cpus_per_trial`."
        )
    return room


@contextmanager
def session(verbose: int) -> Iterator[None]:
    """Be connected to Ray inside the block; what was started for it, and only that, ends with it.

    It joins what is running already: in this process, at RAY_ADDRESS, or started by `ray start` on this machine.
    """
    level = logging.INFO if verbose > 1 else logging.CRITICAL  # the records say why a trial failed
    with _environment(SETTINGS), _log_level(level):
        started = not ray.is_initialized()
        try:
            if started:
                ray.init(log_to_driver=verbose > 1, logging_level=level)
            yield
        finally:
            if started:
                ray.shutdown()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if before[name] is None})  # the user's own wins
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@contextmanager
def _log_level(level: int) -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, value in before.items():
            logging.getLogger(name).setLevel(value)
