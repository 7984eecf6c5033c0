"""Quantizes the workloads by raysq and by its peers, times what comes out side by side, and writes the tables.

Run it on a quiet machine: `python benchmarks/peers.py --docs docs/peers.md`. Each peer gets a Python environment of its
own, made from PyPI under benchmarks/.cache when it is first needed; each search, each scoring and each engine that is
timed is a process of its own. What was found is kept there too, a folder per workload and contender: a rerun fills in
what is missing, and --again names what is to be done anew. A contender that fails is a row with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contenders.environments import Environment, EnvironmentFailure
from contenders.job import Job
from contenders.process import BATCH, SCORED, SINGLE, TUNED
from contenders.turns import SETTLE_S, ContenderError, Process, busy_s, interleaved
from tables import check_marks, commit, cpu, markdown_head, markdown_row, publish

from raysq.goal import Goal
from raysq.latency import ratio_of
from raysq.result import Ratio

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache" / "peers"
WORKLOADS = ("digits_cnn", "cifar_mbv2", "cifar_mbv2_hard", "shakespeare_gpt", "shakespeare_gpt_outlier")
WITH_POOLS = WORKLOADS[:3]
BACKENDS = ("auto", "onednn", "ipex")
BEGIN, END = "<!-- peers table -->", "<!-- end of peers table -->"
TIMED, LOG = "timed.json", "log.txt"
FP32 = "fp32"
INC_TRIALS = 20  # of Neural Compressor; more take minutes and, where 20 found nothing, find nothing
LIMIT_S = 3600  # of one search
DISTURBED = 0.05  # share of the cores that others may have while engines are timed, before the table says so
HEADINGS = ("", "trials", "s to pass", "s in all", "accuracy (loss)", "ms, batch", "÷ raysq", "ms, batch 1", "÷ raysq")

INC = Environment(
    "neural-compressor",
    ("neural-compressor==2.6", "numpy<2", "six", "setuptools<81"),  # it imports the last two and doesn't say so
    needs_gb=1.0,
    borrowed=("torch==2.8.0", "intel-extension-for-pytorch==2.8.0"),
    borrowed_gb=8.0,
)
NNCF = Environment("nncf", ("torch==2.13.0", "nncf==3.4.0", "openvino==2026.4.1"), needs_gb=2.0)
ORT = Environment("onnxruntime", ("torch==2.13.0", "onnx==1.23.2", "onnxruntime==1.31.1"), needs_gb=2.0)


@dataclass(frozen=True)
class Entrant:
    """One row of a table.

    Attributes:
        name: of its folder, and for the command line.
        title: in the table.
        module: that implements it.
        options: its arguments.
        environment: what it runs in; None: where this script does.
        workloads: those that it makes sense on.
    """

    name: str
    title: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Environment | None = None
    workloads: Sequence[str] = WORKLOADS


@dataclass(frozen=True)
class Found:
    """What is known of an entrant on a workload.

    Attributes:
        entrant: whose row it is.
        tuned: the record of its search.
        accuracy: of the artifact, scored in a fresh process; None where there is none.
        ms: what is timed → milliseconds, one per round; empty where nothing was timed.
        reason: why there is no accuracy, or no time, although there is an artifact.
    """

    entrant: Entrant
    tuned: Mapping[str, Any]
    accuracy: float | None
    ms: Mapping[str, Sequence[float]]
    reason: str = ""


def entrants(backends: Sequence[str]) -> list[Entrant]:
    """Return all rows, fp32 first, raysq last."""
    inc, nncf, ort = "contenders.inc", "contenders.openvino_nncf", "contenders.onnx_runtime"
    tied = {"max_trials": INC_TRIALS, "ties_pools": True}
    rows = [
        Entrant(FP32, "fastest fp32", "contenders.fp32"),
        Entrant("inc", "Neural Compressor, `basic`", inc, {"max_trials": INC_TRIALS}, INC),
        Entrant("inc_repaired", "the same, IPEX's pooling repaired", inc, tied, INC, WITH_POOLS),
        Entrant("nncf", "NNCF, accuracy control", nncf, environment=NNCF),
        Entrant("ort", "ONNX Runtime, static QDQ", ort, environment=ORT),
    ]
    for backend in backends:
        options = {"backend": backend}
        first = {**options, "stop_at_first": True}
        rows += [
            Entrant(f"raysq_{backend}", f"**raysq**, {backend}", "contenders.raysq_tune", options),
            Entrant(f"raysq_{backend}_first", f"raysq, {backend}, first that passes", "contenders.raysq_tune", first),
        ]
    return rows


@dataclass(frozen=True)
class Course:
    """Where and how everything runs.

    Attributes:
        cache: holds environments and results.
        cores: that contenders may use.
        threads: of each model.
        tolerance: share of the fp32 score that may be lost.
        rounds: of timing.
    """

    cache: Path
    cores: Sequence[int]
    threads: int
    tolerance: float
    rounds: int

    def folder(self, workload: str, entrant: Entrant) -> Path:
        """Return where the results of an entrant lie."""
        return self._results / workload / entrant.name

    def timed(self, workload: str) -> Path:
        """Return the file with the times of all entrants."""
        return self._results / workload / TIMED

    @property
    def _results(self) -> Path:
        return self.cache / f"threads_{self.threads}_tolerance_{self.tolerance:g}"

    def command(self, action: str, workload: str, entrant: Entrant) -> list[str]:
        """Return what runs a contender in its environment, which is made if need be.

        Raises:
            EnvironmentFailure: it can't be made.
        """
        here = Path(sys.executable)
        python = entrant.environment.python(self.cache / "venvs") if entrant.environment else here
        job = Job(
            module=entrant.module,
            options=entrant.options,
            workload=workload,
            directory=str(self.folder(workload, entrant)),
            threads=self.threads,
            cores=self.cores,
            tolerance=self.tolerance,
        )
        return [str(python), "-P", "-m", "contenders.process", action, job.to_json()]

    @property
    def environment(self) -> dict[str, str]:
        """The variables of all processes."""
        paths = [str(HERE), str(HERE / "workloads"), str(HERE.parent), *os.environ.get("PYTHONPATH", "").split(":")]
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        return {**os.environ, **threads, "PYTHONPATH": ":".join(filter(None, paths))}

    def run(self, action: str, workload: str, entrant: Entrant) -> str:
        """Run an action to its end; return what went wrong, "" if nothing did."""
        folder = self.folder(workload, entrant)
        try:
            command = self.command(action, workload, entrant)
            with (folder / LOG).open("ab") as log:
                done = subprocess.run(
                    command, stdout=log, stderr=log, env=self.environment, cwd=folder, timeout=LIMIT_S, check=False
                )
        except EnvironmentFailure as exc:
            return str(exc)
        except subprocess.TimeoutExpired:
            return f"it did not end within {LIMIT_S} s"
        if not done.returncode:
            return ""
        lines = (folder / LOG).read_text(errors="replace").strip().splitlines()
        return f"exit code {done.returncode}: {lines[-1] if lines else 'no message'}"

    def measure(self, workload: str, entrant: Entrant) -> None:
        """Tune and score, as far as that isn't done."""
        folder = self.folder(workload, entrant)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / TUNED).exists():
            print(f"{workload}: {entrant.name}", flush=True)
            reason = self.run("tune", workload, entrant)
            if reason:
                failed = {"trials": 0, "seconds": 0.0, "to_pass": None, "accuracy": None, "reason": reason}
                (folder / TUNED).write_text(json.dumps(failed))
        if not read(folder / TUNED)["reason"] and not (folder / SCORED).exists():
            reason = self.run("score", workload, entrant)
            if reason:
                (folder / SCORED).write_text(json.dumps({"accuracy": None, "reason": reason}))

    def time(self, workload: str, rows: Sequence[Entrant]) -> None:
        """Time all artifacts of a workload side by side, if that isn't done for all of these."""
        known = read(self.timed(workload))
        able = [row for row in rows if read(self.folder(workload, row) / SCORED).get("accuracy") is not None]
        if {row.name for row in able} <= {*known.get("ms", {}).get(BATCH, {}), *known.get("failed", {})}:
            return
        print(f"{workload}: timing {', '.join(row.name for row in able)}", flush=True)
        engines: dict[str, Process] = {}
        failed: dict[str, str] = {}
        with ExitStack() as stack:
            for row in able:
                log = self.folder(workload, row) / LOG
                engine = stack.enter_context(Process(self.command("serve", workload, row), self.environment, log))
                try:
                    engines[row.name] = engine.ready()
                except ContenderError as exc:
                    failed[row.name] = str(exc)

            def by_others() -> float:
                return busy_s(self.cores) - sum(engine.cpu_s() for engine in engines.values())

            begun, before = time.perf_counter(), by_others()
            ms = interleaved(engines, (BATCH, SINGLE), self.rounds, self.settle_s)
            others = (by_others() - before) / ((time.perf_counter() - begun) * len(self.cores))
        self.timed(workload).write_text(json.dumps({"ms": ms, "others": others, "failed": failed}))

    @property
    def settle_s(self) -> float:
        """Seconds of rest before an engine's turn."""
        return SETTLE_S if self.threads > 1 else 0.0

    def found(self, workload: str, rows: Sequence[Entrant]) -> list[Found]:
        """Return what is known of each row."""
        timed = read(self.timed(workload))
        found = []
        for row in rows:
            folder = self.folder(workload, row)
            if (folder / TUNED).exists():
                scored = read(folder / SCORED)
                ms = {what: of[row.name] for what, of in timed.get("ms", {}).items() if row.name in of}
                reason = scored.get("reason", "") or timed.get("failed", {}).get(row.name, "")
                found.append(Found(row, read(folder / TUNED), scored.get("accuracy"), ms, reason))
        return found


