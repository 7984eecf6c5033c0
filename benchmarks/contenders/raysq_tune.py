"""raysq itself, on one backend."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from contenders.base import Inputs, Task, TorchModel, Tuned, accuracy, versions
from ray import tune

import raysq
from raysq.deployed import Deployed
from raysq.errors import NoFeasibleRecipe
from raysq.tuning.runner import session


class Clock(tune.Callback):
    """Notes when the search began, when its first worker was there, and when a recipe first passed."""

    def __init__(self) -> None:
        self.began = self.first_worker = self.passed = math.nan

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # Ray copies its callbacks

    def setup(self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any) -> None:
        """Note the begin of the search."""
        self.began = time.perf_counter()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note the first worker."""
        if math.isnan(self.first_worker):
            self.first_worker = time.perf_counter()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Note the first recipe that passed."""
        if result.get("feasible") and math.isnan(self.passed):
            self.passed = time.perf_counter()

    @property
    def worker_s(self) -> float:
        """Seconds that the first worker took; 0 where there was none."""
        return 0.0 if math.isnan(self.first_worker) else self.first_worker - self.began


class RaysqModel(TorchModel):
    """An artifact of raysq's as a loaded model."""

    def __init__(self, deployed: Deployed) -> None:
        super().__init__(deployed)
        self._deployed = deployed

    def bound(self, *inputs: torch.Tensor) -> Callable[[], object]:
        """Return a run whose inputs are bound."""
        return self._deployed.bound(*inputs)


@dataclass(frozen=True)
class Peer:
    """One of raysq's rows.

    Attributes:
        backend: a name of `raysq.tune`.
        stop_at_first: whether the search ends with the first recipe that passes.
    """

    backend: str
    stop_at_first: bool = False

    def tune(self, task: Task, directory: Path) -> Tuned:
        """Tune with raysq's own settings."""
        clock = Clock()
        begun = time.perf_counter()
        with session(verbose=0):
            ray_s = time.perf_counter() - begun
            try:
                result, reason = self._search(task, directory, clock), ""
            except NoFeasibleRecipe as exc:
                result, reason = exc.result, str(exc).splitlines()[0]
            seconds = time.perf_counter() - begun
        if not reason:
            result.save(directory)
        start_s = ray_s + clock.worker_s
        return Tuned(
            trials=len(result.trials),
            seconds=seconds - start_s,
            to_pass=None if math.isnan(clock.passed) else clock.passed - begun - start_s,
            accuracy=None if reason else result.accuracy,
            start_s=start_s,
            reason=reason,
            versions=versions("torch", "ray"),
        )

    def _search(self, task: Task, directory: Path, clock: Clock) -> raysq.Result:
        return raysq.tune(
            task.model,
            task.calib,
            partial(_score, items=task.items),
            tolerance=task.tolerance,
            backend=self.backend,
            stop_at_first=self.stop_at_first,
            latency_inputs=task.inputs,
            num_threads=task.threads,
            max_concurrent_trials=max(1, task.cores // task.threads),
            storage_path=directory,
            name="run",
            callbacks=[clock],
            verbose=0,
        )

    def load(self, task: Task, directory: Path) -> RaysqModel:
        """Read the model."""
        return RaysqModel(raysq.load(directory))


def _score(model: torch.nn.Module, items: Sequence[tuple[Inputs, torch.Tensor]]) -> float:
    return accuracy(model, items)
