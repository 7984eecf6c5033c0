"""Runs hundreds of trials in one worker and shows what grows: its memory, the seconds of a trial, the journal.

Run it on a quiet machine: `python benchmarks/long_run.py --backend onednn`. It prints a line per hundred trials.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

import raysq
from raysq import memory
from raysq.baseline import measure
from raysq.goal import Goal
from raysq.job import Job
from raysq.journal import Entry, Header, Journal
from raysq.kernels import base
from raysq.options import Latency
from raysq.space import SearchSpace
from raysq.tuning.records import record
from raysq.tuning.trial import ENVIRONMENT
from raysq.tuning.worker import Worker

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "workloads"))

GOAL = Goal(tolerance=0.99)  # every trial is timed
LATENCY = Latency(budget_s=0.05)
BATCHES = 2  # of the evaluation: what is looked for is what trials leave behind, not what they take
BLOCK = 100  # trials to a line


def points(space: SearchSpace, seed: int = 0) -> Iterator[dict[str, object]]:
    """Yield random points of a space."""
    rng = random.Random(seed)
    while True:
        yield {dimension.name: rng.choice(dimension.values) for dimension in space.dimensions}


def main() -> None:
    """Run the trials, and print how memory, time and journal stand after each hundred."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", default="digits_cnn")
    parser.add_argument("--backend", default="onednn", choices=list(base.BACKENDS))
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ |= ENVIRONMENT  # what a worker has
    torch.set_num_threads(options.threads)
    import workloads

    model, calib, whole, _, _ = workloads.load(options.workload)

    def eval_fn(candidate: torch.nn.Module) -> float:
        return float(whole(candidate, BATCHES))

    prepared = raysq.prepare(model, calib, backend=options.backend, num_threads=options.threads)
    engine = base.get(options.backend)
    baseline = measure(prepared, engine, model, eval_fn, GOAL, LATENCY)
    worker = Worker(Job(prepared, eval_fn, GOAL, LATENCY, baseline), engine)
    header = Header(prepared.fingerprints, {}, {}, prepared.engine, baseline)
    with (
        tempfile.TemporaryDirectory(prefix="raysq_long_run_") as directory,
        Journal.create(Path(directory) / "journal.jsonl", header) as journal,
    ):
        seconds: list[float] = []
        held = memory.resident()
        for trial, point in zip(range(options.trials), points(prepared.space), strict=False):
            begun = time.perf_counter()
            worker.begin(point)
            report = worker.advance()
            while not report["done"]:
                report = worker.advance()
            seconds.append(time.perf_counter() - begun)
            journal.append(Entry(record(trial, point, report), seen=trial))
            if not (trial + 1) % BLOCK:
                now = memory.resident()
                print(
                    f"{trial + 1} trials: {now / 2**20:.0f} MiB ({(now - held) / 2**20 / BLOCK:+.3f} a trial), "
                    f"{median(seconds[-BLOCK:]):.3f} s a trial, "
                    f"{journal.path.stat().st_size / (trial + 1) / 2**10:.1f} KiB of journal a trial",
                    flush=True,
                )
                held = now


if __name__ == "__main__":
    main()
