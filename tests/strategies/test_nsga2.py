"""NSGA-II sees each objective for itself, obeys the constraint, and spreads over the front."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from ray.tune.search import Searcher
from simulation import Simulation, make_graph

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


def hypervolume(records: list[TrialRecord], sim: Simulation) -> float:
    """Return the share of the unit cube of latency, size and tolerated loss that the feasible trials beat."""
    axis = (np.arange(20) + 0.5) / 20
    cells = np.stack(np.meshgrid(axis, axis, axis), -1)
    beaten = np.zeros(cells.shape[:-1], bool)
    for r in records:
        if r.feasible and r.size_ratio is not None:
            point = np.array([r.latency_bound, r.size_ratio, r.loss / sim.tolerance])
            beaten |= (point <= cells).all(-1)
    return float(beaten.mean())


def test_it_covers_more_of_the_front_of_a_large_space_than_random_search() -> None:
    found = {"nsga2": 0.0, "random": 0.0}
    calls = [call for call in Simulation().graph.calls if call.weight][:12]
    for name in found:
        for seed in range(3):
            sim = Simulation(seed=seed, sensitive=3, tolerance=0.03, objectives=EQUAL, graph=make_graph(calls))
            strategy = strategies.get(name).bind(sim.space().per_op(), sim.goal, 120, seed)
            found[name] += hypervolume(run(strategy, sim, 120), sim)
    print(found)
    assert found["nsga2"] > found["random"]


@pytest.mark.parametrize("size", [1, 0, 2.5, True])
def test_population_size_out_of_range(size: Any) -> None:
    with pytest.raises(OptionError, match="`population_size` must be a whole number of at least 2"):
        strategies.get("nsga2", population_size=size)


# the goal's cost, in every strategy


@pytest.mark.parametrize("name", ["tpe", "random", "nsga2"])
def test_the_best_is_the_one_of_least_cost(name: str) -> None:
    sim = Simulation(tolerance=0.05, objectives={"latency": 1.0, "size": 3.0})
    strategy = strategies.get(name).bind(sim.space(), sim.goal, 25, seed=1)
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
