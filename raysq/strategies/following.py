"""Proposals that follow a Ray Tune searcher, which learns how each did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from ray.tune.search import Searcher

from raysq.errors import SpaceError
from raysq.goal import Goal
from raysq.result import Status, TrialRecord
from raysq.space import SearchSpace
from raysq.strategies.base import BARRIER, MAX_DUPLICATES, METRIC, History, Proposal, Steps
from raysq.strategies.optuna_searcher import ConstrainedOptuna
from raysq.tuning.records import to_result

__all__ = ["follow", "penalised", "teach", "tell"]

WORST_RATIO = 2.0  # a feasible recipe is hardly ever this slow, so each infeasible one ranks behind


def follow(
    engine: Searcher,
    space: SearchSpace,
    history: History,
    label: str,
    view: Callable[[TrialRecord], dict[str, Any]] = to_result,
) -> Steps:
    """Yield what a searcher suggests until it ends, has suggested all there is, or nothing new many times in a row.

    What was tried before is answered from the history at once.

    Args:
        engine: the searcher, whose configs are points of `space`.
        space: what it searches.
        history: live.
        label: of the proposals.
        view: the result of a trial that the searcher is shown.
    """
    asked = told = repeats = 0
    pending: dict[str, list[str]] = {}
    suggested: set[str] = set()
    size = math.prod(len(dimension.values) for dimension in space.dimensions)
    while len(suggested) < size:
        for record in history[told:]:
            for trial_id in pending.pop(record.recipe.digest, ()):
                tell(engine, trial_id, record, view)
        told = len(history)
        if repeats >= MAX_DUPLICATES:
            if not pending:
                return
            yield BARRIER
            repeats = 0
            continue
        trial_id = f"{asked:05d}"
        asked += 1
        config: Any = engine.suggest(trial_id)
        if config == Searcher.FINISHED:
            return
        if config is None:
            if not pending:
                return
            yield BARRIER
            continue
        recipe = space.recipe(config)
        suggested.add(recipe.digest)
        known = history.of(recipe)
        if known is not None:
            repeats += 1
            tell(engine, trial_id, known, view)
        elif recipe.digest in pending:
            repeats += 1
            pending[recipe.digest].append(trial_id)
        else:
            repeats = 0
            pending[recipe.digest] = [trial_id]
            yield Proposal(recipe, label)


def tell(
    engine: Searcher, trial_id: str, record: TrialRecord, view: Callable[[TrialRecord], dict[str, Any]] = to_result
) -> None:
    """Tell a searcher how a trial ended, failed ones as errors: some leave a NaN running for ever."""
    if record.status is Status.FAILED:
        engine.on_trial_complete(trial_id, result=None, error=True)
    else:
        engine.on_trial_complete(trial_id, result=view(record))


def teach(engine: ConstrainedOptuna, space: SearchSpace, records: Iterable[TrialRecord]) -> None:
    """Tell a searcher of trials that it didn't suggest: those that a point of its space says all about."""
    for record in records:
        try:
            config = space.config(record.recipe)
        except SpaceError:
            continue
        if len(config) == len(space.dimensions):  # no override
            engine.learn(config, record)


def penalised(record: TrialRecord, goal: Goal) -> dict[str, Any]:
    """Return a result for searchers without constraints: the cost, an infeasible trial's behind all, by its loss."""
    result = to_result(record)
    result[METRIC] = goal.cost(record)
    if not record.feasible:
        excess = max(record.loss - goal.tolerance, 0.0)
        result[METRIC] = max(result[METRIC], WORST_RATIO * sum(goal.objectives.values())) + excess / (1 + excess)
    return result
