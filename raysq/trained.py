"""A trained model in a search: its weights beside the journal, its space, and training as the last resort."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from raysq import fingerprint, qat
from raysq.conclusion import conclude
from raysq.errors import NoFeasibleRecipe, ResumeError, StorageError
from raysq.model_choices import ModelChoices
from raysq.prepared import Prepared, ranked
from raysq.recipe import Recipe, Rounding
from raysq.result import Result, TrialRecord
from raysq.space import SearchSpace

if TYPE_CHECKING:
    from raysq.job import Job
    from raysq.kernels.base import Backend
    from raysq.source import Source
    from raysq.tuning.live import Say

__all__ = ["LABEL", "searched", "train_once", "with_last_resort"]

LABEL = "quantization-aware training"


def train_once(prepared: Prepared, recipe: Recipe, train_fn: qat.TrainFn, run: Path, *, again: bool = True) -> Source:
    """Train under a recipe, or take the weights that an earlier part of this run left; see `qat.train`.

    Args:
        prepared: the model.
        recipe: which calls are rounded and how.
        train_fn: the training loop.
        run: the run's directory.
        again: whether it may be trained where no weights were left.

    Raises:
        ResumeError: the weights can't be read, or there are none of this loop though there must be.
        StorageError: they can't be written.
    """
    path = run / f"trained-{recipe.digest}.pt"
    about = {**prepared.fingerprints, "training": fingerprint.of_function(train_fn)}
    found = _saved(path, prepared.source, recipe, about)
    if found is not None:
        return found
    if not again:
        raise ResumeError(
            f"this run's trials are of a trained model, and {path} holds no weights that this `train_fn` trained. "
            "Start a new run: leave out `resume`."
        )
    trained = qat.train(prepared.source, recipe, train_fn)
    _save(path, trained, about)
    return trained


def _save(path: Path, trained: Source, about: Mapping[str, str]) -> None:
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"about": dict(about), "weights": trained.model.state_dict()}, part)
        part.replace(path)  # whole or not at all
    except (OSError, RuntimeError) as exc:  # torch's writer raises RuntimeError where the disk is full
        raise StorageError(f"can't write {path}: {exc}. Make room, or pass another `storage_path`.") from exc


def _saved(path: Path, source: Source, recipe: Recipe, about: Mapping[str, str]) -> Source | None:
    """Return what was trained in an earlier part of the run, None if that ended before or trained something else."""
    if not path.exists():
        return None
    scaled = source.under(recipe)
    model = copy.deepcopy(scaled.model)
    try:
        saved = torch.load(path, weights_only=True)
        if saved["about"] != about:
            return None
        model.load_state_dict(saved["weights"])
    except Exception as exc:
        raise ResumeError(f"{path} can't be read: {exc}. Remove it to train again.") from exc
    return qat.deployed(scaled, model)


def searched(prepared: Prepared, trained: Source) -> Prepared:
    """Return the search of a trained model, whose default recipe is what was trained."""
    space, sensitivities = ranked(_learned(prepared.space), trained)
    return replace(prepared, source=trained, space=space, sensitivities=sensitivities)


def _learned(space: SearchSpace) -> SearchSpace:
    """Return what may be tried of a model after training, of a space from before.

    It holds neither smoothing nor transforms nor adaptive rounding: weights have learned the grid that they are on.
    """
    nearest = {
        configs: tuple(dict.fromkeys(replace(c, rounding=Rounding.NEAREST) for c in configs))
        for configs in space.options.values()
    }
    options = {name: nearest[configs] for name, configs in space.options.items()}
    return replace(space, options=options, model=ModelChoices())


def with_last_resort(
    job: Job,
    engine: Backend,
    trials: Sequence[TrialRecord],
    journal: Path,
    train_fn: qat.TrainFn,
    say: Say = lambda text: None,
) -> Result:
    """Conclude a search in which nothing passed: train under the closest recipe, and take that if it is closer.

    The trained model is one more trial of the result. The journal doesn't have it, as its lines are about the model
    that was given; a resumed run has its weights.

    Raises:
        NoFeasibleRecipe: it doesn't meet the goal either.
        EvaluationError: no trial could be scored.
    """
    scored = [t for t in trials if t.accuracy_drop is not None and t.int8_calls]
    if not scored:
        return conclude(job, engine, trials, journal, say)
    closest = min(scored, key=lambda t: t.loss)
    say(f"nothing met the goal: training under the closest recipe, which loses {closest.loss:.4g}")
    source = train_once(job.prepared, closest.recipe, train_fn, journal.parent)
    only = SearchSpace(source.graph, {n: (c,) for n, c in qat.plain(closest.recipe).ops.items()})
    trained = replace(job, prepared=replace(job.prepared, source=source, space=only))
    trial = _tried(trained, engine, len(trials))
    better = trial.feasible or trial.loss < closest.loss
    of, concluded = (trained, [trial]) if better else (job, trials)
    every = (*trials, trial)
    try:
        result = conclude(of, engine, concluded, journal, say)
    except NoFeasibleRecipe as exc:
        result = replace(exc.result, trials=every)
        if result.confirmation is not None:
            raise NoFeasibleRecipe(str(exc), result) from None
        raise NoFeasibleRecipe(
            f"neither a recipe in {len(trials)} trials nor training under the closest of them met the goal "
            f"({job.goal}); the closest loses {result.accuracy_drop:.4g}. It is in this error's `result`. "
            "Train for longer, or allow a larger tolerance.",
            result,
        ) from None
    return replace(result, trials=every)


def _tried(job: Job, engine: Backend, number: int) -> TrialRecord:
    """Build, score and time a model that has one recipe, in this process."""
    from raysq.tuning.records import record
    from raysq.tuning.worker import Worker

    worker = Worker(job, engine)
    worker.begin({"label": LABEL})
    report = worker.advance()
    if report["feasible"]:
        report = worker.advance()
    return record(number, {}, report)
