"""Runs a search through Ray Tune, on this machine or on the cluster that it is launched on."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.job_config import JobConfig
from ray.tune.search import Searcher
from ray.tune.stopper import CombinedStopper

from raysq import memory
from raysq.job import Job
from raysq.journal import Journal
from raysq.result import TrialRecord
from raysq.run import Entry, WarmStart
from raysq.tuning.board import opened
from raysq.tuning.capacity import Capacity
from raysq.tuning.conductor import NOTHING, Conductor
from raysq.tuning.followers import Follower, Followers
from raysq.tuning.live import Progress, said, shown
from raysq.tuning.metrics import Metrics
from raysq.tuning.need import needed
from raysq.tuning.newest_first import NewestFirst
from raysq.tuning.recorder import Recorder
from raysq.tuning.stopper import AccuracyConstraintStopper, StopAll
from raysq.tuning.trial import bound, cpus_per_trial, sent
from raysq.workers import Workers

__all__ = ["run", "session"]

SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # its table prints even when it is told to be silent
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # eval_fn may read files by relative paths
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # 20 ms a trial; the journal holds all they would write
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the journal is what a run resumes from
}
LOGGERS = ("ray", "ray.tune")
READS_FILES = "ray.tune.analysis"  # warns of each trial that no logger of Ray's wrote files of it: none does
ANSWERS_S = 5.0  # a Ray on this machine takes the connection, however busy it is


def run(
    job: Job,
    *,
    workers: Workers,
    searcher: Searcher,
    max_trials: int,
    timeout_s: float | None = None,
    stop_at_first: bool = False,
    journal: Journal | None = None,
    earlier: Sequence[Entry] = (),
    warm_start: WarmStart = NOTHING,
    callbacks: Sequence[Follower] = (),
    verbose: int = 1,
) -> list[TrialRecord]:
    """Search, and return all trials that ended, in that order: those of a warm start, of an earlier run, of this one.

    Ctrl-C ends the search and keeps what has ended. A trial whose worker was lost is tried again
    `workers.max_failures` times on a fresh one, then it is a failed record; so is at once one that hangs.

    Args:
        job: what all trials share.
        workers: what a trial reserves, how many run at once, and how often a lost one is tried again.
        searcher: a bound strategy, or any Ray Tune searcher; fresh, also where `earlier` is given.
        max_trials: how many trials there will be at most, those of the earlier run included, >= 1.
        timeout_s: seconds the search may take, > 0.
        stop_at_first: end with the first trial that meets the goal and is timed.
        journal: gets a line for each trial that ended.
        earlier: the entries of the journal that is continued; they are replayed through the searcher.
        warm_start: what runs of before spare this one.
        callbacks: of Ray Tune, in addition, and studies that get the trials; loggers write beside the journal.
        verbose: 0 silent, 1 progress, 2 what Ray logs too.

    Raises:
        OptionError: no node has room for a trial, and none came in time.
        EvaluationError, ModelError: what workers need can't be pickled.
        StorageError: the journal can't be written.
    """
    prepared, baseline, goal = job.prepared, job.baseline, job.goal
    say = said(verbose)
    capacity = Capacity(cpus_per_trial(prepared, workers), workers, prepared.capabilities.isa, say)
    conductor = Conductor(
        searcher,
        prepared.space,
        goal,
        max_trials,
        stop_at_first=stop_at_first,
        warm_start=warm_start,
        room=capacity.room,
        max_failures=workers.max_failures,
    )
    conductor.replay(earlier)
    packed = sent(job)
    need = needed(job, packed)
    about = {
        "run": journal.path.parent.name if journal else "",
        "model": prepared.name,
        "goal": str(goal),
        "strategy": str(getattr(searcher, "name", type(searcher).__name__)),
        "backend": prepared.engine,
    }
    title = f"raysq {about['run']}: {prepared.name}"
    with (
        session(verbose, about),
        tempfile.TemporaryDirectory(prefix="raysq-") as scratch,
        opened(title) as board,
        closing(capacity),
    ):
        board.note(", ".join(f"{key} {value}" for key, value in about.items()))
        board.note(f"calibrate {prepared.calibration_s:.1f} s")
        capacity.reserve(need.worker)
        concurrent = capacity.wait()
        say(need.line(concurrent))
        need.warn(concurrent, capacity.memory_offered())
        memory.trim()
        trial_s = (prepared.build_s + baseline.eval_s) / concurrent + job.latency.budget_s  # timings run one by one
        known = [entry.record for entry in warm_start.entries]
        records = [entry.record for entry in earlier]
        progress = Progress(baseline, goal, max_trials, timeout_s, trial_s, records, known)
        with shown(progress, verbose) as show:
            metrics = Metrics(about["run"], progress, prepared.calibration_s)
            directory = Path(scratch) if journal is None else journal.path.parent
            followers = Followers(callbacks, directory, prepared.space, goal, records)

            def tell(record: TrialRecord) -> None:
                board.end(record, len(prepared.source.graph.calls))
                metrics.update()
                show(record)
                followers.tell(record)

            recorder = Recorder(
                prepared.space,
                journal,
                progress,
                tell,
                max_failures=workers.max_failures,
                before_s=max((entry.ended_s or 0.0 for entry in earlier), default=0.0),
                tries_again=conductor.tries_again,
            )
            tuner = tune.Tuner(
                bound(job, packed, workers, capacity.memory, board),
                tune_config=tune.TuneConfig(
                    metric="latency_ratio",
                    mode="min",
                    search_alg=conductor,
                    num_samples=max_trials * (workers.max_failures + 1) + 1,  # the conductor ends first, and says why
                    max_concurrent_trials=max_trials,  # the conductor's slots are fewer, and change
                    scheduler=NewestFirst(),  # type: ignore[no-untyped-call]
                    reuse_actors=True,
                    time_budget_s=timeout_s,
                ),
                run_config=tune.RunConfig(
                    name="run",
                    storage_path=scratch,  # Ray's own snapshot: nothing in it that the journal hasn't
                    stop=CombinedStopper(
                        AccuracyConstraintStopper(goal.tolerance, goal.criterion, goal.higher_is_better, stop_at_first),
                        StopAll(recorder.is_broken),
                    ),
                    callbacks=[recorder, *followers.callbacks],
                    failure_config=tune.FailureConfig(workers.max_failures + 1),  # the last is the recorder's
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    verbose=0,
                ),
            )
            with suppress(KeyboardInterrupt), _uncounted():
                tuner.fit()
            if recorder.broken is not None:
                raise recorder.broken
    say(f"the search ended: {conductor.why_over() or 'interrupted, or out of time'}")
    return [*known, *progress.records]


@contextmanager
def session(verbose: int, metadata: Mapping[str, str] | None = None) -> Iterator[None]:
    """Be connected to Ray inside the block; what was started for it, and only that, ends with it.

    It joins what is running already: in this process, at RAY_ADDRESS, or started by `ray start` on this machine.

    Args:
        verbose: 2 and more: as Ray logs.
        metadata: of the job, unless this process has one already.
    """
    level = logging.INFO if verbose > 1 else logging.CRITICAL  # the records say why a trial failed
    with _environment(SETTINGS), _log_level(level):
        started = not ray.is_initialized()
        try:
            if started:
                job = JobConfig(metadata=dict(metadata or {}))
                own = "local" if _is_forsaken() else None
                ray.init(own, log_to_driver=verbose > 1, logging_level=level, job_config=job)
            yield
        finally:
            if started:
                ray.shutdown()


def _is_forsaken() -> bool:
    """Whether the Ray that this machine remembers is gone: killed, not stopped. Ray would wait for it for minutes."""
    if "RAY_ADDRESS" in os.environ:
        return False
    remembered = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", "ray_current_cluster")
    try:
        host, _, port = remembered.read_text().strip().rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), ANSWERS_S).close()
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return False


@contextmanager
def _uncounted() -> Iterator[None]:
    """Keep Ray Tune from counting callbacks for usage statistics, for which it imports wandb and MLflow: seconds."""
    usage: Any = sys.modules.get("ray.air._internal.usage")
    count = getattr(usage, "tag_callbacks", None)
    if count is None:
        yield
        return
    usage.tag_callbacks = lambda _: False
    try:
        yield
    finally:
        usage.tag_callbacks = count


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
    levels = {**dict.fromkeys(LOGGERS, level), READS_FILES: logging.CRITICAL}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, value in levels.items():
        logging.getLogger(name).setLevel(value)
    try:
        yield
    finally:
        for name, value in before.items():
            logging.getLogger(name).setLevel(value)
