"""No int8 at all: the fastest fp32 form of the model that raysq finds."""

from __future__ import annotations

import time
from pathlib import Path

from contenders.base import Task, Tuned, accuracy, versions
from contenders.raysq_tune import RaysqModel

import raysq
from raysq import baseline
from raysq.kernels import base
from raysq.latency import Latency


class Peer:
    """TorchScript in either layout, and what the backends make of it."""

    def tune(self, task: Task, directory: Path) -> Tuned:
        """Find the form."""
        begun = time.perf_counter()
        prepared = raysq.prepare(task.model, task.calib, num_threads=task.threads)
        engine = base.get(prepared.engine)

        def eval_fn(model: object) -> float:
            return accuracy(model, task.items)  # type: ignore[arg-type]

        found = baseline.measure(prepared, engine, task.model, eval_fn, raysq.Goal(task.tolerance), Latency())
        engine.build_float(prepared.source, found.form).save(directory)
        return Tuned(
            trials=0,
            seconds=time.perf_counter() - begun,
            to_pass=None,
            accuracy=found.accuracy,
            note=found.form,
            versions=versions("torch"),
        )

    def load(self, task: Task, directory: Path) -> RaysqModel:
        """Read the model."""
        return RaysqModel(raysq.load(directory))
