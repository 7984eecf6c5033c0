"""What the strategies promise that sample a space, and what they are called."""

from __future__ import annotations

import statistics
import sys
from importlib import metadata
from typing import Any

import pytest
from simulation import CAPABILITIES, Simulation, make_call, make_graph

from raysq import strategies
from raysq.errors import OptionError
from raysq.graph import OpType
from raysq.space import SearchSpace, build_space
from raysq.strategies import plugins
from raysq.strategies.base import Strategy
from raysq.strategies.bayesian import gp_sampler

SAMPLED = ("bayesian", "tpe", "tpe_hyperopt", "exhaustive", "random")


def small() -> Simulation:
    """Two linears, a convolution, an addition."""
    calls = [make_call("a", OpType.LINEAR), make_call("b", OpType.LINEAR), make_call("c", OpType.CONV2D)]
    return Simulation(graph=make_graph([*calls, make_call("d:add", OpType.ADD)]), sensitive=1)


def few() -> SearchSpace:
    """Eight ways to quantize, and calls that may be in float."""
    return (
        small()
        .space()
        .narrow(
            {
                "linear.algorithm": ("mse", "kl"),
                "linear.weight_algorithm": "minmax",
                "linear.granularity": "per_channel",
                "linear.rounding": "nearest",
                "conv.activation": "uint8 asym",
                "conv.algorithm": "mse",
                "conv.weight_algorithm": "minmax",
                "conv.granularity": "per_channel",
                "conv.rounding": "nearest",
            }
        )
    )


def run(strategy: Strategy, sim: Simulation, trials: int = 1000) -> list[dict[str, Any]]:
    """Run one trial after the other; return the configs."""
    configs: list[dict[str, Any]] = []
    while len(configs) < trials and isinstance(config := strategy.suggest(str(len(configs))), dict):
        strategy.on_trial_complete(str(len(configs)), sim.run(strategy.space.recipe(config)))
        configs.append(config)
    return configs


