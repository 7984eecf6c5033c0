"""The strategy that raysq uses by default: a ladder of informed proposals, then TPE under the constraint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import ClassVar

from raysq.description import family
from raysq.errors import CalibrationError, ModelError
from raysq.features import Per
from raysq.goal import Objective
from raysq.recipe import Precision, Recipe
from raysq.sensitivities import MSE, Fisher
from raysq.space import SearchSpace
from raysq.strategies.base import BARRIER, History, Proposal, Steps, Strategy
from raysq.strategies.bisection import bisected, shrunk
from raysq.strategies.following import follow, teach
from raysq.strategies.moves import (
    Change,
    float_precisions,
    in_float,
    in_int8,
    other_values,
    rankings,
    with_feature,
)
from raysq.strategies.optuna_searcher import ConstrainedOptuna
from raysq.strategies.surrogate import Prediction, Surrogate
from raysq.strategies.tpe import tpe_sampler
from raysq.switches import free_switches
from raysq.transfer import within

__all__ = ["Auto"]

FOUND = "found"  # the ranking that starts with the calls that the best recipe has in float
FEW = 4  # float calls that TPE may try even where the best recipe has none
SHARE = 3  # modelling, shrinking, and looking for speed take at most max_trials / SHARE proposals each
LIMITS = (1.0, 0.7, 0.4, 0.1)  # of the tolerance
OPTIMISM = (0.0, 0.1, 0.3)  # standard deviations
GAIN = 0.005  # share of the best's time that a proposal must promise
WORTH = 0.9  # of the default's loss: another base that loses hardly less isn't worth modelling
VARIANTS = (
    "bits",
    "algorithm",
    "weight_algorithm",
    "activation",
    "rounding",
)  # features that are varied globally, in this order
RESCALING = ("smooth_quant", "equalization")  # switches, the one that costs less time first
INT8_RARELY_PAYS = ("depthwise", "add", "pool", "matmul")  # families whose float kernels are tried first


class Auto(Strategy):
    """The ladder, in this order, each step built on the best recipe so far.

    1. The default of the space, usually all calls in int8; each alpha of a list that was given, for all groups.
    2. Where that failed: all that may be smoothed, then equalization, each with all calls in int8, until one passes.
       What loses least is what the rest goes on with.
    3. A model of loss and latency, sums over the calls: its prior are sensitivities (`Fisher` where the default failed)
       and the measured times of single calls, what leaving int8 between two of them costs included. What it takes for
       the fastest within the tolerance, by an integer programme, is tried; each result corrects it, until it knows
       nothing better. As in HAWQ-V3 (arXiv 2011.10680); that single effects don't add up (CLADO, arXiv 2307.05657) is
       what correcting is for.
    4. Where 2. passed nothing, as soon as something passes: no smoothing, each transform, other algorithms, schemes
       and roundings for all calls at once until one of them passes, then the best of each kind together. What loses
       least is what 3. then goes on with.
    5. If nothing has passed: the 1, 2, 4, … most sensitive calls in float, then bisection.
    6. What may be faster: families in float, other float types, other schemes, eight bits; then all that was, together.
       These say most about the model's times, so 3. again.
    7. Float calls back to int8, those that gain most time first, half of them at once, then fewer.
    8. TPE over the space, seeded with all of this, with one more ranking that starts at the float calls found.

    It spends its whole budget: `raysq.tune` ends a search that no longer gets faster. It can fail where int8 hurts by
    pairs of calls only, and where single calls run at other speeds than inside of the model: what follows 3. is for
    those.
    """

    name: ClassVar[str] = "auto"
    measures_times: ClassVar[bool] = True

    def next_recipe(self, history: History) -> Steps:
        """Yield the ladder, then what TPE suggests."""
        self._base = self.space.default()
        self._surrogates: dict[str, Surrogate] = {}
        yield Proposal(self._base, "default")
        yield from self._everywhere(history)
        yield BARRIER
        self._failed = history.best is None
        if self._failed:
            yield from self._rescaled(history)
        if history.best is None:
            yield from self._modelled(history, first=True)
            yield from self._vary(history)
        yield from self._modelled(history)
        if history.best is None:
            yield from bisected(self.space, self._base, history)
        if history.best is not None:
            yield from self._speed_up(history)
            yield from self._modelled(history)
            gains = self._surrogate.gains(history.best.recipe, history)
            yield from shrunk(self.space, self._base, history, self._share, gains)
        yield from self._refine(history)

    def _everywhere(self, history: History) -> Steps:
        """Try the alphas that were asked for, each for all groups, and go on with the one that loses least."""
        ways = self.space.model.alpha_variants()
        for label, change in ways:
            yield Proposal(change(self._base), label)
        if ways:
            yield BARRIER
            tried = [self._base, *(change(self._base) for _, change in ways)]
            self._base = min(tried, key=history.loss)

    def _rescaled(self, history: History) -> Steps:
        """Try what makes channels more even and leaves every call in int8, until something passes."""
        default, free = self._base, free_switches(self.space)
        ways = [(name, within(free[name].narrow(self.space, True), default)) for name in RESCALING if name in free]
        tried = []
        for name, recipe in ways:
            if recipe != default and history.best is None:
                tried.append(recipe)
                yield Proposal(recipe, name)
        yield BARRIER
        self._go_on_with(tried, history)

    def _go_on_with(self, recipes: Sequence[Recipe], history: History) -> None:
        """Build further steps on the one of these that loses least, if it loses clearly less than what they change."""
        least = min([self._base, *recipes], key=history.loss)
        if history.loss(least) < WORTH * history.loss(self._base):
            self._base = least

    def _vary(self, history: History) -> Steps:
        """Try other algorithms and schemes for all calls at once until one passes, then the best of each together.

        What loses least is what further steps build on.
        """
        default = self._base
        variants = [*self.space.model.variants(default), *self._feature_variants(default)]
        tried: list[Recipe] = []
        for ways in variants:
            for label, change in ways:
                if not any(map(history.feasible, tried)):
                    tried.append(change(default))
                    yield Proposal(tried[-1], label)
        yield BARRIER
        combined = default
        for ways in variants:
            _, change = min(ways, key=lambda way: history.loss(way[1](default)))
            if history.loss(change(default)) < history.loss(default):
                combined = change(combined)
        if not any(map(history.feasible, tried)):
            tried.append(combined)
            yield Proposal(combined, "best of each")
            yield BARRIER
        self._go_on_with(tried, history)

    def _feature_variants(self, default: Recipe) -> Iterator[list[tuple[str, Change]]]:
        for feature in VARIANTS:
            values = other_values(self.space, feature, default)
            if values:
                yield [(f"{feature} {value}", partial(with_feature, self.space, feature, value)) for value in values]

    def _modelled(self, history: History, *, first: bool = False) -> Steps:
        """Propose what a model of both objectives takes for the fastest, until it knows nothing better.

        Args:
            history: live.
            first: end with the first recipe that passes.
        """
        surrogate = self._surrogate
        left = self._share
        while surrogate.calls and left and not (first and history.best is not None):
            found = self._optimum(surrogate, history)
            if found is not None:
                left -= 1
                yield Proposal(found.recipe, f"{len(found.recipe.int8_calls)} in int8, predicted {found.ratio:.3f}")
            elif self.running:
                yield BARRIER
            else:
                return

    def _optimum(self, surrogate: Surrogate, history: History) -> Prediction | None:
        """Return the model's next proposal, None if it is content.

        Until something passes, the limit is lowered where the optimum was tried already. Then it also looks at what
        were fastest if uncertain terms turned out lucky, as long as that promises something.
        """
        best, tolerance = history.best, self.goal.tolerance
        ways = [(tolerance * share, 0.0) for share in LIMITS] if best is None else [(tolerance, o) for o in OPTIMISM]
        for limit, optimism in ways:
            found = surrogate.optimum(history, limit, optimism)
            if found is None or not self.is_new(found.recipe):
                continue
            if best is None or found.ratio < (1 - GAIN) * surrogate.ratio(best.recipe, history, optimism):
                return found
        return None

    def _prior_losses(self) -> dict[str, float]:
        """Return what int8 may cost each call: by a sensitivity, or where nothing tells by its place in a ranking."""
        if self._failed and self.measures_costs:
            with suppress(ModelError, CalibrationError):  # no derivative, or no batch of one
                return self.costs(Fisher(), self._base)
        if self.measures_costs:
            return self.costs(MSE(), self._base)
        return {call: 1 / (1 + place) for place, call in enumerate(next(iter(rankings(self.space).values())))}

    @property
    def _surrogate(self) -> Surrogate:
        if self._base.digest not in self._surrogates:
            self._surrogates[self._base.digest] = Surrogate(self.space, self._base, self._prior_losses(), self.times)
        return self._surrogates[self._base.digest]

    def _speed_up(self, history: History) -> Steps:
        """Try what may be faster on top of the best so far; last, all that was faster together."""
        start = history.best
        assert start is not None
        left = self._share
        tried: list[tuple[Change, Recipe, float]] = []
        for label, change in self._changes(start.recipe):
            best = history.best or start
            recipe = change(best.recipe)
            if left and recipe.int8_calls and history.of(recipe) is None:
                left -= 1
                tried.append((change, recipe, self.goal.cost(best)))
                yield Proposal(recipe, label)
        yield BARRIER
        together = start.recipe
        for change, recipe, before in tried:
            record = history.of(recipe)
            if record is not None and record.feasible and self.goal.cost(record) < before:
                together = change(together)
        yield Proposal(together, "all that was faster")
        yield BARRIER

    def _changes(self, start: Recipe) -> Iterator[tuple[str, Change]]:
        """Yield what may make a recipe faster, the likeliest first."""
        space = self.space
        members: dict[str, list[str]] = {}
        for call in space.flippable:
            members.setdefault(family(space.graph[call]), []).append(call)
        precisions = float_precisions(space)
        for name in sorted(members, key=lambda name: name not in INT8_RARELY_PAYS):
            if any(start.config(call).is_int8 for call in members[name]):
                yield f"{name} in {precisions[0]}", partial(in_float, space, members[name], precisions[0])
            if not any(start.config(call).is_int8 for call in members[name]):
                yield f"{name} in int8", partial(in_int8, space, members[name], self._base)
        free = {group: alpha for group, alpha in start.smoothing.items() if space.graph.groups[group].producers}
        if free != dict(start.smoothing):
            yield "smoothing where it is free", lambda recipe: within(space, recipe.with_smoothing(free))
        ways = [("bits", "8")] if "8" in other_values(space, "bits", start) else []  # seven are clamped on the way
        ways += [("activation", value) for value in other_values(space, "activation", start)]
        for feature, value in ways:
            yield f"{feature} {value}", partial(with_feature, space, feature, value)
        for precision in precisions:
            yield f"float calls in {precision}", partial(self._recast, precision)

    def _refine(self, history: History) -> Steps:
        """Yield what TPE suggests, which knows all trials that the space can express."""
        space = self.space if history.best is None else self._narrowed(history.best.recipe)
        if not space.dimensions:
            return
        engine = ConstrainedOptuna(space, self.goal, tpe_sampler(self.seed))
        teach(engine, space, history)
        yield from follow(engine, space, history, "tpe")

    def _narrowed(self, best: Recipe) -> SearchSpace:
        """Return the space without what can hardly be faster than the best recipe.

        AdaRound, which takes minutes to build a large model, is left out where it could only buy accuracy: there are no
        float calls that it might bring back to int8.
        """
        space, floats, free = self.space, self._float_calls(best)[::-1], free_switches(self.space)
        if not floats and "adaround" in free and Objective.ACCURACY not in self.goal.objectives:
            space = free["adaround"].narrow(space, False)
        if space.per is Per.CALL:
            return space
        if floats:
            ranking = next(iter(rankings(space).values()))
            space = space.with_ranking(FOUND, dict.fromkeys([*floats, *ranking]))
        counts = {d.name: d.values for d in space.dimensions if isinstance(d.values, range)}
        top = max(FEW, 2 * len(floats))  # far more calls in float than are needed is never fast
        return space.narrow({name: values[: top + 1] for name, values in counts.items()})

    @property
    def _share(self) -> int:
        return max(1, self.max_trials // SHARE)

    def _float_calls(self, recipe: Recipe) -> list[str]:
        """Return the calls of a recipe that are float but may be int8, the least sensitive first."""
        ranking = next(iter(rankings(self.space).values()))
        return [call for call in reversed(ranking) if not recipe.config(call).is_int8]

    def _recast(self, precision: Precision, recipe: Recipe) -> Recipe:
        """Return the recipe with its float calls in another float type."""
        return in_float(self.space, self._float_calls(recipe), precision, recipe)
