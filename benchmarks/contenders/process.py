"""One contender in a process of its own, in its own environment: it tunes, is scored, or is timed turn by turn.

`python -P -m contenders.process tune|score|serve JOB`, with benchmarks and benchmarks/workloads on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from contenders.job import Job

TUNED, SCORED = "tuned.json", "scored.json"
BATCH, SINGLE = "batch", "single"  # what is timed
WARM_UP_RUNS = 10


def tune(job: Job) -> None:
    """Let the contender search; whatever it raises is its record."""
    from contenders.base import Task, Tuned

    directory = Path(job.directory)
    try:
        tuned = job.contender().tune(Task.of(job), directory)
    except Exception as exc:
        traceback.print_exc()
        lines = str(exc).strip().splitlines()
        tuned = Tuned.failed(f"{type(exc).__name__}: {lines[0] if lines else ''}")
    (directory / TUNED).write_text(json.dumps(asdict(tuned), indent=1))


def score(job: Job) -> None:
    """Score the artifact as it ships on all data."""
    from contenders.base import Task, accuracy

    task, directory = Task.of(job), Path(job.directory)
    found = accuracy(job.contender().load(task, directory), task.items)
    (directory / SCORED).write_text(json.dumps({"accuracy": found}))


def serve(job: Job) -> None:
    """Time the artifact whenever it is this process's turn."""
    from contenders.base import Task

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among the answers
    task = Task.of(job)
    model = job.contender().load(task, Path(job.directory))
    runs = {BATCH: model.bound(*task.inputs), SINGLE: model.bound(*task.single)}
    for run in runs.values():
        for _ in range(WARM_UP_RUNS):
            run()
    take_turns(runs, sys.stdin, answers)


def take_turns(runs: Mapping[str, Callable[[], object]], asked: TextIO, answers: TextIO) -> None:
    """Say that all is ready; then for each line "what calls" answer the median milliseconds of so many calls."""
    print("ready", file=answers, flush=True)
    for line in asked:
        what, calls = line.split()
        run = runs[what]
        run()  # others had the core since the last turn
        seen = []
        for _ in range(int(calls)):
            begun = time.perf_counter()
            run()
            seen.append(1000 * (time.perf_counter() - begun))
        print(statistics.median(seen), file=answers, flush=True)


def main() -> None:
    """Do what the command line says."""
    action, text = sys.argv[1:]
    job = Job.from_json(text)
    os.sched_setaffinity(0, job.cores)  # before torch counts them
    import torch

    torch.set_num_threads(job.threads)
    {"tune": tune, "score": score, "serve": serve}[action](job)


if __name__ == "__main__":
    main()
