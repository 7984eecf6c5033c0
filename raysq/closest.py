"""The point of a space's dimensions that comes closest to a recipe: what is left of it takes overrides."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from raysq.description import family
from raysq.features import (
    FEATURES,
    FLOAT_CALLS,
    FLOAT_DTYPE,
    Per,
    Value,
    block_of,
    features_of,
    group_of,
    int8_or_float,
)
from raysq.recipe import Recipe

if TYPE_CHECKING:
    from raysq.space import SearchSpace

__all__ = ["closest_point"]


def closest_point(space: SearchSpace, recipe: Recipe) -> dict[str, Value]:
    """Return what a recipe has in the dimensions that are about calls; those it doesn't need are left out."""
    if space.per is Per.BLOCK:
        precisions = {**_blocks_of(space, recipe), **_families_of(space, recipe, {}, space.outside_blocks)}
    else:
        counts = _counts_of(space, recipe)
        families = _families_of(space, recipe, counts, space.flippable)  # shortens the counts
        precisions = {**counts, **families}
    return {**precisions, **_features_of(space, recipe)}


def _counts_of(space: SearchSpace, recipe: Recipe) -> dict[str, Value]:
    """Return how much of each ranking's top is float; a ranking that adds nothing to the others has none."""
    tops: dict[str, tuple[str, ...]] = {}
    for name in space.rankings:
        calls = space.ranking(name)
        k = next((i for i, call in enumerate(calls) if recipe.config(call).is_int8), len(calls))
        fitting = [n for n in space.choices[FLOAT_CALLS + name] if isinstance(n, int) and n <= k]
        tops[name] = calls[: max(fitting, default=0)]
    counts: dict[str, Value] = {}
    covered: set[str] = set()
    for name, top in sorted(tops.items(), key=lambda item: -len(item[1])):
        if not covered.issuperset(top):
            counts[FLOAT_CALLS + name] = len(top)
            covered.update(top)
    return counts


def _families_of(
    space: SearchSpace, recipe: Recipe, counts: dict[str, Value], flippable: Iterable[str]
) -> dict[str, Value]:
    """Return the precision of each family, and shorten `counts` by what a float family explains already."""
    tops = {key: space.ranking(key.removeprefix(FLOAT_CALLS))[: int(k)] for key, k in counts.items()}
    covered = {call for top in tops.values() for call in top}
    members: dict[str, list[str]] = defaultdict(list)
    for call in flippable:
        members[family(space.graph[call])].append(call)
    whole = {
        name
        for name, calls in members.items()
        if not any(recipe.config(call).is_int8 for call in calls) and not covered.issuperset(calls)
    }
    for key, top in tops.items():
        explained = [family(space.graph[call]) in whole for call in top]
        counts[key] = next((i + 1 for i in range(len(top) - 1, -1, -1) if not explained[i]), 0)
    return {name: "float" if name in whole else "int8" for name in members}


def _blocks_of(space: SearchSpace, recipe: Recipe) -> dict[str, Value]:
    """Return what most calls of each block run in."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for call in space.flippable:
        if block := block_of(space.graph[call]):
            votes[block][int8_or_float(recipe.config(call))] += 1
    return _winners(votes)


def _features_of(space: SearchSpace, recipe: Recipe) -> dict[str, Value]:
    """Return what most int8 calls of each group have, and what most float calls run in."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for call in space.options:
        config = recipe.config(call)
        if config.is_int8:
            for feature in features_of(space.graph[call]):
                votes[f"{group_of(space.graph[call])}.{feature}"][FEATURES[feature](config)] += 1
        elif call in space.flippable:
            votes[FLOAT_DTYPE][config.precision.value] += 1
    return _winners(votes)


def _winners(votes: dict[str, Counter[str]]) -> dict[str, Value]:
    return {name: counter.most_common(1)[0][0] for name, counter in votes.items()}
