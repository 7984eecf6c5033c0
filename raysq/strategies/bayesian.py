"""Gaussian processes with the accuracy constraint, by Optuna."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import GPSampler
from optuna.trial import FrozenTrial

from raysq.strategies.sampled import STARTUP_TRIALS, Modelled

__all__ = ["Bayesian", "gp_sampler"]


class Bayesian(Modelled):
    """The default recipe, some random ones, then the expected improvement of a Gaussian process.

    One process models latency, another the lost accuracy (Gardner et al. 2014, constrained expected improvement). They
    are fitted in the driver before each suggestion: seconds in a space of some twenty dimensions, minutes in one with
    a dimension per call.
    Unlike INC, which models the accuracy alone, rounds continuous numbers to options, and repeats itself for ever
    in a small space, it looks for the fastest recipe that passes, knows that options have no order, and ends when it
    suggests nothing new, or with the budget of the search instead of 100 trials.

    Args:
        startup_trials: random trials before it models anything, >= 1.
        fallback: whether calls may run in float too.

    Raises:
        OptionError: `startup_trials` below 1.
    """

    name: ClassVar[str] = "bayesian"

    def sampler(self) -> GPSampler:
        """Return Optuna's Gaussian processes."""
        return gp_sampler(self.seed, self.startup_trials)


def gp_sampler(seed: int, startup_trials: int = STARTUP_TRIALS) -> GPSampler:
    """Return a sampler that takes results as noisy, which timings are."""
    return _GP(seed=seed, n_startup_trials=startup_trials, deterministic_objective=False)


class _GP(GPSampler):
    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        with np.errstate(invalid="ignore"):  # it divides 0 by 0 where one point is far better than all others
            return super().sample_relative(study, trial, search_space)
