"""Measures SmoothQuant, equalization, bias correction and AdaRound on the benchmark models, and writes two tables.

Run it on a quiet machine: `python benchmarks/smoothquant_table.py --docs docs/smoothquant.md`. Every line is measured
in a process of its own. It prints the tables, and with --docs writes them between that file's marks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tables import check_marks, markdown_head, markdown_row, publish, where

from raysq.goal import Goal
from raysq.graph import OpType
from raysq.kernels import base
from raysq.kernels.base import Backend, BuiltModel
from raysq.latency import Latency
from raysq.prepared import Prepared, prepare
from raysq.recipe import Precision, Recipe, Rounding, Transform
from raysq.smoothing import Smoothing

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "workloads"))

TINY_LLAMA = "tiny_llama"
TRANSFORMERS = ("shakespeare_gpt_outlier", TINY_LLAMA)
CONVOLUTIONS = ("cifar_mbv2_hard",)
PACKAGES = ("torch", "intel-extension-for-pytorch")
BACKEND = "ipex"
BEGIN, END = "<!-- smoothquant tables -->", "<!-- end of smoothquant tables -->"
BUDGET = Latency(budget_s=5.0)


@dataclass(frozen=True)
class Line:
    """What one line of a table measures: raysq's default precisions and schemes, changed like this.

    Attributes:
        label: its first cell.
        smoothing: how alphas are found; None for no smoothing.
        folded: whether scales go into what makes an activation, where that is exact.
        transforms: changes of the whole model.
        rounding: of the weights of convolutions and linear layers.
        by_framework: whether IPEX does it all by itself instead.
        advised: whether it is what `raysq.quantize` takes by itself instead.
    """

    label: str
    smoothing: Smoothing | None = None
    folded: bool = True
    transforms: tuple[Transform, ...] = ()
    rounding: Rounding = Rounding.NEAREST
    by_framework: bool = False
    advised: bool = False


FP32 = Line("fp32")  # measured first: what the others are compared with
DEFAULTS = (
    Line("IPEX's default int8", by_framework=True),
    Line("raysq's default", advised=True),
    Line("raysq's default without smoothing"),
)
SMOOTHINGS = {
    "alpha 0.5": Smoothing(alpha=0.5),
    "best of a global list": Smoothing(alpha=tuple(np.arange(0.0, 1.0, 0.1).tolist())),  # the RFC's own
    "auto, layer-wise": Smoothing(),
    "auto, block-wise": Smoothing(enable_blockwise_loss=True),
}
SMOOTHED = tuple(
    Line(f"{label}, {'folded' if folded else 'multiplied'}", smoothing, folded)
    for label, smoothing in SMOOTHINGS.items()
    for folded in (True, False)
)
BOTH = (Transform.EQUALIZATION, Transform.BIAS_CORRECTION)
CORRECTED = (
    Line("equalization", transforms=BOTH[:1]),
    Line("bias correction", transforms=BOTH[1:]),
    Line("both", transforms=BOTH),
    Line("both, AdaRound", transforms=BOTH, rounding=Rounding.ADAROUND),
)
LINES = {
    **dict.fromkeys(TRANSFORMERS, (FP32, *DEFAULTS, *SMOOTHED)),
    **dict.fromkeys(CONVOLUTIONS, (FP32, *DEFAULTS, *CORRECTED)),
}


@dataclass(frozen=True)
class Subject:
    """A workload that is ready to be measured."""

    model: Any
    calib: Sequence[tuple[Any, ...]]
    eval_fn: Callable[..., float]
    prepared: Prepared
    engine: Backend

    @classmethod
    def load(cls, name: str, threads: int) -> Subject:
        """Load a workload and calibrate it."""
        import tiny_llama
        import torch
        import workloads

        torch.set_num_threads(threads)
        model, calib, eval_fn, _, _ = tiny_llama.load() if name == TINY_LLAMA else workloads.load(name)
        prepared = prepare(model, calib, backend=BACKEND, num_threads=threads)
        return cls(model, calib, eval_fn, prepared, base.get(BACKEND))


def measure_fp32(subject: Subject) -> dict[str, Any]:
    """Return the score, the fastest fp32 form, and how long one evaluation takes."""
    from raysq.baseline import measure

    prepared, engine = subject.prepared, subject.engine
    baseline = measure(prepared, engine, subject.model, subject.eval_fn, Goal(), BUDGET)
    return {"accuracy": baseline.accuracy, "form": baseline.form, "eval_s": baseline.eval_s}


def measure_int8(subject: Subject, line: Line, fp32_form: str) -> dict[str, Any]:
    """Build what a line says, score it and time it against the fastest fp32 form."""
    prepared = subject.prepared
    begun = time.perf_counter()
    recipe = None if line.by_framework else changed(subject, line)
    search_s = time.perf_counter() - begun
    begun = time.perf_counter()
    built = build(subject, line, recipe)
    build_s = time.perf_counter() - begun
    fp32 = subject.engine.build_float(prepared.source, fp32_form)
    ratio = prepared.time(built.model, fp32.model, BUDGET).ratio
    return {
        "accuracy": subject.eval_fn(built.model),
        "ratio": [ratio, ratio.low, ratio.high],
        "search_s": search_s,
        "build_s": build_s,
        "linears": None if line.by_framework else counted(prepared, built, {OpType.LINEAR}),
        "calls": None if line.by_framework else counted(prepared, built, set(OpType)),
        "smoothing": {} if recipe is None else dict(recipe.smoothing),
    }


def changed(subject: Subject, line: Line) -> Recipe:
    """Return raysq's default recipe, changed as a line says."""
    prepared, graph = subject.prepared, subject.prepared.source.graph
    if line.advised:
        return prepared.space.default()
    ops = {
        name: replace(config, rounding=line.rounding) if config.is_int8 and graph[name].op.has_matrix else config
        for name, config in prepared.space.default().ops.items()
    }
    recipe = Recipe(ops, transforms=line.transforms)
    if line.smoothing is None:
        return recipe
    return replace(recipe, smoothing=alphas(subject, line, recipe))


