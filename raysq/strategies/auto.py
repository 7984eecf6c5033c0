"""The strategy that raysq uses by default: a ladder of informed proposals, then TPE under the constraint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

from raysq.description import family
from raysq.recipe import Precision, Recipe
from raysq.strategies.base import BARRIER, Barrier, History, Proposal, Strategy, ratio_of
from raysq.strategies.following import follow
from raysq.strategies.moves import (
    Change,
    flippable,
    float_precisions,
    in_float,
    in_int8,
    other_values,
    rankings,
    with_feature,
)
from raysq.strategies.optuna_searcher import ConstrainedOptuna
from raysq.strategies.tpe import tpe_sampler

__all__ = ["Auto"]

Steps = Iterator[Proposal | Barrier]

FOUND = "found"  # the ranking that starts with the calls that the best recipe has in float
FEW = 4  # float calls that TPE may try even where the best recipe has none
PRUNE_FROM = 2  # float calls from which on only the ranking that lost least so far is climbed further
SHARE = 3  # shrinking, and looking for speed, take at most max_trials / SHARE proposals each
VARIANTS = (
    "bits",
    "algorithm",
    "weight_algorithm",
    "activation",
    "rounding",
)  # features that are varied globally, in this order
INT8_RARELY_PAYS = ("depthwise", "add", "pool", "matmul")  # families whose float kernels are tried first


class Auto(Strategy):
    """The ladder, in this order, each step built on the best recipe so far.

    1. The default of the space, usually all calls in int8; each alpha of a list that was given, for all groups.
    2. If that fails: no smoothing, each transform, other algorithms, schemes and roundings for
       all calls at once, then the best of each kind together.
    3. If they fail: the 1, 2, 4, 8, … most sensitive calls in float, then bisection between the last number that
       failed and the first that passed; with several rankings, only the best one is climbed beyond 2.
    4. Float calls back to int8, the least sensitive first, half of them at once, then fewer.
    5. What may be faster: families in float, other float types, other schemes; then all that was, together.
    6. TPE over the space, seeded with all of this, with one more ranking that starts at the float calls found.

    It spends its whole budget: `raysq.tune` ends a search that no longer gets faster.
    """

    name: ClassVar[str] = "auto"

    def next_recipe(self, history: History) -> Steps:
        """Yield the ladder, then what TPE suggests."""
        self._base = self.space.default()
        yield Proposal(self._base, "default")
        yield from self._everywhere(history)
        yield BARRIER
        if history.best is None:
            yield from self._vary(history)
        if history.best is None:
            yield from self._fall_back(history)
        if history.best is not None:
            yield from self._shrink(history)
            yield from self._speed_up(history)
        yield from self._refine(history)

    def _everywhere(self, history: History) -> Steps:
        """Try the alphas that were asked for, each for all groups, and go on with the one that loses least."""
        ways = self.space.model.alpha_variants()
        for label, change in ways:
            yield Proposal(change(self._base), label)
        if ways:
            yield BARRIER
            tried = [self._base, *(change(self._base) for _, change in ways)]
            self._base = min(tried, key=lambda recipe: _loss(history, recipe))

    def _vary(self, history: History) -> Steps:
        """Try other algorithms and schemes for all calls at once, then the best of each kind together."""
        default = self._base
        variants = [*self.space.model.variants(default), *self._feature_variants(default)]
        for ways in variants:
            for label, change in ways:
                if history.best is None:
                    yield Proposal(change(default), label)
        yield BARRIER
        combined = default
        for ways in variants:
            _, change = min(ways, key=lambda way: _loss(history, way[1](default)))
            if _loss(history, change(default)) < _loss(history, default):
                combined = change(combined)
        if history.best is None:
            yield Proposal(combined, "best of each")
            yield BARRIER
        best = history.best or history.closest
        if best is not None:
            self._base = best.recipe

    def _feature_variants(self, default: Recipe) -> Iterator[list[tuple[str, Change]]]:
        for feature in VARIANTS:
            values = other_values(self.space, feature, default)
            if values:
                yield [(f"{feature} {value}", partial(with_feature, self.space, feature, value)) for value in values]

    def _fall_back(self, history: History) -> Steps:
        """Put the most sensitive calls in float: ever more until it passes, then bisect."""
        for precision in float_precisions(self.space):
            yield from self._climb(history, precision)
            yield BARRIER
            if history.best is not None:
                yield from self._bisect(history, precision)
                return

    def _climb(self, history: History, precision: Precision) -> Steps:
        alive = rankings(self.space)
        for k in self._rungs:
            for name, calls in alive.items():
                if history.best is not None:
                    return
                yield Proposal(self._rung(calls, k, precision), f"{k} calls in {precision} by {name}")
            rungs = {name: self._rung(calls, k, precision) for name, calls in alive.items()}
            if k >= PRUNE_FROM and all(history.of(recipe) for recipe in rungs.values()):
                least = min(rungs, key=lambda name: _loss(history, rungs[name]))  # noqa: B023  # used at once
                alive = {least: alive[least]}

    def _bisect(self, history: History, precision: Precision) -> Steps:
        passed = [
            (k, name)
            for name, calls in rankings(self.space).items()
            for k in self._rungs
            if _feasible(history, self._rung(calls, k, precision))
        ]
        top, name = min(passed)
        calls = rankings(self.space)[name]
        bottom = max((k for k in self._rungs if k < top), default=0)
        while top - bottom > 1:
            k = (top + bottom) // 2
            recipe = self._rung(calls, k, precision)
            yield Proposal(recipe, f"{k} calls in {precision} by {name}")
            yield BARRIER
            top, bottom = (k, bottom) if _feasible(history, recipe) else (top, k)

    def _rung(self, calls: Sequence[str], k: int, precision: Precision) -> Recipe:
        return in_float(self.space, calls[:k], precision, self._base)

    @property
    def _rungs(self) -> list[int]:
        """Return 1, 2, 4, … and all calls but one, since a recipe needs one in int8."""
        top = sum(any(c.is_int8 for c in configs) for configs in self.space.options.values()) - 1
        return [*(2**i for i in range(top.bit_length()) if 2**i < top), *([top] if top > 0 else [])]

    def _shrink(self, history: History) -> Steps:
        """Put float calls back to int8, the least sensitive first, in ever smaller groups, each in other bits too.

        Without VNNI some calls need float because their 8-bit products saturate: 7 bits are enough for those.
        """
        assert history.best is not None
        left = max(1, self.max_trials // SHARE)
        chunk = len(self._fallen_back(history.best.recipe)) // 2
        while chunk:
            for bits in ("", *other_values(self.space, "bits", self._base)):
                calls = self._fallen_back(history.best.recipe)
                for start in range(0, len(calls), chunk):
                    back = calls[start : start + chunk]
                    recipe = in_int8(self.space, back, self._base, history.best.recipe)
                    if bits:
                        recipe = with_feature(self.space, "bits", bits, recipe, back)
                    if left and history.of(recipe) is None:
                        left -= 1
                        yield Proposal(recipe, f"{len(back)} calls back to int8{bits and f' of {bits} bits'}")
                yield BARRIER
            chunk //= 2

    def _speed_up(self, history: History) -> Steps:
        """Try what may be faster on top of the best so far; last, all that was faster together."""
        start = history.best
        assert start is not None
        left = max(1, self.max_trials // SHARE)
        tried: list[tuple[Change, Recipe, float]] = []
        for label, change in self._changes(start.recipe):
            best = history.best or start
            recipe = change(best.recipe)
            if left and recipe.int8_calls and history.of(recipe) is None:
                left -= 1
                tried.append((change, recipe, ratio_of(best)))
                yield Proposal(recipe, label)
        yield BARRIER
        together = start.recipe
        for change, recipe, before in tried:
            record = history.of(recipe)
            if record is not None and record.feasible and ratio_of(record) < before:
                together = change(together)
        yield Proposal(together, "all that was faster")
        yield BARRIER

    def _changes(self, start: Recipe) -> Iterator[tuple[str, Change]]:
        """Yield what may make a recipe faster, the likeliest first."""
        space = self.space
        members: dict[str, list[str]] = {}
        for call in flippable(space):
            members.setdefault(family(space.graph[call]), []).append(call)
        precisions = float_precisions(space)
        for name in sorted(members, key=lambda name: name not in INT8_RARELY_PAYS):
            if any(start.config(call).is_int8 for call in members[name]):
                yield f"{name} in {precisions[0]}", partial(in_float, space, members[name], precisions[0])
            if not any(start.config(call).is_int8 for call in members[name]):
                yield f"{name} in int8", partial(in_int8, space, members[name], self._base)
        free = {group: alpha for group, alpha in start.smoothing.items() if space.graph.groups[group].producers}
        if free != dict(start.smoothing):
            yield "smoothing where it is free", partial(Recipe.with_smoothing, smoothing=free)
        for value in other_values(space, "activation", start):
            yield f"activation {value}", partial(with_feature, space, "activation", value)
        for precision in precisions:
            yield f"float calls in {precision}", partial(self._recast, precision)

    def _refine(self, history: History) -> Steps:
        """Yield what TPE suggests, which knows all trials that the space can express."""
        space = self.space
        if history.best is not None and not space.by_call:
            floats = self._float_calls(history.best.recipe)[::-1]
            if floats:
                ranking = next(iter(rankings(space).values()))
                space = space.with_ranking(FOUND, dict.fromkeys([*floats, *ranking]))
            counts = {d.name: d.values for d in space.dimensions if isinstance(d.values, range)}
            top = max(FEW, 2 * len(floats))  # far more calls in float than are needed is never fast
            space = space.narrow({name: values[: top + 1] for name, values in counts.items()})
        if not space.dimensions:
            return
        engine = ConstrainedOptuna(space, self.goal, tpe_sampler(self.seed))
        for record in history:
            config = space.config(record.recipe)
            if len(config) == len(space.dimensions):  # no override: the point says all about the recipe
                engine.learn(config, record)
        yield from follow(engine, space, history, "tpe")

    def _float_calls(self, recipe: Recipe) -> list[str]:
        """Return the calls of a recipe that are float but may be int8, the least sensitive first."""
        ranking = next(iter(rankings(self.space).values()))
        return [call for call in reversed(ranking) if not recipe.config(call).is_int8]

    def _fallen_back(self, recipe: Recipe) -> list[str]:
        return [call for call in self._float_calls(recipe) if self._base.config(call).is_int8]

    def _recast(self, precision: Precision, recipe: Recipe) -> Recipe:
        """Return the recipe with its float calls in another float type."""
        return in_float(self.space, self._float_calls(recipe), precision, recipe)


def _loss(history: History, recipe: Recipe) -> float:
    record = history.of(recipe)
    return float("inf") if record is None else record.loss


def _feasible(history: History, recipe: Recipe) -> bool:
    record = history.of(recipe)
    return record is not None and record.feasible
