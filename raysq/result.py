"""What a search leaves: the baseline, one record per trial, and the winner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from raysq.recipe import Recipe

__all__ = ["Baseline", "Ratio", "Stage", "Status", "TrialRecord"]


class Status(StrEnum):
    """How a trial ended."""

    FINISHED = "finished"
    FAILED = "failed"


class Stage(StrEnum):
    """How far a trial came."""

    BUILD = "build"
    EVALUATED = "evaluated"
    TIMED = "timed"


@dataclass(frozen=True)
class Ratio:
    """A latency ratio with its 95 % interval: int8 over the fastest fp32, smaller is better."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Baseline:
    """What int8 is measured against.

    Attributes:
        accuracy: score of the model as it was given.
        metrics: all its metrics.
        latency_ms: median of the fastest fp32 form.
        form: name of that form.
        forms_ms: latency of every float form that was tried.
        bf16_accuracy: score of the bf16 form, None where the CPU has no bf16 kernels.
        bf16_latency_ms: its median.
        bf16_ratio: its latency ratio to the fastest fp32.
        dropped: float forms that are left out, and why.
    """

    accuracy: float
    metrics: Mapping[str, float]
    latency_ms: float
    form: str
    forms_ms: Mapping[str, float]
    bf16_accuracy: float | None = None
    bf16_latency_ms: float | None = None
    bf16_ratio: Ratio | None = None
    dropped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialRecord:
    """One finished trial; times in seconds, latency in milliseconds.

    Attributes:
        trial: its number, from 0, in the order of suggestion.
        recipe: what was tried.
        config: the flat search point that gave the recipe.
        status: finished or failed.
        stage: how far it came.
        accuracy: the goal's metric; None if the trial failed before it.
        accuracy_drop: loss against the baseline, as the goal counts it.
        feasible: within the tolerance, with at least one op really in int8.
        latency_ms: median, None if it was not timed.
        latency_ratio: against the fastest fp32; a prediction where `ratio` is None.
        ratio: the measured ratio with its interval, None if it was not timed.
        metrics: every metric that eval_fn returned.
        size_bytes: size of the built model.
        peak_memory_bytes: peak resident memory of the worker.
        int8_calls: how many calls really ran in int8.
        build_s: seconds to build and warm up.
        eval_s: seconds in eval_fn.
        overhead_s: all other seconds but timing.
        node: host that ran it.
        digest: fingerprint of the built model's outputs on the example inputs.
        label: what the strategy calls this trial.
        reason: why it failed, or why it is not feasible; "" otherwise.
    """

    trial: int
    recipe: Recipe
    config: Mapping[str, object]
    status: Status
    stage: Stage
    accuracy: float | None = None
    accuracy_drop: float | None = None
    feasible: bool = False
    latency_ms: float | None = None
    latency_ratio: float | None = None
    ratio: Ratio | None = None
    metrics: Mapping[str, float] | None = None
    size_bytes: int | None = None
    peak_memory_bytes: int | None = None
    int8_calls: int = 0
    build_s: float = 0.0
    eval_s: float = 0.0
    overhead_s: float = 0.0
    node: str = ""
    digest: str = ""
    label: str = ""
    reason: str = ""
