"""What the default strategy promises, on simulated models."""

from __future__ import annotations

import math
from typing import Any

import pytest
from driving import drive
from simulation import RoughSimulation, Simulation, make_call, make_graph

from raysq import strategies
from raysq.errors import CalibrationError, ModelError
from raysq.graph import OpType
from raysq.recipe import Precision, Rounding
from raysq.sensitivities import Sensitivity
from raysq.strategies.auto import Auto
from raysq.strategies.base import Strategy

SEEDS = range(5)


def bound(sim: Simulation, trials: int, *, measured: bool = False) -> Strategy:
    times = sim.op_times() if measured and isinstance(sim, RoughSimulation) else None
    return Auto().bind(sim.space(), sim.goal, trials, costs=sim.costs, times=times)


def labels_of(sim: Simulation, trials: int) -> list[str]:
    return [config["label"] for config in drive(bound(sim, trials), sim, trials=trials)]


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_too_sensitive_and_what_is_slow_ends_in_float(seed: int, slots: int) -> None:
    sim = Simulation(seed=seed)
    strategy = bound(sim, 40)
    drive(strategy, sim, slots, trials=40)
    best = strategy.history.best
    assert best is not None
    needed = {name for name, loss in sim.loss.items() if loss > sim.tolerance}
    assert not needed & set(best.recipe.int8_calls)
    slow = {call.name for call in sim.graph.calls if call.is_depthwise}
    assert not slow & set(best.recipe.int8_calls)  # int8 is planted to be slower there


@pytest.mark.parametrize("seed", SEEDS)
def test_it_passes_within_four_trials_of_which_the_default_is_one(seed: int) -> None:
    sim = RoughSimulation(seed=seed)
    strategy = bound(sim, 50)
    drive(strategy, sim, trials=4)
    assert not strategy.history[0].feasible and strategy.history[0].label == "default"
    assert strategy.history.best is not None


@pytest.mark.parametrize("seed", SEEDS)
def test_with_measured_times_ten_trials_do_what_fifty_of_tpe_cannot(seed: int) -> None:
    sim = RoughSimulation(seed=seed)
    auto = bound(sim, 50, measured=True)
    drive(auto, sim, trials=10)
    tpe = strategies.get("tpe", fallback=True).bind(sim.space(), sim.goal, 50, seed)
    drive(tpe, sim, trials=50)
    assert auto.history.best is not None
    other = tpe.history.best
    assert other is None or sim.exact_ratio(auto.history.best.recipe) < sim.exact_ratio(other.recipe)


def test_where_the_default_passes_it_looks_for_speed_only() -> None:
    sim = Simulation(sensitive=0)
    strategy = bound(sim, 18)
    labels = [config["label"] for config in drive(strategy, sim)]
    assert labels[0] == "default" and not any("algorithm" in label or "by mse" in label for label in labels)
    assert all(record.feasible for record in strategy.history)
    assert strategy.history.best is not None and strategy.history.best.label != "default"


@pytest.mark.parametrize(("objectives", "tried"), [({"latency": 1}, False), ({"latency": 1, "accuracy": 1}, True)])
def test_where_all_calls_pass_in_int8_adaround_is_tried_for_accuracy_only(
    objectives: dict[str, float], tried: bool
) -> None:
    linears = make_graph([make_call(f"fc{i}", OpType.LINEAR) for i in range(6)])
    sim = Simulation(sensitive=0, graph=linears, objectives=objectives)
    strategy = bound(sim, 60)
    drive(strategy, sim, trials=60)
    assert any(record.label == "tpe" for record in strategy.history)
    rounded = [c for record in strategy.history for c in record.recipe.ops.values() if c.rounding is Rounding.ADAROUND]
    assert bool(rounded) is tried


def test_the_ladder_where_the_default_fails() -> None:
    labels = labels_of(Simulation(seed=1), 50)
    first = {kind: next(i for i, label in enumerate(labels) if kind in label) for kind in STEPS}
    assert sorted(first, key=lambda kind: first[kind]) == STEPS


STEPS = ["default", "predicted", "algorithm", "matmul in", "tpe"]


def test_where_no_fallback_set_that_it_predicts_passes_it_climbs_the_ranking() -> None:
    sim = Simulation(tolerance=0.0, sensitive=60)  # not a single call may run in int8
    labels = labels_of(sim, 60)
    counts = [int(label.split()[0]) for label in labels if label.endswith("calls in fp32 by mse")]
    assert counts == [1, 2, 4, 8, 16, 32, 59][: len(counts)] and counts
    assert labels[-1] == "tpe"


def test_without_costs_and_times_it_goes_by_the_ranking() -> None:
    sim = Simulation(seed=2)
    strategy = Auto().bind(sim.space(), sim.goal, 30)
    drive(strategy, sim, trials=30)
    assert strategy.history.best is not None


@pytest.mark.parametrize("error", [ModelError, CalibrationError])
def test_where_gradients_cannot_be_had_it_goes_by_the_error_of_each_call(error: type[Exception]) -> None:
    sim = Simulation(seed=2)
    asked: list[str] = []

    def costs(sensitivity: Sensitivity, *given: Any) -> dict[str, float]:
        asked.append(sensitivity.name)
        if sensitivity.name == "fisher":
            raise error("no batch of one")
        return sim.costs(sensitivity, *given)

    strategy = Auto().bind(sim.space(), sim.goal, 20, costs=costs)
    drive(strategy, sim, trials=20)
    assert asked[:2] == ["fisher", "mse"] and strategy.history.best is not None


def test_the_float_calls_are_in_the_type_that_is_fastest() -> None:
    sim = RoughSimulation(seed=3)
    strategy = bound(sim, 20, measured=True)
    drive(strategy, sim, trials=20)
    best = strategy.history.best
    assert best is not None
    floats = {best.recipe.config(call.name).precision for call in sim.graph.calls} - {Precision.INT8}
    assert Precision.BF16 in floats  # planted at 0.7 of fp32


def test_it_beats_random_search() -> None:
    ratios: dict[str, list[float]] = {"auto": [], "random": []}
    for seed in range(3):
        sim = Simulation(seed=seed)
        for strategy in (bound(sim, 40), strategies.get("random").bind(sim.space(), sim.goal, 40, seed)):
            drive(strategy, sim, trials=40)
            best = strategy.history.best
            ratios[strategy.name].append(math.inf if best is None or best.latency_ratio is None else best.latency_ratio)
    assert all(a < r for a, r in zip(ratios["auto"], ratios["random"], strict=True))
