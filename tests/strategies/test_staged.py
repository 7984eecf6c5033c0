"""INC's staged strategies: what each proposes, in which order, and where it ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from simulation import Simulation
from test_strategies import drive, make

from raysq.model_choices import ModelChoices
from raysq.space import SearchSpace

BUDGET = 50
NAMES = ("inc_auto", "conservative", "basic", "mse")
SWITCHES = ["adaround", "first_op_float", "last_op_float", "pre_post_process_float"]  # those of the simulation


def labels(
    name: str, sim: Simulation, space: SearchSpace | None = None, trials: int = BUDGET, **kwargs: Any
) -> list[str]:
    strategy = make(name, sim, space or sim.space(), trials, **kwargs)
    return [config["label"] for config in drive(strategy, sim, trials=trials)]


def with_alphas(space: SearchSpace, *alphas: float) -> SearchSpace:
    model = ModelChoices({"alpha.fc": ("blocks.0.fc1/0",)}, {}, {"alpha.fc": ("off", *alphas)}, everywhere=alphas)
    return replace(space, model=model)
