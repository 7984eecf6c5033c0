"""What the tools that follow a search cost: CPU milliseconds of the driver for each trial, and writes a table.

`python benchmarks/tools_cost.py --docs docs/tools.md` shows each tool simulated trials of a model with sixty calls, in
this process, as a search does: with few settings, and with one for each call.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback, TBXLoggerCallback
from tables import check_marks, markdown_head, markdown_row, publish, where

from raysq import OptunaStudy
from raysq.tuning.loggers import Logged
from raysq.tuning.records import record

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from simulation import Simulation  # noqa: E402

BEGIN, END = "<!-- table of the tools' cost -->", "<!-- end of the tools' cost -->"
PACKAGES = ("ray", "tensorboardX", "optuna", "mlflow-skinny")
SIMULATION = Simulation()
SPACES = (SIMULATION.space(), SIMULATION.space().per_op())
REPORT = {"training_iteration": 1, "timesteps_total": None, "node": "here", "eval_s": 1.0, "build_s": 1.0}


def logger(make: Callable[[Path], Any], space: Any, directory: Path) -> Callable[[int], None]:
    """Return what shows a logger of Ray's one trial, with a report after each of its stages."""
    logged = Logged(make(directory), directory, space)
    logged.setup()
    point, report = space.config(space.default()), SIMULATION.run(space.default()) | REPORT

    def show(number: int) -> None:
        config = {**point, "label": "default", "trial": number, "seen": number}
        trial: Any = SimpleNamespace(trial_id=f"{number:08x}", config=config, checkpoint=None)
        logged.on_trial_start(0, [trial], trial)
        logged.on_trial_result(0, [trial], trial, dict(report))
        logged.on_trial_result(0, [trial], trial, report | {"training_iteration": 2})
        logged.on_trial_complete(0, [trial], trial)

    return show


def study(space: Any, directory: Path) -> Callable[[int], None]:
    """Return what adds one trial to a study."""
    followed = OptunaStudy(f"sqlite:///{directory}/study.db")
    followed.begin("cost", space, SIMULATION.goal, [])
    point, report = space.config(space.default()), SIMULATION.run(space.default())
    return lambda number: followed.add(record(number, point, report))


TOOLS: dict[str, Callable[[Any, Path], Callable[[int], None]]] = {
    "CSV": lambda space, at: logger(lambda _: CSVLoggerCallback(), space, at),
    "JSON": lambda space, at: logger(lambda _: JsonLoggerCallback(), space, at),
    "TensorBoard": lambda space, at: logger(lambda _: TBXLoggerCallback(), space, at),
    "`OptunaStudy`, SQLite": study,
    "MLflow, SQLite": lambda space, at: logger(
        lambda d: MLflowLoggerCallback(tracking_uri=f"sqlite:///{d}/mlflow.db", experiment_name="cost"), space, at
    ),
}


def cost_ms(show: Callable[[int], None], trials: int) -> float:
    """Return the median CPU milliseconds of a trial; the first makes files and tables, and isn't counted."""
    spent = []
    for number in range(trials + 1):
        begun = time.process_time()
        show(number)
        spent.append(1e3 * (time.process_time() - begun))
    return median(spent[1:])


def table(costs: dict[str, list[float]]) -> str:
    """Return a line for each tool, its cost with few settings and with many."""
    settings = [len(space.dimensions) for space in SPACES]
    head = markdown_head(["tool", *(f"{count} settings" for count in settings)])
    lines = [markdown_row([name, *(f"{ms:.0f} ms" for ms in found)]) for name, found in costs.items()]
    return "\n".join([*head, *lines, "", f"CPU of the driver, a trial. {where(1, PACKAGES)}"])


def main() -> None:
    """Measure each tool with each space."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--docs", type=Path, help="file between whose marks the table is written")
    options = parser.parse_args()
    check_marks(options.docs, BEGIN, END)
    costs: dict[str, list[float]] = {}
    for name, tool in TOOLS.items():
        for space in SPACES:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
                costs.setdefault(name, []).append(cost_ms(tool(space, Path(directory)), options.trials))
    content = table(costs)
    publish(content, options.docs, BEGIN, END)


if __name__ == "__main__":
    main()
