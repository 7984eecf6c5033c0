"""A recipe from outside of a space carried over to it: the closest that may be tried there."""

from __future__ import annotations

from dataclasses import replace

from raysq.features import FEATURES, canonical
from raysq.recipe import OpConfig, Recipe
from raysq.space import SearchSpace

__all__ = ["adapted", "within"]


def within(space: SearchSpace, recipe: Recipe) -> Recipe:
    """Return the recipe of a space that is closest to one from outside: what it allows stays as it is.

    Calls and groups are told by name. Each call runs as the recipe says, or by the option that has most in common with
    that, the same precision first; one that the recipe doesn't name is fp32 there too.
    """
    ops = {call: _closest(canonical(recipe.config(call)), options) for call, options in space.options.items()}
    return space.model.within(replace(recipe, ops=ops))


def adapted(recipe: Recipe, space: SearchSpace) -> Recipe | None:
    """Return the recipe of a space that is closest to one of another model; one that lies in the space as it is.

    What the space doesn't have is dropped, fixed smoothing scales with it.

    Returns:
        None where the two have no call in common, or none of them would be left in int8.
    """
    if not recipe.ops.keys() & space.options.keys():
        return None
    alphas = {group: alpha for group, alpha in recipe.smoothing.items() if not isinstance(alpha, tuple)}
    found = within(space, recipe.with_smoothing(alphas))
    return found if found.int8_calls else None


def _closest(wanted: OpConfig, options: tuple[OpConfig, ...]) -> OpConfig:
    def likeness(option: OpConfig) -> tuple[bool, int]:
        alike = sum(read(option) == read(wanted) for read in FEATURES.values()) if wanted.is_int8 else 0
        return option.is_int8 == wanted.is_int8, alike

    return wanted if wanted in options else max(options, key=likeness)
