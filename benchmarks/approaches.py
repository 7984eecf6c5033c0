"""Quantizes the benchmark models by every approach, without tuning, and writes a table of accuracy and time.

Run it on a quiet machine: `python benchmarks/approaches.py --docs docs/approaches.md`. Each workload is measured in a
process of its own. It prints the table, and with --docs writes it between that file's marks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tables import check_marks, markdown_head, markdown_row, publish, where
from torch import nn
from torch.nn import functional as F
from workload_table import NAMES

from raysq.latency import Latency

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "workloads"))

BACKENDS = {"static": "ipex", "dynamic": "ipex", "auto": "ipex", "qat": "ipex", "weight_only": "reference"}
PACKAGES = ("torch", "intel-extension-for-pytorch")
BEGIN, END = "<!-- approaches table -->", "<!-- end of approaches table -->"
HEADINGS = ("workload", "approach", "accuracy (loss)", "time / fp32 [95 %]", "int8 / all calls", "seconds to quantize")
BUDGET = Latency(budget_s=3.0)
EPOCHS, LEARNING_RATE = 3, 1e-4  # of the training, which sees no more than the calibration data


def measure(name: str, threads: int) -> dict[str, Any]:
    """Measure a workload by every approach."""
    import workloads

    import raysq
    from raysq import baseline
    from raysq.goal import Goal
    from raysq.kernels import base
    from raysq.latency import pair

    torch.set_num_threads(threads)
    model, calib, eval_fn, _, _ = workloads.load(name)
    prepared = raysq.prepare(model, calib, backend="ipex", num_threads=threads)
    engine = base.get("ipex")
    fp32 = baseline.measure(prepared, engine, model, eval_fn, Goal(), BUDGET)
    reference = engine.build_float(prepared.source, fp32.form).model
    results = {}
    for approach, backend in BACKENDS.items():
        train_fn = distilled(model, calib) if approach == "qat" else None
        begun = time.perf_counter()
        int8 = raysq.quantize(model, calib, backend=backend, approach=approach, train_fn=train_fn)
        seconds = time.perf_counter() - begun
        ratio = None
        if backend == engine.name:
            timing = pair(int8, reference, args=calib[0], kwargs={}, num_threads=threads, latency=BUDGET)
            ratio = [timing.ratio, timing.ratio.low, timing.ratio.high]
        counts = [sum(p == "int8" for p in int8.executed.values()), len(prepared.source.graph.calls)]
        results[approach] = {"accuracy": eval_fn(int8), "ratio": ratio, "calls": counts, "seconds": seconds}
    return {"name": name, "fp32": fp32.accuracy, "form": fp32.form, "approaches": results}


def distilled(model: nn.Module, calib: Sequence[tuple[Any, ...]]) -> Callable[[nn.Module], None]:
    """Return a training loop that needs no labels: it follows the float model's outputs on the calibration data."""
    with torch.no_grad():
        wanted = [model(*batch).log_softmax(-1) for batch in calib]

    def train(rounded: nn.Module) -> None:
        optimizer = torch.optim.Adam(rounded.parameters(), lr=LEARNING_RATE)
        steps = list(zip(calib, wanted, strict=True)) * EPOCHS
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(steps))
        for batch, target in steps:
            optimizer.zero_grad()
            loss = F.kl_div(rounded(*batch).log_softmax(-1), target, log_target=True, reduction="batchmean")
            loss.backward()
            optimizer.step()
            decay.step()

    return train


def rows(measured: Mapping[str, Any]) -> list[str]:
    """Return the lines of one workload."""
    fp32 = measured["fp32"]
    lines = [f"| {measured['name']} | fp32 ({measured['form']}) | {fp32:.4f} | 1 | | |"]
    for approach, result in measured["approaches"].items():
        accuracy, ratio, calls = result["accuracy"], result["ratio"], result["calls"]
        cells = (
            "",
            f"`{approach}`",
            f"{accuracy:.4f} ({(fp32 - accuracy) / fp32:.2%})",
            f"**{ratio[0]:.3f}** [{ratio[1]:.3f}, {ratio[2]:.3f}]" if ratio else "simulated",
            f"{calls[0]} / {calls[1]}",
            f"{result['seconds']:.1f}",
        )
        lines.append(markdown_row(cells))
    return lines


def table(measured: Sequence[Mapping[str, Any]], threads: int) -> str:
    """Return the whole table in Markdown, with how and where it was measured."""
    head = markdown_head(HEADINGS)
    how = (
        "Each by `raysq.quantize`, without tuning. Times are ratios of interleaved runs on one batch to the fastest "
        f"fp32 form. `qat` trained for {EPOCHS} epochs on the calibration data, towards the float model's outputs."
    )
    return "\n".join(
        [*head, *(line for one in measured for line in rows(one)), "", f"{how} {where(threads, PACKAGES)}"]
    )


def main() -> None:
    """Measure every workload in a process of its own, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="directory for a JSON per workload; those there are kept")
    parser.add_argument("--docs", type=Path, help="file between whose marks the table is written")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="raysq_approaches_"))
    if options.measure:
        measured = measure(options.measure, options.threads)
        (out / f"{options.measure}.json").write_text(json.dumps(measured, indent=1))
        return

    check_marks(options.docs, BEGIN, END)
    out.mkdir(parents=True, exist_ok=True)
    for name in options.workloads:
        if not (out / f"{name}.json").exists():
            settings = ["--threads", str(options.threads), "--out", str(out)]
            subprocess.run([sys.executable, __file__, "--measure", name, *settings], check=True)
    content = table([json.loads((out / f"{name}.json").read_text()) for name in options.workloads], options.threads)
    publish(content, options.docs, BEGIN, END)


if __name__ == "__main__":
    main()
