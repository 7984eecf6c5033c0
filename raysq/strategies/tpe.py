"""Tree-structured Parzen estimators with the accuracy constraint, by Optuna."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from optuna.samplers import TPESampler

from raysq.errors import OptionError
from raysq.strategies.base import Barrier, History, Proposal, Strategy
from raysq.strategies.following import follow
from raysq.strategies.optuna_searcher import ConstrainedOptuna

__all__ = ["TPE", "tpe_sampler"]

STARTUP_TRIALS = 10  # Optuna's own default


class TPE(Strategy):
    """The default recipe, some random ones, then TPE (Bergstra et al. 2011) over the whole space.

    Args:
        startup_trials: random trials before it models anything, >= 1.

    Raises:
        OptionError: `startup_trials` below 1.
    """

    name: ClassVar[str] = "tpe"

    def __init__(self, startup_trials: int = STARTUP_TRIALS) -> None:
        if startup_trials < 1:
            raise OptionError(f"`startup_trials` must be at least 1, got {startup_trials}.")
        super().__init__()
        self.startup_trials = startup_trials

    def next_recipe(self, history: History) -> Iterator[Proposal | Barrier]:
        """Yield what the searcher suggests, the default first."""
        default = self.space.default()
        yield Proposal(default, "default")
        if not self.space.dimensions:
            return
        sampler = tpe_sampler(self.seed, self.startup_trials)
        engine = ConstrainedOptuna(self.space, self.goal, sampler, points=[self.space.config(default)])
        yield from follow(engine, self.space, history, self.name)


def tpe_sampler(seed: int, startup_trials: int = STARTUP_TRIALS) -> TPESampler:
    """Return a sampler that sees dimensions together and running trials as bad ones, so that slots differ."""
    return TPESampler(seed=seed, n_startup_trials=startup_trials, multivariate=True, constant_liar=True)
