"""Tunes architectures that raysq was not developed on, and writes a table of what ran in int8 and what did not.

Run it on a quiet machine, with the extra `zoo`: `python benchmarks/coverage_table.py --docs docs/coverage.md`. The
weights are random, and nothing is downloaded. Each architecture has a process of its own, so that a crash is a row.
What was found is kept in benchmarks/.cache: a rerun fills in what is missing, and --again names what is measured once
more.
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
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tables import check_marks, markdown_head, markdown_row, publish, where
from torch import Tensor
from zoo import ALL, Architecture, Specimen

import raysq
from raysq.calibration_data import arguments
from raysq.errors import NoFeasibleRecipe
from raysq.journal import read
from raysq.latency import Latency
from raysq.recipe import Precision
from raysq.result import Result

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache" / "coverage"
NAMES = tuple(architecture.name for architecture in ALL)
BACKENDS = ("onednn", "ipex")
PACKAGES = ("torch", "intel-extension-for-pytorch", "transformers", "torchvision", "timm")
BEGIN, END = "<!-- coverage table -->", "<!-- end of coverage table -->"
HEADINGS = ("architecture", "from", "backend", "calls", "int8", "float", "fidelity", "time / fp32 [95 %]", "in float")
CALIBRATED, HELD_OUT = range(4), range(100, 104)  # numbers of the batches
SEED = 0  # of the weights
TOLERANCE = 0.2  # of the fidelity, which fp32 has 1 of; rounding costs random weights more than trained ones
TIMED = Latency(budget_s=0.3, final_budget_s=1.0)
LIMIT_S = 1800  # of one architecture
CHOSEN = "the search's choice"
LONGEST_REASON = 160


@dataclass(frozen=True)
class Fidelity:
    """Scores a model by how near its outputs are to the fp32 model's, on inputs that calibration has not seen.

    The score is 1 − the root mean square error, relative to how much the fp32 outputs vary: their mean is taken away
    first, which a model that tells no input from another has too.

    Attributes:
        specimen: the fp32 model, and what of an output is compared.
    """

    specimen: Specimen

    def __call__(self, model: Callable[..., Any]) -> float:
        """Return the fidelity: 1 at best, 0 or less where nothing of the fp32 model is left."""
        exact, got = self.outputs(self.specimen.model), self.outputs(model)
        return 1 - float((got - exact).norm() / (exact - exact.mean(0)).norm())

    def outputs(self, model: Callable[..., Any]) -> Tensor:
        """Return what a model makes of all held-out inputs, (rows, features)."""
        rows = []
        with torch.no_grad():
            for number in HELD_OUT:
                args, kwargs = arguments(self.specimen.batch(number))
                made = self.specimen.compared(model(*args, **kwargs))
                rows.append(made.reshape(-1, made.shape[-1]))
        return torch.cat(rows)


def measure(architecture: Architecture, backend: str, max_trials: int) -> dict[str, Any]:
    """Tune an architecture on a backend in this process; return what its row needs."""
    torch.manual_seed(SEED)
    specimen = architecture.make()
    calib = raysq.Calibration([specimen.batch(n) for n in CALIBRATED], inputs=lambda batch: batch)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        try:
            result = raysq.tune(
                specimen.model,
                calib,
                Fidelity(specimen),
                tolerance=TOLERANCE,
                backend=backend,
                max_trials=max_trials,
                num_threads=1,
                latency=TIMED,
                storage_path=directory,
                verbose=0,
            )
        except NoFeasibleRecipe as exc:
            result = exc.result
        seconds = time.monotonic() - begun
        assert result.journal is not None
        kinds = {name: call["op"] for name, call in read(result.journal)[0].calls.items()}
    return {**found(result, kinds), "seconds": seconds}


def found(result: Result, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Return what a search found, as plain data.

    Args:
        result: of the search.
        kinds: call to its kind.
    """
    ratio = result.latency_ratio
    return {
        "calls": len(kinds),
        "int8": sum(precision is Precision.INT8 for precision in result.executed.values()),
        "fidelity": result.accuracy,
        "feasible": result.feasible,
        "ratio": [ratio, ratio.low, ratio.high],
        "left": condensed(result.executed, result.left_in_float, kinds),
        "trials": len(result.trials),
    }


