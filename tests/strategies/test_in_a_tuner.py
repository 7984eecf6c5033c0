"""Strategies and domains in a Tuner of one's own, on a real Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import simulation
from driving import make
from ray import tune
from ray.tune.search.optuna import OptunaSearch
from simulation import Simulation

from raysq import strategies
from raysq.tuning.conductor import Conductor
from raysq.tuning.domains import domains

pytestmark = pytest.mark.slow

SIM = Simulation(sensitive=2)
SPACE = SIM.space()


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(simulation.__file__).parent), prepend=os.pathsep)  # for the workers
        ray.init(num_cpus=2, include_dashboard=False)
        yield
        ray.shutdown()


class Toy(tune.Trainable):
    """A trial of the simulation; actors are reused, since a process for each takes seconds."""

    def setup(self, config: dict[str, Any]) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._point = new_config
        return True

    def step(self) -> dict[str, Any]:
        return {**SIM.run(SPACE.recipe(self._point)), "done": True}


def fit(storage: Path, param_space: dict[str, Any], searcher: Any) -> tune.ResultGrid:
    return tune.Tuner(
        Toy,
        param_space=param_space,
        tune_config=tune.TuneConfig(
            metric="latency_ratio",
            mode="min",
            search_alg=searcher,
            num_samples=6,
            max_concurrent_trials=2,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            storage_path=str(storage),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()


@pytest.mark.parametrize("space", [SPACE, SPACE.per_op()], ids=["compact", "per op"])
def test_domains_are_a_param_space(space: Any, tmp_path: Path) -> None:
    results = fit(tmp_path, domains(space), OptunaSearch(seed=0))
    assert len(results) == 6 and not results.errors


@pytest.mark.parametrize("name", [kind.name for kind in strategies.ALL])
def test_a_strategy_is_a_searcher(name: str, tmp_path: Path) -> None:
    strategy = make(name, SIM, SPACE, trials=6)
    results = fit(tmp_path, {}, strategy)
    assert 1 <= len(results) == len(strategy.history) <= 6 and not results.errors  # staged ones may end earlier


def test_a_conductor_is_a_searcher(tmp_path: Path) -> None:
    strategy = strategies.get("auto").bind(SPACE, SIM.goal, max_trials=6)
    results = fit(tmp_path, {}, Conductor(strategy, SPACE, SIM.goal, max_trials=4))
    assert len(results) == 4 and not results.errors
    assert sorted(r.config["trial"] for r in results) == [0, 1, 2, 3]
