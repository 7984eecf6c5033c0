"""What it costs that Ray's dashboard, metrics and logs show a trial: milliseconds that a trial waits, and CPU of all.

`python benchmarks/dashboard_cost.py --docs docs/dashboard.md` does for each of many trials what driver and worker do to
show it, in one process at a steady pace. The table has the median time that this takes, and the CPU time of each of
Ray's processes per trial, less what they take in as many seconds of rest.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import psutil  # type: ignore[import-untyped]
import ray
from tables import check_marks, markdown_head, markdown_row, publish, where

from raysq.goal import Goal
from raysq.recipe import OpConfig, Precision, Recipe
from raysq.result import Baseline, Ratio, Stage, Status, TrialRecord
from raysq.tuning import trial_log
from raysq.tuning.board import Board, opened
from raysq.tuning.live import Progress
from raysq.tuning.metrics import PHASES, Metrics

PAUSE_S = 0.05  # between trials
CALLS = 30
RECIPE = Recipe({f"layer.{n}": OpConfig(Precision.INT8) for n in range(CALLS)})
FLUSH_S = 3.0  # Ray sends what tasks did once a second
MOST = 6  # processes that have a line
PACKAGES = ("ray",)
BEGIN, END = "<!-- dashboard cost -->", "<!-- end of dashboard cost -->"
HEADINGS = ("of a trial", "ms")


def show(trial: int, board: Board, progress: Progress, metrics: Metrics, log: logging.Logger) -> None:
    """Do what shows one trial."""
    log.info("trial %d: %s", trial, trial_log.tried(RECIPE))
    for phase in PHASES:
        board.begin(trial, phase)
        log.info("trial %d: %s in %.2f s", trial, phase, 1.0)
    ratio = Ratio(0.5, 0.49, 0.51)
    record = TrialRecord(
        trial, RECIPE, {}, Status.FINISHED, Stage.TIMED, accuracy=0.9, feasible=True, latency_ratio=0.5, ratio=ratio
    )
    progress.records.append(record)
    board.end(record, CALLS)
    metrics.update()


def cpu_s() -> Counter[str]:
    """Return the CPU seconds of this process and of all that Ray started, by name."""
    me = psutil.Process()
    found: Counter[str] = Counter()
    for process in [me, *me.children(recursive=True)]:
        times = process.cpu_times()
        name = "this process" if process == me else (" ".join(process.cmdline()[:1]) or process.name()).split("/")[-1]
        found[name] += times.user + times.system
    return found


def measure(trials: int) -> tuple[float, dict[str, float]]:
    """Rest, show the trials, and return what each took more than rest.

    Returns:
        Median milliseconds that a trial waits; process to its milliseconds of CPU.
    """
    ray.init(num_cpus=1, logging_level=logging.ERROR, log_to_driver=False)
    progress = Progress(Baseline(0.9, {}, 5.0, "jit", {}), Goal(), trials)
    waits: list[float] = []
    with tempfile.TemporaryDirectory() as directory, opened("cost") as board:
        log = logging.getLogger("raysq.trial")
        log.setLevel(logging.INFO)
        log.addHandler(logging.FileHandler(Path(directory) / "log"))
        metrics = Metrics("cost", progress)
        show(0, board, progress, metrics, log)
        time.sleep(FLUSH_S)
        rest = cpu_s()
        begun = time.monotonic()
        time.sleep(trials * PAUSE_S + FLUSH_S)
        rest, rested = cpu_s() - rest, time.monotonic() - begun
        before, begun = cpu_s(), time.monotonic()
        for trial in range(1, trials + 1):
            at = time.perf_counter()
            show(trial, board, progress, metrics, log)
            waits.append(time.perf_counter() - at)
            time.sleep(PAUSE_S)
        time.sleep(FLUSH_S)
        spent, ran = cpu_s() - before, time.monotonic() - begun
    ray.shutdown()
    return 1e3 * median(waits), {name: 1e3 * (spent[name] - rest[name] * ran / rested) / trials for name in spent}


def table(wait_ms: float, cpu_ms: Mapping[str, float], trials: int) -> str:
    """Return the table in Markdown, with where it was measured.

    Args:
        wait_ms: that a trial waits.
        cpu_ms: process to the CPU time that a trial costs it.
        trials: how many were shown.
    """
    most = sorted(cpu_ms.items(), key=lambda item: -item[1])[:MOST]
    lines = [
        ("waiting, in worker and driver together", f"{wait_ms:.1f}"),
        ("CPU of all processes", f"{sum(cpu_ms.values()):.1f}"),
        *((f"of that: `{name}`", f"{ms:.1f}") for name, ms in most),
    ]
    return "\n".join(
        [*markdown_head(HEADINGS), *map(markdown_row, lines), "", f"{trials} trials. {where(1, PACKAGES)}"]
    )


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--docs", type=Path, help="file between whose marks the table is written")
    options = parser.parse_args()
    check_marks(options.docs, BEGIN, END)
    publish(table(*measure(options.trials), options.trials), options.docs, BEGIN, END)


if __name__ == "__main__":
    main()
