"""The end of a search: the best trials are built here, checked, timed once more with a larger budget, and confirmed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from raysq import evaluation
from raysq.errors import EvaluationError, NoFeasibleRecipe
from raysq.finalists import Finalist, Finals, Standing
from raysq.goal import Goal
from raysq.kernels import base
from raysq.probing import CRAWLING
from raysq.result import Baseline, Confirmation, Result, Status, TrialRecord

if TYPE_CHECKING:
    from raysq.job import Job
    from raysq.kernels.base import Backend
    from raysq.tuning.live import Say

__all__ = ["conclude"]

FINALISTS = 3  # the best of many noisy timings is partly the luckiest: a few are timed again
CONFIRMED_AT_MOST = 5  # recipes; the best of many on the second split would be as optimistic as on the first


def conclude(
    job: Job,
    engine: Backend,
    trials: Sequence[TrialRecord],
    journal: Path,
    say: Say = lambda text: None,
) -> Result:
    """Return the finalist of the lowest cost that meets the goal, on the goal's split for confirmation too.

    A finalist whose score is an estimate, or whose outputs are not those that the worker saw (another CPU), is scored
    whole. One that fails here drops out. Trials that hold but were not timed, on nodes that only score, are finalists
    beside those that were. Where none then holds, other feasible trials are tried, as are five in all where none is
    confirmed. What holds is tried on the rivals of the backend too, where there are any.

    Raises:
        NoFeasibleRecipe: none meets the goal, or none is confirmed; its `result` is the closest.
        EvaluationError: no trial could be scored.
        Exception: what the first finalist raised, where none could be built and measured.
    """
    scored = [t for t in trials if t.accuracy_drop is not None and t.int8_calls]
    if not scored:
        reasons = "; ".join(sorted({t.reason for t in trials if t.reason})[:3])
        reasons = reasons or "the search ended before its first trial"
        raise EvaluationError(
            f"no trial could be scored: {reasons.rstrip('.')}. Call `eval_fn(raysq.quantize(model, calib))` to see one "
            "fail here, or give the search more time."
        )
    prepared, baseline, goal = job.prepared, job.baseline, job.goal
    finals = Finals(job, engine)

    def result(best: Finalist, feasible: bool, confirmation: Confirmation | None = None) -> Result:
        return Result(
            model=best.built.model,
            built=best.built,
            recipe=best.trial.recipe,
            accuracy=float(best.trial.accuracy or 0.0),
            accuracy_drop=float(best.trial.accuracy_drop or 0.0),
            baseline=baseline,
            latency_ms=best.timing.candidate_ms,
            latency_ratio=best.timing.ratio,
            feasible=feasible,
            trials=tuple(trials),
            executed=best.built.executed,
            left_in_float={**prepared.left_in_float, **best.left_in_float, **best.built.left_in_float},
            journal=journal,
            objectives=goal.front,
            confirmation=confirmation,
            environment={**prepared.environment, "inputs": prepared.timed_inputs},
            backends=standings,
        )

    standings: tuple[Standing, ...] = ()
    ordered = sorted((t for t in trials if t.feasible and t.ratio is not None), key=goal.cost)
    untimed = sorted((t for t in trials if t.feasible and t.ratio is None), key=goal.cost)  # by nodes that only score
    closest_first = sorted(scored, key=lambda t: (t.status is Status.FAILED, t.loss))
    finalists = [*_finalists(ordered, goal), *untimed[:FINALISTS]] or closest_first[:1]
    say(f"the best {len(finalists)} are built and timed once more")
    failures: list[Exception] = []

    def measured(trials: Iterable[TrialRecord]) -> Iterator[Finalist]:
        for trial in trials:
            try:
                yield finals.measured(trial)
            except Exception as exc:  # noqa: BLE001  # kernels and `eval_fn` may raise anything; the others remain
                failures.append(exc)
                say(f"trial {trial.trial} drops out: {type(exc).__name__}: {exc}")

    ranked = sorted(measured(finalists), key=lambda f: goal.cost(f.trial))
    rest = (t for t in [*ordered, *untimed] if t not in finalists)
    others = (f for f in measured(rest) if f.holds(goal))
    holding = [f for f in ranked if f.holds(goal)] or list(islice(others, 1))
    if not holding:
        ranked = ranked or list(islice(measured(t for t in closest_first if t not in finalists), 1))
        if not ranked:
            raise failures[0]
        closest = min(ranked, key=lambda f: (f.is_hopeless, f.trial.loss))
        why = CRAWLING if closest.is_hopeless else f"the closest loses {closest.trial.loss:.4g}."
        raise NoFeasibleRecipe(
            f"no recipe met the goal ({goal}) in {len(trials)} trials; {why} It is in this error's `result`. "
            + (
                "Take another `backend`, or allow"
                if closest.is_hopeless
                else "Allow a larger tolerance (`warm_start` spares what was measured), or"
            )
            + " more trials (`resume`).",
            result(closest, feasible=False),
        )
    if prepared.rivals:
        standings, holding = _contested(finals, holding, [*ordered, *untimed], prepared.rivals, goal, say)
    if goal.confirm is None:
        return result(holding[0], feasible=True)
    best, confirmation = _confirmed(chain(holding, others), goal, baseline)
    if not confirmation.holds:
        raise NoFeasibleRecipe(
            f"none of the {confirmation.tried} best recipes that met the goal ({goal}) on `eval_fn` met it on "
            f"`Goal.confirm` too; the closest loses {confirmation.worst_drop:.4g} there. It is in this error's "
            "`result`. Evaluate on more items, or allow a larger tolerance.",
            result(best, feasible=False, confirmation=confirmation),
        )
    return result(best, feasible=True, confirmation=confirmation)


def _contested(
    finals: Finals,
    holding: Sequence[Finalist],
    ordered: Sequence[TrialRecord],
    rivals: Sequence[str],
    goal: Goal,
    say: Say,
) -> tuple[tuple[Standing, ...], list[Finalist]]:
    """Return how each backend does with the recipes that hold, and these with what the rivals made of them, by cost.

    They also get the feasible trial with the most calls in int8: what is slow on one may be fast on another.
    """
    trials = [*(f.trial for f in holding), *sorted(ordered, key=lambda t: -t.int8_calls)[:1]]
    standings, best = [holding[0].standing(goal, holds=True)], list(holding)
    say(f"backend {standings[0]}")
    for rival in rivals:
        found = finals.carried(trials, base.get(rival))
        if isinstance(found, Finalist):
            best.append(found)
            found = found.standing(goal, holds=True)
        standings.append(found)
        say(f"backend {found}")
    standings.append(finals.compiled())
    say(str(standings[-1]))
    return tuple(standings), sorted(best, key=lambda f: goal.cost(f.trial))


def _finalists(ordered: Sequence[TrialRecord], goal: Goal) -> list[TrialRecord]:
    """Return those of the feasible trials, ordered by cost, that may each be the best: the first few of them."""
    return [t for t in ordered if t.ratio and goal.cost(t.at(t.ratio.low)) <= goal.cost(ordered[0])][:FINALISTS]


def _confirmed(candidates: Iterable[Finalist], goal: Goal, baseline: Baseline) -> tuple[Finalist, Confirmation]:
    """Return the first candidate that holds on the split that confirms, or else the closest of those tried."""
    assert baseline.confirm_accuracy is not None and baseline.confirm_metrics is not None  # measured with the goal
    tried: list[tuple[Finalist, Confirmation]] = []
    for finalist in islice(candidates, CONFIRMED_AT_MOST):
        score = evaluation.confirm(finalist.built.model, goal)
        loss = evaluation.loss(score, baseline.confirm_accuracy, baseline.confirm_metrics, goal)
        holds = goal.holds(loss.worst_drop)
        confirmation = Confirmation(
            accuracy=score.value,
            baseline_accuracy=baseline.confirm_accuracy,
            accuracy_drop=loss.drop,
            worst_drop=loss.worst_drop,
            holds=holds,
            tried=len(tried) + 1,
        )
        if holds:
            return finalist, confirmation
        tried.append((finalist, confirmation))
    closest, confirmation = min(tried, key=lambda pair: pair[1].worst_drop)
    return closest, replace(confirmation, tried=len(tried))
