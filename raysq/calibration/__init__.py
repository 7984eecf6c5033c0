"""Calibration algorithms: from the statistics of a tensor to the range that its integers cover."""

from __future__ import annotations

import re

from raysq.calibration.base import Calibrator
from raysq.calibration.minmax import MinMax
from raysq.errors import RecipeError, unknown

__all__ = ["ALL", "Calibrator", "parse"]

ALL: tuple[type[Calibrator], ...] = (MinMax,)

_SPELLING = re.compile(r"(\w+)(?:\((\d+(?:\.\d+)?)\))?")


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
    try:
        return kind(float(argument))
    except TypeError as exc:
        raise RecipeError(f"calibration algorithm {match[1]!r} takes no argument, got {text!r}.") from exc
