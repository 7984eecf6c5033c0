"""What `raysq.tune` is given, checked and brought to one form before any work."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.parametrize import is_parametrized

from raysq import evaluation
from raysq.errors import OptionError, ResumeError
from raysq.goal import Goal
from raysq.inspection import evaluating
from raysq.options import Latency, Workers, is_whole
from raysq.parametrization import bake

if TYPE_CHECKING:
    from raysq.recipe import Recipe
    from raysq.warm_start import Run

__all__ = ["check_limits", "check_options", "check_sendable", "journal_path", "searcher_of", "sources_of", "versions"]

STORAGE = Path("raysq_runs")


def check_options(**given: Any) -> None:
    """Refuse option values of another kind.

    Raises:
        OptionError: which one, and what it must be.
    """
    for name, kind in (("goal", Goal), ("latency", Latency), ("workers", Workers)):
        if not isinstance(given[name], kind | None):
            raise OptionError(f"`{name}` must be a raysq.{kind.__name__}, got {given[name]!r}.")


def check_limits(max_trials: int, timeout_s: float | None, max_concurrent_trials: int | None) -> None:
    """Refuse limits that end no search, or each.

    Raises:
        OptionError: a value out of its range.
    """
    if not is_whole(max_trials) or max_trials < 1:
        raise OptionError(f"`max_trials` must be a whole number of at least 1, got {max_trials!r}.")
    if timeout_s is not None and (isinstance(timeout_s, bool | str) or not timeout_s > 0):
        hint = " INC's timeout=0, which ends with the first model that passes, is `stop_at_first=True`."
        raise OptionError(f"`timeout_s` must be a positive number of seconds, got {timeout_s!r}.{hint}")
    if max_concurrent_trials is not None and (not is_whole(max_concurrent_trials) or max_concurrent_trials < 1):
        raise OptionError(
            f"`max_concurrent_trials` must be a whole number of at least 1, got {max_concurrent_trials!r}."
        )


def check_sendable(model: torch.nn.Module, eval_fn: evaluation.EvalFn) -> None:
    """Make sure that workers can be sent the model and the evaluation.

    Raises:
        ModelError, EvaluationError: what can't be pickled.
    """
    from raysq.tuning import shipping

    parametrized = any(map(is_parametrized, model.modules()))  # can't be pickled, but workers get the copy
    shipping.pack_model(bake(evaluating(model)) if parametrized else model)
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


def journal_path(storage_path: str | Path | None, name: str | None, resume: str | Path | None) -> Path:
    """Return where the journal of a run is, or will be.

    Raises:
        ResumeError: there is none to resume.
        StorageError: it can't be written, or stands already.
    """
    from raysq import journal

    if resume is not None:
        path = Path(resume)
        path = path / journal.FILE if path.is_dir() else path
        if not path.exists():
            raise ResumeError(f"there is no journal at {path}. `resume` takes the directory of an earlier run.")
        journal.read(path)
        return path
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    return journal.vacant(Path(storage_path or STORAGE) / (name or f"run-{stamp}") / journal.FILE)


def sources_of(given: Any, resume: str | Path | None) -> Sequence[Run | Recipe]:
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
    for package in ("raysq", "torch", "ray", "optuna", "intel-extension-for-pytorch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
