"""Random recipes: what any other strategy must beat."""

from __future__ import annotations

import random
from typing import ClassVar

from raysq.features import Value
from raysq.space import Dimension, SearchSpace
from raysq.strategies.base import History, Proposal, Steps
from raysq.strategies.sampled import Sampled

__all__ = ["Random"]


class Random(Sampled):
    """The default recipe, then points drawn at random; counts of float calls mostly small ones.

    Unlike INC, which builds all combinations before it draws and then yields one of them for ever, it draws each point
    by itself; it goes on after the first recipe that passes, within the budget of the search instead of 100 trials.

    Args:
        fallback: whether calls may run in float too.
    """

    name: ClassVar[str] = "random"

    def sample(self, space: SearchSpace, history: History) -> Steps:
        """Yield random recipes without end; the base passes over those that were drawn before."""
        rng = random.Random(self.seed)
        while True:
            point = {dimension.name: _draw(rng, dimension) for dimension in space.dimensions}
            yield Proposal(space.recipe(point), self.name)


def _draw(rng: random.Random, dimension: Dimension) -> Value:
    values = dimension.values
    if isinstance(values, range):  # half of the time the first, else log-uniform: evenly drawn, most would be in float
        return values[int(len(values) ** rng.random()) - 1 if rng.random() < 0.5 else 0]
    return rng.choice(values)
