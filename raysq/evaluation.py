"""The score of a model: what eval_fn returns, checked and brought to one form."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raysq.errors import EvaluationError
from raysq.goal import Goal

__all__ = ["EvalFn", "Loss", "Score", "check", "confirm", "evaluate", "first_call", "loss"]

EvalFn = Callable[[Any], Any]

ACCURACY = "accuracy"
ALLOWED = "`eval_fn(model)` must return a number, a dict of numbers, or yield (sum, n) for each batch"


@dataclass(frozen=True)
class Score:
    """What an evaluation gave.

    Attributes:
        metrics: every metric by name; "accuracy" where eval_fn returned a bare number or a stream.
        primary: the name of the metric that the goal is about.
        items: per-item scores of the primary metric where they are known, (n,), else None.
        n: number of items where known, else None.
    """

    metrics: Mapping[str, float]
    primary: str
    items: NDArray[np.float64] | None = None
    n: int | None = None

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


def evaluate(eval_fn: EvalFn, model: Any, goal: Goal) -> Score:
    """Run `eval_fn` on a model, without gradients, and return its score.

    Args:
        eval_fn: returns a number, a dict of numbers, or yields (sum, n) per batch, whose score is the mean
            over all items, sum(sums) / sum(n).
        model: what it is called with.
        goal: says which metrics of a dict count.

    Raises:
        EvaluationError: it raised, returned anything else, or a metric that counts is missing or not finite.

    Example:
        >>> evaluate(lambda model: {"f1": 0.5}, None, Goal()).value
        0.5
    """
    with torch.no_grad():
        try:
            returned = eval_fn(model)
            batches = list(returned) if isinstance(returned, Generator) else None
        except Exception as exc:
            raise EvaluationError(f"`eval_fn` raised {type(exc).__name__}: {exc}") from exc
    if isinstance(returned, Mapping):
        return _chosen(returned, goal)
    if goal.others:
        raise EvaluationError(
            f"the goal has other metrics, {_names(goal.others)}, so `eval_fn(model)` must return a dict of numbers "
            f"with them and its own; it {'yielded batches' if batches is not None else f'returned {_shown(returned)}'}."
        )
    if batches is not None:
        return _streamed(batches)
    return Score({ACCURACY: _finite(_number(returned, "returned"), ACCURACY)}, ACCURACY)


def confirm(model: Any, goal: Goal) -> Score:
    """Return the score of a model by `goal.confirm`, which must be there.

    Raises:
        EvaluationError: as `evaluate`.
    """
    assert goal.confirm is not None
    try:
        return evaluate(goal.confirm, model, goal)
    except EvaluationError as exc:
        raise EvaluationError(f"`Goal.confirm` is called as `eval_fn` is: {exc}") from exc


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
    reasons = [] if goal.holds(drop) else [f"loses {drop:.4g}, allowed is {goal.own}"]
    for name, other in goal.others.items():
        lost = other.drop(score.metrics[name], metrics[name])
        worst = max(worst, goal.tolerance + (lost - other.tolerance))
        reasons += [] if other.holds(lost) else [f"loses {lost:.4g} of {name}, allowed is {other.own}"]
    return Loss(drop, worst, "; ".join(reasons))


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


def _streamed(batches: list[Any]) -> Score:
    total, count = 0.0, 0
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise EvaluationError(f"{ALLOWED}; it yielded {_shown(batch)}.")
        n = _number(batch[1], "yielded as n")
        if n < 0 or n != int(n):
            raise EvaluationError(f"{ALLOWED}, n being the number of items, an integer >= 0; it yielded n = {n:g}.")
        total, count = total + _number(batch[0], "yielded as a sum"), count + int(n)
    if not count:
        raise EvaluationError("`eval_fn` yielded no item, so there is nothing to score.")
    return Score({ACCURACY: _finite(total / count, ACCURACY)}, ACCURACY, n=count)


def _chosen(returned: Mapping[Any, Any], goal: Goal) -> Score:
    metrics = {str(name): _number(value, f"returned for {name!r}") for name, value in returned.items()}
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
                f"the goal has {name!r} among its `others`, and `eval_fn` returned {_names(metrics)} only."
            )
        _finite(metrics[name], name)
    return Score(metrics, primary)


def _number(value: Any, came: str) -> float:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EvaluationError(f"{ALLOWED}; it {came} {_shown(value)}.")
    return float(value)


def _names(metrics: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, metrics)) or "nothing"


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise EvaluationError(f"{ALLOWED}, and it must be finite; {name!r} is {value}.")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:80]}{'...' if len(text) > 80 else ''} ({type(value).__name__})"
