"""Searches with hundreds of trials, and several times in one process, and shows what grows: nothing should.

`python benchmarks/long_run.py --docs docs/large.md` writes both tables between that file's marks. Each search runs in a
process of its own, on Ray, with one worker.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Self

import ray
from footprint import family, open_files, resident, role
from ray import tune
from ray._private.internal_api import memory_summary
from ray.tune.experiment import Trial
from tables import check_marks, markdown_head, markdown_row, publish, where

from raysq import memory
from raysq.latency import Latency
from raysq.strategies.auto import Auto
from raysq.strategies.base import History, Steps

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "workloads"))

BACKENDS = ("onednn", "ipex")
TRIALS, RUNS, TRIALS_A_RUN = 300, 5, 6
TOLERANCE = 0.99  # every trial is timed
LATENCY = Latency(budget_s=0.05, final_budget_s=0.2)
BATCHES = 2  # of the evaluation: what is looked for is what trials leave behind, not what they take
WARM = 30  # trials after which a worker has all that it keeps: its caches are full, its heap has its shape
PACKAGES = ("torch", "intel-extension-for-pytorch", "ray")
TABLES = {
    "trials": ("<!-- long run table -->", "<!-- end of long run table -->"),
    "runs": ("<!-- runs table -->", "<!-- end of runs table -->"),
}
MIB = 2**20


class Long(Auto):
    """The default strategy, for as many trials as asked for, however little they bring; notes what suggestions take."""

    def __init__(self, trials: int) -> None:
        super().__init__()
        self._wanted = trials
        self.seconds: list[float] = []

    def next_recipe(self, history: History) -> Steps:
        """Yield what `Auto` does, with its shares of the trials that there are."""
        self.max_trials = self._wanted
        for step in super().next_recipe(history):
            if history.proposed >= self._wanted:
                return
            yield step

    def suggest(self, trial_id: str) -> Any:
        """Suggest as `Auto` does."""
        begun = time.perf_counter()
        suggestion = super().suggest(trial_id)
        if isinstance(suggestion, dict):
            self.seconds.append(time.perf_counter() - begun)
        return suggestion


class Watch(tune.Callback):
    """Notes after each trial when it ended, and the memory of the driver and of the worker, which waits."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.driver: list[int] = []
        self.worker: list[int] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # Ray copies what it is given

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Note all of it."""
        here = os.getpid()
        (worker,) = (pid for pid in family(here) if role(pid, here) == "workers")
        self.ends.append(time.perf_counter())
        self.driver.append(resident(here))
        self.worker.append(resident(worker))


def search(backend: str, threads: int, trials: int, runs: str, **more: Any) -> Any:
    """Search with the smallest workload; return the result."""
    import workloads

    import raysq

    model, calib, whole, _, _ = workloads.load("digits_cnn")
    return raysq.tune(
        model,
        calib,
        lambda candidate: float(whole(candidate, BATCHES)),
        tolerance=TOLERANCE,
        backend=backend,
        num_threads=threads,
        max_concurrent_trials=1,
        latency=LATENCY,
        storage_path=runs,
        verbose=0,
        **{"max_trials": trials, **more},
    )


def trials(backend: str, threads: int) -> dict[str, Any]:
    """Make hundreds of trials in one run; return what its row needs."""
    watch, strategy = Watch(), Long(TRIALS)
    with tempfile.TemporaryDirectory(prefix="raysq_long_run_") as runs:
        # a search ends that has not become faster for a quarter of the trials that it might make
        result = search(backend, threads, 4 * TRIALS, runs, strategy=strategy, callbacks=[watch])
        journal = result.journal.stat().st_size
    walls = [end - before for before, end in zip(watch.ends, watch.ends[1:], strict=False)]
    return {
        "trials": len(result.trials),
        "failed": sum(trial.accuracy is None for trial in result.trials),
        "driver": watch.driver,
        "worker": watch.worker,
        "walls": walls,
        "suggestions": strategy.seconds,
        "journal": journal,
    }


def runs(backend: str, threads: int) -> dict[str, Any]:
    """Search several times in this process, each time on a Ray of its own, then on one that stays; see what is left."""
    return {"own": list(_left_by_runs(backend, threads)), "joined": list(_left_by_runs(backend, threads, joined=True))}


def _left_by_runs(backend: str, threads: int, joined: bool = False) -> Iterator[dict[str, int]]:
    here = os.getpid()
    if joined:
        ray.init(num_cpus=2 * threads, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="raysq_runs_") as directory:
        for _ in range(RUNS):
            search(backend, threads, TRIALS_A_RUN, directory)
            memory.release()
            yield {
                "driver": resident(here),
                "processes": len(family(here)) - 1,
                "workers": sum(role(pid, here) == "workers" for pid in family(here)),
                "threads": threading.active_count(),
                "files": open_files(here),
                "objects": _objects() if joined else 0,
            }
    if joined:
        ray.shutdown()


def _objects() -> int:
    """Return how many bytes lie in the object store of the running Ray."""
    address = ray.get_runtime_context().gcs_address  # others may run on this machine
    told = memory_summary(address, stats_only=True)  # type: ignore[no-untyped-call]
    usage = re.search(r"Plasma memory usage ([\d.]+) MiB", told)
    if usage is None:
        raise SystemExit("Ray's summary of its memory has another form by now.")
    return int(float(usage[1]) * MIB)


def trials_row(backend: str, found: Mapping[str, Any]) -> str:
    """Return one line of the table about many trials."""
    third = len(found["walls"]) // 3
    walls, thoughts = found["walls"], found["suggestions"]
    cells = (
        f"`{backend}`",
        f"{found['trials']} ({found['failed']})",
        *(_grown(found[who]) for who in ("driver", "worker")),
        f"{found['journal'] / found['trials'] / 1024:.1f}",
        *(f"{median(part):.2f}" for part in (walls[:third], walls[-third:])),
        *(f"{1000 * median(part):.0f}" for part in (thoughts[:third], thoughts[-third:])),
    )
    return markdown_row(cells)


def _grown(held: Sequence[int]) -> str:
    """Return medians over ten trials once all is warm and at the end, and the difference per trial."""
    first, last = (median(part) / MIB for part in (held[WARM : WARM + 10], held[-10:]))
    return f"{first:.0f} → {last:.0f} ({1024 * (last - first) / (len(held) - WARM - 10):+.0f} KiB a trial)"


def runs_rows(backend: str, found: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table about several runs, one for each way to have Ray."""
    lines = []
    for how, name in (("own", "of its own"), ("joined", "one for all")):
        each = found[how]
        cells = [
            f"`{backend}`",
            name,
            " ".join(f"{run['driver'] / MIB:.0f}" for run in each),
            *(" ".join(str(run[what]) for run in each) for what in ("processes", "workers", "threads", "files")),
            " ".join(f"{run['objects'] / MIB:.1f}" for run in each) if how == "joined" else "none",
        ]
        lines.append(markdown_row(cells))
    return lines


