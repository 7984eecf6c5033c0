"""How a search stands, as metrics of Ray: every node serves them for Prometheus, and docs/grafana draws them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from ray.util.metrics import Gauge

from raysq.result import Status
from raysq.tuning.live import Progress

__all__ = ["GAUGES", "PHASES", "Metrics"]

GAUGES = {  # Ray puts "ray_" before each name
    "raysq_trials": "Trials that ended, those before a resumption included.",
    "raysq_failures": "Trials that failed.",
    "raysq_feasible_share": "Share of the trials that hold the goal.",
    "raysq_trials_per_minute": "Trials per minute, over the last ten.",
    "raysq_best_latency_ratio": "Latency of the best trial that holds the goal, as a share of the fastest fp32's.",
    "raysq_phase_seconds": "Seconds that trials spent in a phase, those before a resumption included.",
}
PHASES = {"build": "build_s", "evaluate": "eval_s", "time": "timing_s"}  # to the record's field
RECENT = 10  # trials

log = logging.getLogger("raysq")


class Metrics:
    """The gauges of one run, in the driver; setting them costs microseconds, and never raises.

    Args:
        run: name of the run, the tag of each of its values.
        progress: how the search stands.
        calibration_s: seconds that calibration took.
        clock: seconds.
    """

    def __init__(
        self,
        run: str,
        progress: Progress,
        calibration_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress = progress
        self._calibration_s = calibration_s
        self._clock = clock
        self._ends = deque([clock()], maxlen=RECENT + 1)
        self._gauges: dict[str, Gauge] = {}
        try:
            for name, what in GAUGES.items():
                gauge = Gauge(name, what, ("run", "phase") if name == "raysq_phase_seconds" else ("run",))
                gauge.set_default_tags({"run": run})
                self._gauges[name] = gauge
        except Exception as exc:  # noqa: BLE001  # a run goes on without them
            log.debug("no metrics: %s", exc)

    def update(self) -> None:
        """Set all after a trial ended, which `progress` knows already."""
        self._ends.append(self._clock())
        try:
            self._set()
        except Exception as exc:  # noqa: BLE001  # as above
            log.debug("metrics are not updated: %s", exc)

    def _set(self) -> None:
        records, best = self._progress.records, self._progress.best
        minutes = (self._ends[-1] - self._ends[0]) / 60
        values = {
            "raysq_trials": len(records),
            "raysq_failures": sum(r.status is Status.FAILED for r in records),
            "raysq_feasible_share": sum(r.feasible for r in records) / len(records),
            "raysq_trials_per_minute": (len(self._ends) - 1) / minutes if minutes else None,
            "raysq_best_latency_ratio": best.latency_ratio if best else None,
        }
        for name, value in values.items():
            if value is not None:
                self._gauges[name].set(value)
        seconds = {phase: sum(getattr(r, field) for r in records) for phase, field in PHASES.items()}
        for phase, spent in {"calibrate": self._calibration_s, **seconds}.items():
            self._gauges["raysq_phase_seconds"].set(spent, tags={"phase": phase})
