"""The exception tree: every error raysq raises on purpose, all under `RaysqError`.

RaysqError
├── InputError (ValueError)      something given by the caller can't be used; raised before any work
│   ├── ModelError               on GPU, not picklable, not traceable, nothing to quantize
│   ├── CalibrationError         no batch, or batches that don't fit the model
│   ├── EvaluationError          eval_fn raised, or returned what can't be scored
│   ├── SpaceError               empty search space, bad expression, unknown key
│   ├── OptionError              an argument out of its range, or an unknown name
│   ├── RecipeError              a recipe that is malformed, or that a backend can't run
│   ├── StorageError             a path that can't be written or read
│   └── ResumeError              a journal that is missing or belongs to another run
├── BackendError                 a backend is unavailable, or failed while it built a model
└── NoFeasibleRecipe             the search ended and no recipe met the goal; carries the result
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from reprlib import Repr
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raysq.result import Result

__all__ = [
    "BackendError",
    "CalibrationError",
    "EvaluationError",
    "InputError",
    "ModelError",
    "NoFeasibleRecipe",
    "OptionError",
    "RaysqError",
    "RecipeError",
    "ResumeError",
    "SpaceError",
    "StorageError",
    "shown",
    "unknown",
]

LONGEST = 100  # characters of a value that a message repeats


class RaysqError(Exception):
    """Root of every error that raysq raises on purpose."""


class InputError(RaysqError, ValueError):
    """Something that the caller gave can't be used."""


class ModelError(InputError):
    """The model can't be quantized as it is."""


class CalibrationError(InputError):
    """The calibration data is empty or doesn't fit the model."""


class EvaluationError(InputError):
    """`eval_fn` raised, or returned something that can't be scored."""


class SpaceError(InputError):
    """The search space is empty, or its description is wrong."""


class OptionError(InputError):
    """An argument is out of its range, or names something unknown."""


class RecipeError(InputError):
    """A recipe is malformed, or asks for what a backend can't run."""


class StorageError(InputError):
    """A path can't be written or read."""


class ResumeError(InputError):
    """A journal is missing, damaged, or belongs to another model, data or evaluation."""


class BackendError(RaysqError):
    """A backend is unavailable, or failed while it built a model."""


class NoFeasibleRecipe(RaysqError):
    """The search ended and no recipe met the goal.

    Attributes:
        result: the whole `Result`; its `recipe` and `model` are those closest to the goal.
    """

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.result)  # by default an exception pickles its message alone


def shown(value: object) -> str:
    """Return a value as a message repeats it: whole where it is short, whatever it is made of."""
    brief = Repr()
    brief.maxstring = brief.maxother = brief.maxlong = LONGEST
    return brief.repr(value)


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Word the error for an unknown name, with the nearest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name)[:LONGEST], names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {shown(name)}; known are {', '.join(names)}.{hint}"