TRIALS_HEADINGS = (
    "backend",
    "trials (failed)",
    "driver, MiB",
    "worker, MiB",
    "journal, KiB a trial",
    "s a trial, first third",
    "last third",
    "ms a suggestion, first third",
    "last third",
)
RUNS_HEADINGS = (
    "backend",
    "Ray",
    "driver after each run, MiB",
    "processes left",
    "workers left",
    "threads",
    "open files",
    "object store, MiB",
)


def table(headings: Sequence[str], lines: Sequence[str], how: str, threads: int) -> str:
    """Return a table in Markdown, with where it was measured."""
    return "\n".join([*markdown_head(headings), *lines, "", f"{how} {where(threads, PACKAGES)}"])


def main() -> None:
    """Measure in processes, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="directory for a JSON per process; those there are kept")
    parser.add_argument("--docs", type=Path, help="file between whose marks the tables are written")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="raysq_long_run_"))
    if options.measure:
        what, backend = options.measure
        found = {"trials": trials, "runs": runs}[what](backend, options.threads)
        (out / f"{what}.{backend}.json").write_text(json.dumps(found))
        return

    for marks in TABLES.values():
        check_marks(options.docs, *marks)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {what: {} for what in TABLES}
    for backend in options.backends:
        for what in TABLES:
            file = out / f"{what}.{backend}.json"
            if not file.exists():
                settings = ["--threads", str(options.threads), "--out", str(out)]
                subprocess.run([sys.executable, __file__, "--measure", what, backend, *settings], check=True)
            results[what][backend] = json.loads(file.read_text())
    contents = {
        "trials": table(
            TRIALS_HEADINGS,
            [trials_row(*each) for each in results["trials"].items()],
            f"Strategy `auto` on the workload digits_cnn. Memory: resident, medians after trial {WARM} and at the end.",
            options.threads,
        ),
        "runs": table(
            RUNS_HEADINGS,
            [line for each in results["runs"].items() for line in runs_rows(*each)],
            f"{RUNS} searches of {TRIALS_A_RUN} trials, one after the other, on digits_cnn; a number after each.",
            options.threads,
        ),
    }
    for what, content in contents.items():
        publish(content, options.docs, *TABLES[what])


if __name__ == "__main__":
    main()
