"""The end of a search: the best trials are built here, checked, and timed once more with a larger budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raysq import evaluation, fingerprint
from raysq.baseline import outputs
from raysq.errors import EvaluationError, NoFeasibleRecipe
from raysq.latency import Timing
from raysq.options import Goal, Latency
from raysq.result import Baseline, Result, TrialRecord

if TYPE_CHECKING:
    from raysq.kernels.base import Backend, BuiltModel
    from raysq.prepared import Prepared

__all__ = ["conclude"]

FINALISTS = 3  # the best of many noisy timings is partly the luckiest: a few are timed again


@dataclass(frozen=True)
class _Finalist:
    """A trial, built and measured in this process."""

    trial: TrialRecord
    built: BuiltModel
    accuracy: float
    drop: float
    timing: Timing


def conclude(
    prepared: Prepared,
    engine: Backend,
    eval_fn: evaluation.EvalFn,
    baseline: Baseline,
    goal: Goal,
    latency: Latency,
    trials: Sequence[TrialRecord],
    journal: Path,
) -> Result:
    """Return the fastest of the finalists that meet the goal.

    A finalist whose outputs are not those that the worker saw (another CPU) is scored again.

    Raises:
        NoFeasibleRecipe: none meets the goal; its `result` is the closest.
        EvaluationError: no trial could be scored.
    """
    scored = [t for t in trials if t.accuracy_drop is not None and t.int8_calls]
    if not scored:
        reasons = "; ".join(sorted({t.reason for t in trials if t.reason})[:3])
        raise EvaluationError(f"no trial could be scored. {reasons or 'The search ended before its first trial.'}")
    source = prepared.source
    reference = engine.build_float(source, baseline.form)
    final = Latency(latency.final_budget_s, latency.final_budget_s, latency.ci_width / 2)

    def measured(trial: TrialRecord) -> _Finalist:
        built = engine.build(source, trial.recipe)
        accuracy, drop = float(trial.accuracy or 0.0), trial.loss
        if fingerprint.of_tensors(outputs(built.model, source.args, source.kwargs)) != trial.digest:
            accuracy = evaluation.evaluate(eval_fn, built.model, goal).value
            drop = goal.drop(accuracy, baseline.accuracy)
        return _Finalist(trial, built, accuracy, drop, prepared.time(built, reference, final))

    finalists = _finalists(trials) or [min(scored, key=lambda t: t.loss)]
    best = min(map(measured, finalists), key=lambda f: (not goal.holds(f.drop), f.timing.ratio))
    result = Result(
        model=best.built.model,
        built=best.built,
        recipe=best.trial.recipe,
        accuracy=best.accuracy,
        accuracy_drop=best.drop,
        baseline=baseline,
        latency_ms=best.timing.candidate_ms,
        latency_ratio=best.timing.ratio,
        feasible=goal.holds(best.drop),
        trials=tuple(trials),
        executed=best.built.executed,
        left_in_float={**prepared.left_in_float, **best.built.left_in_float},
        journal=journal,
    )
    if not result.feasible:
        raise NoFeasibleRecipe(
            f"no recipe met the goal ({goal}) in {len(trials)} trials; the closest loses {best.drop:.4g}. It is in "
            "this error's `result`. Allow a larger tolerance, or more trials.",
            result,
        )
    return result


def _finalists(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the feasible trials with the lowest latency bounds that may each be the fastest."""
    timed = sorted((t for t in trials if t.feasible and t.ratio is not None), key=lambda t: t.latency_bound)
    return [t for t in timed if t.ratio is not None and t.ratio.low <= timed[0].latency_bound][:FINALISTS]
