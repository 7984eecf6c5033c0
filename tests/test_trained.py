"""A trained model in a search: trained once, searched as it was trained, and the last resort."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import uneven_digits
from ray import cloudpickle
from torch import nn
from uneven_digits import accuracy, batches, coarse, fit, trained_net

import raysq
from raysq import qat, trained
from raysq.baseline import measure
from raysq.errors import NoFeasibleRecipe, ResumeError
from raysq.job import Job
from raysq.kernels import base
from raysq.prepared import Prepared, prepare
from raysq.recipe import Rounding
from raysq.result import Baseline, TrialRecord
from raysq.space import SearchSpace
from raysq.tuning.records import record
from raysq.tuning.worker import Worker

cloudpickle.register_pickle_by_value(uneven_digits)  # workers can't import test modules

LATENCY = raysq.Latency(0.02, 0.02)
CALIB = batches(300)
X = CALIB[0][0]


def never(model: nn.Module) -> None:
    raise AssertionError("trained again")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(trained_net(), CALIB, backend="reference", smoothing=False, num_threads=1)


def test_weights_are_trained_once_in_a_run(prepared: Prepared, tmp_path: Path) -> None:
    recipe = prepared.space.default()
    first = trained.train_once(prepared, recipe, fit(1), tmp_path)
    again = trained.train_once(prepared, recipe, fit(1), tmp_path, again=False)
    assert not torch.equal(first.model(X), prepared.source.model(X))
    assert torch.equal(first.model(X), again.model(X))


def test_another_recipe_or_loop_is_trained_for_itself(prepared: Prepared, tmp_path: Path) -> None:
    recipe = prepared.space.default()
    trained.train_once(prepared, recipe, fit(1), tmp_path)
    for other, train_fn in ((coarse(recipe), never), (recipe, never)):
        with pytest.raises(AssertionError, match="trained again"):
            trained.train_once(prepared, other, train_fn, tmp_path)


def test_lost_weights_are_not_replaced_by_others(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="no weights"):
        trained.train_once(prepared, prepared.space.default(), fit(1), tmp_path, again=False)


def test_torn_weights_are_told(prepared: Prepared, tmp_path: Path) -> None:
    recipe = prepared.space.default()
    (tmp_path / f"trained-{recipe.digest}.pt").write_bytes(b"torn")
    with pytest.raises(ResumeError, match="Remove it to train again"):
        trained.train_once(prepared, recipe, fit(1), tmp_path)


def test_the_space_of_a_trained_model_starts_with_what_was_trained(prepared: Prepared) -> None:
    default = prepared.space.default()
    adaptive = {n: replace(config, rounding=Rounding.ADAROUND) for n, config in default.ops.items()}
    space = prepared.space.narrow({"linear.rounding": ["adaround", "nearest"]})
    assert space.default() == replace(default, ops=adaptive)
    source = qat.train(prepared.source, space.default(), fit(1))
    found = trained.searched(replace(prepared, space=space), source)
    assert found.space.default() == qat.plain(space.default()) == default
    assert not {"linear.rounding", "equalization", "bias_correction"} & {d.name for d in found.space.dimensions}
    assert found.space.rankings["mse"] and found.source is source


@pytest.fixture(scope="module")
def lost(prepared: Prepared) -> tuple[raysq.Goal, Baseline, TrialRecord]:
    """A goal, and a trial that misses it."""
    goal, engine = raysq.Goal(0.1), base.get("reference")
    baseline = measure(prepared, engine, prepared.source.model, accuracy, goal, LATENCY)
    recipe = coarse(prepared.space.default())
    worker = Worker(Job(prepared, accuracy, goal, LATENCY, baseline), engine)
    worker.begin(prepared.space.config(recipe))
    trial = record(0, {}, worker.advance())
    assert not trial.feasible
    return goal, baseline, trial


def test_training_is_the_last_resort(prepared: Prepared, lost: tuple, tmp_path: Path) -> None:
    goal, baseline, trial = lost
    job = Job(prepared, accuracy, goal, LATENCY, baseline)
    settings = job, base.get("reference"), [trial], tmp_path / "journal.jsonl"
    result = trained.with_last_resort(*settings, fit(15))
    assert result.feasible and accuracy(result.model) == result.accuracy > trial.accuracy
    assert [t.label for t in result.trials] == ["", trained.LABEL]
    assert result.recipe == trial.recipe, "trained under the closest recipe, which needs no smoothing"
    assert result.trials[1].ratio is not None, "it was timed like any other"


@pytest.mark.parametrize("worse", [False, True])
def test_training_that_does_not_help_is_told(prepared: Prepared, lost: tuple, tmp_path: Path, worse: bool) -> None:
    goal, baseline, trial = lost

    def forget(model: nn.Module) -> None:
        if worse:
            with torch.no_grad():
                model.model[2].weight.zero_()

    job = Job(prepared, accuracy, goal, LATENCY, baseline)
    settings = job, base.get("reference"), [trial], tmp_path / "journal.jsonl"
    with pytest.raises(NoFeasibleRecipe, match="nor training") as caught:
        trained.with_last_resort(*settings, forget)
    result = caught.value.result
    assert result.accuracy == trial.accuracy, "the closest of all"
    assert [t.label for t in result.trials] == ["", trained.LABEL]


def loop(path: Path) -> qat.TrainFn:
    def train_fn(model: nn.Module) -> None:
        with path.open("a") as file:
            file.write("trained\n")
        fit(15)(model)

    return train_fn


@pytest.mark.slow
def test_a_search_of_a_trained_model_goes_on_with_the_same_weights(cluster: None, tmp_path: Path) -> None:
    model, told = trained_net(), tmp_path / "told"
    settings = {
        "tolerance": 0.5,
        "backend": "reference",
        "approach": "qat",
        "train_fn": loop(told),
        "num_threads": 1,
        "max_concurrent_trials": 1,
        "verbose": 0,
        "latency": LATENCY,
        "storage_path": tmp_path,
        "name": "run",
    }
    result = raysq.tune(model, CALIB, accuracy, max_trials=2, **settings)
    assert result.baseline.accuracy == accuracy(model), "of the model that was given"
    resumed = raysq.tune(model, CALIB, accuracy, max_trials=3, resume=tmp_path / "run", **settings)
    assert told.read_text() == "trained\n"
    assert [t.digest for t in resumed.trials[:2]] == [t.digest for t in result.trials]
    settings["train_fn"] = fit(1)
    with pytest.raises(ResumeError, match="`train_fn`"):
        raysq.tune(model, CALIB, accuracy, max_trials=3, resume=tmp_path / "run", **settings)


@pytest.mark.slow
def test_a_search_in_which_nothing_passes_trains(cluster: None, prepared: Prepared, tmp_path: Path) -> None:
    told = tmp_path / "told"
    only = SearchSpace(prepared.source.graph, {n: (c,) for n, c in coarse(prepared.space.default()).ops.items()})
    result = raysq.tune(
        trained_net(),
        CALIB,
        accuracy,
        tolerance=0.1,
        backend="reference",
        space=only,
        train_fn=loop(told),
        num_threads=1,
        max_concurrent_trials=1,
        verbose=0,
        latency=LATENCY,
        storage_path=tmp_path,
    )
    assert told.read_text() == "trained\n"
    assert [t.feasible for t in result.trials] == [False, True]
    assert result.dataframe().label.iloc[-1] == trained.LABEL
