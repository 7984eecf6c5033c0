"""Tree-structured Parzen estimators by HyperOpt, which knows no constraints: infeasible trials are penalised."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from ray.tune.search.hyperopt import HyperOptSearch

from raysq.checks import check_whole
from raysq.errors import OptionError
from raysq.space import SearchSpace
from raysq.strategies.base import METRIC, History, Steps
from raysq.strategies.following import follow, penalised
from raysq.strategies.sampled import Sampled
from raysq.tuning.domains import domains

__all__ = ["HyperOptTPE"]


class HyperOptTPE(Sampled):
    """The default recipe, `n_initial` random ones, then HyperOpt's TPE.

    Unlike INC, whose `tpe` this is, it ranks infeasible recipes behind all feasible ones instead of adding to the
    logarithm of a latency that it divides by zero before its second trial, searches dynamic quantization too where
    `approach` allows it, and goes on after the first recipe that passes, within the budget of the search instead of
    100 trials. INC's `gamma` was 0.3; the default is HyperOpt's own.

    Args:
        n_initial: random trials before it models anything, >= 1.
        gamma: share of the trials that count as good, in (0, 1).
        fallback: whether calls may run in float too.

    Raises:
        OptionError: a value out of its range, or hyperopt is not installed.
    """

    name: ClassVar[str] = "tpe_hyperopt"

    def __init__(self, n_initial: int = 10, gamma: float = 0.25, fallback: bool = False) -> None:
        if not 0 < gamma < 1:
            raise OptionError(f"`gamma` must lie in (0, 1), got {gamma}.")
        try:
            import hyperopt  # noqa: F401
        except ImportError as exc:
            raise OptionError("strategy 'tpe_hyperopt' needs hyperopt. Run `pip install 'raysq[hyperopt]'`.") from exc
        super().__init__(fallback)
        check_whole("n_initial", n_initial, 1)
        self.n_initial = n_initial
        self.gamma = gamma

    def sample(self, space: SearchSpace, history: History) -> Steps:
        """Yield what HyperOpt suggests."""
        engine = HyperOptSearch(
            space=HyperOptSearch.convert_search_space(domains(space)),
            metric=METRIC,
            mode="min",
            n_initial_points=self.n_initial,
            random_state_seed=self.seed,
            gamma=self.gamma,
        )
        yield from follow(engine, space, history, self.name, view=partial(penalised, goal=self.goal))
