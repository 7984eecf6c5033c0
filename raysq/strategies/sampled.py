"""What the strategies share that sample a space instead of walking through it in stages."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from optuna.samplers import BaseSampler

from raysq.checks import check_whole
from raysq.errors import OptionError
from raysq.space import SearchSpace
from raysq.strategies.base import History, Proposal, Steps, Strategy
from raysq.strategies.following import follow, teach
from raysq.strategies.optuna_searcher import ConstrainedOptuna

__all__ = ["STARTUP_TRIALS", "ByOptuna", "Modelled", "Sampled"]

STARTUP_TRIALS = 10  # Optuna's own default, for all its samplers


class Sampled(Strategy):
    """The default recipe, then what `sample` draws.

    Args:
        fallback: whether calls that may run in int8 may run in float too; False: only how they run in int8 is searched.

    Raises:
        OptionError: `fallback` is no bool.
    """

    def __init__(self, fallback: bool = False) -> None:
        if not isinstance(fallback, bool):
            raise OptionError(f"`fallback` must be True or False, got {fallback!r}.")
        super().__init__()
        self.fallback = fallback

    def next_recipe(self, history: History) -> Steps:
        """Yield the default of what is searched, then the samples."""
        space = self.space if self.fallback else self.space.quantization_only()
        yield Proposal(space.default(), "default")
        if space.dimensions:
            yield from self.sample(space, history)

    @abstractmethod
    def sample(self, space: SearchSpace, history: History) -> Steps:
        """Yield recipes of a space that has dimensions; what `next_recipe` may assume holds here too."""


class ByOptuna(Sampled):
    """What a sampler of Optuna suggests, told of the cost and of the accuracy constraint."""

    front: ClassVar[bool] = False  # whether each objective is told for itself instead of the cost

    @abstractmethod
    def sampler(self) -> BaseSampler:
        """Return a new sampler of `self.seed`; asked for once per search."""

    def sample(self, space: SearchSpace, history: History) -> Steps:
        """Yield what the sampler suggests, told of the default first."""
        default = space.default()
        points = [space.config(default)]
        engine = ConstrainedOptuna(space, self.goal, self.sampler(), points=points, front=self.front)
        teach(engine, space, (known for known in history if known.recipe != default))  # of a warm start
        yield from follow(engine, space, history, self.name)


class Modelled(ByOptuna):
    """What a sampler suggests that models the trials after some random ones.

    Args:
        startup_trials: random trials before it models anything, >= 1.
        fallback: as `Sampled` has it.

    Raises:
        OptionError: `startup_trials` is no whole number of at least 1.
    """

    def __init__(self, startup_trials: int = STARTUP_TRIALS, fallback: bool = False) -> None:
        super().__init__(fallback)
        check_whole("startup_trials", startup_trials, 1)
        self.startup_trials = startup_trials
