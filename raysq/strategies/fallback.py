"""Calls of a recipe put back in float: a block, a single call, ever more of a list."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from raysq.errors import OptionError
from raysq.graph import Call, ModelGraph
from raysq.recipe import Precision, Recipe
from raysq.result import Status
from raysq.space import SearchSpace
from raysq.strategies.base import History, Proposal, Steps
from raysq.strategies.moves import float_precisions, in_float
from raysq.strategies.stages import Stage, together

__all__ = [
    "Blocks",
    "accumulated",
    "bisecting",
    "by_impact",
    "candidates",
    "check_blocks",
    "each_block",
    "each_call",
    "in_order",
    "turns",
]

Blocks = Sequence[Sequence[str]]  # per block, expressions for the calls in it


def candidates(space: SearchSpace, base: Recipe) -> list[str]:
    """Return the calls of a recipe that are in int8 and may be float, in execution order."""
    return [call for call in space.flippable if base.config(call).is_int8]


def bisecting(calls: int) -> int:
    """Return how many trials bisection of a list takes."""
    return max(calls - 1, 0).bit_length()


def turns(space: SearchSpace, history: History, calls: int, max_trials: int) -> Iterator[tuple[Precision, int]]:
    """Yield the float types, the default first, each with how many trials the search may have made after its turn.

    Each leaves what the later ones need to bisect the list of calls, unless it couldn't do so itself then.
    """
    enough = bisecting(calls)
    precisions = float_precisions(space)
    for later, precision in zip(reversed(range(len(precisions))), precisions, strict=True):
        until = max_trials - enough * later
        yield precision, until if until - history.proposed >= enough else max_trials


def check_blocks(blocks: Blocks | None) -> None:
    """Refuse what can't be blocks.

    Raises:
        OptionError: not a list of lists of regular expressions.
    """
    if isinstance(blocks, str) or any(isinstance(block, str) for block in blocks or ()):
        raise OptionError(f'`blocks` must be a list of lists, such as [["encoder.0"], ["encoder.1"]], got {blocks!r}.')
    for pattern in (pattern for block in blocks or () for pattern in block):
        try:
            re.compile(pattern)
        except (re.error, TypeError) as exc:
            raise OptionError(f"`blocks`: {pattern!r} must be a regular expression: {exc}.") from exc


def each_block(
    space: SearchSpace, base: Recipe, precision: Precision, blocks: Blocks | None, ranked: Sequence[str]
) -> Iterator[Proposal]:
    """Yield the recipe with all int8 calls of a block in float, for each block, that of the most sensitive call first.

    Args:
        space: what may be tried.
        base: what is changed.
        precision: the float type.
        blocks: per block, expressions that match the whole name of a call or of a module that encloses it; None: the
            repeated blocks that were found in the model.
        ranked: the calls that may be float, the most sensitive first.
    """
    members = {name: [c for c in ranked if c in calls] for name, calls in _members(space.graph, blocks)}
    for name in sorted(filter(members.get, members), key=lambda name: ranked.index(members[name][0])):
        inside = members[name]
        yield Proposal(in_float(space, inside, precision, base), f"{name} in {precision}")


def each_call(space: SearchSpace, base: Recipe, precision: Precision, calls: Iterable[str]) -> Iterator[Proposal]:
    """Yield the recipe with one call in float, for each call: how much better it is is the call's impact."""
    for call in calls:
        recipe = in_float(space, [call], precision, base)
        yield Proposal(recipe, f"{call} in {recipe.config(call).precision}")


def by_impact(space: SearchSpace, history: History, base: Recipe, calls: Sequence[str]) -> list[str]:
    """Return the calls, those that gained most when they were float by themselves first.

    Those that nothing was gained by stand last, those that were not tried before them, as they are given.
    """

    def loss(call: str) -> float:
        tried = (history.of(in_float(space, [call], precision, base)) for precision in float_precisions(space))
        return next((r.loss for r in tried if r is not None and r.status is Status.FINISHED), before)

    before = history.loss(base)
    return sorted(calls, key=loss)


def accumulated(
    space: SearchSpace,
    history: History,
    base: Recipe,
    precision: Precision,
    calls: Sequence[str],
    until: int,
    order: str,
) -> Steps:
    """Put ever more calls in float until a recipe passes: one by one, or by bisection where trials are short.

    Args:
        space: what may be tried.
        history: live.
        base: the recipe that is changed; it doesn't pass.
        precision: the float type.
        calls: in the order in which they become float.
        until: ends when the search has made this many trials.
        order: what the calls are ordered by, for the labels.
    """

    def first(count: int) -> Recipe:
        return in_float(space, calls[:count], precision, base)

    def trial(count: int) -> Stage:
        return together([Proposal(first(count), f"{count} calls in {precision} by {order}")], history, until)

    if until - history.proposed >= len(calls):
        for count in range(1, len(calls) + 1):
            yield from trial(count)
            if history.feasible(first(count)):
                return
        return
    bottom, top = 0, len(calls)
    while top - bottom > 1:
        count = (top + bottom) // 2
        yield from trial(count)
        top, bottom = (count, bottom) if history.feasible(first(count)) else (top, count)


def in_order(
    space: SearchSpace, history: History, base: Recipe, order: Sequence[str], max_trials: int, name: str
) -> Steps:
    """Put ever more calls in float until a recipe passes, in each float type that the space offers.

    Args:
        space: what may be tried.
        history: live.
        base: the recipe that is changed; it doesn't pass.
        order: calls, the most sensitive first; those that it leaves out come last.
        max_trials: of the whole search.
        name: what they are ordered by, for the labels.
    """
    may = candidates(space, base)
    calls = [*(call for call in order if call in may), *(call for call in may if call not in order)]
    for precision, until in turns(space, history, len(calls), max_trials):
        yield from accumulated(space, history, base, precision, calls, until, name)
        if history.best is not None:
            return


def _members(graph: ModelGraph, blocks: Blocks | None) -> Iterator[tuple[str, set[str]]]:
    if blocks is None:
        for block in graph.blocks:
            yield block, {call.name for call in graph.calls if call.block == block}
        return
    for patterns in blocks:
        name = ", ".join(patterns)
        inside = {call.name for call in graph.calls if any(_encloses(pattern, call) for pattern in patterns)}
        if not inside:
            warnings.warn(f"`blocks`: {name} matches no call of this model; ignored.", stacklevel=2)
        yield name, inside


def _encloses(pattern: str, call: Call) -> bool:
    modules = accumulate(call.module.split("."), "{}.{}".format)
    return any(re.fullmatch(pattern, path) for path in (call.name, *modules))
