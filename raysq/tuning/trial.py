"""The Ray Tune trainable: one trial is one recipe, built, scored, and timed if it still matters."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ray import tune

from raysq import evaluation
from raysq.errors import OptionError
from raysq.goal import Goal
from raysq.job import Job
from raysq.options import Latency, Workers
from raysq.tuning import shipping
from raysq.tuning.worker import Worker, unusable

if TYPE_CHECKING:
    from raysq.prepared import Prepared
    from raysq.result import Baseline

__all__ = ["QuantTrial", "bound", "cpus_per_trial", "trainable"]


ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DNNL_GRAPH_COMPILED_PARTITION_CACHE_CAPACITY": "0",  # no partition comes twice, and 1024 would be kept
}


class QuantTrial(tune.Trainable):
    """Reports after accuracy and, unless a stopper ended it there, again after timing.

    Actors are reused, so a class attribute holds what they reserve and the object store what they share;
    `trainable` fills in both.
    """

    cpus: ClassVar[int] = 1

    @classmethod
    def default_resource_request(cls, config: Mapping[str, Any]) -> tune.PlacementGroupFactory:
        """Return what Ray reserves for one trial."""
        return tune.PlacementGroupFactory([{"CPU": cls.cpus}])

    def setup(self, config: dict[str, Any], job: shipping.Packed | None = None) -> None:
        """Take up the job; called once per process, which then runs many trials."""
        os.environ |= ENVIRONMENT
        from raysq.kernels import base

        if job is None:
            raise TypeError("QuantTrial runs through `raysq.trainable(prepared, eval_fn)`, which gives it its job.")
        self._unusable: dict[str, Any] = {}
        try:
            unpacked: Job = shipping.unpack(job)
            self._worker = Worker(unpacked, base.get(unpacked.prepared.engine))
        except Exception as exc:  # noqa: BLE001  # raised from here, Ray would print it for each trial and go on
            self._unusable = unusable(exc)
        else:
            gc.collect()
            gc.freeze()  # what lives now stays; looking through it for garbage took 0.2 to 0.4 s of each trial
            self._worker.begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take up another search point."""
        if not self._unusable:
            self._worker.begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Go one stage further; never raises for what a recipe or `eval_fn` does."""
        return self._unusable or self._worker.advance()

    def __repr__(self) -> str:
        return f"raysq-worker@{socket.gethostname()}:{os.getpid()}"  # Ray reads it once, so it names the slot


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
            "`Goal.confirm` is scored by `raysq.tune` when its search ends. In a Tuner of your own leave it out, and "
            "score the winner: `raysq.quantize(model, calib, recipe)`."
        )
    if baseline is None:
        from raysq.baseline import measure
        from raysq.kernels import base

        engine = base.get(prepared.engine)
        baseline = measure(prepared, engine, prepared.source.model, eval_fn, goal, latency)
    return bound(Job(prepared, eval_fn, goal, latency, baseline), workers or Workers())


def bound(job: Job, workers: Workers) -> type[QuantTrial]:
    """Return the trainable of one job.

    Raises:
        EvaluationError, ModelError: what workers need can't be pickled.
    """

    class Bound(QuantTrial):
        cpus = cpus_per_trial(job.prepared, workers)

    found: type[QuantTrial] = tune.with_parameters(Bound, job=_packed(job))
    found.__name__ = found.__qualname__ = QuantTrial.__name__  # what the dashboard shows
    return found


def cpus_per_trial(prepared: Prepared, workers: Workers) -> int:
    """Return how many CPUs a trial reserves: as many as it has threads, unless `workers` says otherwise."""
    return workers.cpus_per_trial or prepared.num_threads


def _packed(job: Job) -> shipping.Packed:
    try:
        return shipping.pack(job)
    except Exception:
        shipping.pack_model(job.prepared.source.model)  # these name what can't be pickled
        shipping.pack_eval_fn(job.eval_fn)
        raise
