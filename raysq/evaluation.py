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
from raysq.options import Goal

__all__ = ["EvalFn", "Score", "check", "evaluate", "first_call"]

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


def check(eval_fn: EvalFn) -> None:
    """Make sure, before any work, that `eval_fn` can be called with a model and nothing else.

    Raises:
        EvaluationError: it isn't callable, is asynchronous, or wants another number of arguments.
    """
    if not callable(eval_fn):
        raise EvaluationError(f"`eval_fn` must be a function of one argument, the model; got {eval_fn!r}.")
    if inspect.iscoroutinefunction(eval_fn) or inspect.isasyncgenfunction(eval_fn):
        raise EvaluationError("`eval_fn` must be an ordinary function: `def`, not `async def`.")
    try:
        signature = inspect.signature(eval_fn)
    except (TypeError, ValueError):  # some builtins don't tell
        return
    try:
        signature.bind(object())
    except TypeError as exc:
        raise EvaluationError(
            f"`eval_fn` must take exactly one argument, the model; its signature is {signature}. "
            "Bind the others first: `eval_fn=lambda model: evaluate(model, loader)`."
        ) from exc


def evaluate(eval_fn: EvalFn, model: Any, goal: Goal) -> Score:
    """Run `eval_fn` on a model, without gradients, and return its score.

    Args:
        eval_fn: returns a number, a dict of numbers, or yields (sum, n) per batch, whose score is the mean
            over all items, sum(sums) / sum(n).
        model: what it is called with.
        goal: says which metric of a dict counts.

    Raises:
        EvaluationError: it raised, returned anything else, or the metric that counts is not finite.

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
    if batches is not None:
        return _streamed(batches, goal)
    if isinstance(returned, Mapping):
        return _chosen(returned, goal)
    return Score({ACCURACY: _finite(_number(returned, "returned"), ACCURACY)}, ACCURACY)


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


def _streamed(batches: list[Any], goal: Goal) -> Score:
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
    if goal.metric is not None:
        primary = goal.metric
    elif ACCURACY in metrics or len(metrics) != 1:
        primary = ACCURACY
    else:
        primary = next(iter(metrics))
    if primary not in metrics:
        names = ", ".join(map(repr, metrics)) or "nothing"
        raise EvaluationError(
            f"`eval_fn` returned {names}, and {primary!r} is not among them. "
            f"Say which one counts: `goal=Goal(metric={next(iter(metrics), 'f1')!r})`."
        )
    _finite(metrics[primary], primary)
    return Score(metrics, primary)


def _number(value: Any, came: str) -> float:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EvaluationError(f"{ALLOWED}; it {came} {_shown(value)}.")
    return float(value)


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise EvaluationError(f"{ALLOWED}, and it must be finite; {name!r} is {value}.")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:80]}{'...' if len(text) > 80 else ''} ({type(value).__name__})"
