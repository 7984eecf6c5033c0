"""A model of accuracy and latency over the float calls of a recipe, corrected by every trial that ended.

Both objectives are sums over the calls, which is not quite true: so the terms have a prior (from sensitivities and
from times of single calls), and what was really measured moves them, the uncertain ones most.

rows   (trials, terms)   which terms a trial's value is the sum of
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag

from raysq.description import family
from raysq.features import canonical
from raysq.op_times import OpTimes, typical_times
from raysq.recipe import Precision, Recipe
from raysq.result import Status, TrialRecord
from raysq.space import SearchSpace
from raysq.strategies.knapsack import Problem, solve
from raysq.strategies.moves import float_precisions, in_float, in_int8

__all__ = ["Prediction", "Surrogate", "posterior"]

Floats = NDArray[np.float64]

LOSS_SPREAD, LOSS_FLOOR = 1.0, 0.25  # std of a call's loss: of its expected one, and of the mean of all
TIME_SPREAD = 0.3  # std of what a call gains, as a share of its fp32 time; alone it ran 10 to 30 % off
FAMILY_SHARE = 1.0  # std of what all calls of a kind err alike, over that of each by itself
INTERACTION = 0.05  # std of what a sum misses, as a share of the sum
NOISE = 0.005  # std of a measured latency ratio beyond its own interval


@dataclass(frozen=True)
class Prediction:
    """A recipe, and what the model expects of it."""

    recipe: Recipe
    loss: float
    ratio: float


class Surrogate:
    """The model for one way to quantize: which of its calls are better left in float.

    Args:
        space: what is searched.
        base: how calls run that are not left in float.
        losses: what int8 costs each call, in any unit, as a sensitivity says; those that are missing cost the median.
        times: of single calls; None: guessed from their multiply-accumulates.
    """

    def __init__(
        self, space: SearchSpace, base: Recipe, losses: Mapping[str, float], times: OpTimes | None = None
    ) -> None:
        self._space = space
        self.calls = tuple(space.flippable)
        self.base = in_int8(space, self.calls, base, base)
        self._kinds = (Precision.INT8, *float_precisions(space))
        known = [losses[c] for c in self.calls if c in losses] or [1.0]
        shares = np.array([losses.get(c, float(np.median(known))) for c in self.calls])
        self._shares = shares / (shares.sum() or 1.0)
        self._times = times or typical_times(space.graph)

    def optimum(self, history: Iterable[TrialRecord], limit: float, optimism: float = 0.0) -> Prediction | None:
        """Return the recipe that is expected to be fastest within the limit; None if none is, or all of it is float.

        Args:
            history: the trials that ended.
            limit: of the loss.
            optimism: how many standard deviations better than expected each term is taken to be.
        """
        records = [record for record in history if record.status is Status.FINISHED]
        losses, loss_std = self._losses(records)
        times, time_std = self._time_terms(records)
        calls, kinds = len(self.calls), len(self._kinds)
        hoped = times - optimism * time_std
        table = np.zeros((calls, kinds))
        for column, kind in enumerate(self._kinds):
            table[:, column] = [0.0 if kind is Precision.FP32 else t for t in self._of(kind, hoped)]
            table[~self._able[:, column], column] = np.inf
        crossing = np.maximum(hoped[1 + calls * kinds :], 0.0)
        chosen = solve(
            Problem(table, losses[1:] - optimism * loss_std[1:], self._edges, crossing, limit - float(losses[0]))
        )
        if chosen is None:
            return None
        recipe = self.base
        for column, kind in enumerate(self._kinds[1:], 1):
            floats = [call for call, k in zip(self.calls, chosen, strict=True) if k == column]
            recipe = in_float(self._space, floats, kind, recipe)
        if not recipe.int8_calls:
            return None
        return Prediction(recipe, float(self._loss_row(recipe) @ losses), float(self._time_row(recipe) @ hoped))

    def ratio(self, recipe: Recipe, history: Iterable[TrialRecord], optimism: float = 0.0) -> float:
        """Return the latency ratio that the model expects of a recipe."""
        times, std = self._time_terms([record for record in history if record.status is Status.FINISHED])
        return float(self._time_row(recipe) @ (times - optimism * std))

    def gains(self, recipe: Recipe, history: Iterable[TrialRecord]) -> dict[str, float]:
        """Return by how much the model expects the ratio to fall with a float call of a recipe in int8, for each."""
        times, _ = self._time_terms([record for record in history if record.status is Status.FINISHED])
        now = self._time_row(recipe)
        floats = [call for call in self.base.int8_calls if not recipe.config(call).is_int8]
        changed = {call: self._time_row(in_int8(self._space, [call], self.base, recipe)) for call in floats}
        return {call: float((now - row) @ times) for call, row in changed.items()}

    def _losses(self, records: Iterable[TrialRecord]) -> tuple[Floats, Floats]:
        """Return mean and std of the loss: what is lost in any case, then of each call."""
        comparable = [record for record in records if self._is_comparable(record.recipe)]
        total = max((abs(record.loss) for record in comparable), default=1.0) or 1.0
        expected = total * self._shares
        spread = LOSS_SPREAD * expected + LOSS_FLOOR * total / max(len(self.calls), 1)
        mean = np.concatenate([[0.0], expected])
        std = np.concatenate([[1e-3 * total], spread])
        shared = np.concatenate([np.zeros((1, len(self._families.T))), FAMILY_SHARE * spread[:, None] * self._families])
        rows = [self._loss_row(record.recipe) for record in comparable]
        values = np.array([record.loss for record in comparable])
        estimated = np.array([record.drop_std for record in comparable])
        noise = (INTERACTION * values) ** 2 + (1e-3 * total) ** 2 + estimated**2
        found = posterior(mean, std**2, shared, rows, values, noise)
        return np.maximum(found[0], 0.0), found[1]

    def _time_terms(self, records: Iterable[TrialRecord]) -> tuple[Floats, Floats]:
        """Return mean and std of the ratio: all float, each call in each kind over fp32, each way into int8."""
        timed = [record for record in records if record.ratio is not None]
        gains = [self._shares_of_time[:, column] - self._shares_of_time[:, -1] for column in range(len(self._kinds))]
        mean = np.concatenate([[1.0], *gains, self._crossing])
        fp32 = np.abs(self._shares_of_time[:, -1])
        spread = [TIME_SPREAD * fp32 * (kind is not Precision.FP32) for kind in self._kinds]
        std = np.concatenate([[0.1], *spread, TIME_SPREAD * self._crossing])
        families = block_diag(*(FAMILY_SHARE * column[:, None] * self._families for column in spread))
        shared = np.zeros((len(mean), families.shape[1]))
        shared[1 : 1 + len(families)] = families
        rows = [self._time_row(record.recipe) for record in timed]
        values = np.array([record.ratio for record in timed], float)
        widths = np.array([(record.ratio.high - record.ratio.low) / 4 for record in timed if record.ratio is not None])
        return posterior(mean, std**2, shared, rows, values, widths**2 + NOISE**2)

    def _of(self, kind: Precision, terms: Floats) -> Floats:
        start = 1 + self._kinds.index(kind) * len(self.calls)
        return terms[start : start + len(self.calls)]

    def _loss_row(self, recipe: Recipe) -> Floats:
        return np.array([1.0, *(recipe.config(call).is_int8 for call in self.calls)])

    def _time_row(self, recipe: Recipe) -> Floats:
        kinds = [[recipe.config(call).precision is kind for call in self.calls] for kind in self._kinds]
        int8 = np.array(kinds[0], float)
        crossed = np.abs(int8[self._edges[:, 0]] - int8[self._edges[:, 1]])
        return np.concatenate([[1.0], np.array(kinds, float).ravel(), crossed])

    def _is_comparable(self, recipe: Recipe) -> bool:
        """Whether a recipe is the base with some calls in float: other ways to quantize lose something else."""
        same = recipe.smoothing == self.base.smoothing and recipe.transforms == self.base.transforms
        return same and all(
            canonical(recipe.config(call)) == canonical(self.base.config(call))
            or (call in self._flips and not recipe.config(call).is_int8)
            for call in self._space.options
        )

    @cached_property
    def _flips(self) -> frozenset[str]:
        return frozenset(self.calls)

    @cached_property
    def _families(self) -> Floats:
        """Whether a call, (calls, families), is of a family."""
        names = [family(self._space.graph[call]) for call in self.calls]
        return np.array([[name == other for other in dict.fromkeys(names)] for name in names], float)

    @cached_property
    def _able(self) -> NDArray[np.bool_]:
        options = self._space.options
        return np.array(
            [[any(c.precision is kind for c in options[call]) for kind in self._kinds] for call in self.calls]
        )

    @cached_property
    def _shares_of_time(self) -> Floats:
        """What each call takes in each kind, as a share of the whole model in fp32; the last column is fp32."""
        kinds = [*self._kinds, *([] if self._kinds[-1] is Precision.FP32 else [Precision.FP32])]
        rows = [[self._times.share(call, kind) for kind in kinds] for call in self.calls]
        return np.array(rows).reshape(len(self.calls), len(kinds))

    @cached_property
    def _edges(self) -> NDArray[np.int64]:
        index = {call: i for i, call in enumerate(self.calls)}
        pairs = [(index[a], index[b]) for a, b in self._times.neighbours if a in index and b in index]
        return np.array(pairs, np.int64).reshape(-1, 2)

    @cached_property
    def _crossing(self) -> Floats:
        return np.array([self._times.entries.get(self.calls[b], 0.0) for _, b in self._edges], float)


def posterior(
    mean: Floats,  # (terms,)
    variance: Floats,  # (terms,) of each term alone
    shared: Floats,  # (terms, factors) loadings of what terms have in common, each factor of variance 1
    rows: Iterable[Floats],
    values: Floats,  # (trials,) what was measured
    noise: Floats,  # (trials,) its variance
) -> tuple[Floats, Floats]:
    """Return mean and std of the terms after the measurements: Bayesian linear regression, in its dual form.

    Rasmussen & Williams, Gaussian Processes for Machine Learning (2006), eq. 2.11 and 2.12.
    """
    matrix = np.array(list(rows)).reshape(len(values), len(mean))
    covariance = matrix * variance + (matrix @ shared) @ shared.T  # (trials, terms)
    gain = np.linalg.solve(matrix @ covariance.T + np.diag(noise), covariance)
    left = variance + (shared**2).sum(axis=1) - (covariance * gain).sum(axis=0)
    return mean + (values - matrix @ mean) @ gain, np.sqrt(np.maximum(left, 0.0))
