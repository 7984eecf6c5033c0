"""Strategies bound to a simulation, and driven as Ray Tune would."""

from __future__ import annotations

from typing import Any

import torch
from ray.tune.search import Searcher
from simulation import Simulation

from raysq import strategies
from raysq.space import SearchSpace
from raysq.strategies.base import Strategy

TRIALS = 18
ARGUMENTS: dict[str, dict[str, Any]] = {
    "hawq_v2": {"hawq_v2_loss": torch.nn.functional.mse_loss},
    "bayesian": {"startup_trials": TRIALS - 1},  # what comes then takes seconds each; tests/strategies/test_sampled.py
    "constrained": {"startup_trials": 10 * TRIALS},  # told more than it runs: a point in float may stand for many
}


def make(name: str, sim: Simulation, space: SearchSpace, trials: int = TRIALS, **kwargs: Any) -> Strategy:
    strategy = strategies.get(name, **{**ARGUMENTS.get(name, {}), **kwargs})
    return strategy.bind(space, sim.goal, trials, seed=0, costs=sim.costs)


def drive(strategy: Strategy, sim: Simulation, slots: int = 1, trials: int = TRIALS) -> list[dict[str, Any]]:
    """Run trials as Ray Tune would, the oldest ending first; return the configs in the order of suggestion."""
    configs: list[dict[str, Any]] = []
    running: list[int] = []
    finished = False
    while True:
        suggestion = None
        if not finished and len(running) < slots and len(configs) < trials:
            suggestion = strategy.suggest(str(len(configs)))
            finished = suggestion == Searcher.FINISHED
            assert suggestion is not None or running  # it may wait only for what is running
        if isinstance(suggestion, dict):
            running.append(len(configs))
            configs.append(suggestion)
        elif running:
            number = running.pop(0)
            result = sim.run(strategy.space.recipe(configs[number]))
            strategy.on_trial_complete(str(number), result, error=result["status"] == "failed")
        else:
            return configs
