"""What `raysq.tune` is given, checked and brought to one form before any work."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raysq import evaluation, storage
from raysq.checks import check_whole
from raysq.errors import OptionError, ResumeError
from raysq.goal import Goal
from raysq.latency import Latency
from raysq.workers import Workers

if TYPE_CHECKING:
    from raysq.recipe import Recipe
    from raysq.warm_start import EarlierRun

__all__ = [
    "check_limits",
    "check_options",
    "check_sendable",
    "goal_of",
    "journal_path",
    "searcher_of",
    "sources_of",
    "versions",
    "workers_of",
]

FOLLOWS = ("on_trial_result", "begin")  # a method of a Ray Tune callback, and of a study: neither is imported for it


def check_options(*, callbacks: Any = (), **given: Any) -> None:
    """Refuse option values of another kind.

    Raises:
        OptionError: which one, and what it must be.
    """
    for name, kind in (("goal", Goal), ("latency", Latency), ("workers", Workers)):
        if not isinstance(given[name], kind | None):
            raise OptionError(f"`{name}` must be a raysq.{kind.__name__}, got {given[name]!r}.")
    if not isinstance(callbacks, Sequence) or not all(map(_follows, callbacks)):
        raise OptionError(
            f"`callbacks` must be a list of Ray Tune callbacks and `raysq.OptunaStudy`, got {callbacks!r}."
        )


def _follows(callback: object) -> bool:
    return not isinstance(callback, type) and any(hasattr(callback, name) for name in FOLLOWS)


def goal_of(goal: Goal | None, tolerance: float, criterion: str, higher_is_better: bool) -> Goal:
    """Return the goal, or the one that the three arguments describe.

    Raises:
        OptionError: both say something, or a value is out of its range.
    """
    described = Goal(tolerance, criterion, higher_is_better)  # type: ignore[arg-type]
    if goal is None:
        return described
    if described != Goal():
        raise OptionError(
            "`goal` is given, so `tolerance`, `criterion` and `higher_is_better` would have no effect. Say them in it: "
            "`raysq.Goal(tolerance, criterion, higher_is_better)`."
        )
    return goal


def check_limits(max_trials: int, timeout_s: float | None) -> None:
    """Refuse limits that end no search, or each.

    Raises:
        OptionError: a value out of its range.
    """
    check_whole("max_trials", max_trials, 1)
    if timeout_s is not None and (isinstance(timeout_s, bool | str) or not timeout_s > 0):
        hint = " INC's timeout=0, which ends with the first model that passes, is `stop_at_first=True`."
        raise OptionError(f"`timeout_s` must be a positive number of seconds, got {timeout_s!r}.{hint}")


def workers_of(workers: Workers | None, max_concurrent_trials: int | None) -> Workers:
    """Return the workers with their count, which `max_concurrent_trials` says as well.

    Raises:
        OptionError: it is out of its range, or both say something.
    """
    workers = workers or Workers()
    if max_concurrent_trials is None:
        return workers
    check_whole("max_concurrent_trials", max_concurrent_trials, 1)
    if workers.count is not None:
        raise OptionError("`max_concurrent_trials` is `Workers.count`: give one of them.")
    return replace(workers, count=max_concurrent_trials)


def check_sendable(model: torch.nn.Module, eval_fn: evaluation.EvalFn) -> None:
    """Make sure that workers can be sent the model and the evaluation.

    Raises:
        ModelError, EvaluationError: what can't be pickled.
    """
    from raysq.tuning import shipping

    shipping.pack_model(model)
    shipping.pack_eval_fn(eval_fn)


def searcher_of(strategy: Any, arguments: Mapping[str, Any]) -> Any:
    """Return the searcher that a name stands for, or the one that was given.

    Raises:
        OptionError: an unknown name or argument; neither a name nor a searcher.
    """
    from raysq import strategies

    if isinstance(strategy, str):
        return strategies.get(strategy, **arguments)
    if arguments:
        raise OptionError("`strategy_kwargs` go with a strategy's name; give a searcher instance its own arguments.")
    if not callable(getattr(strategy, "suggest", None)):
        raise OptionError(f"`strategy` must be a name or a Ray Tune searcher, got {type(strategy).__name__}.")
    return strategy


def journal_path(
    storage_path: str | Path | None, name: str | None, resume: str | Path | None
) -> tuple[Path, str | None]:
    """Return where the journal of a run is, or will be, and the URL that its directory is copied to, if any.

    Raises:
        ResumeError: there is none to resume.
        StorageError: it can't be written, or stands already.
    """
    from raysq import journal

    url: str | None = None
    if resume is not None:
        if storage.is_url(resume):
            path, url = storage.continued(str(resume), journal.FILE)
        else:
            path = Path(resume)
            path = path / journal.FILE if path.is_dir() else path
        if not path.exists():
            raise ResumeError(f"there is no journal at {path}. `resume` takes the directory of an earlier run.")
        journal.read(path)
        return path, url
    name = name or f"run-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S-%f')}"
    parent = storage_path or storage.runs()
    if not storage.is_url(parent):
        return journal.vacant(Path(parent) / name / journal.FILE), None
    url = f"{str(parent).rstrip('/')}/{name}"
    path = journal.vacant(storage.local_copy(url) / journal.FILE)
    storage.vacant(url, journal.FILE)
    return path, url


def sources_of(given: Any, resume: str | Path | None) -> Sequence[EarlierRun | Recipe]:
    """Return what a run is warm-started with.

    Raises:
        OptionError: there is something to resume too.
        ResumeError: it can't be read.
    """
    from raysq import warm_start

    if given is not None and resume is not None:
        raise OptionError(
            "`resume` goes on with what that run was warm-started with. Leave out `warm_start`; or begin a new run, "
            f"which both give what they have: `warm_start=[{str(resume)!r}, …]`, without `resume`."
        )
    return warm_start.read(given)


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    found = {}
    for package in ("raysq", "torch", "ray", "optuna", "intel-extension-for-pytorch", "openvino"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
