"""Compares the strategies on simulated models and on the workloads: trials and seconds to what a user wants.

Run it on a quiet machine: `python benchmarks/strategies.py --docs docs/strategies.md`. On the workloads every recipe is
built, scored and timed once, however many strategies try it, then timed for longer to be judged by, and the results are
kept in benchmarks/.cache; so are the searches, and the tables have a row for each strategy that was ever run there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ray.tune.search import Searcher
from tables import check_marks, insert, markdown_head, markdown_row, where

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "workloads"), str(HERE.parent / "tests")]

from simulation import RoughSimulation  # noqa: E402

import raysq  # noqa: E402
from raysq import baseline, strategies  # noqa: E402
from raysq.job import Job  # noqa: E402
from raysq.kernels import base  # noqa: E402
from raysq.latency import Latency  # noqa: E402
from raysq.op_times import measured_times  # noqa: E402
from raysq.recipe import Recipe  # noqa: E402
from raysq.space import SearchSpace  # noqa: E402
from raysq.strategies import Strategy  # noqa: E402
from raysq.tuning.worker import Worker  # noqa: E402

CACHE = HERE / ".cache" / "strategies"
PACKAGES = ("torch", "intel-extension-for-pytorch", "ray", "optuna", "hyperopt")
BEGIN, END = "<!-- strategies table -->", "<!-- end of strategies table -->"
SIMULATION = "simulation"
WORKLOADS = {  # name in the table: workload, batches of it that are evaluated, whether it is smoothed
    "digits_cnn": ("digits_cnn", None, None),
    "cifar_mbv2_hard, not smoothed": ("cifar_mbv2_hard", 20, False),
    "shakespeare_gpt_outlier, not smoothed": ("shakespeare_gpt_outlier", 12, False),
}
CLOSE = 1.02  # of the best known latency
HAS_FALLBACK = ("tpe", "tpe_hyperopt", "bayesian", "random", "exhaustive")  # that they search it must be asked for
RANDOM = (*HAS_FALLBACK, "constrained", "nsga2")  # whose proposals depend on the seed
LONG = Latency(budget_s=5.0, ci_width=0.005)  # what a recipe is judged by: trials' own times err by several per cent
SLOW = 0.5  # seconds that a trial of the simulation stands for


@dataclass(frozen=True)
class Problem:
    """One model to be tuned.

    Attributes:
        name: in the table.
        space: what is searched.
        bound: further arguments of `Strategy.bind`.
        goal: what a recipe must hold.
        run: tries a recipe: the result that a trial reports, and the seconds that it took.
        exact: the latency ratio that a recipe is judged by; of those that pass, it is measured for longer than a trial
            would.
    """

    name: str
    space: SearchSpace
    bound: Mapping[str, Any]
    goal: raysq.Goal
    run: Callable[[Recipe], tuple[dict[str, Any], float]]
    exact: Callable[[Recipe], float]


@dataclass(frozen=True)
class Step:
    """One trial of a search: whether it passed, its exact ratio, and the seconds since the search began."""

    feasible: bool
    ratio: float
    seconds: float


def simulated(seed: int) -> Problem:
    """Return the simulated model of sixty calls with other planted numbers for each seed."""
    sim = RoughSimulation(seed=seed)
    bound = {"costs": sim.costs, "times": sim.op_times()}
    return Problem(f"{SIMULATION} {seed}", sim.space(), bound, sim.goal, lambda r: (sim.run(r), SLOW), sim.exact_ratio)


def measured(name: str, threads: int) -> Problem:
    """Return a workload, whose trials are what a worker of Ray Tune would do."""
    import workloads

    workload, limit, smoothing = WORKLOADS[name]
    model = workloads.build_model(workload)
    eval_fn = partial(workloads.make_eval(workload), limit=limit)
    calib = raysq.Calibration(
        list(workloads.eval_batches(workload, "train")), inputs=lambda b: b[0], target=lambda b: b[1]
    )
    torch.set_num_threads(threads)
    goal, latency = raysq.Goal(0.01), Latency(budget_s=1.0)
    prepared = raysq.prepare(model, calib, smoothing=smoothing, num_threads=threads)
    engine = base.get(prepared.engine)
    reference = baseline.measure(prepared, engine, prepared.source.model, eval_fn, goal, latency)
    worker = Worker(Job(prepared, eval_fn, goal, latency, reference), engine)
    path = CACHE / f"{file_name(name)}.json"
    known: dict[str, tuple[dict[str, Any], float]] = json.loads(path.read_text()) if path.exists() else {}

    def run(recipe: Recipe) -> tuple[dict[str, Any], float]:
        if recipe.digest not in known:
            begun = time.perf_counter()
            worker.begin(prepared.space.config(recipe))
            report = worker.advance()
            while not report["done"] and report["feasible"]:
                report = worker.advance()
            known[recipe.digest] = (report, time.perf_counter() - begun)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(known))
        report, seconds = known[recipe.digest]
        return dict(report), seconds

    fp32 = engine.build_float(prepared.source, reference.form)
    times_path = CACHE / f"{file_name(name)}.times.json"
    times: dict[str, float] = json.loads(times_path.read_text()) if times_path.exists() else {}

    def exact(recipe: Recipe) -> float:
        report = known[recipe.digest][0]
        if not report["feasible"]:
            return float(report["latency_ratio"])
        if recipe.digest not in times:
            times[recipe.digest] = float(
                prepared.time(engine.build(prepared.source, recipe).model, fp32.model, LONG).ratio
            )
            times_path.write_text(json.dumps(times))
        return times[recipe.digest]

    bound = {"source": prepared.source, "times": measured_times(prepared, engine, reference)}
    return Problem(name, prepared.space, bound, goal, run, exact)


def file_name(problem: str) -> str:
    """Return the name of a problem without what file names shouldn't have."""
    return problem.replace(", ", "_").replace(" ", "_")


