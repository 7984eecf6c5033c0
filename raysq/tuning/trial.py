"""The Ray Tune trainable: one trial is one recipe, built, scored, and timed if it still matters."""

from __future__ import annotations

import gc
import math
import os
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

import ray
from ray import tune

from raysq import evaluation
from raysq.errors import OptionError
from raysq.goal import Goal
from raysq.job import Job
from raysq.latency import Latency
from raysq.tuning import last_words, shipping, trial_log
from raysq.tuning.board import Board
from raysq.tuning.capacity import reservation
from raysq.tuning.deadline import Hanging
from raysq.tuning.machines import alive, is_marked, times
from raysq.tuning.worker import Worker, failed
from raysq.workers import OtherCpus, Workers

if TYPE_CHECKING:
    from raysq.prepared import Prepared
    from raysq.result import Baseline

__all__ = ["GIVEN_UP", "QuantTrial", "bound", "cpus_per_trial", "seconds_per_trial", "sent", "trainable"]


ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DNNL_GRAPH_COMPILED_PARTITION_CACHE_CAPACITY": "0",  # no partition comes twice, and 1024 would be kept
}
GIVEN_UP = "given_up"  # key of a config whose trial lost its workers: why; the next worker only reports it
LEAST_LIMIT_S = 600.0  # an evaluation of milliseconds may still wait for a slow disk or a busy neighbour
PATIENCE = 20  # times what the model takes to build and score; kernels that crawl are found by the build


class QuantTrial(tune.Trainable):
    """Reports after accuracy and, unless a stopper ended it there, again after timing.

    Actors are reused, so a class attribute holds what they reserve and the object store what they share;
    `trainable` fills in both.
    """

    cpus: ClassVar[int] = 1
    memory: ClassVar[int] = 0
    times_anywhere: ClassVar[bool] = False
    limit_s: ClassVar[float] = math.inf

    @classmethod
    def default_resource_request(cls, config: Mapping[str, Any]) -> tune.PlacementGroupFactory:
        """Return what Ray reserves for one trial, away from the nodes that its config avoids."""
        avoid = config.get("avoid")
        return reservation(cls.cpus, avoid.split(",") if avoid else (), cls.memory)

    def setup(self, config: dict[str, Any], job: shipping.Packed | None = None, board: Board | None = None) -> None:
        """Take up the job; called once per process, which then runs many trials."""
        if job is None:
            raise TypeError("QuantTrial runs through `raysq.trainable(prepared, eval_fn)`, which gives it its job.")
        os.environ |= ENVIRONMENT
        trial_log.attach()
        self._job = job
        self._board = board
        self._model = "unusable"
        self._worker: Worker | None = None
        self._failed: dict[str, Any] = {}  # what this trial reports instead of running
        self._unusable: dict[str, Any] = {}  # what all trials of this process do
        self._hangs = False
        self._words: TextIO | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take up another search point."""
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Go one stage further; never raises for what a recipe or `eval_fn` does, unless that never ends.

        Raises:
            Hanging: the trial worked for too long.
        """
        if self._failed or self._worker is None:
            return self._failed
        try:
            return self._worker.advance()
        except Hanging:
            self._hangs = True
            last_words.forget(self.logdir)
            raise

    def cleanup(self) -> None:
        """End the process where what it runs doesn't end; called by Ray Tune when it stops the actor."""
        if self._hangs:
            os._exit(1)  # any other exit waits for the threads

    def _begin(self, config: Mapping[str, Any]) -> None:
        died_of = last_words.read(self.logdir)
        given_up = config.get(GIVEN_UP) or (last_words.hung(died_of) and "its worker had to be ended")
        if given_up:
            self._failed = failed(f"{given_up}: {died_of}" if died_of else str(given_up))
            return
        before, self._words = self._words, last_words.keep(self.logdir)
        if before is not None:
            before.close()
        if self._worker is None and not self._unusable:
            self._take_up_job()
        self._failed = self._unusable
        if self._worker is not None:
            self._worker.begin(config, self._words)

    def _take_up_job(self) -> None:
        from raysq.kernels import base

        try:
            job: Job = shipping.unpack(self._job)
            self._model = job.prepared.name
            engine = base.get(job.prepared.engine)
            own, wanted = engine.capabilities().isa, job.prepared.capabilities.isa
            count = self.times_anywhere or times(own, wanted, _is_marked())
            self._worker = Worker(job, engine, self._announce, times=count, limit_s=self.limit_s)
        except Exception as exc:  # noqa: BLE001  # raised from here, Ray would print it for each trial and go on
            self._unusable = failed(f"the worker can't load the model or `eval_fn`: {type(exc).__name__}: {exc}")
            return
        gc.collect()
        gc.freeze()  # what lives now stays; looking through it for garbage took 0.2 to 0.4 s of each trial

    def _announce(self, config: Mapping[str, Any], phase: str) -> None:
        if self._board is not None and "trial" in config:
            self._board.begin(int(config["trial"]), phase)

    def __repr__(self) -> str:  # Ray reads it once, so it names the slot
        return f"raysq {self._model} @ {socket.gethostname()}:{os.getpid()}"


