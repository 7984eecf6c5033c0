"""Tree-structured Parzen estimators by HyperOpt, which knows no constraints: infeasible trials are penalised."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import ClassVar

from ray.tune.search.hyperopt import HyperOptSearch

from raysq.errors import OptionError
from raysq.strategies.base import METRIC, Barrier, History, Proposal, Strategy
from raysq.strategies.following import follow, penalised
from raysq.tuning.domains import domains

__all__ = ["HyperOptTPE"]


class HyperOptTPE(Strategy):
    """The default recipe, `n_initial` random ones, then HyperOpt's TPE over the whole space.

    Args:
        n_initial: random trials before it models anything, >= 1.
        gamma: share of the trials that count as good, in (0, 1).

    Raises:
        OptionError: a value out of its range, or hyperopt is not installed.
    """

    name: ClassVar[str] = "tpe_hyperopt"

    def __init__(self, n_initial: int = 10, gamma: float = 0.25) -> None:
        if n_initial < 1:
            raise OptionError(f"`n_initial` must be at least 1, got {n_initial}.")
        if not 0 < gamma < 1:
            raise OptionError(f"`gamma` must lie in (0, 1), got {gamma}.")
        try:
            import hyperopt  # noqa: F401
        except ImportError as exc:
            raise OptionError("strategy 'tpe_hyperopt' needs hyperopt. Run `pip install 'raysq[hyperopt]'`.") from exc
        super().__init__()
        self.n_initial = n_initial
        self.gamma = gamma

    def next_recipe(self, history: History) -> Iterator[Proposal | Barrier]:
        """Yield what the searcher suggests, the default first."""
        yield Proposal(self.space.default(), "default")
        if not self.space.dimensions:
            return
        engine = HyperOptSearch(
            space=HyperOptSearch.convert_search_space(domains(self.space)),
            metric=METRIC,
            mode="min",
            n_initial_points=self.n_initial,
            random_state_seed=self.seed,
            gamma=self.gamma,
        )
        yield from follow(engine, self.space, history, self.name, view=partial(penalised, goal=self.goal))
