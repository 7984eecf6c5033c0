"""NSGA-II sees each objective for itself and the constraint; what the goal makes small counts in every strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from ray.tune.search import Searcher
from simulation import Simulation

from raysq import strategies
from raysq.errors import OptionError
from raysq.goal import Goal, Objective
from raysq.result import TrialRecord
from raysq.strategies.base import Strategy
from raysq.tuning.records import record

EQUAL = {"latency": 1.0, "size": 1.0, "memory": 1.0}


def run(strategy: Strategy, sim: Simulation, trials: int) -> list[TrialRecord]:
    for i in range(trials):
        config = strategy.suggest(str(i))
        if config == Searcher.FINISHED:
            break
        strategy.on_trial_complete(str(i), sim.run(strategy.space.recipe(config)))
    return list(strategy.history)


def told(objectives: Mapping[str, float], result: dict[str, Any]) -> Any:
    """Return the Optuna trial of a searcher over a front that was told one result."""
    from optuna.samplers import NSGAIISampler

    sim = Simulation()
    goal = Goal(objectives=objectives)
    searcher = strategies.ConstrainedOptuna(sim.space(), goal, NSGAIISampler(seed=0), front=True)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result)
    return searcher._study.trials[0]


@pytest.mark.parametrize(
    ("objectives", "names"),
    [({"latency": 1}, ("latency", "accuracy")), ({"size": 1}, ("latency", "accuracy", "size")), (EQUAL, Objective)],
)
def test_each_objective_is_a_value_of_its_own(objectives: dict[str, float], names: tuple[str, ...]) -> None:
    sim = Simulation(sensitive=0)
    result = sim.run(sim.space().default())
    kept = record(0, {}, result)
    assert told(objectives, result).values == [Objective(name).of(kept) for name in names]


def test_the_constraint_is_the_metric_that_passes_its_tolerance_by_most() -> None:
    sim = Simulation(sensitive=0)
    result = {**sim.run(sim.space().default()), "worst_drop": 0.5, "feasible": False}
    assert max(told({"latency": 1}, result).constraints.values()) == pytest.approx(0.5 - Goal().tolerance)


def test_a_trial_with_an_unknown_objective_has_failed() -> None:
    sim = Simulation(sensitive=0)
    result = {**sim.run(sim.space().default()), "size_ratio": float("nan")}
    assert told({"size": 1}, result).state.name == "FAIL"


@pytest.mark.parametrize("size", [1, 0, 2.5, True])
def test_population_size_out_of_range(size: Any) -> None:
    with pytest.raises(OptionError, match="`population_size` must be a whole number of at least 2"):
        strategies.get("nsga2", population_size=size)


# the goal's cost, in every strategy


@pytest.mark.parametrize(
    ("name", "kwargs"), [("tpe", {"fallback": True}), ("random", {"fallback": True}), ("nsga2", {})]
)
def test_the_best_is_the_one_of_least_cost(name: str, kwargs: dict[str, Any]) -> None:
    sim = Simulation(tolerance=0.05, objectives={"latency": 1.0, "size": 3.0})
    strategy = strategies.get(name, **kwargs).bind(sim.space(), sim.goal, 25, seed=1)
    feasible = [r for r in run(strategy, sim, 25) if r.feasible]
    best = strategy.history.best
    assert best is not None and best.size_ratio is not None
    assert best.latency_bound + 3 * best.size_ratio == min(sim.goal.cost(r) for r in feasible)


def test_other_searchers_are_shown_the_cost() -> None:
    from raysq.strategies.following import penalised

    sim = Simulation(sensitive=0, objectives={"latency": 2.0, "size": 1.0})
    kept = record(0, {}, sim.run(sim.space().default()))
    assert kept.size_ratio is not None
    assert penalised(kept, sim.goal)["latency_ratio"] == 2 * kept.latency_bound + kept.size_ratio