def read(path: Path) -> dict[str, Any]:
    """Return a JSON object, an empty one where there is no file."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def line(found: Found, fp32: float, goal: Goal, reference: Mapping[str, Sequence[float]]) -> str:
    """Return the row of an entrant.

    Args:
        found: what is known of it.
        fp32: score of the float model.
        goal: what an artifact must hold.
        reference: raysq's times, what is timed → milliseconds by round; empty where raysq has none.
    """
    tuned = found.tuned
    title = found.entrant.title + (f" ({tuned['note']})" if tuned.get("note") else "")
    cells = [title, _trials(tuned), _seconds(tuned["to_pass"]), _in_all(tuned)]
    if found.accuracy is None:
        reason = (tuned["reason"] or found.reason).replace("|", "/")
        return markdown_row([*cells, reason, *"––––"])
    drop = goal.drop(found.accuracy, fp32)
    cells.append(f"{found.accuracy:.4f} ({drop:.2%}){'' if goal.holds(drop) else ', **fails**'}")
    if abs(found.accuracy - tuned["accuracy"]) >= 5e-5:
        cells[-1] += f", reported as {tuned['accuracy']:.4f}"
    if found.reason:
        cells[-1] += f", can't be timed: {found.reason.replace('|', '/')}"
    for what in (BATCH, SINGLE):
        times = found.ms.get(what)
        cells.append(f"{_median(times):.3g}" if times else "–")
        cells.append(_ratio(times, reference.get(what)) if times else "–")
    return markdown_row(cells)


def _trials(tuned: Mapping[str, Any]) -> str:
    whole = tuned.get("whole")
    return str(tuned["trials"]) if whole in (None, tuned["trials"]) else f"{tuned['trials']}, {whole} on all data"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _in_all(tuned: Mapping[str, Any]) -> str:
    start = tuned.get("start_s", 0.0)
    return f"{tuned['seconds']:.1f}" + (f" + {start:.1f}" if start else "")


def _median(times: Sequence[float]) -> float:
    return float(ratio_of([(ms, 1.0) for ms in times]))


def _ratio(times: Sequence[float], reference: Sequence[float] | None) -> str:
    if reference is None:
        return "–"
    if times is reference:
        return "1"
    ratio: Ratio = ratio_of(list(zip(times, reference, strict=True)))
    return f"{ratio:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def table(workload: str, rows: Sequence[Found], reference: str, goal: Goal) -> str:
    """Return the table of a workload in Markdown.

    Args:
        workload: its name.
        rows: what is known of the entrants, that of fp32 among them.
        reference: name of the entrant whose times the others are divided by.
        goal: what an artifact must hold.
    """
    by_name = {row.entrant.name: row for row in rows}
    fp32 = by_name[FP32].accuracy
    if fp32 is None:
        raise SystemExit(f"{workload}: fp32 could not be measured: {by_name[FP32].tuned['reason']}.")
    times = by_name[reference].ms if reference in by_name else {}
    head = markdown_head(HEADINGS)
    return "\n".join([f"**{workload}**", "", *head, *(line(row, fp32, goal, times) for row in rows)])


def footnote(rows: Sequence[Found], course: Course, others: float) -> str:
    """Return what the tables were measured on and with."""
    packages: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for name, version in row.tuned.get("versions", {}).items():
            packages[name].add(version.partition("+")[0])
    seen = ", ".join(f"{name} {' and '.join(sorted(of))}" for name, of in sorted(packages.items()))
    disturbed = f" Others used up to {others:.0%} of the cores meanwhile." if others > DISTURBED else ""
    threads = f"{course.threads} thread{'s' if course.threads > 1 else ''}"
    return f"{cpu()}, {threads} on {len(course.cores)} of its cores, {seen}, raysq {commit()}.{disturbed}"


def main() -> None:
    """Measure what is missing, print and write the tables."""
    allowed = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--backends", nargs="+", default=BACKENDS, help="of raysq; times are divided by the first's")
    parser.add_argument("--only", nargs="+", help="names of rows; default all")
    parser.add_argument("--again", nargs="+", default=[], help="names of rows that are measured anew")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cores", type=int, nargs="+", help="default: as many of the allowed ones as threads")
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--rounds", type=int, default=21, help="of timing")
    parser.add_argument("--cache", type=Path, default=CACHE, help="holds environments and results")
    parser.add_argument("--docs", type=Path, help="file between whose marks the tables are written")
    options = parser.parse_args()
    check_marks(options.docs, BEGIN, END)
    cores = options.cores or allowed[: options.threads]
    course = Course(options.cache.resolve(), cores, options.threads, options.tolerance, options.rounds)
    every = entrants(options.backends)
    chosen = [row for row in every if options.only is None or row.name in {FP32, *options.only}]
    unknown = {*(options.only or []), *options.again} - {row.name for row in every}
    if unknown:
        raise SystemExit(f"there is no row {', '.join(sorted(unknown))}: {', '.join(row.name for row in every)}.")
    for workload in options.workloads:
        for row in (row for row in chosen if workload in row.workloads):
            if row.name in options.again:
                shutil.rmtree(course.folder(workload, row), ignore_errors=True)
                course.timed(workload).unlink(missing_ok=True)
            course.measure(workload, row)
        course.time(workload, [row for row in chosen if workload in row.workloads])
    found = {workload: course.found(workload, every) for workload in WORKLOADS}
    goal, reference = Goal(options.tolerance), f"raysq_{options.backends[0]}"
    tables = [table(workload, rows, reference, goal) for workload, rows in found.items() if rows]
    others = max(read(course.timed(workload)).get("others", 0.0) for workload in WORKLOADS)
    content = "\n\n".join([*tables, footnote([row for rows in found.values() for row in rows], course, others)])
    publish(content, options.docs, BEGIN, END)


if __name__ == "__main__":
    main()
