"""Random recipes: what any other strategy must beat."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import ClassVar

from raysq.space import Dimension, Value
from raysq.strategies.base import Barrier, History, Proposal, Strategy

__all__ = ["Random"]


class Random(Strategy):
    """The default recipe, then points drawn at random; counts of float calls mostly small ones."""

    name: ClassVar[str] = "random"

    def next_recipe(self, history: History) -> Iterator[Proposal | Barrier]:
        """Yield random recipes without end; the base passes over those that were drawn before."""
        yield Proposal(self.space.default(), "default")
        rng = random.Random(self.seed)
        while True:
            point = {dimension.name: _draw(rng, dimension) for dimension in self.space.dimensions}
            yield Proposal(self.space.recipe(point), self.name)


def _draw(rng: random.Random, dimension: Dimension) -> Value:
    values = dimension.values
    if isinstance(values, range):  # half of the time the first, else log-uniform: evenly drawn, most would be in float
        return values[int(len(values) ** rng.random()) - 1 if rng.random() < 0.5 else 0]
    return rng.choice(values)