def trainable(
    prepared: Prepared,
    eval_fn: evaluation.EvalFn,
    *,
    goal: Goal | None = None,
    latency: Latency | None = None,
    workers: Workers | None = None,
    baseline: Baseline | None = None,
) -> type[QuantTrial]:
    """Return the trainable of a prepared model, for a `ray.tune.Tuner` of your own.

    Set `RunConfig(checkpoint_config=CheckpointConfig(checkpoint_at_end=False))`, `TuneConfig(reuse_actors=True)` and
    `max_concurrent_trials`: a trial costs 10 ms instead of seconds. Infeasible trials report a predicted
    `latency_ratio`; `AccuracyConstraintStopper` ends them before they are timed.

    Args:
        prepared: from `raysq.prepare`.
        eval_fn: returns a number, a dict of numbers, or yields (sum, n) per batch.
        goal: how much may be lost; default `Goal()`.
        latency: the budget of a timing; default `Latency()`.
        workers: what a trial reserves; default as many CPUs as threads.
        baseline: what int8 is measured against; measured here if it isn't given.

    Raises:
        EvaluationError: `eval_fn` can't be called, scored or pickled.
        OptionError: the goal has a split for confirmation, which a Tuner never comes to.
        ModelError: the model can't be pickled; the message names the attribute.
    """
    evaluation.check(eval_fn)
    goal, latency = goal or Goal(), latency or Latency()
    if goal.confirm is not None:
        raise OptionError(
            "`Goal.confirm` is scored by `raysq.tune` when its search ends. Leave it out in a Tuner of your own, and "
            "score the winner: `raysq.quantize(model, calib, recipe)`."
        )
    if baseline is None:
        from raysq.baseline import measure
        from raysq.kernels import base

        engine = base.get(prepared.engine)
        baseline = measure(prepared, engine, prepared.source.model, eval_fn, goal, latency)
    job = Job(prepared, eval_fn, goal, latency, baseline)
    return bound(job, sent(job), workers or Workers())


def bound(
    job: Job, packed: shipping.Packed, workers: Workers, memory: int = 0, board: Board | None = None
) -> type[QuantTrial]:
    """Return the trainable of one job.

    Args:
        job: what its trials share.
        packed: the same, as it is sent to workers.
        workers: what a trial reserves,
        memory: and how many bytes of memory.
        board: shows what its trials do.
    """
    reserved = memory

    class Bound(QuantTrial):
        cpus = cpus_per_trial(job.prepared, workers)
        memory = reserved
        times_anywhere = workers.other_cpus is OtherCpus.TIME
        limit_s = seconds_per_trial(job, workers)

    found: type[QuantTrial] = tune.with_parameters(Bound, job=packed, board=board)
    found.__name__ = found.__qualname__ = QuantTrial.__name__  # what the dashboard shows
    return found


def cpus_per_trial(prepared: Prepared, workers: Workers) -> int:
    """Return how many CPUs a trial reserves: as many as it has threads, unless `workers` says otherwise."""
    return workers.cpus_per_trial or prepared.num_threads


def _is_marked() -> bool:
    """Whether timings are for the node of this process."""
    nodes, here = alive(), ray.get_runtime_context().get_node_id()
    return all(is_marked(node, nodes) for node in nodes if node["NodeID"] == here)


def seconds_per_trial(job: Job, workers: Workers) -> float:
    """Return for how many seconds a trial may work before it counts as hanging."""
    usual = PATIENCE * (job.baseline.eval_s + job.prepared.build_s)
    return max(LEAST_LIMIT_S, usual) if workers.trial_timeout_s is None else workers.trial_timeout_s


def sent(job: Job) -> shipping.Packed:
    """Return a job as it is sent to workers.

    Raises:
        EvaluationError, ModelError: what workers need can't be pickled.
    """
    try:
        return shipping.pack(job)
    except Exception:
        shipping.pack_model(job.prepared.source.model)  # these name what can't be pickled
        shipping.pack_eval_fn(job.eval_fn)
        raise
