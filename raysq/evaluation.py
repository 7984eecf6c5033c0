"""The score of a model: what eval_fn returns, checked and brought to one form."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from raysq import fingerprint
from raysq.errors import EvaluationError
from raysq.goal import Goal
from raysq.rejection import Early, Rejection, Watch
from raysq.scores import ACCURACY, UNBOUNDED, Bounds, Part, Units, gathered
from raysq.stream import ALLOWED, number, read, shown

__all__ = [
    "EvalFn",
    "InParts",
    "Loss",
    "Score",
    "check",
    "confirm",
    "digest",
    "evaluate",
    "first_call",
    "loss",
    "warn_if_whole",
]

EvalFn = Callable[[Any], Any]

log = logging.getLogger("raysq")


@runtime_checkable
class InParts(Protocol):
    """An evaluation that gives its scores part by part, so that it may end early: `Evaluation`, `Stream`."""

    @property
    def rejection(self) -> Rejection:
        """When it may end."""

    def parts(self, model: Any) -> Generator[Part]:
        """Score a model, one batch after another; the same units in the same places for every model."""

    def digest(self) -> str:
        """Return what tells it from another, in any process."""

    def __call__(self, model: Any) -> Any:
        """Return the whole score."""


@dataclass(frozen=True)
class Score:
    """What an evaluation gave.

    Attributes:
        metrics: every metric by name; "accuracy" where eval_fn returned a bare number or a stream.
        primary: the name of the metric that the goal is about.
        units: all scores of the primary metric; None where only their mean is known, or not all of it.
        n: number of items scored, None where that isn't known.
        early: how the evaluation ended before its last item, with the primary metric estimated; None if it didn't.
    """

    metrics: Mapping[str, float]
    primary: str
    units: Units | None = None
    n: int | None = None
    early: Early | None = None

    @property
    def value(self) -> float:
        """The primary metric."""
        return self.metrics[self.primary]


@dataclass(frozen=True)
class Loss:
    """What a score loses against the baseline's.

    Attributes:
        drop: of the primary metric.
        worst_drop: of the metric that passes its tolerance by most, counted from the primary one's tolerance: the one
            number that decides, and the drop itself where there is a single metric. Metrics of other units weigh as
            their numbers do.
        reason: which metrics lose too much; "" where all hold.
    """

    drop: float
    worst_drop: float
    reason: str


def check(eval_fn: EvalFn, name: str = "eval_fn") -> None:
    """Make sure, before any work, that `eval_fn`, or what `name` says, can be called with a model and nothing else.

    Raises:
        EvaluationError: it isn't callable, is asynchronous, or wants another number of arguments.
    """
    if not callable(eval_fn):
        raise EvaluationError(f"`{name}` must be a function of one argument, the model; got {eval_fn!r}.")
    if inspect.iscoroutinefunction(eval_fn) or inspect.isasyncgenfunction(eval_fn):
        raise EvaluationError(f"`{name}` must be an ordinary function: `def`, not `async def`.")
    try:
        signature = inspect.signature(eval_fn)
    except (TypeError, ValueError):  # some builtins don't tell
        return
    try:
        signature.bind(object())
    except TypeError as exc:
        raise EvaluationError(
            f"`{name}` must take exactly one argument, the model; its signature is {signature}. "
            f"Bind the others first: `{name}=lambda model: evaluate(model, loader)`."
        ) from exc


def digest(eval_fn: EvalFn) -> str:
    """Return a digest of an evaluation; data that it reads is beyond it."""
    return eval_fn.digest() if isinstance(eval_fn, InParts) else fingerprint.of_function(eval_fn)


def evaluate(eval_fn: EvalFn, model: Any, goal: Goal, reference: Units | None = None) -> Score:
    """Run `eval_fn` on a model, without gradients, and return its score.

    Args:
        eval_fn: returns a number, a dict of numbers, yields (sum, n) or the scores of the items per batch, whose score
            is the mean over all items, or is an `Evaluation` or a `Stream`.
        model: what it is called with.
        goal: says which metrics of a dict count.
        reference: the fp32 model's scores: evaluation ends once it is clear whether the goal is held, if `eval_fn`
            allows that and the goal has no other metrics; None: it is evaluated whole.

    Raises:
        EvaluationError: it raised, returned anything else, or a metric that counts is missing or not finite.

    Example:
        >>> evaluate(lambda model: {"f1": 0.5}, None, Goal()).value
        0.5
    """
    with torch.no_grad():
        try:
            if isinstance(eval_fn, InParts):
                watch = Watch(eval_fn.rejection, reference, goal) if reference and not goal.others else None
                return _scored(eval_fn.parts(model), eval_fn.rejection.stated, goal, watch)
            returned = eval_fn(model)
            if isinstance(returned, Generator):
                return _scored(read(returned, UNBOUNDED), UNBOUNDED, goal, None)
        except EvaluationError:
            raise
        except Exception as exc:
            raise EvaluationError(
                f"`eval_fn` raised {type(exc).__name__}: {exc}. It must score any model that is called like yours."
            ) from exc
    if isinstance(returned, Mapping):
        return _chosen(returned, goal)
    _refuse_others(goal, f"returned {shown(returned)}")
    return Score({ACCURACY: _finite(number(returned, "returned"), ACCURACY)}, ACCURACY)


def confirm(model: Any, goal: Goal) -> Score:
    """Return the score of a model by `goal.confirm`, which must be there.

    Raises:
        EvaluationError: as `evaluate`.
    """
    assert goal.confirm is not None
    try:
        return evaluate(goal.confirm, model, goal)
    except EvaluationError as exc:
        raise EvaluationError(f"`Goal.confirm` must do as `eval_fn` does: {exc}") from exc


def loss(score: Score, accuracy: float, metrics: Mapping[str, float], goal: Goal) -> Loss:
    """Compare a score with the baseline's.

    Args:
        score: of a candidate.
        accuracy: the baseline's primary metric.
        metrics: all its metrics.
        goal: how much of which metric may be lost.

    Raises:
        EvaluationError: a relative loss against a baseline of 0.
    """
    drop = worst = goal.drop(score.value, accuracy)
    reasons = [] if goal.holds(drop) else [f"{_lost(score, drop)}, allowed is {goal.own}"]
    for name, other in goal.others.items():
        lost = other.drop(score.metrics[name], metrics[name])
        worst = max(worst, goal.tolerance + (lost - other.tolerance))
        reasons += [] if other.holds(lost) else [f"loses {lost:.4g} of {name}, allowed is {other.own}"]
    return Loss(drop, worst, "; ".join(reasons))


def _lost(score: Score, drop: float) -> str:
    if score.early is None:
        return f"loses {drop:.4g}"
    early = score.early
    return f"stopped after {early.seen} of {early.items} items: loses {drop:.4g} (at least {early.bound:.4g})"


def warn_if_whole(eval_fn: EvalFn, score: Score, goal: Goal) -> None:
    """Warn where an evaluation that could end early never does, since nobody said what its scores lie in.

    Args:
        eval_fn: the evaluation.
        score: the fp32 model's.
        goal: what it is compared by.
    """
    if not isinstance(eval_fn, InParts) or score.units is None or goal.others:
        return
    if not Watch(eval_fn.rejection, score.units, goal).rejects:
        log.warning(
            "no trial ends early: the scores could be anything, for all that raysq knows. State what each lies in: "
            "`bounds=(0, 1)`, of losses `bounds=(0, math.inf)`."
        )


class _Called(BaseException):
    """Ends an evaluation at its first forward; no `except Exception` stops it."""


def first_call(eval_fn: EvalFn, model: nn.Module, goal: Goal) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments with which `eval_fn` calls a model first, without running the model; None if it doesn't.

    Args:
        eval_fn: the evaluation; it is left at that call.
        model: a copy that nobody else uses.
        goal: says which metric counts.

    Raises:
        EvaluationError: it raised before that, or returned no score without calling the model.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Called

    model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        evaluate(eval_fn, model, goal)
    except _Called:
        pass
    except EvaluationError:
        if not seen:
            raise
    return seen[0] if seen else None


def _scored(parts: Generator[Part], stated: Bounds, goal: Goal, watch: Watch | None) -> Score:
    """Return the score of an evaluation that gives it in parts, of which it takes no more than are needed."""
    kept: list[Part] = []
    primary = ACCURACY
    for part in parts:
        if not kept:
            primary = _primary(part.sums, goal)
        kept.append(part)
        if watch is None:
            continue
        watch.saw(part, primary)
        early = watch.verdict
        if early is not None:
            parts.close()
            return Score({primary: early.accuracy}, primary, n=early.seen, early=early)
    if not kept:
        raise EvaluationError(
            "`eval_fn` yielded no item to score, and must yield at least one. Is its loader exhausted?"
        )
    if watch is not None:
        watch.ended()
    units = gathered(kept, stated)
    metrics = {name: _finite(of.mean, name) for name, of in units.items()}
    return Score(metrics, primary, units[primary], units[primary].items)


def _primary(names: Iterable[str], goal: Goal) -> str:
    """Return which of the metrics that come in parts counts; one without a name is the goal's, whatever it is."""
    if list(names) == [ACCURACY]:
        _refuse_others(goal, "yielded batches")
        return ACCURACY
    return _chosen(dict.fromkeys(names, 0.0), goal).primary


def _refuse_others(goal: Goal, came: str) -> None:
    if goal.others:
        raise EvaluationError(
            f"the goal has other metrics, {_names(goal.others)}, so `eval_fn(model)` must return a dict of numbers "
            f"with them and its own; it {came}."
        )


def _chosen(returned: Mapping[Any, Any], goal: Goal) -> Score:
    metrics = {str(name): number(value, f"returned for {name!r}") for name, value in returned.items()}
    own = [name for name in metrics if name not in goal.others]
    primary = goal.metric or (own[0] if len(own) == 1 else ACCURACY)
    if primary not in own:
        raise EvaluationError(
            f"`eval_fn` returned {_names(metrics)}, and {primary!r} is not among them. "
            f"Say which one counts: `goal=Goal(metric={next(iter(own), 'f1')!r})`."
        )
    for name in (primary, *goal.others):
        if name not in metrics:
            raise EvaluationError(
                f"the goal has {name!r} among its `others`, so `eval_fn` must return it; it returned "
                f"{_names(metrics)} only."
            )
        _finite(metrics[name], name)
    return Score(metrics, primary)


def _names(metrics: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, metrics)) or "nothing"


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise EvaluationError(f"{ALLOWED}, and it must be finite; {name!r} is {value}.")
    return value
