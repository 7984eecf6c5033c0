"""Splits the time of a search's trials into evaluation, timing and what is neither, and writes a table.

Run it on a quiet machine: `python benchmarks/overhead.py --docs docs/overhead.md`. Each search runs in a process of its
own, one trial at a time. It prints the table, and with --docs writes it between that file's marks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Self

from ray import tune
from ray.tune.experiment import Trial
from tables import check_marks, markdown_head, markdown_row, publish, where

from raysq.strategies.auto import Auto

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "workloads"))

NAMES = ("cifar_mbv2_hard", "shakespeare_gpt", "digits_cnn")
BACKENDS = ("onednn", "ipex")
TARGETS = {"onednn": 0.10, "ipex": 0.35}  # of a trial may be neither evaluation nor timing
TRIALS = 15
PACKAGES = ("torch", "intel-extension-for-pytorch", "ray")
BEGIN, END = "<!-- overhead table -->", "<!-- end of overhead table -->"
PARTS = ("evaluation", "timing", "build", "rest of the worker", "suggestion", "Ray and driver")
WANTED = PARTS[:2]
HEADINGS = ("workload", "backend", "trials (timed)", "a trial, s", *PARTS, "neither evaluation nor timing", "target")


class Clock(tune.Callback):
    """When trials ended, as the driver sees it."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # Ray copies what it is given

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


class Timed(Auto):
    """The default strategy, which notes how long it took to suggest each trial."""

    def __init__(self) -> None:
        super().__init__()
        self.suggestions: list[float] = []

    def suggest(self, trial_id: str) -> Any:
        """Suggest as `Auto` does."""
        begun = time.perf_counter()
        suggestion = super().suggest(trial_id)
        if isinstance(suggestion, dict):
            self.suggestions.append(time.perf_counter() - begun)
        return suggestion


def measure(name: str, backend: str, threads: int) -> dict[str, Any]:
    """Search with one workload on one backend; return the seconds of each trial by part, the first one left out.

    The first trial waits for its worker to start, which happens once.
    """
    import workloads

    import raysq
    from raysq.errors import NoFeasibleRecipe

    model, calib, eval_fn, _, _ = workloads.load(name)
    clock, strategy = Clock(), Timed()
    with tempfile.TemporaryDirectory(prefix="raysq_overhead_") as runs:
        try:
            result = raysq.tune(
                model,
                calib,
                eval_fn,
                strategy=strategy,
                backend=backend,
                max_trials=TRIALS,
                num_threads=threads,
                max_concurrent_trials=1,
                storage_path=runs,
                callbacks=[clock],
                verbose=0,
            )
        except NoFeasibleRecipe as exc:
            result = exc.result
    split = []
    walls = [end - before for before, end in zip(clock.ends, clock.ends[1:], strict=False)]
    for record, wall, suggestion in zip(result.trials[1:], walls, strategy.suggestions[1:], strict=True):
        rest = record.waiting_s + record.overhead_s
        known = (record.eval_s, record.timing_s, record.build_s, rest, suggestion)
        split.append([*known, wall - sum(known)])
    timed = sum(record.ratio is not None for record in result.trials[1:])
    return {"name": name, "backend": backend, "split": split, "timed": timed}


def row(measured: Mapping[str, Any]) -> str:
    """Return one line of the table: medians over the trials, in milliseconds."""
    split, backend = measured["split"], measured["backend"]
    shares = [1 - sum(trial[: len(WANTED)]) / sum(trial) for trial in split]
    cells = (
        measured["name"],
        f"`{backend}`",
        f"{len(split)} ({measured['timed']})",
        f"{median(map(sum, split)):.2f}",
        *(f"{1e3 * median(seconds):.0f}" for seconds in zip(*split, strict=True)),
        f"**{median(shares):.1%}**",
        f"{TARGETS[backend]:.0%}",
    )
    return markdown_row(cells)


def table(measured: Sequence[Mapping[str, Any]], threads: int) -> str:
    """Return the whole table in Markdown, with how and where it was measured."""
    head = markdown_head(HEADINGS)
    how = (
        f"Medians over the trials of a search by `auto` with {TRIALS} trials, but for the first, which waits for its "
        "worker; parts in milliseconds. A trial that misses the goal is not timed."
    )
    return "\n".join([*head, *map(row, measured), "", f"{how} {where(threads, PACKAGES)}"])


def main() -> None:
    """Measure every search in a process of its own, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="directory for a JSON per search; those there are kept")
    parser.add_argument("--docs", type=Path, help="file between whose marks the table is written")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="raysq_overhead_"))
    if options.measure:
        name, backend = options.measure
        measured = measure(name, backend, options.threads)
        (out / f"{name}.{backend}.json").write_text(json.dumps(measured))
        return

    check_marks(options.docs, BEGIN, END)
    out.mkdir(parents=True, exist_ok=True)
    every = [(name, backend) for name in options.workloads for backend in options.backends]
    files = [out / f"{name}.{backend}.json" for name, backend in every]
    for search, file in zip(every, files, strict=True):
        if not file.exists():
            settings = ["--threads", str(options.threads), "--out", str(out)]
            subprocess.run([sys.executable, __file__, "--measure", *search, *settings], check=True)
    content = table([json.loads(file.read_text()) for file in files], options.threads)
    publish(content, options.docs, BEGIN, END)


if __name__ == "__main__":
    main()
