"""The best trials, built and measured in this process: on the backend that was searched on, and on its rivals."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raysq import evaluation, fingerprint, memory
from raysq.baseline import outputs
from raysq.errors import BackendError, RaysqError
from raysq.goal import Criterion, Goal, Objective
from raysq.kernels import base, built
from raysq.latency import Timing
from raysq.probing import CRAWLING, Settled, is_hopeless, settled
from raysq.recipe import Recipe
from raysq.result import Ratio, Stage, Status, TrialRecord
from raysq.rivals import carried

if TYPE_CHECKING:
    from raysq.deployed import Deployed
    from raysq.job import Job
    from raysq.kernels.base import Backend, BuiltModel

__all__ = ["COMPILED", "Finalist", "Finals", "Standing"]

COMPILED = "torch.compile"


@dataclass(frozen=True)
class Standing:
    """What the best recipe is on one backend.

    Attributes:
        backend: its name; "torch.compile" for the fp32 model, compiled, which is never returned.
        recipe: digest of the recipe as it ran there; "" for none.
        int8_calls: how many calls really ran in int8.
        accuracy: its score; None where it was not scored.
        accuracy_drop: its loss against the baseline.
        latency_ms: its median.
        latency_ratio: against the fastest fp32 form, with its 95 % interval.
        holds: whether it meets the goal.
        reason: why it doesn't, or why there is no number.
        criterion: how the loss is counted.
    """

    backend: str
    recipe: str = ""
    int8_calls: int = 0
    accuracy: float | None = None
    accuracy_drop: float | None = None
    latency_ms: float | None = None
    latency_ratio: Ratio | None = None
    holds: bool = False
    reason: str = ""
    criterion: Criterion = Criterion.RELATIVE

    def __str__(self) -> str:
        parts = [self.backend]
        if self.latency_ratio is not None:
            parts.append(f"latency {self.latency_ratio.with_interval} of fp32")
        if self.accuracy is not None and self.accuracy_drop is not None:
            parts.append(f"accuracy {self.accuracy:.4g} ({self.criterion.shown(self.accuracy_drop)})")
        return "  ".join([*parts, *filter(None, [self.reason])])


@dataclass(frozen=True)
class Finalist:
    """A trial, built and measured in this process; its record has the recipe, the ratio and the loss found here."""

    trial: TrialRecord
    built: BuiltModel
    timing: Timing
    left_in_float: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_hopeless(self) -> bool:
        """Whether it must not be deployed, however well it scores."""
        return is_hopeless(self.timing, self.built)

    def holds(self, goal: Goal) -> bool:
        """Whether it may be returned."""
        return goal.holds(self.trial.loss) and not self.is_hopeless

    def standing(self, goal: Goal, holds: bool) -> Standing:
        """Return it as a line of the table of backends."""
        return Standing(
            backend=self.built.backend,
            recipe=self.trial.recipe.digest,
            int8_calls=base.count_int8(self.built),
            accuracy=self.trial.accuracy,
            accuracy_drop=self.trial.accuracy_drop,
            latency_ms=self.timing.candidate_ms,
            latency_ratio=self.timing.ratio,
            holds=holds,
            reason="" if holds else self.trial.reason,
            criterion=goal.criterion,
        )


@dataclass(frozen=True)
class _Loaded:
    """What a rival built, saved and loaded again, and its timing."""

    settled: Settled
    model: Deployed
    timing: Timing


class Finals:
    """Measures trials once more, all against one build of the fastest fp32 form, with the larger budget.

    Args:
        job: what the trials share.
        engine: the backend that they ran on.
    """

    def __init__(self, job: Job, engine: Backend) -> None:
        self._job = job
        self._engine = engine
        self._reference = base.offering(job.baseline.form, engine).build_float(job.prepared.source, job.baseline.form)
        self._latency = replace(job.latency, budget_s=job.latency.final_budget_s, ci_width=job.latency.ci_width / 2)

    def measured(self, trial: TrialRecord) -> Finalist:
        """Build a trial and time it; score it too where its score is an estimate, or its outputs are others here."""
        source = self._job.prepared.source
        memory.trim()
        built = self._engine.build(source, trial.recipe)
        digest = fingerprint.of_tensors(outputs(built.model, source.args, source.kwargs))
        timing = self._time(built.model)
        if (trial.estimated or digest != trial.digest) and not is_hopeless(timing, built):
            trial = self._scored(trial, built.model)
        return Finalist(trial.at(timing.ratio), built, timing)

    def carried(self, trials: Iterable[TrialRecord], rival: Backend) -> Finalist | Standing:
        """Return the fastest of some trials on another backend that meets the goal there, or what its best lacks.

        Everything is measured of what was saved and loaded again. Whatever goes wrong is what it lacks: the search
        that found these recipes isn't lost.
        """
        source = self._job.prepared.source
        recipes = dict.fromkeys(carried(trial.recipe, source, rival) for trial in trials)
        loaded: list[_Loaded] = []
        lacking = Standing(rival.name)
        for recipe in recipes:
            try:
                loaded.append(self._loaded(recipe, rival))
            except Exception as exc:  # noqa: BLE001
                lacking = Standing(rival.name, recipe.digest, reason=_told(exc))
        for each in sorted(loaded, key=lambda each: each.timing.ratio):
            try:
                finalist = self._of(each)
            except Exception as exc:  # noqa: BLE001
                lacking = Standing(rival.name, each.settled.recipe.digest, reason=_told(exc))
                continue
            if self._job.goal.holds(finalist.trial.loss):
                return finalist
            if lacking.accuracy is None:
                lacking = finalist.standing(self._job.goal, holds=False)
        return lacking

    def compiled(self) -> Standing:
        """Return how fast the fp32 model is under torch.compile, frozen: it can't be saved, so it is never returned."""
        from torch._inductor import config

        source = self._job.prepared.source
        model = torch.compile(source.model, options={"freezing": True})
        try:
            with torch.no_grad(), config.patch(compile_threads=1):  # more leave processes behind
                model(*source.args, **source.kwargs)
            timing = self._time(model)
        except Exception as exc:  # noqa: BLE001  # a compiler may raise anything, and needs one for C++
            return Standing(COMPILED, reason=_told(exc))
        finally:
            torch._dynamo.reset()
        return Standing(
            COMPILED,
            latency_ms=timing.candidate_ms,
            latency_ratio=timing.ratio,
            reason="the fp32 model, to compare with: what it compiles can't be saved",
        )

    def _loaded(self, recipe: Recipe, rival: Backend) -> _Loaded:
        if not recipe.int8_calls:
            raise BackendError("it has no int8 kernel for what the recipe has in int8")
        found = settled(recipe, self._job.prepared.source, rival)
        with tempfile.TemporaryDirectory(prefix="raysq-") as directory:
            found.built.save(Path(directory))
            model = built.load(Path(directory))
        timing = self._time(model)
        if is_hopeless(timing, found.built):
            raise BackendError(CRAWLING)
        if not base.count_int8(found.built):
            raise BackendError("no call runs in int8")
        return _Loaded(found, model, timing)

    def _of(self, loaded: _Loaded) -> Finalist:
        """Return the record of a trial that was not one of the search: what it would have been on this backend."""
        prepared, baseline, found = self._job.prepared, self._job.baseline, loaded.settled
        trial = TrialRecord(-1, found.recipe, {}, Status.FINISHED, Stage.TIMED, size_bytes=found.built.size_bytes)
        if baseline.size_bytes:
            trial = replace(trial, size_ratio=found.built.size_bytes / baseline.size_bytes)
        if Objective.MEMORY in self._job.goal.objectives:
            growth = prepared.memory_growth(found.built) / prepared.memory_growth(self._reference)
            trial = replace(trial, memory_ratio=growth)
        trial = self._scored(trial.at(loaded.timing.ratio), loaded.model)
        return Finalist(trial, found.built, loaded.timing, found.left_in_float)

    def _scored(self, trial: TrialRecord, model: Any) -> TrialRecord:
        job = self._job
        score = evaluation.evaluate(job.eval_fn, model, job.goal)
        loss = evaluation.loss(score, job.baseline.accuracy, job.baseline.metrics, job.goal)
        return replace(
            trial,
            accuracy=score.value,
            accuracy_drop=loss.drop,
            worst_drop=loss.worst_drop,
            items_scored=score.n,
            items=score.n,
            drop_std=0.0,
            reason=loss.reason,
        )

    def _time(self, model: Callable[..., Any]) -> Timing:
        return self._job.prepared.time(model, self._reference.model, self._latency)


def _told(exc: Exception) -> str:
    """Return the first line of what went wrong; ours speak for themselves."""
    first = str(exc).strip().partition("\n")[0]
    return first if isinstance(exc, RaysqError) else f"{type(exc).__name__}: {first}"
