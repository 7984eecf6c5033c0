"""What a search leaves: the baseline, one record per trial, and the winner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from raysq import notebook
from raysq.goal import Objective
from raysq.impact import Impact, impacts
from raysq.quantized import write
from raysq.recipe import Precision, Recipe
from raysq.storage import written

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from raysq.finalists import Standing
    from raysq.kernels.base import BuiltModel
    from raysq.scores import Units

__all__ = ["Baseline", "Confirmation", "Ratio", "Result", "Stage", "Status", "TrialRecord"]


COLUMNS = {  # of the frame
    Objective.LATENCY: "latency_ratio",
    Objective.ACCURACY: "accuracy_drop",
    Objective.SIZE: "size_ratio",
    Objective.MEMORY: "memory_ratio",
}


class Status(StrEnum):
    """How a trial ended."""

    FINISHED = "finished"
    FAILED = "failed"


class Stage(StrEnum):
    """How far a trial came."""

    BUILD = "build"
    EVALUATED = "evaluated"
    TIMED = "timed"


class Ratio(float):
    """A latency ratio, a number, with its 95 % interval: int8 over the fastest fp32, smaller is better.

    Attributes:
        low: lower end of the interval.
        high: upper end.

    Example:
        >>> ratio = Ratio(0.5, 0.4, 0.6)
        >>> ratio < 1, ratio.high
        (True, 0.6)
    """

    low: float
    high: float

    def __new__(cls, value: float, low: float, high: float) -> Self:
        """Return the number with its interval."""
        self = super().__new__(cls, value)
        self.low, self.high = low, high
        return self

    @property
    def with_interval(self) -> str:
        """The number and its interval, as logs and tables show them."""
        return f"{self:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def __getnewargs__(self) -> tuple[float, float, float]:  # type: ignore[override]  # float's has one
        """Say what pickle and copy make another of."""
        return float(self), self.low, self.high

    def __repr__(self) -> str:
        return f"Ratio({float(self)}, {self.low}, {self.high})"


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
        eval_s: seconds that one evaluation took.
        dropped: float forms that are left out, and why.
        size_bytes: size of the fastest fp32 form; None in journals of raysq 0.1.
        confirm_accuracy: score of the model on the goal's split for confirmation, None where there is none.
        confirm_metrics: all its metrics there.
        reference: its scores of each item, where the evaluation gives them: what trials are compared with that end
            early.
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
    eval_s: float = 0.0
    size_bytes: int | None = None
    confirm_accuracy: float | None = None
    confirm_metrics: Mapping[str, float] | None = None
    reference: Units | None = field(default=None, compare=False)


@dataclass(frozen=True)
class TrialRecord:
    """One finished trial; times in seconds, latency in milliseconds.

    Attributes:
        trial: its number, from 0, in the order of suggestion; below 0 for one of another run, by a warm start.
        recipe: what was tried.
        config: the flat search point that gave the recipe.
        status: finished or failed.
        stage: how far it came.
        accuracy: the goal's metric; None if the trial failed before it.
        accuracy_drop: loss against the baseline, as the goal counts it.
        feasible: within all tolerances, with at least one op really in int8.
        latency_ms: median, None if it was not timed.
        latency_ratio: against the fastest fp32; a prediction where `ratio` is None.
        ratio: the measured ratio with its interval, None if it was not timed.
        metrics: every metric that eval_fn returned.
        size_bytes: size of the built model.
        peak_memory_bytes: peak resident memory of the worker.
        int8_calls: how many calls really ran in int8.
        build_s: seconds to build and warm up.
        eval_s: seconds in eval_fn.
        timing_s: seconds in timings.
        overhead_s: all other seconds from when the worker took it up to its last report.
        node: host that ran it.
        cpu: name of that host's CPU.
        isa: its instruction sets, with commas between.
        digest: fingerprint of the built model's outputs on the example inputs.
        label: what the strategy calls this trial.
        reason: why it failed, or why it is not feasible; "" otherwise.
        worst_drop: that of the metric that decides, see `evaluation.Loss`; None: that of the only one.
        size_ratio: against that of the fastest fp32 form.
        memory_ratio: what a forward adds to the resident memory at its peak, against the same of the fastest fp32
            form; measured where the goal has memory among its objectives.
        items_scored: how many items the accuracy is of; None where that isn't known.
        items: how many there are; the accuracy is an estimate if that is more.
        drop_std: standard error of such an estimate's drop; 0 where all items were scored.
        waiting_s: seconds for which others were timed on the node, or still ran where this trial was to be timed; in
            none of the others.
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
    timing_s: float = 0.0
    overhead_s: float = 0.0
    node: str = ""
    cpu: str = ""
    isa: str = ""
    digest: str = ""
    label: str = ""
    reason: str = ""
    worst_drop: float | None = None
    size_ratio: float | None = None
    memory_ratio: float | None = None
    items_scored: int | None = None
    items: int | None = None
    drop_std: float = 0.0
    waiting_s: float = 0.0

    @property
    def estimated(self) -> bool:
        """Whether the evaluation ended before its last item, so that accuracy and drop are estimates."""
        return self.items_scored is not None and self.items is not None and self.items_scored < self.items

    @property
    def loss(self) -> float:
        """The drop that decides, infinite where it is unknown."""
        drop = self.accuracy_drop if self.worst_drop is None else self.worst_drop
        return float("inf") if drop is None else drop

    @property
    def latency_bound(self) -> float:
        """What the latency ratio lies below: the upper end of its interval, so that luck in timing wins nothing.

        It is the prediction where nothing was timed, and infinite where there is none.
        """
        if self.ratio is not None:
            return self.ratio.high
        return float("inf") if self.latency_ratio is None else self.latency_ratio

    def at(self, latency_ratio: float | None) -> TrialRecord:
        """Return the record as it were if its latency ratio were known to be this."""
        return replace(self, latency_ratio=latency_ratio, ratio=None)


