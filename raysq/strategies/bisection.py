"""Fallback sets without a model of them: how much of a ranking's top must be in float, then what of it may go back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raysq.recipe import Precision, Recipe
from raysq.space import SearchSpace
from raysq.strategies.base import BARRIER, History, Proposal, Steps
from raysq.strategies.moves import float_precisions, in_float, in_int8, other_values, rankings, with_feature

__all__ = ["bisected", "shrunk"]

PRUNE_FROM = 2  # float calls from which on only the ranking that lost least so far is climbed further


def bisected(space: SearchSpace, base: Recipe, history: History) -> Steps:
    """Put the 1, 2, 4, 8, … most sensitive calls in float until it passes, then bisect; the default float type first.

    With several rankings, only the best one is climbed beyond 2.
    """
    for precision in float_precisions(space):
        yield from _climb(space, base, precision, history)
        yield BARRIER
        if history.best is not None:
            yield from _bisect(space, base, precision, history)
            return


def shrunk(space: SearchSpace, base: Recipe, history: History, trials: int, gains: Mapping[str, float]) -> Steps:
    """Put float calls back to int8, those that gain most first, in ever smaller groups, each in other bits too.

    Without VNNI some calls need float because their 8-bit products saturate: 7 bits are enough for those.

    Args:
        space: what is searched.
        base: how calls run in int8.
        history: has a feasible trial.
        trials: that may be spent.
        gains: how much faster each call is in int8; those that are not stay in float.
    """

    def fallen_back(recipe: Recipe) -> list[str]:
        names = [name for name, gain in gains.items() if gain > 0 and not recipe.config(name).is_int8]
        return sorted(names, key=lambda name: -gains[name])

    assert history.best is not None
    left = trials
    chunk = len(fallen_back(history.best.recipe)) // 2
    while chunk:
        for bits in ("", *other_values(space, "bits", base)):
            calls = fallen_back(history.best.recipe)
            for start in range(0, len(calls), chunk):
                back = calls[start : start + chunk]
                recipe = in_int8(space, back, base, history.best.recipe)
                if bits:
                    recipe = with_feature(space, "bits", bits, recipe, back)
                if left and history.of(recipe) is None:
                    left -= 1
                    yield Proposal(recipe, f"{len(back)} calls back to int8{bits and f' of {bits} bits'}")
            yield BARRIER
        chunk //= 2


def _climb(space: SearchSpace, base: Recipe, precision: Precision, history: History) -> Steps:
    alive = rankings(space)
    for k in _rungs(space):
        for name, calls in alive.items():
            if history.best is not None:
                return
            yield Proposal(in_float(space, calls[:k], precision, base), f"{k} calls in {precision} by {name}")
        tried = {name: history.of(in_float(space, calls[:k], precision, base)) for name, calls in alive.items()}
        losses = {name: record.loss for name, record in tried.items() if record is not None}
        if k >= PRUNE_FROM and len(losses) == len(alive):
            least = min(losses, key=lambda name: losses[name])  # noqa: B023  # used at once
            alive = {least: alive[least]}


def _bisect(space: SearchSpace, base: Recipe, precision: Precision, history: History) -> Steps:
    def passes(calls: Sequence[str]) -> bool:
        return history.feasible(in_float(space, calls, precision, base))

    passed = [(k, name) for name, calls in rankings(space).items() for k in _rungs(space) if passes(calls[:k])]
    if not passed:
        return  # what passed was none of these
    top, name = min(passed)
    calls = rankings(space)[name]
    bottom = max((k for k in _rungs(space) if k < top), default=0)
    while top - bottom > 1:
        k = (top + bottom) // 2
        yield Proposal(in_float(space, calls[:k], precision, base), f"{k} calls in {precision} by {name}")
        yield BARRIER
        top, bottom = (k, bottom) if passes(calls[:k]) else (top, k)


def _rungs(space: SearchSpace) -> list[int]:
    """Return 1, 2, 4, … and all calls but one, since a recipe needs one in int8."""
    top = sum(any(c.is_int8 for c in configs) for configs in space.options.values()) - 1
    return [*(2**i for i in range(top.bit_length()) if 2**i < top), *([top] if top > 0 else [])]