def condensed(
    executed: Mapping[str, Precision], left: Mapping[str, str], kinds: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """Return why calls and functions are in float: reason to how many of each kind.

    Args:
        executed: call to the precision that it runs in.
        left: call or function to its reason; calls that have none are in float by the recipe.
        kinds: call to its kind.
    """
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for name, precision in executed.items():
        if precision is not Precision.INT8:
            counted[left.get(name, CHOSEN)][kinds[name]] += 1
    for name, reason in left.items():
        if name not in executed:  # a function that no backend has a kernel for
            counted[reason][re.sub(r"^.*:|#\d+$", "", name)] += 1
    return {reason: dict(of) for reason, of in counted.items()}


def rows(architecture: Architecture, measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of an architecture, one for each backend."""
    lines = []
    for place, (backend, record) in enumerate(measured.items()):
        head = (architecture.name, architecture.package, backend) if place == 0 else ("", "", backend)
        lines.append(markdown_row((*head, *_cells(record))))
    return lines


def _cells(record: Mapping[str, Any]) -> tuple[str, ...]:
    if "failed" in record:
        return ("–", "–", "–", "–", "–", f"**fails**: {_short(record['failed'])}")
    value, low, high = record["ratio"]
    return (
        str(record["calls"]),
        str(record["int8"]),
        str(record["calls"] - record["int8"]),
        f"{record['fidelity']:.3f}" + ("" if record["feasible"] else ", below the goal"),
        f"{value:.2f} [{low:.2f}, {high:.2f}]",
        "; ".join(f"{_counted(of)}: {_short(reason)}" for reason, of in record["left"].items()) or "nothing",
    )


def _counted(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _short(reason: str) -> str:
    line = (reason.strip().splitlines() or [""])[0].replace("|", "/")
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}…"


def table(measured: Mapping[str, Mapping[str, Mapping[str, Any]]], max_trials: int) -> str:
    """Return the whole table in Markdown, with how and where it was measured.

    Args:
        measured: architecture to backend to its record.
        max_trials: of each search.
    """
    lines = [line for one in ALL for line in rows(one, measured.get(one.name, {}))]
    others = "; ".join(one.name for one in ALL if not measured.get(one.name))  # names have commas
    how = (
        f"Each is the best of at most {max_trials} trials whose fidelity is at least {1 - TOLERANCE:g}, or, *below the "
        "goal*, the closest. Times are ratios of interleaved runs on one batch to the fastest fp32 form."
    )
    missing = f" Not measured here: {others}." if others else ""
    return "\n".join([*markdown_head(HEADINGS), *lines, "", f"{how} {where(1, PACKAGES)}{missing}"])


def record_path(cache: Path, name: str, backend: str) -> Path:
    """Return the file with what is known of an architecture on a backend."""
    return cache / re.sub(r"\W+", "_", name) / f"{backend}.json"


def complete(cache: Path, name: str, backends: Sequence[str], settings: Sequence[str]) -> None:
    """Measure what is missing of an architecture; where its process fails, that is what is known of a backend."""
    while missing := [backend for backend in backends if not record_path(cache, name, backend).exists()]:
        print(f"{name}: {', '.join(missing)}", flush=True)
        path = record_path(cache, name, missing[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        reason = _run([sys.executable, __file__, "--measure", name, "--backends", *missing, *settings], path.parent)
        failed = next((b for b in missing if not record_path(cache, name, b).exists()), None)
        if failed is not None:
            record_path(cache, name, failed).write_text(json.dumps({"failed": reason or "it ended without a result"}))


def _run(command: Sequence[str], folder: Path) -> str:
    """Run a process to its end, its output into a log; return what went wrong, "" if nothing did."""
    log = folder / "log.txt"
    with log.open("ab") as output:
        try:
            done = subprocess.run(command, stdout=output, stderr=output, timeout=LIMIT_S, check=False).returncode
        except subprocess.TimeoutExpired:
            return f"it did not end within {LIMIT_S} s"
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"exit code {done}: {lines[-1] if lines else 'no message'}" if done else ""


@contextmanager
def one_ray() -> Iterator[None]:
    """Start a Ray with a single slot that all processes started meanwhile join: each would start its own."""
    import ray

    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]  # Ray's workers import the zoo
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": ":".join(filter(None, paths))}
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    context: Any = ray.init("local", num_cpus=1, **options)
    os.environ["RAY_ADDRESS"] = context.address_info["address"]
    try:
        yield
    finally:
        ray.shutdown()


def known(cache: Path, names: Sequence[str], backends: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what is known: architecture to backend to its record."""
    return {
        name: {b: json.loads(path.read_text()) for b in backends if (path := record_path(cache, name, b)).exists()}
        for name in names
    }


def main() -> None:
    """Measure what is missing, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES, metavar="NAME", help="default: all")
    parser.add_argument("--again", nargs="+", default=[], choices=NAMES, metavar="NAME", help="what is measured anew")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--max-trials", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE, help="holds a JSON per architecture and backend")
    parser.add_argument("--docs", type=Path, help="file between whose marks the table is written")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cache = options.cache.resolve()
    if options.measure:
        architecture = next(one for one in ALL if one.name == options.measure)
        for backend in options.backends:
            record = measure(architecture, backend, options.max_trials)
            record_path(cache, architecture.name, backend).write_text(json.dumps(record, indent=1))
        return

    check_marks(options.docs, BEGIN, END)
    for name in options.again:
        for backend in options.backends:
            record_path(cache, name, backend).unlink(missing_ok=True)
    missing = [name for name in options.only if not all(record_path(cache, name, b).exists() for b in options.backends)]
    if missing:
        with one_ray():
            for name in missing:
                settings = ["--max-trials", str(options.max_trials), "--cache", str(cache)]
                complete(cache, name, options.backends, settings)
    content = table(known(cache, NAMES, options.backends), options.max_trials)
    publish(content, options.docs, BEGIN, END)


if __name__ == "__main__":
    main()