@dataclass(frozen=True)
class Confirmation:
    """How a winner did on data that the search did not see, `Goal.confirm`.

    Attributes:
        accuracy: its score there.
        baseline_accuracy: that of the model as it was given.
        accuracy_drop: its loss there, as the goal counts it.
        worst_drop: that of the metric that decides, see `evaluation.Loss`.
        holds: whether all metrics are within their tolerances there.
        tried: how many recipes were scored there, this one included; the more, the more of it is luck again.
    """

    accuracy: float
    baseline_accuracy: float
    accuracy_drop: float
    worst_drop: float
    holds: bool
    tried: int

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "does not hold"
        return (
            f"accuracy {self.accuracy:.4f} of {self.baseline_accuracy:.4f} on the split that confirms: {verdict}, "
            f"number {self.tried} of those tried there"
        )


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        model: the int8 model that was measured, called like the original.
        recipe: what runs how in it.
        accuracy: its score, the best of many trials on one evaluation set: optimistic, unless it is confirmed.
        accuracy_drop: its loss against the baseline, as the goal counts it.
        baseline: what it was measured against.
        latency_ms: its median.
        latency_ratio: against the fastest fp32 form, with its 95 % interval; smaller is better.
        feasible: whether it meets the goal.
        trials: every trial that ended.
        executed: call name to the precision it really runs in.
        left_in_float: call name, and why it isn't in int8.
        journal: the run's journal, a local file; None where there is none.
        objectives: what the Pareto front is over.
        confirmation: how it did on `Goal.confirm`; None where the goal has none, or nothing met it.
        environment: what it was timed on and with: "cpu", "isa", "threads", "governor" (of the frequency, None where
            the system doesn't tell), "inputs" (type and shape of each tensor).
        backends: with `backend="auto"`, what the best recipe is on each backend, the one that was searched on first;
            `pandas.DataFrame(result.backends)` shows them as a table.
    """

    model: torch.nn.Module
    built: BuiltModel
    recipe: Recipe
    accuracy: float
    accuracy_drop: float
    baseline: Baseline
    latency_ms: float
    latency_ratio: Ratio
    feasible: bool
    trials: tuple[TrialRecord, ...]
    executed: Mapping[str, Precision]
    left_in_float: Mapping[str, str]
    journal: Path | None = None
    objectives: tuple[Objective, ...] = (Objective.LATENCY, Objective.ACCURACY)
    confirmation: Confirmation | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    backends: tuple[Standing, ...] = ()

    @property
    def backend(self) -> str:
        """Name of the backend that the model runs on."""
        return self.built.backend

    @property
    def speedup(self) -> float:
        """How many times as fast as the fastest fp32 form it is."""
        return 1 / self.latency_ratio

    @property
    def speedup_ci(self) -> tuple[float, float]:
        """The 95 % interval of the speed-up."""
        return 1 / self.latency_ratio.high, 1 / self.latency_ratio.low

    @property
    def worthwhile(self) -> bool:
        """Whether it is faster than both the fastest fp32 and the bf16 form, also at the upper end of its interval."""
        return self.latency_ratio.high < min(1.0, self.baseline.bf16_ratio or 1.0)

    def _repr_html_(self) -> str:
        return notebook.of_result(self)

    def dataframe(self) -> pd.DataFrame:
        """Return a row per trial, in the order in which they ended."""
        import pandas as pd

        rows = []
        for t in self.trials:
            ratio = t.latency_ratio
            rows.append(
                {
                    "trial": t.trial,
                    "status": t.status.value,
                    "stage": t.stage.value,
                    "label": t.label,
                    "accuracy": t.accuracy,
                    "accuracy_drop": t.accuracy_drop,
                    "worst_drop": t.worst_drop,
                    "drop_std": t.drop_std,
                    "items_scored": t.items_scored,
                    "items": t.items,
                    "latency_ms": t.latency_ms,
                    "latency_ratio": ratio,
                    "latency_ratio_low": t.ratio.low if t.ratio else None,
                    "latency_ratio_high": t.ratio.high if t.ratio else None,
                    "latency_predicted": t.ratio is None,
                    "speedup": 1 / ratio if ratio else None,
                    "feasible": t.feasible,
                    "size_bytes": t.size_bytes,
                    "size_ratio": t.size_ratio,
                    "memory_ratio": t.memory_ratio,
                    "peak_memory_bytes": t.peak_memory_bytes,
                    "int8_calls": t.int8_calls,
                    "build_s": t.build_s,
                    "eval_s": t.eval_s,
                    "timing_s": t.timing_s,
                    "waiting_s": t.waiting_s,
                    "overhead_s": t.overhead_s,
                    "node": t.node,
                    "cpu": t.cpu,
                    "isa": t.isa,
                    "recipe": t.recipe.digest,
                    "reason": t.reason,
                }
            )
        return pd.DataFrame(rows)

    def pareto_front(self) -> pd.DataFrame:
        """Return the timed trials that none beats: as good in all objectives, better in one; of equals the earliest.

        It is over latency, accuracy loss, and what else the goal has among its objectives.
        """
        frame = self.dataframe()
        columns = [COLUMNS[objective] for objective in self.objectives]
        timed = frame[~frame["latency_predicted"]].dropna(subset=columns).drop_duplicates(columns)
        points = timed[columns].to_numpy()
        beaten = [bool(((points <= point).all(1) & (points < point).any(1)).any()) for point in points]
        return timed.loc[[not b for b in beaten]].sort_values(columns)

    def impacts(self) -> pd.DataFrame:
        """Return what single calls gained by being float, the largest gain first; empty where no two trials tell.

        A row per call and float type: its `accuracy_drop` in float, and its `gain`, by how much less that is than with
        it in int8. Strategies with a stage for it, such as `basic`, tell this of many calls.
        """
        import pandas as pd

        rows = [asdict(impact) for impact in impacts(self.trials)]
        return pd.DataFrame(rows, columns=[f.name for f in fields(Impact)])

    def save(self, directory: str | Path) -> None:
        """Write model.pt, signature.json, recipe.json and trials.csv; `raysq.load` reads them.

        With the extra `report`, and a journal, also report.html: the whole run as one page.

        Args:
            directory: path, or URL of any kind that fsspec knows.

        Raises:
            StorageError: it can't be written.
        """
        with written(directory) as path:
            write(path, self.built, self.recipe)
            self.dataframe().to_csv(path / "trials.csv", index=False)
            self._report(path)

    def _report(self, directory: Path) -> None:
        from raysq import journal, report
        from raysq.run import Run

        if self.journal is None or not self.journal.exists() or not report.is_available():
            return
        header, entries = journal.read(self.journal)
        report.write(Run(header, entries, winner=self.recipe.digest), directory / report.FILE)
