"""Tunes the benchmark workloads, each in a fresh process, and writes a table of what was measured.

Run it on a quiet machine: `python benchmarks/workload_table.py --docs README.md`. It prints the table, and with
--docs writes it between that file's marks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tables import check_marks, markdown_head, markdown_row, publish, where

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "workloads"))

NAMES = ("cifar_mbv2_hard", "shakespeare_gpt_outlier", "shakespeare_gpt", "digits_cnn")
PACKAGES = ("torch", "intel-extension-for-pytorch", "ray", "optuna")
BEGIN, END = "<!-- benchmark table -->", "<!-- end of benchmark table -->"
HEADINGS = (
    "workload",
    "fp32 accuracy",
    "default int8 accuracy (loss)",
    "default time / fp32",
    "tuned int8 accuracy (loss)",
    "tuned time / fp32 [95 %]",
    "tuned time / bf16",
    "trials",
    "seconds",
)


def measure(name: str, threads: int, max_trials: int) -> dict[str, Any]:
    """Tune one workload in this process; return what its row needs."""
    import workloads

    import raysq
    from raysq.kernels import ipex
    from raysq.latency import Latency, pair

    model, calib, eval_fn, _, _ = workloads.load(name)
    start = time.monotonic()
    result = raysq.tune(model, calib, eval_fn, tolerance=0.01, max_trials=max_trials, num_threads=threads)
    seconds = time.monotonic() - start
    baseline, tuned = result.baseline, result.latency_ratio
    source = raysq.prepare(model, calib).source
    default = ipex.Engine().framework_default(source, ((batch, {}) for batch in calib)).model
    budget = Latency(budget_s=5.0)
    to_tuned = pair(default, result.model, args=calib[0], kwargs={}, num_threads=threads, latency=budget).ratio
    return {
        "name": name,
        "fp32": baseline.accuracy,
        "default": eval_fn(default),
        "default_ratio": to_tuned * tuned,
        "tuned": result.accuracy,
        "ratio": [tuned, tuned.low, tuned.high],
        "to_bf16": tuned / baseline.bf16_ratio if baseline.bf16_ratio else None,
        "trials": len(result.trials),
        "seconds": seconds,
    }


def row(measured: Mapping[str, Any]) -> str:
    """Return one line of the table."""
    fp32 = measured["fp32"]

    def with_loss(accuracy: float) -> str:
        return f"{accuracy:.4f} ({(fp32 - accuracy) / fp32:.2%})"

    value, low, high = measured["ratio"]
    to_bf16 = measured["to_bf16"]
    cells = (
        measured["name"],
        f"{fp32:.4f}",
        with_loss(measured["default"]),
        f"{measured['default_ratio']:.3f}",
        with_loss(measured["tuned"]),
        f"**{value:.3f}** [{low:.3f}, {high:.3f}]",
        "no bf16 kernels" if to_bf16 is None else f"{to_bf16:.3f}",
        str(measured["trials"]),
        f"{measured['seconds']:.0f}",
    )
    return markdown_row(cells)


def table(rows: list[Mapping[str, Any]], threads: int) -> str:
    """Return the whole table in Markdown, with where it was measured."""
    head = markdown_head(HEADINGS)
    goal = (
        "Goal: at most 1 % relative loss. Times are ratios of interleaved runs on one batch to the fastest fp32 form."
    )
    return "\n".join([*head, *map(row, rows), "", f"{goal} {where(threads, PACKAGES)}"])


def main() -> None:
    """Measure every workload in a process of its own, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-trials", type=int, default=50)
    parser.add_argument("--out", type=Path, help="directory for table.md and a JSON per workload")
    parser.add_argument("--docs", type=Path, help="file between whose marks the table is written")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measured = measure(options.measure, options.threads, options.max_trials)
        (options.out / f"{options.measure}.json").write_text(json.dumps(measured, indent=1))
        return

    check_marks(options.docs, BEGIN, END)
    out = options.out or Path(tempfile.mkdtemp(prefix="raysq_benchmark_"))
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.workloads:
        settings = ["--threads", str(options.threads), "--max-trials", str(options.max_trials), "--out", str(out)]
        subprocess.run([sys.executable, __file__, "--measure", name, *settings], check=True)
        rows.append(json.loads((out / f"{name}.json").read_text()))
    content = table(rows, options.threads)
    (out / "table.md").write_text(content + "\n")
    publish(content, options.docs, BEGIN, END)


if __name__ == "__main__":
    main()