def alphas(subject: Subject, line: Line, recipe: Recipe) -> dict[str, float]:
    """Return an alpha for each group: of a list the one that scores best on the whole model."""
    from raysq.smoothquant.alphas import tuned_alphas

    assert line.smoothing is not None
    source = subject.prepared.source
    listed = line.smoothing.alpha
    if not isinstance(listed, tuple):
        return tuned_alphas(source, line.smoothing, recipe)
    candidates = [tuned_alphas(source, replace(line.smoothing, alpha=alpha), recipe) for alpha in listed]
    return max(
        candidates, key=lambda found: subject.eval_fn(build(subject, line, replace(recipe, smoothing=found)).model)
    )


def build(subject: Subject, line: Line, recipe: Recipe | None) -> BuiltModel:
    """Build a recipe, or what IPEX makes of the model where there is none."""
    source = subject.prepared.source
    if recipe is None:
        engine: Any = subject.engine  # of all backends IPEX's alone has this method
        built: BuiltModel = engine.framework_default(source, ((batch, {}) for batch in subject.calib))
        return built
    return subject.engine.build(replace(source, absorb=line.folded), recipe)


def counted(prepared: Prepared, built: BuiltModel, kinds: set[OpType]) -> list[int]:
    """Return how many calls of these kinds really run in int8, and how many there are."""
    names = [call.name for call in prepared.source.graph.calls if call.op in kinds]
    return [sum(built.executed.get(name) is Precision.INT8 for name in names), len(names)]


def row(first: str, line: Line, measured: Mapping[str, Any], fp32: float, transformer: bool) -> str:
    """Return one line of a table."""
    value, low, high = measured["ratio"]
    counts = measured["linears" if transformer else "calls"]
    seconds = measured["search_s" if transformer else "build_s"]
    searched = not transformer or line.smoothing is not None
    cells = (
        first,
        line.label,
        f"{measured['accuracy']:.4f} ({(fp32 - measured['accuracy']) / fp32:.2%})",
        f"**{value:.3f}** [{low:.3f}, {high:.3f}]",
        f"{seconds:.2f}" if searched else "",
        f"{counts[0]} / {counts[1]}" if counts else "not known",
    )
    return markdown_row(cells)


def table(names: Sequence[str], measured: Mapping[str, Mapping[str, Any]], transformer: bool) -> list[str]:
    """Return the lines of one table in Markdown."""
    last = ("seconds to find alpha", "int8 / all Linears") if transformer else ("seconds to build", "int8 / all calls")
    headings = ("workload", "recipe", "accuracy (loss)", "time / fp32 [95 %]", *last)
    lines = markdown_head(headings)
    for name in names:
        results = measured[name]
        fp32 = results[FP32.label]
        lines.append(f"| {name} | fp32 ({fp32['form']}) | {fp32['accuracy']:.4f} | 1 | | |")
        lines += [
            row("", line, results[line.label], fp32["accuracy"], transformer)
            for line in LINES[name]
            if line.label in results and line is not FP32
        ]
    return [*lines, ""]


def text(measured: Mapping[str, Mapping[str, Any]], threads: int) -> str:
    """Return both tables, and where and how they were measured."""
    parts: list[str] = []
    for kind in (TRANSFORMERS, CONVOLUTIONS):
        names = [name for name in kind if name in measured]
        if names:
            parts += table(names, measured, kind is TRANSFORMERS)
    evaluations = ", ".join(f"{name} {results[FP32.label]['eval_s']:.1f} s" for name, results in measured.items())
    parts.append(
        "Times are ratios of interleaved runs on one batch to the fastest fp32 form. A global list is scored on the "
        f"whole model, one build and evaluation per alpha. One fp32 evaluation: {evaluations}. "
        + where(threads, PACKAGES)
    )
    return "\n".join(parts)


def measure_one(name: str, label: str, threads: int, out: Path) -> None:
    """Measure one line in this process and add it to the workload's file."""
    path = out / f"{name}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    line = next(line for line in LINES[name] if line.label == label)
    subject = Subject.load(name, threads)
    if line is FP32:
        results[label] = measure_fp32(subject)
    else:
        results[label] = measure_int8(subject, line, results[FP32.label]["form"])
    path.write_text(json.dumps(results, indent=1))


def main() -> None:
    """Measure every line in a process of its own, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=tuple(LINES), choices=tuple(LINES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, help="directory for tables.md and a JSON per workload; lines there are kept"
    )
    parser.add_argument("--docs", type=Path, help="file between whose marks the tables are written")
    parser.add_argument("--measure", nargs=2, metavar=("WORKLOAD", "LINE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="raysq_smoothquant_"))
    if options.measure:
        name, label = options.measure
        measure_one(name, label, options.threads, out)
        return

    check_marks(options.docs, BEGIN, END)
    out.mkdir(parents=True, exist_ok=True)
    measured = {}
    for name in options.workloads:
        path = out / f"{name}.json"
        for line in LINES[name]:
            if path.exists() and line.label in json.loads(path.read_text()):
                continue
            settings = ["--threads", str(options.threads), "--out", str(out)]
            subprocess.run([sys.executable, __file__, "--measure", name, line.label, *settings], check=True)
        measured[name] = json.loads(path.read_text())
    content = text(measured, options.threads)
    (out / "tables.md").write_text(content + "\n")
    publish(content, options.docs, BEGIN, END)


if __name__ == "__main__":
    main()
