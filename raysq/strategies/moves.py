"""Recipes made of other recipes of a space: calls into float and back, one feature changed, rankings completed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from raysq.calibration.minmax import MinMax
from raysq.features import FEATURES, FLOAT_DTYPE
from raysq.recipe import Approach, Granularity, OpConfig, Precision, Recipe, Rounding
from raysq.space import SearchSpace
from raysq.transfer import within

__all__ = [
    "Change",
    "float_precisions",
    "framework_default",
    "in_float",
    "in_int8",
    "other_values",
    "rankings",
    "with_feature",
]

Change = Callable[[Recipe], Recipe]


def rankings(space: SearchSpace) -> dict[str, tuple[str, ...]]:
    """Return all rankings of the calls that may be int8 or float, each completed; without any, small calls first."""
    calls = sorted(space.graph.calls, key=lambda call: call.macs)
    every = space.with_ranking("macs", (call.name for call in calls)).ranking("macs")
    ranked = {name: tuple(dict.fromkeys([*space.ranking(name), *every])) for name in space.rankings}
    return ranked or {"macs": every}


def float_precisions(space: SearchSpace) -> list[Precision]:
    """Return the float types that some call offers beside int8, the default first."""
    return [Precision(str(value)) for value in space.choices.get(FLOAT_DTYPE, ())]


def in_float(space: SearchSpace, calls: Iterable[str], precision: Precision, recipe: Recipe) -> Recipe:
    """Return the recipe with these calls in a float type, or in the one they have."""
    changes = {}
    for call in calls:
        floats = [config for config in space.options[call] if not config.is_int8]
        changes[call] = next((config for config in floats if config.precision is precision), floats[0])
    return recipe.with_ops(changes)


def in_int8(space: SearchSpace, calls: Iterable[str], like: Recipe, recipe: Recipe) -> Recipe:
    """Return the recipe with these calls in int8, as another recipe has them, or else by their first int8 option."""
    changes = {}
    for call in calls:
        if not recipe.config(call).is_int8:
            config = like.config(call)
            changes[call] = config if config.is_int8 else next(c for c in space.options[call] if c.is_int8)
    return recipe.with_ops(changes)


def other_values(space: SearchSpace, feature: str, recipe: Recipe) -> list[str]:
    """Return the values of a feature that would change a recipe."""
    tables = (choices for name, choices in space.choices.items() if name.rpartition(".")[2] == feature)
    named = dict.fromkeys(str(value) for choices in tables for value in choices)
    return [value for value in named if with_feature(space, feature, value, recipe) != recipe]


def with_feature(
    space: SearchSpace, feature: str, value: str, recipe: Recipe, calls: Sequence[str] | None = None
) -> Recipe:
    """Return the recipe with one feature changed in all int8 calls that can, or in those named that can."""
    changes = {}
    for call, configs in space.options.items():
        now = recipe.config(call)
        if now.is_int8 and (calls is None or call in calls):
            same = (c for c in configs if c.is_int8 and _agree(c, now, feature) and FEATURES[feature](c) == value)
            changes[call] = next(same, now)
    return recipe.with_ops(changes)


def _agree(one: OpConfig, other: OpConfig, but: str) -> bool:
    return all(read(one) == read(other) for name, read in FEATURES.items() if name != but)


def framework_default(space: SearchSpace) -> Recipe:
    """Return the recipe of a space that is nearest to what a framework does by itself.

    That is: the whole model in int8, static, ranges from minimum to maximum, weights per channel and rounded to the
    nearest, nothing smoothed or transformed. Types and schemes are the first that the space has.
    """
    default = space.default()
    plain = {
        call: replace(
            config,
            approach=Approach.STATIC,
            activation=replace(config.activation, algorithm=MinMax()),
            weight=replace(config.weight, algorithm=MinMax(), granularity=Granularity.PER_CHANNEL),
            rounding=Rounding.NEAREST,
        )
        for call, config in default.ops.items()
    }
    return within(space, Recipe(plain))
