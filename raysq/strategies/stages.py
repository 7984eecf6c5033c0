"""What staged strategies are made of: trials that don't depend on each other, then a barrier."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from functools import reduce
from itertools import combinations, product

from raysq.errors import SpaceError
from raysq.features import FEATURES
from raysq.recipe import Approach, Recipe
from raysq.space import SearchSpace
from raysq.strategies.base import BARRIER, Barrier, History, Proposal
from raysq.switches import free_switches
from raysq.transfer import within

__all__ = ["Stage", "all_switches", "alphas", "dynamic", "every_switch", "least", "model_wise", "op_types", "together"]

Stage = Generator[Proposal | Barrier, None, list[Recipe]]  # returns what was tried

ELSEWHERE = (".approach", ".rounding")  # features that have a stage or a switch of their own


def together(proposals: Iterable[Proposal], history: History, until: int) -> Stage:
    """Yield proposals that don't depend on each other, then a barrier; return their recipes.

    What was tried before is not proposed again, but returned as well.

    Args:
        proposals: read no further than they are wanted.
        history: live.
        until: the stage ends when the search has made this many trials.
    """
    tried: dict[Recipe, None] = {}
    before = history.proposed
    rest = iter(proposals)
    while history.proposed < until and (proposal := next(rest, None)) is not None:
        if proposal.recipe not in tried and history.of(proposal.recipe) is None:
            yield proposal
        tried[proposal.recipe] = None
    if history.proposed > before:
        yield BARRIER
    return list(tried)


def least(history: History, recipes: Iterable[Recipe]) -> Recipe:
    """Return the recipe that lost least, the first of equals and of those that failed."""
    return min(recipes, key=history.loss)


def alphas(space: SearchSpace, history: History, until: int) -> Stage:
    """Try each alpha of a list that was given, for all groups at once, on the default recipe."""
    default = space.default()
    ways = space.model.alpha_variants()
    return (yield from together((Proposal(change(default), label) for label, change in ways), history, until))


def op_types(space: SearchSpace, start: Recipe) -> Iterator[Proposal]:
    """Yield ways to quantize all calls, ever further from the default: one choice of a type changed, then two.

    They are made as they are asked for, never the whole product.

    Args:
        space: its choices per type of call.
        start: the smoothing and transforms of all.
    """
    default = space.default()
    features = [name for name in space.choices if _is_feature(space, name) and not name.endswith(ELSEWHERE)]
    effective = {name: [v for v in space.choices[name] if space.recipe({name: v}) != default] for name in features}
    choices = {name: values for name, values in effective.items() if values}
    for count in range(len(choices) + 1):
        for names in combinations(choices, count):
            for values in product(*(choices[name] for name in names)):
                point = dict(zip(names, values, strict=True))
                recipe = replace(space.recipe(point), smoothing=start.smoothing, transforms=start.transforms)
                label = ", ".join(f"{name} {value}" for name, value in point.items()) or "all in int8"
                yield Proposal(recipe, label)


def dynamic(space: SearchSpace, recipe: Recipe) -> Iterator[Proposal]:
    """Yield the recipe with all calls dynamic that may be static or dynamic; nothing where there are none."""
    values = {name: choices for name, choices in space.choices.items() if _is_feature(space, name)}
    both = [name for name, choices in values.items() if name.endswith(".approach") and Approach.DYNAMIC in choices[1:]]
    if both:
        yield Proposal(within(space.narrow(dict.fromkeys(both, Approach.DYNAMIC.value)), recipe), "dynamic")


def all_switches(space: SearchSpace, recipe: Recipe) -> Iterator[Proposal]:
    """Yield the recipe with every switch on that isn't fixed; nothing where all are, or none would leave int8."""
    free = free_switches(space).values()
    try:
        on = reduce(lambda narrowed, switch: switch.narrow(narrowed, True), free, space)
    except SpaceError:
        return
    if free:
        yield Proposal(within(on, recipe), "all switches")


def every_switch(space: SearchSpace, recipe: Recipe) -> Iterator[Proposal]:
    """Yield the recipe with each switch turned by itself: on, or off where it is on."""
    for name, switch in free_switches(space).items():
        on, off = (within(switch.narrow(space, value), recipe) for value in (True, False))
        yield Proposal(on, name) if on != recipe else Proposal(off, f"no {name}")


def model_wise(
    space: SearchSpace, history: History, few: int, max_trials: int
) -> Generator[Proposal | Barrier, None, Recipe]:
    """Try alphas that were given and a few ways to quantize all calls; return the recipe that lost least.

    If one passes, the rest of the budget goes to more of them; else dynamic quantization is tried, if there is any.

    Args:
        space: what may be tried.
        history: live.
        few: how many ways are tried at first, half of `max_trials` at most.
        max_trials: of the whole search.
    """
    half = -(-max_trials // 2)
    tried = (yield from alphas(space, history, half)) or [space.default()]
    ways = op_types(space, least(history, tried))
    tried += yield from together(ways, history, min(half, history.proposed + few))
    if history.best is not None:
        tried += yield from together(ways, history, max_trials)
    else:
        tried += yield from together(dynamic(space, least(history, tried)), history, half)
    return least(history, tried)


def _is_feature(space: SearchSpace, name: str) -> bool:
    return not space.model.is_about(name) and "." in name and name.rpartition(".")[2] in FEATURES
