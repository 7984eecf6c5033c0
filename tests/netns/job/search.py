"""The job that the test submits: a search whose driver is killed once, and that goes on when it is submitted again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import ray
import workload
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import raysq

TRIALS = 9
KILLED_AFTER = 4
RUNS = Path.home() / "raysq_runs"  # where a job's runs are by default


class Killer(tune.Callback):
    """Kills the driver that begins the run."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        lines = (RUNS / "job" / "journal.jsonl").read_bytes().count(b"\n")
        if lines > KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


@ray.remote
def threads() -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def threads_of_nodes() -> list[str | None]:
    """Return what a worker of two CPUs has as OMP_NUM_THREADS on each node."""
    ray.init()
    nodes = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes()]
    return ray.get([threads.options(num_cpus=2, scheduling_strategy=node).remote() for node in nodes])


if __name__ == "__main__":
    begun = (RUNS / "job").exists()
    result = raysq.tune(
        workload.model(),
        [workload.X],
        workload.closeness,
        tolerance=0.5,
        backend="onednn",
        strategy="random",
        max_trials=TRIALS,
        latency=raysq.Latency(0.05, 0.05),
        name="job",
        resume=RUNS / "job" if begun else None,
        callbacks=[] if begun else [Killer()],
    )
    result.save(RUNS / "int8")
    found = {"trials": len(result.trials), "raysq": raysq.__file__, "threads": threads_of_nodes()}
    (RUNS / "found.json").write_text(json.dumps(found))