def search(problem: Problem, strategy: Strategy, trials: int) -> list[Step]:
    """Drive a strategy with one trial at a time."""
    steps: list[Step] = []
    begun, waited = time.perf_counter(), 0.0
    while len(steps) < trials:
        config = strategy.suggest(str(len(steps)))
        if config is None or config == Searcher.FINISHED:
            break
        recipe = problem.space.recipe(config)
        before = time.perf_counter()
        result, seconds = problem.run(recipe)
        waited += seconds - (time.perf_counter() - before)  # a known result took its seconds when it was measured
        strategy.on_trial_complete(str(len(steps)), result, error=result["status"] == "failed")
        passed = time.perf_counter() - begun + waited
        steps.append(Step(bool(result["feasible"]), problem.exact(recipe), passed))
        waited -= time.perf_counter() - begun + waited - passed  # judging is no part of a search
    return steps


def make(name: str, problem: Problem, trials: int, seed: int) -> Strategy:
    """Return a strategy bound to a problem; the searches are over fallback too, or most would never pass."""
    arguments: dict[str, Any] = {"fallback": True} if name in HAS_FALLBACK else {}
    if name == "hawq_v2":
        arguments["hawq_v2_loss"] = loss
    bound = dict(problem.bound)
    if name != "auto":
        bound.pop("times")
    return strategies.get(name, **arguments).bind(problem.space, problem.goal, trials, seed, **bound)


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of classes, or of the next characters."""
    return torch.nn.functional.cross_entropy(output.flatten(0, -2), target.flatten())


def compare(
    names: list[str], problems: Callable[[int], Problem], trials: int, seeds: int
) -> dict[str, dict[str, list[list[Any]]]]:
    """Return the steps of each search by strategy and problem; where no seed matters one run stands for all."""
    runs: dict[str, dict[str, list[list[Any]]]] = {name: {} for name in names}
    for seed in range(seeds):
        problem = problems(seed)
        for name in names:
            one_is_all = name not in RANDOM and problem.name in runs[name]
            steps = [] if one_is_all else search(problem, make(name, problem, trials, seed), trials)
            of = runs[name].setdefault(problem.name, [])
            of.append(of[0] if one_is_all else [[s.feasible, s.ratio, s.seconds] for s in steps])
            print(f"{problem.name} {name} {seed}: {len(of[-1])} trials", flush=True)
    return runs


def medians(runs: Mapping[str, Mapping[str, list[list[Any]]]], trials: int) -> dict[str, list[str]]:
    """Return the cells of each strategy: trials and seconds to pass, to come close to the best known, how close."""
    best: dict[str, float] = {}
    for problem, of in (item for problems in runs.values() for item in problems.items()):
        best[problem] = min([best.get(problem, 9.0), *(ratio for run in of for ok, ratio, _ in run if ok)])
    return {
        name: _cells([_reached(run, best[problem]) for problem, of in problems.items() for run in of], trials)
        for name, problems in runs.items()
    }


def _reached(run: list[list[Any]], best: float) -> tuple[float, ...]:
    never = float("inf")
    passed = [(i + 1, ratio, seconds) for i, (ok, ratio, seconds) in enumerate(run) if ok]
    first = passed[0] if passed else (never, never, never)
    close = next((one for one in passed if one[1] <= CLOSE * best), (never, never, never))
    return first[0], first[2], close[0], close[2], min((ratio for _, ratio, _ in passed), default=never) / best


def _cells(reached: list[tuple[float, ...]], trials: int) -> list[str]:
    values = [statistics.median_low(column) for column in zip(*reached, strict=True)]
    shown = ["–" if value == float("inf") else f"{value:.0f}" for value in values[:4]]
    for place in (0, 2):
        shown[place] = shown[place].replace("–", f"> {trials}")
    return [*shown, "none passed" if values[4] == float("inf") else f"{values[4]:.3f}"]


HEADINGS = ("strategy", "trials to pass", "seconds", "trials to within 2 %", "seconds", "its best / best known")


def table(name: str, cells: Mapping[str, list[str]], trials: int, seeds: int) -> str:
    """Return one table in Markdown."""
    title = f"**{name}**, at most {trials} trials, median of {seeds} seeds"
    head = markdown_head(HEADINGS)
    return "\n".join([title, "", *head, *(markdown_row([s, *of]) for s, of in cells.items())])


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [kind.name for kind in strategies.ALL]
    parser.add_argument("--strategies", nargs="+", default=names, choices=names)
    parser.add_argument("--problems", nargs="+", default=[SIMULATION, *WORKLOADS], choices=[SIMULATION, *WORKLOADS])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--docs", type=Path, help="file between whose marks the tables are written")
    parser.add_argument("--out", type=Path, default=CACHE, help="directory that keeps each problem's table")
    options = parser.parse_args()
    check_marks(options.docs, BEGIN, END)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.problems:
        if name == SIMULATION:
            problems: Callable[[int], Problem] = simulated
        else:
            problem = measured(name, options.threads)
            problems = lambda seed, problem=problem: problem  # type: ignore[misc]  # noqa: E731
        kept = options.out / f"{file_name(name)}.runs.json"
        runs = json.loads(kept.read_text()) if kept.exists() else {}
        runs |= compare(options.strategies, problems, options.trials, options.seeds)
        kept.write_text(json.dumps(runs))
        ordered = {strategy: runs[strategy] for strategy in names if strategy in runs}
        text = table(name, medians(ordered, options.trials), options.trials, options.seeds)
        (options.out / f"{file_name(name)}.md").write_text(text)
        print(text, flush=True)
    if options.docs:
        tables = [options.out / f"{file_name(name)}.md" for name in (SIMULATION, *WORKLOADS)]
        content = "\n\n".join([*(t.read_text() for t in tables if t.exists()), where(options.threads, PACKAGES)])
        options.docs.write_text(insert(options.docs.read_text(), content, BEGIN, END))


if __name__ == "__main__":
    main()
