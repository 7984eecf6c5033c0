"""What a worker process does with one search point after another: build, score, time; no Ray in here."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raysq import evaluation, fingerprint, memory
from raysq.baseline import outputs
from raysq.errors import BackendError
from raysq.goal import Objective
from raysq.kernels import base
from raysq.prediction import predicted_ratio
from raysq.prepared import machine
from raysq.probing import crawls
from raysq.recipe import Precision
from raysq.result import Stage, Status
from raysq.tuning.turns import TakesTurns, Turns

if TYPE_CHECKING:
    from raysq.job import Job
    from raysq.kernels.base import Backend, BuiltModel

__all__ = ["Worker", "unusable"]

Report = dict[str, Any]

UNKNOWN = float("nan")
CRAWLING = "a forward takes many times as long as in fp32: some int8 kernel of this recipe is a reference kernel"
WORST = float("inf")  # what a failed trial reports: no searcher takes it for good, none is left without its metric


class Worker:
    """Takes a search point through its stages; holds the source, the fastest fp32 form and one candidate.

    After `begin`, the first `advance` builds and scores, the second times and is the last. An exception in either
    becomes a report with status "failed".

    A trial has a thread of its own: oneDNN Graph keeps every kernel that it compiled, with its packed weights, for as
    long as the thread lives that ran it first.
    """

    def __init__(self, job: Job, engine: Backend) -> None:
        torch.set_num_threads(job.prepared.num_threads)
        self._job = job
        self._engine = engine
        # one for all runs of this user on this node: their timings disturb each other too
        self._turns = Turns(Path(tempfile.gettempdir()) / f"raysq-turns-{os.getuid()}")
        self._machine = {
            "node": socket.gethostname(),
            **machine(engine.capabilities(), job.prepared.num_threads),
        }
        self._reference_model: BuiltModel | None = None
        self._reference_growth = 0  # not measured yet
        self._candidate: BuiltModel | None = None
        self._thread = ThreadPoolExecutor(1)
        self.begin({})

    def begin(self, config: Mapping[str, Any]) -> None:
        """Drop the last candidate and take up a search point."""
        self._begun = time.perf_counter()
        self._candidate = None
        self._thread.shutdown()
        memory.release()
        threads = self._job.prepared.num_threads
        self._thread = ThreadPoolExecutor(1, "trial", initializer=torch.set_num_threads, initargs=(threads,))
        self._config = config
        self._spent = {"build_s": 0.0, "eval_s": 0.0, "timing_s": 0.0}
        self._peak = 0
        with suppress(OSError):  # where it isn't allowed, the peak is that of the process so far
            memory.reset_peak()
        self._report: Report = {
            "accuracy": UNKNOWN,
            "accuracy_drop": WORST,
            "worst_drop": WORST,
            "drop_std": 0.0,
            "items_scored": None,
            "items": None,
            "baseline_accuracy": self._job.baseline.accuracy,
            "latency_ratio": WORST,
            "latency_ratio_low": UNKNOWN,
            "latency_ratio_high": UNKNOWN,
            "latency_predicted": True,
            "latency_ms": UNKNOWN,
            "speedup": UNKNOWN,
            "size_bytes": 0,
            "size_ratio": UNKNOWN,
            "memory_ratio": UNKNOWN,
            "feasible": False,
            "stage": Stage.BUILD.value,
            "int8_calls": 0,
            "recipe": "",
            "digest": "",
            "metrics": "{}",
            "pairs": "[]",
            "reason": "",
            "status": Status.FINISHED.value,
            "label": str(config.get("label", "")),
            **self._machine,
        }

    def advance(self) -> Report:
        """Go one stage further and return the report; its `done` says whether it is the last."""
        return self._thread.submit(self._advance).result()

    def _advance(self) -> Report:
        try:
            if self._candidate is None:
                self._evaluate()
            else:
                self._time(self._candidate)
        except Exception as exc:  # noqa: BLE001  # whatever a kernel or eval_fn raises costs this trial, not the run
            self._report |= {
                "status": Status.FAILED.value,
                "reason": f"{type(exc).__name__}: {exc}",
                "feasible": False,
                "latency_ratio": WORST,
            }
        return {
            **self._report,
            **self._spent,
            "overhead_s": time.perf_counter() - self._begun - sum(self._spent.values()),
            "peak_memory_bytes": max(self._peak, memory.peak()),
            "done": self._report["status"] == Status.FAILED or self._report["stage"] == Stage.TIMED,
        }

    def _evaluate(self) -> None:
        job = self._job
        source = job.prepared.source
        recipe = job.prepared.space.recipe(self._config)
        self._report["recipe"] = recipe.to_json()
        with self._clock("build_s"), self._turns.shared():
            built = self._engine.build(source, recipe)
            made: list[Tensor] = []
            if crawls(lambda: made.extend(outputs(built.model, source.args, source.kwargs)), source):
                raise BackendError(CRAWLING)
            digest = fingerprint.of_tensors(made)
        with self._turns.shared():
            memory_ratio = self._memory_ratio(built) if Objective.MEMORY in job.goal.objectives else UNKNOWN
        with self._clock("eval_s"):
            model = TakesTurns(built.model, self._turns)
            score = evaluation.evaluate(job.eval_fn, model, job.goal, job.baseline.reference)
        loss = evaluation.loss(score, job.baseline.accuracy, job.baseline.metrics, job.goal)
        int8_calls = sum(precision is Precision.INT8 for precision in built.executed.values())
        predicted = predicted_ratio(source.graph, built.executed)
        self._report |= {
            "accuracy": score.value,
            "accuracy_drop": loss.drop,
            "worst_drop": loss.worst_drop,
            "drop_std": score.early.std if score.early else 0.0,
            "items_scored": score.n,
            "items": score.early.items if score.early else score.n,
            "metrics": json.dumps(dict(score.metrics)),
            "latency_ratio": predicted,
            "speedup": 1 / predicted,
            "size_bytes": built.size_bytes,
            "size_ratio": built.size_bytes / job.baseline.size_bytes if job.baseline.size_bytes else UNKNOWN,
            "memory_ratio": memory_ratio,
            "int8_calls": int8_calls,
            "digest": digest,
            "stage": Stage.EVALUATED.value,
            "feasible": job.goal.holds(loss.worst_drop) and int8_calls > 0,
            "reason": loss.reason or ("" if int8_calls else "no call runs in int8"),
        }
        self._candidate = built

    def _time(self, candidate: BuiltModel) -> None:
        job = self._job
        with self._turns.shared():
            reference = self._reference
        with self._turns.alone(), self._clock("timing_s"):
            timing = job.prepared.time(candidate.model, reference.model, job.latency)
        self._report |= {
            "latency_ratio": float(timing.ratio),
            "latency_ratio_low": timing.ratio.low,
            "latency_ratio_high": timing.ratio.high,
            "latency_predicted": False,
            "latency_ms": timing.candidate_ms,
            "speedup": 1 / timing.ratio,
            "pairs": json.dumps(timing.pairs),
            "stage": Stage.TIMED.value,
        }

    def _memory_ratio(self, built: BuiltModel) -> float:
        prepared = self._job.prepared
        if not self._reference_growth:
            self._reference_growth = prepared.memory_growth(self._reference)
        self._peak = memory.peak()  # measuring resets it
        return prepared.memory_growth(built) / self._reference_growth

    @property
    def _reference(self) -> BuiltModel:
        """The fastest fp32 form, built once."""
        if self._reference_model is None:
            source, form = self._job.prepared.source, self._job.baseline.form
            self._reference_model = base.offering(form, self._engine).build_float(source, form)
        return self._reference_model

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] += time.perf_counter() - begin


def unusable(exc: Exception) -> Report:
    """Return what each trial reports of a process that could not take up its job."""
    return {
        "accuracy": UNKNOWN,
        "accuracy_drop": WORST,
        "worst_drop": WORST,
        "latency_ratio": WORST,
        "stage": Stage.BUILD.value,
        "status": Status.FAILED.value,
        "reason": f"the worker can't load the model or `eval_fn`: {type(exc).__name__}: {exc}",
        "done": True,
    }
