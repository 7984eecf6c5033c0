"""A recipe of one model carried over to the space of another: the closest that may be tried there."""

from __future__ import annotations

from dataclasses import replace

from raysq.features import FEATURES, canonical
from raysq.recipe import OpConfig, Recipe
from raysq.space import SearchSpace

__all__ = ["adapted"]


def adapted(recipe: Recipe, space: SearchSpace) -> Recipe | None:
    """Return the recipe of a space that is closest to this one; one that lies in the space is returned as it is.

    Calls and groups are told by name. Each call runs as the recipe says, or by the option that has most in common with
    that, the same precision first; one that the recipe doesn't name is fp32 there too. What the space doesn't have is
    dropped, fixed smoothing scales with it.

    Returns:
        None where the two have no call in common, or none of them would be left in int8.
    """
    if not recipe.ops.keys() & space.options.keys():
        return None
    alphas = {group: alpha for group, alpha in recipe.smoothing.items() if not isinstance(alpha, tuple)}
    ops = {call: _closest(canonical(recipe.config(call)), options) for call, options in space.options.items()}
    found = space.model.within(replace(recipe, ops=ops, smoothing=alphas))
    return found if found.int8_calls else None


def _closest(wanted: OpConfig, options: tuple[OpConfig, ...]) -> OpConfig:
    def likeness(option: OpConfig) -> tuple[bool, int]:
        alike = sum(read(option) == read(wanted) for read in FEATURES.values()) if wanted.is_int8 else 0
        return option.is_int8 == wanted.is_int8, alike

    return wanted if wanted in options else max(options, key=likeness)
