"""Ray's loggers in a search: they see trials as people read them, write into the run's directory, and may fail."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.logger import LoggerCallback

from raysq.space import SearchSpace
from raysq.tuning.guarded import Guarded
from raysq.tuning.unsaved import Unsaved

__all__ = ["FOLDER", "Logged", "readable", "settings"]

FOLDER = "logs"  # of a run's directory; a folder per trial in it
LEFT_OUT = frozenset(  # of a report: long texts, Ray's own counters, and digests, which MLflow may take for numbers
    ("recipe", "pairs", "metrics", "digest", "config", "experiment_tag", "pid", "node_ip", "timestamp")
    + ("time_since_restore", "iterations_since_restore", "timesteps_total", "episodes_total")
)
NO_SETTING = frozenset(("trial", "seen"))  # of a config


class Logged(Unsaved, tune.Callback):
    """A logger of Ray's, such as those for TensorBoard, MLflow and W&B, in a search.

    Args:
        logger: it gets everything but what `readable` and `settings` leave out.
        directory: the run's; the files of a trial are below it.
        space: gives the recipe of a trial.
    """

    def __init__(self, logger: LoggerCallback, directory: Path, space: SearchSpace) -> None:
        self._logger = logger
        self._directory = directory.resolve()  # W&B's processes have working directories of their own
        self._space = space
        self._guarded = Guarded(type(logger).__name__)
        self._seen: dict[str, Any] = {}

    def setup(self, *given: Any, **info: Any) -> None:
        """Set the logger up; what it raises here is about its arguments."""
        self._logger.setup(*given, **info)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Show it a trial that begins."""
        self._tell(self._logger.on_trial_start, iteration, trials, trial, info)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Show it what a trial reports."""
        self._tell(self._logger.on_trial_result, iteration, trials, trial, {"result": readable(result), **info})

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Show it a trial that ended."""
        self._tell(self._logger.on_trial_complete, iteration, trials, trial, info)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Show it a trial whose worker was lost too often."""
        self._tell(self._logger.on_trial_error, iteration, trials, trial, info)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Let it finish."""
        self._guarded(lambda: self._logger.on_experiment_end(list(map(self._of, trials)), **info))

    def _tell(
        self, hook: Callable[..., None], iteration: int, trials: Sequence[Trial], trial: Trial, info: Mapping[str, Any]
    ) -> None:
        self._guarded(
            lambda: hook(iteration=iteration, trials=list(map(self._of, trials)), trial=self._of(trial), **info)
        )

    def _of(self, trial: Trial) -> Any:
        if trial.trial_id not in self._seen:
            self._seen[trial.trial_id] = _Seen(trial, self._directory, settings(trial.config, self._space))
        return self._seen[trial.trial_id]


class _Seen:
    """What a logger sees of a trial: Ray's own, but for its config, its name and where its files are."""

    def __init__(self, trial: Trial, directory: Path, config: dict[str, Any]) -> None:
        self._trial = trial
        number = trial.config.get("trial")
        name = f"trial-{trial.trial_id}" if number is None else f"trial-{number:04d}"
        self.config = self.evaluated_params = config
        self.trial_name = f"{name} {config['label']}"
        self.experiment_dir_name = directory.name
        self.local_path = str(directory / FOLDER / name)
        self.init_local_path()

    def init_local_path(self) -> None:
        Path(self.local_path).mkdir(parents=True, exist_ok=True)

    def __str__(self) -> str:
        return self.trial_name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_trial"], name)


def readable(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a report is for people: one level, each metric of the evaluation, "nan" for what is infinite."""
    metrics = json.loads(report.get("metrics") or "{}")
    found = {name: value for name, value in report.items() if name not in LEFT_OUT}
    found |= {f"metrics/{name}": value for name, value in metrics.items()}
    return {
        name: math.nan if isinstance(value, float) and math.isinf(value) else value for name, value in found.items()
    }


def settings(config: Mapping[str, Any], space: SearchSpace) -> dict[str, Any]:
    """Return what a trial was made with: its search point, its label, and the digest of its recipe."""
    point = {name: value for name, value in config.items() if name not in NO_SETTING}
    label = str(point.pop("label", ""))
    digest = space.recipe(point).digest
    plain = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in point.items()}
    return {**plain, "label": label, "recipe": digest}
