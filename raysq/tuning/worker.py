"""What a worker process does with one search point after another: build, score, time; no Ray in here."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from raysq import evaluation, fingerprint, memory
from raysq.baseline import outputs
from raysq.errors import BackendError
from raysq.goal import Objective
from raysq.kernels import base
from raysq.prediction import predicted_ratio
from raysq.prepared import machine
from raysq.probing import CRAWLING, crawls, is_hopeless
from raysq.recipe import Precision
from raysq.result import Stage, Status
from raysq.tuning.deadline import Deadline
from raysq.tuning.trial_log import tried
from raysq.tuning.turns import TakesTurns, Turns

if TYPE_CHECKING:
    from raysq.job import Job
    from raysq.kernels.base import Backend, BuiltModel

__all__ = ["Worker", "failed"]

Report = dict[str, Any]

UNKNOWN = float("nan")
NAMED = 20  # calls in float that the log names
OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "Cannot allocate memory", "could not create a memory object")
FEWER = "Memory ran out: lower `max_concurrent_trials`, or evaluate in smaller batches."
WORST = float("inf")  # what a failed trial reports: no searcher takes it for good, none is left without its metric

log = logging.getLogger("raysq.trial")


class Worker:
    """Takes a search point through its stages; holds the source, the fastest fp32 form and one candidate.

    After `begin`, the first `advance` builds and scores, the second times and is the last; where times don't count,
    the first is. An exception in either becomes a report with status "failed".

    A trial has a thread of its own: oneDNN Graph keeps every kernel that it compiled, with its packed weights, for as
    long as the thread lives that ran it first.

    Args:
        job: what all trials share.
        engine: the backend that builds.
        announce: told the phase that a search point has come to: "build", "evaluate", "time".
        times: whether times of this machine count; where they don't, nothing is timed.
        limit_s: seconds that a trial may work, those in which it waits for others left out.
    """

    def __init__(
        self,
        job: Job,
        engine: Backend,
        announce: Callable[[Mapping[str, Any], str], None] = lambda config, phase: None,
        *,
        times: bool = True,
        limit_s: float = math.inf,
    ) -> None:
        torch.set_num_threads(job.prepared.num_threads)
        self._job = job
        self._engine = engine
        self._announce = announce
        self._times = times
        # one for all runs of this user on this node: their timings disturb each other too
        self._deadline = Deadline(limit_s)
        self._turns = Turns(Path(tempfile.gettempdir()) / f"raysq-turns-{os.getuid()}", self._deadline.paused)
        self._machine = {
            "node": socket.gethostname(),
            **machine(engine.capabilities(), job.prepared.num_threads),
        }
        self._reference_model: BuiltModel | None = None
        self._reference_growth = 0  # not measured yet
        self._candidate: BuiltModel | None = None
        self._thread = ThreadPoolExecutor(1)
        self.begin({})

    def begin(self, config: Mapping[str, Any], words: TextIO | None = None) -> None:
        """Drop the last candidate and take up a search point.

        Args:
            config: the search point.
            words: where it is written why this process was ended, if it holds the interpreter for too long.
        """
        self._deadline.begin(words)
        self._begun = self._now()
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
        """Go one stage further and return the report; its `done` says whether it is the last.

        Raises:
            Hanging: the trial worked for too long. It still does, so this process is of no more use.
        """
        return self._deadline.run(self._thread, self._advance)

    def _advance(self) -> Report:
        try:
            if self._candidate is None:
                self._evaluate()
            else:
                self._time(self._candidate)
        except (Exception, SystemExit) as exc:  # noqa: BLE001  # whatever a kernel or eval_fn raises costs this trial
            self._report |= {
                "status": Status.FAILED.value,
                "reason": _reason(exc),
                "feasible": False,
                "latency_ratio": WORST,
            }
            log.info("%s: failed", self._name, exc_info=True)
        return {
            **self._report,
            **self._spent,
            "waiting_s": self._deadline.waited_s,
            "overhead_s": self._now() - self._begun - sum(self._spent.values()),
            "peak_memory_bytes": max(self._peak, memory.peak()),
            "done": self._report["status"] == Status.FAILED or not self._times or self._report["stage"] == Stage.TIMED,
        }

    def _evaluate(self) -> None:
        job = self._job
        source = job.prepared.source
        recipe = job.prepared.space.recipe(self._config)
        self._report["recipe"] = recipe.to_json()
        log.info("%s: %s", self._name, tried(recipe))
        self._announce(self._config, "build")
        with self._clock("build_s"), self._turns.shared():
            built = self._engine.build(source, recipe)
            made: list[Tensor] = []

            def forward() -> None:
                made[:] = outputs(built.model, source.args, source.kwargs)

            if crawls(built, source, forward):
                raise BackendError(CRAWLING)
            digest = fingerprint.of_tensors(made)
        int8_calls = base.count_int8(built)
        self._log_build(built, int8_calls)
        with self._turns.shared():
            memory_ratio = self._memory_ratio(built) if Objective.MEMORY in job.goal.objectives else UNKNOWN
        self._announce(self._config, "evaluate")
        with self._clock("eval_s"):
            model = TakesTurns(built.model, self._turns)
            score = evaluation.evaluate(job.eval_fn, model, job.goal, job.baseline.reference)
        loss = evaluation.loss(score, job.baseline.accuracy, job.baseline.metrics, job.goal)
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
        verdict = self._report["reason"] or "holds the goal"
        log.info(
            "%s: evaluated in %.2f s: accuracy %.5g, loses %.4g: %s",
            *(self._name, self._spent["eval_s"], score.value, loss.drop, verdict),
        )

    def _time(self, candidate: BuiltModel) -> None:
        job = self._job
        self._announce(self._config, "time")
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
        if is_hopeless(timing, candidate):
            self._report |= {"feasible": False, "reason": CRAWLING}
        log.info(
            "%s: timed in %.2f s: %.4f [%.4f, %.4f] of fp32, %.4g ms",
            *(self._name, self._spent["timing_s"], timing.ratio, timing.ratio.low, timing.ratio.high),
            timing.candidate_ms,
        )

    def _log_build(self, built: BuiltModel, int8_calls: int) -> None:
        in_float = [name for name, precision in built.executed.items() if precision is not Precision.INT8]
        named = ", ".join(in_float[:NAMED]) + (", …" if len(in_float) > NAMED else "")
        log.info(
            "%s: built in %.2f s: %d calls in int8, %d in float: %s",
            *(self._name, self._spent["build_s"], int8_calls, len(in_float), named or "none"),
        )

    @property
    def _name(self) -> str:
        return f"trial {self._config.get('trial', '?')} ({self._report['label']})"

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
        begin = self._now()
        try:
            yield
        finally:
            self._spent[name] += self._now() - begin

    def _now(self) -> float:
        """Seconds, on a clock that stands still while the trial waits for others."""
        return time.perf_counter() - self._deadline.waited_s


def failed(reason: str) -> Report:
    """Return what a trial reports that came to nothing."""
    return {
        "accuracy": UNKNOWN,
        "accuracy_drop": WORST,
        "worst_drop": WORST,
        "latency_ratio": WORST,
        "stage": Stage.BUILD.value,
        "status": Status.FAILED.value,
        "reason": reason,
        "done": True,
    }


def _reason(exc: BaseException) -> str:
    reason = f"{type(exc).__name__}: {exc}"
    if isinstance(exc.__cause__ or exc, MemoryError) or any(sign in reason for sign in OUT_OF_MEMORY):
        return f"{reason.rstrip('.')}. {FEWER}"
    return reason
