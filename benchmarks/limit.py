"""Compares what the int8 products of tuned models reach with the most that this machine can, and writes the tables.

Run it on a quiet machine: `python benchmarks/limit.py --docs docs/peers.md`. The models are those that
`benchmarks/peers.py` has tuned; what is missing is tuned first. The most is what a large matrix product reaches; what
each product in a model takes is oneDNN's own account of a run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from contenders.process import TUNED
from peers import CACHE, WORKLOADS, Course, Entrant, entrants, read
from tables import check_marks, markdown_head, markdown_row, publish, where

import raysq
from raysq.kernels.profile import Primitive, profile
from raysq.latency import alone

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "workloads"))

BEGIN, END = "<!-- limit table -->", "<!-- end of limit table -->"
PACKAGES = ("torch",)
SIDES = (512, 1024, 2048)  # of the large matrices; the smallest still fills the kernels, and fits in a time slice
GEMM_RUNS = 20  # the fastest counts
PROFILED_RUNS = 20  # of the model; of each product the fastest counts
TIMED_S = 2.0
SMALL = 0.01  # of the model's time: products below share a line
HEADINGS = ("int8 product", "sizes", "how many", "ms", "of the model's time", "TOPS", "of the peak")


def peak_tops(side: int) -> float:
    """Return the int8 operations per second of a product of two square matrices, in 10¹²; a product and sum is two."""
    x = torch.randint(0, 127, (side, side), dtype=torch.uint8)
    weight = torch.randint(-127, 127, (side, side), dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [side, side])
    scales, zeros = torch.full((side,), 0.01), torch.zeros(side, dtype=torch.int64)

    def run() -> object:
        return torch.ops.onednn.qlinear_pointwise(
            x, 0.01, 64, packed, scales, zeros, None, 1.0, 64, torch.uint8, "none", [], ""
        )

    return 2 * side**3 / (1e9 * min(_ms(run) for _ in range(GEMM_RUNS)))


def _ms(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begun)


def products(model: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> list[Primitive]:
    """Return the products that oneDNN runs in a model, each with its fastest time."""
    runs = [profile(lambda: model(*inputs), _verbose()) for _ in range(PROFILED_RUNS)]
    return fastest(runs)


def fastest(runs: Sequence[Sequence[Primitive]]) -> list[Primitive]:
    """Return the primitives of a run, each with the fastest time that it has in any run of the same primitives."""
    shape = [(p.kind, p.problem, p.is_int8) for p in runs[-1]]
    alike = [run for run in runs if [(p.kind, p.problem, p.is_int8) for p in run] == shape]
    return [min(same, key=lambda p: p.ms) for same in zip(*alike, strict=True)]


@contextmanager
def _verbose() -> Iterator[None]:
    """Let every oneDNN in this process print: torch has one, IPEX has its own."""
    with ExitStack() as stack:
        stack.enter_context(torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON))
        if ipex := sys.modules.get("intel_extension_for_pytorch"):
            stack.enter_context(ipex.verbose(ipex.VERBOSE_ON))
        yield


def name_of(primitive: Primitive) -> str:
    """Return what a product is called in the table."""
    if primitive.is_depthwise:
        return "depthwise convolution"
    return {"matmul": "matrix product", "inner_product": "matrix product"}.get(primitive.kind, primitive.kind)


def table(title: str, primitives: Sequence[Primitive], model_ms: float, peak: float) -> str:
    """Return the table of one model in Markdown.

    Args:
        title: what it is of.
        primitives: the products of one run.
        model_ms: milliseconds of a run.
        peak: of the machine, in 10¹² operations per second.
    """
    int8 = [p for p in primitives if p.is_int8]
    grouped: Mapping[tuple[str, str], list[Primitive]] = defaultdict(list)
    for primitive in int8:
        grouped[name_of(primitive), primitive.problem].append(primitive)
    groups = sorted(grouped.items(), key=lambda item: -sum(p.ms for p in item[1]))
    large = [item for item in groups if sum(p.ms for p in item[1]) >= SMALL * model_ms]
    small = [p for item in groups[len(large) :] for p in item[1]]
    rows = [_line(kind, f"`{sizes}`", same, model_ms, peak) for (kind, sizes), same in large]
    if small:
        rows.append(_line("others", "", small, model_ms, peak))
    dense = [p for p in int8 if not p.is_depthwise]
    if dense:
        rows.append(_line("**all but depthwise**", "", dense, model_ms, peak))
    rest = max(0.0, model_ms - sum(p.ms for p in int8))
    in_float = sum(p.ms for p in primitives if not p.is_int8)
    rows.append(f"| not int8 products | float products {in_float:.3g} ms | | {rest:.3g} | {rest / model_ms:.0%} | | |")
    head = markdown_head(HEADINGS)
    return "\n".join([f"**{title}**, {model_ms:.3g} ms", "", *head, *rows])


def _line(kind: str, sizes: str, primitives: Sequence[Primitive], model_ms: float, peak: float) -> str:
    ms = sum(p.ms for p in primitives)
    tops = 2 * sum(p.macs for p in primitives) / (1e9 * ms)
    cells = (kind, sizes, len(primitives), f"{ms:.3g}", f"{ms / model_ms:.0%}", f"{tops:.3f}", f"{tops / peak:.0%}")
    return markdown_row(cells)


def measured(course: Course, workload: str, row: Entrant, peak: float) -> str:
    """Return the table of one workload, tuned if it isn't yet."""
    import workloads

    course.measure(workload, row)
    tuned = read(course.folder(workload, row) / TUNED)
    if tuned["reason"]:
        return f"**{workload}**, {row.title}: {tuned['reason']}"
    model = raysq.load(course.folder(workload, row))
    inputs = next(workloads.eval_batches(workload))[0]
    settings: dict[str, Any] = {"args": inputs, "kwargs": {}, "num_threads": course.threads}
    model_ms = alone(model, **settings, budget_s=TIMED_S)
    title = f"{workload}, {row.options['backend']}"
    return table(title, products(model, inputs), model_ms, peak)


def main() -> None:
    """Measure, print and write the tables."""
    allowed = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--backends", nargs="+", default=["ipex"], help="of raysq")
    parser.add_argument("--core", type=int, default=allowed[0], help="that all runs on")
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--cache", type=Path, default=CACHE, help="holds what is tuned")
    parser.add_argument("--docs", type=Path, help="file between whose marks the tables are written")
    options = parser.parse_args()
    check_marks(options.docs, BEGIN, END)
    os.sched_setaffinity(0, [options.core])
    torch.set_num_threads(1)
    course = Course(options.cache.resolve(), [options.core], 1, options.tolerance, rounds=1)
    peak, side = max((peak_tops(side), side) for side in SIDES)
    rows = [row for row in entrants(options.backends) if row.name in {f"raysq_{b}" for b in options.backends}]
    tables = [measured(course, workload, row, peak) for workload in options.workloads for row in rows]
    most = f"The peak: a product of two {side} × {side} matrices reaches {peak:.3f} TOPS in int8. {where(1, PACKAGES)}"
    content = "\n\n".join([most, *tables])
    publish(content, options.docs, BEGIN, END)


if __name__ == "__main__":
    main()
