"""The trainable inside Ray, and in a Tuner of one's own."""

import gc
import sys
import threading
from dataclasses import replace

import pytest
import ray
from ray import cloudpickle, tune
from torch import nn

from raysq.errors import EvaluationError, ModelError
from raysq.latency import Latency
from raysq.tuning.domains import domains
from raysq.tuning.stopper import AccuracyConstraintStopper
from raysq.tuning.trial import QuantTrial, cpus_per_trial, trainable
from raysq.workers import Workers

cloudpickle.register_pickle_by_value(sys.modules[__name__])

INT8 = {"linear": "int8", "float_calls.order": 0}  # whatever else is drawn


def perfect(model):
    return 1.0


@pytest.mark.parametrize(
    ("workers", "threads", "expected"), [(Workers(), 3, 3), (Workers(cpus_per_trial=1), 3, 1), (Workers(), 1, 1)]
)
def test_a_trial_reserves_its_threads(prepared, workers, threads, expected):
    assert cpus_per_trial(replace(prepared, num_threads=threads), workers) == expected


def test_class_is_called_quant_trial_in_the_dashboard(prepared, baseline):
    bound = trainable(prepared, perfect, baseline=baseline)
    assert issubclass(bound, QuantTrial)
    assert (bound.__name__, bound.__qualname__) == ("QuantTrial", "QuantTrial")


def test_unpicklable_model_is_refused_by_name(prepared, baseline):
    model = nn.Sequential(nn.Linear(2, 2))
    model.get_submodule("0").guard = threading.Lock()
    broken = replace(prepared, source=replace(prepared.source, model=model))
    with pytest.raises(ModelError, match=r"`0\.guard` \(lock\)"):
        trainable(broken, perfect, baseline=baseline)


def test_unpicklable_eval_fn_is_refused(prepared, baseline):
    lock = threading.Lock()
    with pytest.raises(EvaluationError, match="eval_fn"):
        trainable(prepared, lambda model: float(lock.locked()), baseline=baseline)


def test_eval_fn_with_another_argument_is_refused(prepared, baseline):
    with pytest.raises(EvaluationError, match="exactly one argument"):
        trainable(prepared, lambda model, loader: 1.0, baseline=baseline)


def test_baseline_is_measured_where_none_is_given(prepared):
    scored = []
    trainable(prepared, lambda model: float(len(scored.append(model) or scored)), latency=Latency(budget_s=0.01))
    assert scored[0] is prepared.source.model


@pytest.mark.slow
def test_in_a_tuner_of_ones_own(cluster, prepared, baseline, tmp_path):
    def eval_fn(model):
        eval_fn.calls = getattr(eval_fn, "calls", 0) + 1
        return 1.0 if eval_fn.calls != 2 else 0.5

    results = tune.Tuner(
        trainable(prepared, eval_fn, baseline=baseline, latency=Latency(budget_s=0.01)),
        param_space={**domains(prepared.space), **INT8},
        tune_config=tune.TuneConfig(
            metric="latency_ratio", mode="min", num_samples=4, max_concurrent_trials=1, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path),
            stop=AccuracyConstraintStopper(tolerance=0.01),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()
    stages = sorted(result.metrics["stage"] for result in results)
    assert not results.errors
    assert stages == ["evaluated", "timed", "timed", "timed"]  # the infeasible one was not timed
    assert len({result.metrics["pid"] for result in results}) == 1  # one worker ran them all


@pytest.mark.slow
def test_ray_names_the_class_and_the_slot_and_what_stays_is_frozen(cluster, prepared, baseline):
    bound = trainable(prepared, perfect, baseline=baseline)
    actor = ray.remote(bound).remote({})
    ray.get(actor.train.remote())
    names = [info["ActorClassName"] for info in ray._private.state.actors().values()]
    shown = ray.get(actor.__ray_call__.remote(repr))
    frozen = ray.get(actor.__ray_call__.remote(lambda trial: (gc.get_freeze_count(), len(gc.get_objects()))))
    ray.kill(actor)
    assert "QuantTrial" in names
    assert shown.startswith("raysq Sequential @ ")
    assert frozen[0] > 10 * frozen[1]  # a trial's garbage is not looked for among all that was imported