def chosen(config: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(config[name] for name in ("linear.activation", "linear.algorithm", "add.activation"))


def test_exhaustive_varies_the_last_dimension_fastest() -> None:
    u8, s8 = "uint8 asym", "int8 sym"
    configs = run(strategies.get("exhaustive").bind(few(), small().goal), small())
    assert list(map(chosen, configs)) == [
        (u8, "mse", u8),
        (u8, "mse", s8),
        (u8, "kl", u8),
        (u8, "kl", s8),
        (s8, "mse", u8),
        (s8, "mse", s8),
        (s8, "kl", u8),
        (s8, "kl", s8),
    ]


def test_exhaustive_makes_no_product_of_a_large_space() -> None:
    sim = Simulation()
    strategy = strategies.get("exhaustive", fallback=True).bind(sim.space().per_op(), sim.goal)
    assert len(run(strategy, sim, 3)) == 3  # of 64 ** 60


def test_exhaustive_with_fallback_gets_past_points_that_give_the_same_recipe() -> None:
    space = few()
    configs = run(strategies.get("exhaustive", fallback=True).bind(space, small().goal), small())
    recipes = {space.recipe(config) for config in configs}
    assert len(recipes) == len(configs) > 50
    assert any(not recipe.config("a").is_int8 and recipe.config("b").is_int8 for recipe in recipes)


@pytest.mark.parametrize("name", SAMPLED)
def test_calls_stay_in_int8_without_fallback(name: str) -> None:
    strategy = strategies.get(name).bind(few(), small().goal, seed=1)
    recipes = [strategy.space.recipe(config) for config in run(strategy, small())]
    assert {len(recipe.int8_calls) for recipe in recipes} == {4}
    assert 4 <= len(set(recipes)) <= 8


@pytest.mark.parametrize("name", SAMPLED)
def test_calls_may_be_in_float_with_fallback(name: str) -> None:
    strategy = strategies.get(name, fallback=True).bind(few(), small().goal, seed=1)
    recipes = [strategy.space.recipe(config) for config in run(strategy, small(), 9)]
    assert any(len(recipe.int8_calls) < 4 for recipe in recipes)


def test_a_space_of_quantization_choices_only_has_no_choice_of_precision() -> None:
    sim = small()
    rules = {"b": {"activation": {"dtype": ["bf16", "fp32"]}, "weight": {"dtype": ["bf16", "fp32"]}}}
    mixed = build_space(sim.graph, CAPABILITIES, op_name_dict=rules, rankings=sim.rankings)
    for space in (mixed, mixed.per_op(), mixed.per_block()):
        only = space.quantization_only()
        assert not any({"int8", "float"} & set(map(str, d.values)) for d in only.dimensions)
        assert not any(d.name.startswith("float") or d.name == "op/b" for d in only.dimensions)
        assert only.default().int8_calls == ("a", "c", "d:add")
        assert space.recipe(space.config(only.default())) == only.default()


def test_the_gaussian_process_sees_the_constraint() -> None:
    """The more calls in int8 the faster: speed alone draws it to all sixty, a loss with them to the forty that pass."""
    sim = Simulation()
    kept = {"linear", "conv", "depthwise", "matmul", "add"}
    space = sim.space().narrow({d.name: d.default for d in sim.space().dimensions if d.name not in kept})
    suggested = {}
    for loss in (0.0, sim.tolerance / 40):
        engine = strategies.ConstrainedOptuna(space, sim.goal, gp_sampler(seed=0, startup_trials=6))
        counts = suggested[loss] = []
        for i in range(10):
            counts.append(len(space.recipe(engine.suggest(str(i))).int8_calls))
            drop = loss * counts[-1]
            result = {"latency_ratio": 1 - counts[-1] / 100, "accuracy": 1 - drop, "accuracy_drop": drop}
            engine.on_trial_complete(str(i), {**result, "feasible": sim.goal.holds(drop)})
    free, bound = (statistics.median(counts[6:]) for counts in suggested.values())
    assert bound < free, suggested


def test_the_gaussian_process_repeats_itself_by_seed() -> None:
    sim = small()
    twice = [run(strategies.get("bayesian", startup_trials=3).bind(few(), sim.goal, seed=5), sim) for _ in range(2)]
    assert twice[0] == twice[1]


# names


class Mine(Strategy):
    name = "mine"

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.depth = depth

    def next_recipe(self, history: Any) -> Any:
        yield from ()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that installs entry points: name to "module:attribute"."""

    def install(**values: str) -> None:
        points = [metadata.EntryPoint(name.rstrip("_"), value, plugins.GROUP) for name, value in values.items()]
        monkeypatch.setattr(plugins, "entry_points", lambda group: [p for p in points if p.group == group])

    monkeypatch.setitem(sys.modules, "plugged", sys.modules[__name__])
    return install


@pytest.mark.parametrize("name", ["Bayesian", "TPE", "RANDOM", "Exhaustive"])
def test_names_are_known_in_any_case(name: str) -> None:
    assert strategies.get(name).name == name.lower()


def test_an_installed_strategy_is_known_by_its_entry_point(installed: Any) -> None:
    installed(abc="plugged:Mine", broken="no_such_module:X")  # which is not imported
    strategy = strategies.get("ABC", depth=3)
    assert isinstance(strategy, Mine) and strategy.depth == 3


def test_a_built_in_name_wins(installed: Any) -> None:
    installed(random="plugged:Mine")
    assert not isinstance(strategies.get("random"), Mine)


@pytest.mark.parametrize(
    ("points", "name", "message"),
    [
        ({"abc": "plugged:run"}, "abc", "must be a class of raysq.strategies.Strategy"),
        ({"abc": "no_such_module:X"}, "abc", "can't be imported: No module named 'no_such_module'"),
        ({"abc": "plugged:X"}, "abc", "can't be imported"),
        ({"abc": "plugged:Mine", "abc_": "plugged:run"}, "abc", "brought by .*plugged:Mine.* and by .*plugged:run"),
        ({"abc": "plugged:Mine"}, "abd", "Did you mean 'abc'"),
    ],
)
def test_entry_points_that_can_not_be_used(installed: Any, points: dict[str, str], name: str, message: str) -> None:
    installed(**points)
    with pytest.raises(OptionError, match=message):
        strategies.get(name)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (
            "random",
            {"sigopt_api_token": "x"},
            "does not use 'sigopt_api_token': leave it out. It is an argument of sigopt",
        ),
        ("tpe", {"gamma": 0.3}, "does not use 'gamma': leave it out. It is an argument of tpe_hyperopt"),
        ("sigop", {}, "Did you mean 'sigopt'"),
        ("bayesian", {"fallback": 1}, "must be True or False, got 1"),
        ("bayesian", {"startup_trials": 1.5}, "whole number"),
    ],
)
def test_what_a_strategy_does_not_use_is_refused(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        strategies.get(name, **kwargs)
