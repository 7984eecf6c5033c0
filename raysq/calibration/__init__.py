"""Calibration algorithms: from the statistics of a tensor to the range that its integers cover."""

from __future__ import annotations

import re
from dataclasses import fields

from raysq.calibration.base import Calibrator
from raysq.calibration.kl import KL
from raysq.calibration.minmax import MinMax
from raysq.calibration.moving_average import MovingAverage
from raysq.calibration.mse import MSE
from raysq.calibration.percentile import Percentile
from raysq.errors import RecipeError, unknown

__all__ = ["ALL", "Calibrator", "parse"]

ALL: tuple[type[Calibrator], ...] = (MinMax, MovingAverage, Percentile, KL, MSE)

_SPELLING = re.compile(r"(\w+)(?:\((.*)\))?")


def parse(text: object) -> Calibrator:
    """Return the calibrator that a spelling such as "minmax" or "percentile(99.9)" names.

    Raises:
        RecipeError: unknown name, or an argument that it doesn't take.
    """
    if isinstance(text, Calibrator):
        return text
    match = _SPELLING.fullmatch(str(text))
    kinds = {kind.name: kind for kind in ALL}
    if match is None or match[1] not in kinds:
        raise RecipeError(unknown("calibration algorithm", text, kinds))
    kind, argument = kinds[match[1]], match[2]
    if argument is None:
        return kind()
    if not fields(kind):  # type: ignore[arg-type]  # every calibrator is a dataclass
        raise RecipeError(f"calibration algorithm {match[1]!r} takes no argument, got {text!r}.")
    try:
        number = float(argument)
    except ValueError as exc:
        raise RecipeError(f"the argument of {match[1]!r} must be a number, got {text!r}.") from exc
    return kind(number)  # type: ignore[call-arg]  # those with a field take it first
