"""Every recipe of a space, one after the other."""

from __future__ import annotations

from itertools import product
from typing import ClassVar

from raysq.space import SearchSpace
from raysq.strategies.base import History, Proposal, Steps
from raysq.strategies.sampled import Sampled

__all__ = ["Exhaustive"]


class Exhaustive(Sampled):
    """The Cartesian product of the dimensions, the last one varying fastest, from the default on.

    Points are made one at a time, so the size of the space doesn't matter; it ends with the last one.
    Unlike INC, which varies each op by itself, it varies the space's dimensions, about twenty that many calls share;
    give a `space` made by `SearchSpace.per_op()` for INC's order. It goes on after the first recipe that passes,
    within the budget of the search instead of 100 trials.

    Args:
        fallback: whether calls may run in float too.
    """

    name: ClassVar[str] = "exhaustive"

    def sample(self, space: SearchSpace, history: History) -> Steps:
        """Yield all recipes, each once: points that differ only in what no call has give the same one."""
        seen: set[str] = set()
        names = [dimension.name for dimension in space.dimensions]
        for values in product(*(dimension.values for dimension in space.dimensions)):
            recipe = space.recipe(dict(zip(names, values, strict=True)))
            if recipe.digest not in seen and history.of(recipe) is None:
                seen.add(recipe.digest)
                yield Proposal(recipe, self.name)
