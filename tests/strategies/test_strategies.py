"""The contract that every strategy keeps, on a simulated model of sixty calls, and what single ones promise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from driving import TRIALS, drive, make
from ray import cloudpickle
from ray.tune.search import Searcher
from simulation import CAPABILITIES, Simulation, make_call, make_graph

from raysq import strategies
from raysq.errors import OptionError
from raysq.goal import Goal
from raysq.graph import OpType
from raysq.result import Status
from raysq.space import SearchSpace, build_space
from raysq.strategies.base import BARRIER, History, Proposal, Strategy
from raysq.strategies.following import penalised
from raysq.tuning.records import record

NAMES = [kind.name for kind in strategies.ALL]
STAGED = {"inc_auto", "conservative", "basic", "mse", "mse_v2", "hawq_v2"}  # they end where their stages do


def bound(name: str, sim: Simulation, trials: int = TRIALS, **kwargs: Any) -> Strategy:
    return make(name, sim, sim.space(), trials, **kwargs)


def is_enough(name: str, trials: int) -> bool:
    """Whether a strategy spent its budget, or went through its stages."""
    return trials == TRIALS or (name in STAGED and 1 <= trials < TRIALS)


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_suggestions_lie_inside_the_space_and_differ(name: str, slots: int) -> None:
    sim = Simulation()
    strategy = bound(name, sim)
    configs = drive(strategy, sim, slots)
    recipes = {strategy.space.recipe(config).digest for config in configs}  # raises outside the space
    assert len(recipes) == len(configs)
    assert is_enough(name, len(configs))
    assert all(type(value) in (str, int) for config in configs for value in config.values())
    assert all(config["label"] for config in configs)


def net_of_three() -> SearchSpace:
    """A space in which a third of all recipes have no int8 call."""
    calls = [make_call(f"fc{i}", OpType.LINEAR) for i in range(3)]
    return build_space(make_graph(calls), CAPABILITIES).narrow(
        {"linear.algorithm": "minmax", "linear.approach": "static"}
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_proposal_has_a_call_in_int8(name: str) -> None:
    strategy = make(name, Simulation(), net_of_three())
    proposed = 0
    while isinstance(suggestion := strategy.suggest(str(proposed)), dict) and proposed < TRIALS:
        recipe = strategy.space.recipe(suggestion)
        assert recipe.int8_calls
        strategy.on_trial_complete(str(proposed), Simulation().run(recipe))
        proposed += 1
    assert proposed


@pytest.mark.parametrize("name", sorted({*NAMES} - {"conservative", "basic"}))
def test_the_default_recipe_is_first(name: str) -> None:
    strategy = bound(name, Simulation())
    assert strategy.space.recipe(strategy.suggest("0")) == strategy.space.default()


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_and_results_give_the_same_suggestions(name: str) -> None:
    sim = Simulation()
    assert drive(bound(name, sim), sim, slots=2) == drive(bound(name, sim), sim, slots=2)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_saved_and_goes_on(name: str, tmp_path: Path) -> None:
    sim = Simulation()
    first = bound(name, sim)
    drive(first, sim, trials=13)
    first.save(str(tmp_path / "state"))
    again = cloudpickle.loads(cloudpickle.dumps(bound(name, sim)))  # as a Tuner stores it
    again.restore(str(tmp_path / "state"))
    assert again.history[:] == first.history[:]
    assert again.suggest("next") == first.suggest("next")


@pytest.mark.parametrize("kind", ["failing", "nan"])
@pytest.mark.parametrize("name", NAMES)
def test_failed_trials_and_nan_do_not_stop_it(name: str, kind: str) -> None:
    sim = Simulation(**{kind: frozenset({"mse", "minmax"})})  # the default too
    strategy = bound(name, sim)
    assert is_enough(name, len(drive(strategy, sim)))
    failed = [r for r in strategy.history if r.status is Status.FAILED]
    assert failed and not any(r.feasible for r in failed)
    assert all(r.reason for r in failed)


@pytest.mark.parametrize("name", NAMES)
def test_a_lost_worker_does_not_stop_it(name: str) -> None:
    strategy = bound(name, Simulation())
    strategy.suggest("0")
    strategy.on_trial_complete("0", None, error=True)
    assert isinstance(strategy.suggest("1"), dict)


@pytest.mark.parametrize("name", NAMES)
def test_a_small_space_is_exhausted_and_the_search_ends(name: str) -> None:
    graph = make_graph([make_call("a:add", OpType.ADD), make_call("b:add", OpType.ADD)])
    sim = Simulation(graph=graph, sensitive=1)
    strategy = bound(name, sim, 1000)
    assert 1 <= len(drive(strategy, sim, slots=2, trials=1000)) <= 5**2
    assert strategy.suggest("more") == Searcher.FINISHED


@pytest.mark.parametrize("name", NAMES)
def test_a_single_recipe_is_tried_once(name: str) -> None:
    graph = make_graph([make_call("a:add", OpType.ADD)])
    only = {"add": {"activation": {"scheme": "sym", "dtype": ["int8"]}, "weight": {"dtype": "int8"}}}
    space = build_space(graph, CAPABILITIES, op_type_dict=only).narrow({"add": "int8"})
    sim = Simulation(graph=graph, sensitive=1)
    assert len(drive(make(name, sim, space), sim)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_it_works_on_the_per_op_space_and_without_rankings(name: str) -> None:
    sim = Simulation()
    for space in (sim.space().per_op(), build_space(sim.graph, CAPABILITIES)):
        assert is_enough(name, len(drive(make(name, sim, space), sim, slots=2)))


def test_an_unbound_strategy_says_what_to_do() -> None:
    with pytest.raises(OptionError, match=r"Call `strategy\.bind"):
        strategies.get("auto").suggest("0")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("auot", {}, "Did you mean 'auto'"),
        ("tpe", {"startup_trial": 3}, "Did you mean 'startup_trials'"),
        ("tpe", {"startup_trials": 0}, "at least 1"),
        ("random", {"n": 3}, "known are fallback"),
        ("tpe_hyperopt", {"gamma": 1.0}, r"\(0, 1\)"),
        ("tpe_hyperopt", {"n_initial": 0}, "at least 1"),
    ],
)
def test_get_refuses_what_it_does_not_know(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        strategies.get(name, **kwargs)


def test_what_is_proposed_twice_runs_once_and_endless_repetition_ends() -> None:
    class Same(Strategy):
        name = "same"

        def next_recipe(self, history: History) -> Any:
            while True:
                yield Proposal(self.space.default(), "again")

    sim = Simulation()
    assert len(drive(Same().bind(sim.space()), sim)) == 1


def test_a_barrier_lets_a_stage_run_in_parallel() -> None:
    class Stages(Strategy):
        name = "stages"

        def next_recipe(self, history: History) -> Any:
            for stage in ("linear", "conv"):
                best = min((r.accuracy_drop for r in history), default=math.inf)
                for value in self.space.choices[f"{stage}.algorithm"]:
                    yield Proposal(self.space.recipe({f"{stage}.algorithm": value}), f"{stage} after {best:.5f}")
                yield BARRIER

    sim = Simulation()
    serial, parallel = (drive(Stages().bind(sim.space()), sim, slots) for slots in (1, 4))
    assert parallel == serial


# optuna


def test_optuna_knows_the_constraint_and_the_failures() -> None:
    from optuna.samplers import RandomSampler
    from optuna.trial import TrialState

    sim = Simulation(failing=frozenset({"percentile(99.99)"}), sensitive=2)
    space = sim.space()
    searcher = strategies.ConstrainedOptuna(space, sim.goal, RandomSampler(seed=0))
    feasible = {}
    for i in range(12):
        recipe = space.recipe(searcher.suggest(str(i)))
        result = sim.run(recipe)
        feasible[i] = result["feasible"]
        searcher.on_trial_complete(str(i), {**result, "training_iteration": 1})
    for trial in searcher._ot_study.trials:
        if trial.state is TrialState.COMPLETE:
            assert (max(trial.constraints.values()) <= 0) == feasible[trial.number]
    assert {t.state for t in searcher._ot_study.trials} == {TrialState.COMPLETE, TrialState.FAIL}


def test_a_recipe_without_int8_is_infeasible_to_optuna() -> None:
    from optuna.samplers import RandomSampler

    searcher = strategies.ConstrainedOptuna(Simulation().space(), Goal(), RandomSampler(seed=0))
    searcher.suggest("a")
    searcher.on_trial_complete("a", {"latency_ratio": 1.0, "accuracy_drop": 0.0, "feasible": False})
    assert max(searcher._ot_study.trials[0].constraints.values()) > 0


def test_optuna_is_saved_and_goes_on(tmp_path: Path) -> None:
    from raysq.strategies.tpe import tpe_sampler

    sim = Simulation()
    space = sim.space()
    first, again = (strategies.ConstrainedOptuna(space, sim.goal, tpe_sampler(0)) for _ in range(2))
    for i in range(12):
        first.on_trial_complete(str(i), sim.run(space.recipe(first.suggest(str(i)))))
    first.save(str(tmp_path / "state"))
    again.restore(str(tmp_path / "state"))
    assert again.suggest("next") == first.suggest("next")


def test_penalties_order_infeasible_trials_by_their_loss() -> None:
    sim = Simulation()
    records = [record(i, {}, sim.run(sim.space().recipe({"float_calls.mse": k}))) for i, k in enumerate((0, 2, 20))]
    values = [penalised(r, sim.goal)["latency_ratio"] for r in records]
    assert [r.feasible for r in records] == [False, False, True]
    assert values == sorted(values, reverse=True)
