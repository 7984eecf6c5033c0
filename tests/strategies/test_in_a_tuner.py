"""Strategies and domains in a Tuner of one's own, on a real Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from driving import make
from ray import tune
from ray.tune.search.optuna import OptunaSearch
from simulation import Simulation

from raysq import strategies
from raysq.space import SearchSpace
from raysq.tuning.conductor import Conductor
from raysq.tuning.domains import domains

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

SIM = Simulation(sensitive=2)
SPACE = SIM.space()


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


def test_domains_are_a_param_space(tmp_path: Path) -> None:
    results = fit(tmp_path, domains(SPACE.per_op()), OptunaSearch(seed=0))  # nested, as the compact ones are not
    assert len(results) == 6 and not results.errors


@pytest.mark.parametrize("space", [SPACE, SPACE.per_op(), SPACE.per_block()], ids=["compact", "per op", "per block"])
def test_searchers_suggest_points_of_the_space_from_its_domains(space: SearchSpace) -> None:
    searcher = OptunaSearch(space=domains(space), metric="latency_ratio", mode="min", seed=0)
    assert all(space.recipe(searcher.suggest(str(i))).ops for i in range(6))  # raises outside of the space


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
