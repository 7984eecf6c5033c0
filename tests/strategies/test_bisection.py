"""Fallback sets without a model of them: what is put in float, how far, and what of it goes back to int8."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from simulation import CAPABILITIES, Simulation, make_call, make_graph

from raysq.graph import OpType
from raysq.recipe import Recipe
from raysq.space import SearchSpace, build_space
from raysq.strategies.base import BARRIER, History, Steps
from raysq.strategies.bisection import bisected, shrunk
from raysq.strategies.moves import in_float
from raysq.tuning.records import record

CALLS = [f"fc{i}" for i in range(8)]
RANKING = ("fc2", "fc7", "fc0", "fc6", "fc1", "fc4", "fc5", "fc3")
WAIT = "wait"


class Planted(Simulation):
    """Eight linear layers, of which some cost more than the goal allows."""

    def __init__(self, losses: dict[str, float], ranking: tuple[str, ...] = RANKING) -> None:
        super().__init__(graph=make_graph([make_call(name, OpType.LINEAR) for name in CALLS]))
        self.loss = dict.fromkeys(CALLS, 1e-5) | losses
        self.rankings = {"mse": ranking, "kl": ranking[::-1]}

    def space(self, **kwargs: Any) -> SearchSpace:
        """Return one of a CPU without VNNI, where 7 bits are the default and 8 can be had."""
        return build_space(self.graph, replace(CAPABILITIES, reduce_range=True), rankings=self.rankings)


def driven(sim: Simulation, steps: Steps, history: History) -> list[tuple[str, tuple[str, ...]]]:
    """Run what is proposed; return labels with the calls in float, and the barriers."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for step in steps:
        if step is BARRIER:
            found.append((WAIT, ()))
            continue
        history.append(record(len(history), {}, sim.run(step.recipe)))
        found.append((step.label, floats(step.recipe)))
    return found


def floats(recipe: Recipe) -> tuple[str, ...]:
    return tuple(name for name in CALLS if not recipe.config(name).is_int8)


def searched(sim: Simulation) -> list[tuple[str, tuple[str, ...]]]:
    space, history = sim.space(), History(sim.goal)
    return driven(sim, bisected(space, space.default(), history), history)


def test_it_climbs_every_ranking_to_two_calls_then_the_best_one_and_bisects() -> None:
    sim = Planted(dict.fromkeys(RANKING[:6], 0.02))  # all six must go
    steps = searched(sim)
    labels = [label for label, _ in steps]
    assert labels == [
        "1 calls in bf16 by mse",
        "1 calls in bf16 by kl",
        "2 calls in bf16 by mse",
        "2 calls in bf16 by kl",
        "4 calls in bf16 by mse",
        "7 calls in bf16 by mse",
        WAIT,
        "5 calls in bf16 by mse",
        WAIT,
        "6 calls in bf16 by mse",
        WAIT,
    ]
    assert [set(calls) for label, calls in steps if label == "4 calls in bf16 by mse"] == [set(RANKING[:4])]


def test_what_passes_first_is_not_climbed_further() -> None:
    assert searched(Planted({"fc2": 0.02})) == [("1 calls in bf16 by mse", ("fc2",)), (WAIT, ())]


def test_where_one_float_type_never_passes_the_next_is_tried() -> None:
    sim = Planted(dict.fromkeys(CALLS, 0.02))  # one call must stay in int8, and costs too much
    labels = [label for label, _ in searched(sim)]
    assert labels[-1] == WAIT and labels.count(WAIT) == 2
    assert any("in bf16" in label for label in labels) and any("in fp32" in label for label in labels)


@pytest.fixture
def passed() -> tuple[Planted, History]:
    """Return a search whose only feasible trial has six calls in float."""
    sim = Planted({"fc2": 0.02, "fc7": 0.02})
    space, history = sim.space(), History(sim.goal)
    recipe = in_float(space, RANKING[:6], next(iter(space.options["fc0"])).precision, space.default())
    history.append(record(0, {}, sim.run(recipe)))
    assert history.best is not None and set(floats(recipe)) == set(RANKING[:6])
    return sim, history


def gains(names: Iterable[str]) -> dict[str, float]:
    """Return how much each call gains in int8, the first the most; the others gain nothing."""
    found = {name: 1.0 / (1 + place) for place, name in enumerate(names)}
    return {name: found.get(name, -0.1) for name in CALLS}


def test_halves_of_what_gains_go_back_those_that_gain_most_first(passed: tuple[Planted, History]) -> None:
    sim, history = passed
    space = sim.space()
    order = ("fc0", "fc6", "fc2", "fc1")  # fc4 and fc7 gain nothing
    steps = driven(sim, shrunk(space, space.default(), history, 50, gains(order)), history)
    assert steps[0] == ("2 calls back to int8", ("fc1", "fc2", "fc4", "fc7"))
    assert steps[1] == ("2 calls back to int8", ("fc4", "fc7"))  # from what the first made the best
    assert steps[2] == (WAIT, ())
    assert all({"fc4", "fc7"} <= set(calls) for label, calls in steps if label != WAIT)
    assert "2 calls back to int8 of 8 bits" in [label for label, _ in steps]
    assert history.best is not None
    assert set(floats(history.best.recipe)) == {"fc2", "fc4", "fc7"}  # all but what it can't do without


@pytest.mark.parametrize("trials", [0, 1, 3])
def test_no_more_goes_back_than_there_are_trials_for(passed: tuple[Planted, History], trials: int) -> None:
    sim, history = passed
    space = sim.space()
    steps = driven(sim, shrunk(space, space.default(), history, trials, gains(RANKING)), history)
    assert sum(label != WAIT for label, _ in steps) == trials
