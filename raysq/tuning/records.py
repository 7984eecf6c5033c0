"""A trial's flat result, as Ray Tune carries it, to a `TrialRecord` and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from raysq.errors import RecipeError
from raysq.recipe import Recipe
from raysq.result import Ratio, Stage, Status, TrialRecord

__all__ = ["record", "to_result"]

LOST = "the trial ended without a result: its worker was lost or raised"


def record(
    trial: int,
    config: Mapping[str, object],
    result: Mapping[str, Any] | None,
    *,
    recipe: Recipe | None = None,
    error: bool = False,
) -> TrialRecord:
    """Return the record of a trial that ended.

    Numbers that are missing or NaN become None; a trial without a finite accuracy and latency ratio has failed.

    Args:
        trial: its number in the order of suggestion.
        config: its flat config.
        result: its last report, None if there was none.
        recipe: what it ran, for results that don't carry it.
        error: whether Ray says that it failed.

    Raises:
        RecipeError: neither `result` nor `recipe` says what it ran.
    """
    data = result or {}
    if recipe is None:
        if "recipe" not in data:
            raise RecipeError(f"the result of trial {trial} carries no recipe; give it as `recipe`.")
        recipe = Recipe.from_json(data["recipe"])
    label = str(data.get("label") or config.get("label") or "")
    accuracy, ratio = _number(data, "accuracy"), _number(data, "latency_ratio")
    failed = error or data.get("status") == Status.FAILED or accuracy is None or ratio is None
    stage = Stage(data.get("stage", Stage.BUILD))
    measured = ratio is not None and stage is Stage.TIMED and not data.get("latency_predicted", False)
    return TrialRecord(
        trial=trial,
        recipe=recipe,
        config=dict(config),
        status=Status.FAILED if failed else Status.FINISHED,
        stage=stage,
        accuracy=accuracy,
        accuracy_drop=_number(data, "accuracy_drop"),
        worst_drop=_number(data, "worst_drop"),
        drop_std=_number(data, "drop_std") or 0.0,
        items_scored=_integer(data, "items_scored"),
        items=_integer(data, "items"),
        feasible=bool(data.get("feasible", False)) and not failed,
        latency_ms=_number(data, "latency_ms"),
        latency_ratio=ratio,
        ratio=_interval(ratio, data) if measured and ratio is not None else None,
        metrics=json.loads(data["metrics"]) if data.get("metrics") else None,
        size_bytes=_integer(data, "size_bytes"),
        size_ratio=_number(data, "size_ratio"),
        memory_ratio=_number(data, "memory_ratio"),
        peak_memory_bytes=_integer(data, "peak_memory_bytes"),
        int8_calls=_integer(data, "int8_calls") or 0,
        build_s=_number(data, "build_s") or 0.0,
        eval_s=_number(data, "eval_s") or 0.0,
        timing_s=_number(data, "timing_s") or 0.0,
        waiting_s=_number(data, "waiting_s") or 0.0,
        overhead_s=_number(data, "overhead_s") or 0.0,
        node=str(data.get("node") or ""),
        cpu=str(data.get("cpu") or ""),
        isa=str(data.get("isa") or ""),
        digest=str(data.get("digest") or ""),
        label=label,
        reason=str(data.get("reason") or (LOST if failed else "")),
    )


def to_result(record: TrialRecord) -> dict[str, Any]:
    """Return the flat result that gives this record again; what is unknown is left out."""
    ratio = record.ratio
    data: dict[str, Any] = {
        "accuracy": record.accuracy,
        "accuracy_drop": record.accuracy_drop,
        "worst_drop": record.worst_drop,
        "drop_std": record.drop_std,
        "items_scored": record.items_scored,
        "items": record.items,
        "latency_ratio": record.latency_ratio,
        "latency_ratio_low": ratio.low if ratio else None,
        "latency_ratio_high": ratio.high if ratio else None,
        "latency_ms": record.latency_ms,
        "speedup": 1 / record.latency_ratio if record.latency_ratio else None,
        "size_bytes": record.size_bytes,
        "size_ratio": record.size_ratio,
        "memory_ratio": record.memory_ratio,
        "peak_memory_bytes": record.peak_memory_bytes,
        "feasible": record.feasible,
        "stage": record.stage.value,
        "build_s": record.build_s,
        "eval_s": record.eval_s,
        "timing_s": record.timing_s,
        "waiting_s": record.waiting_s,
        "overhead_s": record.overhead_s,
        "latency_predicted": ratio is None,
        "int8_calls": record.int8_calls,
        "recipe": record.recipe.to_json(),
        "digest": record.digest,
        "status": record.status.value,
        "reason": record.reason,
        "node": record.node,
        "cpu": record.cpu,
        "isa": record.isa,
        "label": record.label,
        "metrics": None if record.metrics is None else json.dumps(dict(record.metrics)),
    }
    return {key: value for key, value in data.items() if value is not None}


def _number(data: Mapping[str, Any], key: str) -> float | None:
    value = data.get(key)
    return float(value) if value is not None and math.isfinite(value) else None


def _integer(data: Mapping[str, Any], key: str) -> int | None:
    value = _number(data, key)
    return None if value is None else int(value)


def _interval(ratio: float, data: Mapping[str, Any]) -> Ratio:
    low, high = _number(data, "latency_ratio_low"), _number(data, "latency_ratio_high")
    return Ratio(ratio, ratio if low is None else low, ratio if high is None else high)
