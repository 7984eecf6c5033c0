"""Tree-structured Parzen estimators with the accuracy constraint, by Optuna."""

from __future__ import annotations

from typing import ClassVar

from optuna.samplers import TPESampler

from raysq.strategies.sampled import STARTUP_TRIALS, Modelled

__all__ = ["TPE", "tpe_sampler"]


class TPE(Modelled):
    """The default recipe, some random ones, then TPE (Bergstra et al. 2011) under the accuracy constraint.

    Unlike INC, whose `tpe` is HyperOpt's with a penalty for lost accuracy (see `tpe_hyperopt`) and divides by zero
    before its second trial, it is Optuna's, which models feasible and infeasible trials apart. It goes on after the
    first recipe that passes, within the budget of the search instead of 100 trials.

    Args:
        startup_trials: random trials before it models anything, >= 1.
        fallback: whether calls may run in float too.

    Raises:
        OptionError: `startup_trials` below 1.
    """

    name: ClassVar[str] = "tpe"

    def sampler(self) -> TPESampler:
        """Return Optuna's TPE."""
        return tpe_sampler(self.seed, self.startup_trials)


def tpe_sampler(seed: int, startup_trials: int = STARTUP_TRIALS) -> TPESampler:
    """Return a sampler that sees dimensions together and running trials as bad ones, so that slots differ."""
    return TPESampler(seed=seed, n_startup_trials=startup_trials, multivariate=True, constant_liar=True)
