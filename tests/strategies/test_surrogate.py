"""The model of loss and latency: its regression against a textbook form, and that results correct it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from simulation import RoughSimulation, Simulation

from raysq.recipe import Recipe
from raysq.result import TrialRecord
from raysq.sensitivities import MSE
from raysq.strategies.surrogate import Surrogate, posterior
from raysq.tuning.records import record


def test_the_posterior_is_that_of_the_primal_form() -> None:
    rng = np.random.default_rng(0)
    mean, variance, shared = rng.normal(size=7), rng.random(7), rng.normal(size=(7, 2))
    rows, values, noise = rng.integers(0, 2, (4, 7)).astype(float), rng.normal(size=4), rng.random(4)
    prior = np.linalg.inv(np.diag(variance) + shared @ shared.T)
    precision = prior + rows.T @ np.diag(1 / noise) @ rows  # Rasmussen & Williams, eq. 2.8
    expected = np.linalg.solve(precision, prior @ mean + rows.T @ (values / noise))
    found, std = posterior(mean, variance, shared, rows, values, noise)
    assert found == pytest.approx(expected)
    assert std == pytest.approx(np.sqrt(np.diag(np.linalg.inv(precision))))


def test_without_measurements_the_posterior_is_the_prior() -> None:
    mean, std = posterior(np.ones(3), np.full(3, 4.0), np.zeros((3, 0)), [], np.zeros(0), np.zeros(0))
    assert list(mean) == [1, 1, 1] and list(std) == [2, 2, 2]


def make(sim: Simulation) -> tuple[Surrogate, Recipe]:
    base = sim.space().default()
    times = sim.op_times() if isinstance(sim, RoughSimulation) else None
    return Surrogate(sim.space(), base, sim.costs(MSE(), base), times), base


def trial(sim: Simulation, recipe: Recipe) -> TrialRecord:
    return record(0, {}, sim.run(recipe), recipe=recipe)


def test_what_was_measured_is_predicted() -> None:
    sim = RoughSimulation(sensitive=0)
    surrogate, base = make(sim)
    measured = trial(sim, base)
    assert measured.ratio is not None
    before = abs(surrogate.ratio(base, []) - measured.ratio)
    assert abs(surrogate.ratio(base, [measured]) - measured.ratio) < min(before, 0.01)


def test_the_optimum_holds_the_limit_that_it_is_given() -> None:
    sim = Simulation(seed=3)
    surrogate, base = make(sim)
    history = [trial(sim, base)]
    int8 = []
    for limit in (0.1, 0.01, 0.001):
        found = surrogate.optimum(history, limit)
        assert found is not None and found.loss <= limit * 1.001
        int8.append(len(found.recipe.int8_calls))
    assert int8 == sorted(int8, reverse=True)  # the tighter, the more is in float


def test_a_call_that_cost_more_than_expected_is_left_in_float() -> None:
    sim = Simulation(sensitive=0)
    surrogate, base = make(sim)
    culprit = sim.graph.calls[0].name
    sim.loss[culprit] = 0.05  # no sensitivity knows
    history = [trial(sim, base)]
    for _ in range(12):
        found = surrogate.optimum(history, sim.tolerance)
        assert found is not None
        history.append(trial(sim, found.recipe))
        if history[-1].feasible:
            break
    assert history[-1].feasible and culprit not in history[-1].recipe.int8_calls


def test_other_ways_to_quantize_say_nothing_about_the_loss_of_this_one() -> None:
    sim = Simulation(seed=1)
    surrogate, base = make(sim)
    other = sim.space().recipe({f"{group}.algorithm": "minmax" for group in ("conv", "linear", "matmul")})
    assert other != base
    history = [trial(sim, base)]
    with_other = surrogate.optimum([*history, trial(sim, other)], sim.tolerance)
    assert with_other is not None
    alone = surrogate.optimum(history, sim.tolerance)
    assert alone is not None and with_other.loss == pytest.approx(alone.loss)


def test_an_estimate_weighs_less_than_a_score() -> None:
    sim = Simulation(seed=3)
    surrogate, base = make(sim)
    whole = [trial(sim, base)]
    other = trial(
        sim, next(r for r in (surrogate.optimum(whole, limit).recipe for limit in (0.01, 0.001)) if r != base)
    )
    far_off = replace(other, accuracy_drop=whole[0].loss * 0.9, worst_drop=whole[0].loss * 0.9)
    losses = [surrogate._losses([*whole, replace(far_off, drop_std=std)])[0].sum() for std in (0.0, 1.0)]
    alone = surrogate._losses(whole)[0].sum()
    assert abs(losses[1] - alone) < 0.1 * abs(losses[0] - alone)
