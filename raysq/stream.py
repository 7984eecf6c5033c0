"""An evaluation in the user's own order: a generator that yields batches of scores."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysq import fingerprint
from raysq.errors import EvaluationError
from raysq.rejection import Rejection
from raysq.scores import ACCURACY, Bounds, Part, check_sum, gathered, per_item

__all__ = ["ALLOWED", "Stream", "number", "read", "shown"]

ALLOWED = (
    "`eval_fn(model)` must return a number, a dict of numbers, or yield (sum, n) or an array of scores for each batch"
)


@dataclass(frozen=True, eq=False)
class Stream:
    """An evaluation by a generator that yields, for each batch, the scores of its items, or (sum, n).

    Its order is the user's: it ends early only when a recipe would fail even if all that is left were perfect. In
    random order, `shuffled=True`, the order being drawn once, it ends as early as `Evaluation` does; where (sum, n) is
    yielded a batch counts as a whole, which takes several times as many items.

    Attributes:
        batches: takes a model and yields 1-D tensors or arrays of scores, or pairs (sum, n); batches of the same sizes
            for every model.
        bounds: what each item's score lies in, see `Rejection`.
        shuffled: whether the items come in random order, the same for every model.
        error_rate: of ending early in random order, see `Rejection`.
        stop_passing: whether a recipe that passes ends early too, see `Rejection`.

    Raises:
        EvaluationError: `batches` is no generator function of one argument.
        OptionError: a value out of its range.

    Example:
        >>> def batches(model):
        ...     for x, y in loader:
        ...         yield model(x).argmax(1) == y
        >>> eval_fn = Stream(batches, bounds=(0, 1))
    """

    batches: Callable[[Any], Iterable[Any]]
    _: KW_ONLY
    bounds: Bounds | None = None
    shuffled: bool = False
    error_rate: float = 0.01
    stop_passing: bool = False

    def __post_init__(self) -> None:
        function = self.batches
        while isinstance(function, functools.partial):
            function = function.func
        if not inspect.isgeneratorfunction(function) and not inspect.isgeneratorfunction(
            getattr(function, "__call__", None)  # noqa: B004  # an object whose call is a generator
        ):
            raise EvaluationError(
                "`Stream` takes a generator function of the model, `def batches(model): ... yield scores`; got "
                f"{self.batches!r}. A function that returns the score goes to `eval_fn` as it is."
            )
        object.__setattr__(self, "bounds", self.rejection.bounds)

    @property
    def rejection(self) -> Rejection:
        """When it ends early."""
        return Rejection(self.bounds, self.error_rate, self.shuffled, self.stop_passing)

    def parts(self, model: Any) -> Generator[Part]:
        """Score a model, one batch after another.

        Raises:
            EvaluationError: a batch that can't be scored.
        """
        return read(self.batches(model), self.rejection.stated)

    def __call__(self, model: Any) -> float:
        """Return the whole score."""
        with torch.no_grad():
            return gathered(self.parts(model), self.rejection.stated)[ACCURACY].mean

    def digest(self) -> str:
        """Return what tells it from another, in any process."""
        return fingerprint.of_text(fingerprint.of_function(self.batches), self.rejection)


def read(batches: Iterable[Any], bounds: Bounds) -> Generator[Part]:
    """Yield what a generator yields as parts; batches without an item are passed over.

    Args:
        batches: arrays of scores, or pairs (sum, n).
        bounds: no item's score lies outside.

    Raises:
        EvaluationError: anything else.
    """
    for batch in batches:
        part = _part(batch, bounds)
        if len(part.sizes):
            yield part


def _part(batch: Any, bounds: Bounds) -> Part:
    if isinstance(batch, Tensor | np.ndarray):
        scores, boolean = per_item(batch, "the scores that `eval_fn` yields", bounds)
        return Part({ACCURACY: scores}, np.ones(len(scores), np.int64), frozenset([ACCURACY] if boolean else []))
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise EvaluationError(f"{ALLOWED}; it yielded {shown(batch)}.")
    total, n = number(batch[0], "yielded as a sum"), number(batch[1], "yielded as n")
    if n < 0 or n != int(n):
        raise EvaluationError(f"{ALLOWED}, n being the number of items, an integer >= 0; it yielded n = {n:g}.")
    if not n:
        return Part({}, np.empty(0, np.int64))
    check_sum(total, int(n), "(sum, n) that `eval_fn` yields", bounds)
    return Part({ACCURACY: np.array([total])}, np.array([int(n)]))


def number(value: Any, came: str) -> float:
    """Return a number that an evaluation gave.

    Raises:
        EvaluationError: it is none.
    """
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EvaluationError(f"{ALLOWED}; it {came} {shown(value)}.")
    return float(value)


def shown(value: Any) -> str:
    """Return a value and its type, as messages have them."""
    text = repr(value)
    return f"{text[:80]}{'...' if len(text) > 80 else ''} ({type(value).__name__})"
