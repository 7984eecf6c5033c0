"""The lines of a journal: what is known of a run as plain data for strict JSON, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from raysq.op_times import OpTimes
from raysq.recipe import Recipe
from raysq.result import Baseline, Ratio, Stage, Status, TrialRecord
from raysq.run import Entry, Header, WarmStart
from raysq.scores import Units
from raysq.typed import typed

__all__ = ["baseline_from_dict", "entry_from_dict", "header_from_dict", "record_from_dict", "to_dict"]


def to_dict(value: Any) -> Any:
    """Return plain data for strict JSON; numbers that are not finite become text ("nan", "inf")."""
    if isinstance(value, Recipe):
        return value.to_dict()
    if isinstance(value, Ratio):
        return {"value": float(value), "low": value.low, "high": value.high}
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    if isinstance(value, np.generic):
        return to_dict(value.item())
    if isinstance(value, np.ndarray):
        return to_dict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def record_from_dict(data: Mapping[str, Any]) -> TrialRecord:
    """Return the record whose `to_dict` this is.

    Raises:
        InputError: a malformed recipe.
        TypeError, ValueError, KeyError, AttributeError, OverflowError: anything else that is malformed.
    """
    return TrialRecord(
        **{
            **typed(TrialRecord, data),
            "recipe": Recipe.from_dict(data["recipe"]),
            "status": Status(data["status"]),
            "stage": Stage(data["stage"]),
            "ratio": _ratio(data.get("ratio")),
        }
    )


def baseline_from_dict(data: Mapping[str, Any]) -> Baseline:
    """Return the baseline whose `to_dict` this is.

    Raises:
        TypeError, ValueError, KeyError, AttributeError, OverflowError: malformed data.
    """
    return Baseline(
        **{
            **typed(Baseline, data),
            "bf16_ratio": _ratio(data.get("bf16_ratio")),
            "reference": Units.from_dict(data["reference"]) if data.get("reference") else None,
        }
    )


def header_from_dict(data: Mapping[str, Any]) -> Header:
    """Return the header whose `to_dict` this is.

    Raises:
        InputError: a malformed recipe.
        TypeError, ValueError, KeyError, AttributeError, OverflowError: anything else that is malformed.
    """
    return Header(
        **{
            **typed(Header, data),
            "baseline": baseline_from_dict(data["baseline"]),
            "warm_start": _warm_start(data.get("warm_start", {})),
            "op_times": OpTimes.from_dict(data["op_times"]) if data.get("op_times") else None,
        }
    )


def entry_from_dict(data: Mapping[str, Any]) -> Entry:
    """Return the entry whose `to_dict` this is.

    Raises:
        InputError: a malformed recipe.
        TypeError, ValueError, KeyError, AttributeError, OverflowError: anything else that is malformed.
    """
    pairs = tuple((float(a), float(b)) for a, b in data["pairs"])
    return Entry(**{**typed(Entry, data), "record": record_from_dict(data["record"]), "pairs": pairs})


def _warm_start(data: Mapping[str, Any]) -> WarmStart:
    recipes = tuple(map(Recipe.from_dict, data.get("recipes", ())))
    return WarmStart(tuple(map(entry_from_dict, data.get("entries", ()))), recipes)


def _ratio(data: Mapping[str, Any] | None) -> Ratio | None:
    return None if data is None else Ratio(**{name: float(value) for name, value in data.items()})
