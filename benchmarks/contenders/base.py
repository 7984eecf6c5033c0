"""What every contender is given and must give: the same task, the same record, a model that is called alike.

This file and those of the contenders run in their own environments: nothing here needs raysq.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import torch
import workloads
from contenders.job import Job
from torch import Tensor, nn

__all__ = ["Contender", "Loaded", "Task", "TorchModel", "Tuned", "accuracy", "versions"]

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """What is to be quantized.

    Attributes:
        model: fp32, in eval mode.
        calib: calibration batches.
        items: evaluation batches, inputs and targets.
        inputs: what is served, at the workload's batch.
        single: the same at batch 1.
        is_transformer: peers have settings for those.
        tolerance: share of the fp32 score that may be lost.
        threads: of the model.
        cores: how many cores there are.
    """

    model: nn.Module
    calib: Sequence[Inputs]
    items: Sequence[tuple[Inputs, Tensor]]
    inputs: Inputs
    single: Inputs
    is_transformer: bool
    tolerance: float
    threads: int
    cores: int

    @classmethod
    def of(cls, job: Job) -> Self:
        """Load the workload of a job."""
        model, calib, _, inputs, info = workloads.load(job.workload)
        return cls(
            model=model,
            calib=calib,
            items=list(workloads.eval_batches(job.workload)),
            inputs=inputs,
            single=info["latency_inputs"],
            is_transformer=info["kind"] == "transformer",
            tolerance=job.tolerance,
            threads=job.threads,
            cores=len(job.cores),
        )


@dataclass(frozen=True)
class Tuned:
    """What a contender says of its own search.

    Attributes:
        trials: int8 candidates that it scored.
        seconds: that it took in all, `start_s` left out.
        to_pass: seconds until a candidate had passed; None where none did.
        accuracy: of what it saved, by its own account; None where it saved nothing.
        whole: trials that saw all data, where that isn't all of them.
        start_s: seconds of starting Ray and its first worker, once per session.
        reason: why there is no artifact; "" where there is one.
        note: what a reader should know of the result.
        versions: of the packages that it ran on.
    """

    trials: int
    seconds: float
    to_pass: float | None
    accuracy: float | None
    whole: int | None = None
    start_s: float = 0.0
    reason: str = ""
    note: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def failed(cls, reason: str) -> Self:
        """Return the record of a contender that came to nothing."""
        return cls(0, 0.0, None, None, reason=reason)


class Loaded(Protocol):
    """A model that was read from an artifact."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run it."""

    def bound(self, *inputs: Tensor) -> Callable[[], object]:
        """Return what runs it on these inputs again and again, in the way that is fastest for this engine."""


class Contender(Protocol):
    """One way to a quantized model; a module in this folder holds a class `Peer` that implements it."""

    def tune(self, task: Task, directory: Path) -> Tuned:
        """Search, and write the artifact; called once, in a process of its own."""

    def load(self, task: Task, directory: Path) -> Loaded:
        """Read the artifact; called in fresh processes."""


class TorchModel:
    """A module of torch as a loaded model."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run it, without gradients."""
        with torch.no_grad():
            output: Tensor = self._module(*inputs)
        return output

    def bound(self, *inputs: Tensor) -> Callable[[], object]:
        """Return what runs it on these inputs."""
        return lambda: self(*inputs)


def accuracy(model: Callable[..., Tensor], items: Iterable[tuple[Inputs, Tensor]]) -> float:
    """Return the share of targets that a model hits; batches are of equal size."""
    hits = [_share(model(*inputs), target) for inputs, target in items]
    return sum(hits) / len(hits)


def _share(output: Tensor, target: Tensor) -> float:
    return (output.argmax(-1) == target).double().mean().item()


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of installed packages."""
    return {package: importlib.metadata.version(package) for package in packages}
