"""Searches on a cluster of several nodes, which come and go meanwhile; prints what came of them as JSON.

A process of its own: Ray is one per process. Scores and times are answered by recipe, so that runs can be compared.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from ray import cloudpickle, tune
from ray.cluster_utils import Cluster
from torch import nn

import raysq
from raysq import journal, strategies
from raysq.goal import Goal
from raysq.job import Job
from raysq.kernels import reference
from raysq.latency import Latency, Timing
from raysq.prepared import Prepared
from raysq.result import Baseline, Ratio
from raysq.run import Header
from raysq.tuning.conductor import Conductor
from raysq.tuning.runner import run
from raysq.workers import Workers

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import it

TRIALS = 6
STRATEGY = "random"
PATIENCE_S = 300.0  # a worker may take long to start on a machine that does other things
GOAL = Goal(0.5)
X = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}


def number(model: Any) -> float:
    """Return a number in [0, 1) that depends on what the model computes."""
    with torch.no_grad():
        return zlib.crc32(model(X).numpy().tobytes()) % 1000 / 1000


class Replayed(Prepared):
    """Answers a timing by what the candidate computes."""

    def time(self, candidate: Any, reference: Any, latency: Latency) -> Timing:
        """Return the same for the same recipe."""
        ratio = 0.3 + 0.5 * number(candidate)
        return Timing(ratio, 1.0, Ratio(ratio, ratio - 0.01, ratio + 0.01), ((ratio, 1.0),))


class Evaluation:
    """Scores by what the model computes, and notes the node that it ran on; waits until so many have noted theirs.

    On a node that is doomed it never ends: a worker outlives its node's raylet by moments in which it could finish.
    """

    def __init__(self, log: Path, together: int = 1) -> None:
        self.log = log
        self.together = together
        self.doomed = log.with_suffix(".doomed")

    def __call__(self, model: nn.Module) -> float:
        """Return the same for the same recipe."""
        node = ray.get_runtime_context().get_node_id()
        end = time.monotonic() + PATIENCE_S
        while self.doomed.exists() and self.doomed.read_text() == node and time.monotonic() < end:
            time.sleep(0.2)
        with self.log.open("a") as file:
            file.write(node + "\n")
        while len(set(self.nodes)) < self.together and time.monotonic() < end:
            time.sleep(0.2)
        return 1.0 - 0.1 * number(model)

    @property
    def nodes(self) -> list[str]:
        """The node of each evaluation."""
        return self.log.read_text().split() if self.log.exists() else []


class After(tune.Callback):
    """Does something when so many trials are done."""

    def __init__(self, trials: int, action: Callable[[], None]) -> None:
        self.left = trials
        self.action = action

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> After:
        return self

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Act while a trial runs."""
        if self.left == 0:
            self.action()
        self.left -= 1


class Searches:
    """Runs one search after the other; each in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)]).eval()
        prepared = raysq.prepare(model, [X], backend="reference", num_threads=1)
        self.prepared = Replayed(**{name: getattr(prepared, name) for name in Prepared.__dataclass_fields__})
        self.baseline = Baseline(1.0, {"accuracy": 1.0}, 1.0, reference.Engine().float_forms()[0], {})
        self.directory = directory

    def searcher(self) -> Any:
        return strategies.get(STRATEGY, fallback=True).bind(self.prepared.space, GOAL, TRIALS, seed=0)

    def run(
        self, name: str, workers: Workers, *callbacks: Any, trials: int = TRIALS, together: int = 1
    ) -> dict[str, Any]:
        """Search; return recipes, costs and nodes."""
        evaluation = Evaluation(self.directory / f"{name}.nodes", together)
        job = Job(self.prepared, evaluation, GOAL, Latency(0.02, 0.02), self.baseline)
        path = self.directory / name / journal.FILE
        header = Header({"model": "m"}, {}, {}, "reference", self.baseline)
        with journal.Journal.create(path, header) as kept:
            records = run(
                job,
                workers=workers,
                searcher=self.searcher(),
                max_trials=trials,
                journal=kept,
                callbacks=callbacks,
                verbose=0,
            )
        entries = journal.read(path)[1]
        return {
            "recipes": [r.recipe.digest for r in records],
            "trials": [r.trial for r in records],
            "costs": [GOAL.cost(r) for r in records],
            "stages": [r.stage for r in records],
            "reasons": [r.reason for r in records],
            "isa": [r.isa for r in records],
            "nodes": evaluation.nodes,
            "written": [entry.record == record for entry, record in zip(entries, records, strict=True)],
            "replayed": self.follows(entries),
        }

    def follows(self, entries: Any) -> bool:
        """Whether a fresh searcher proposes the same, told what the journal says in the order in which it says it."""
        fresh = Conductor(self.searcher(), self.prepared.space, GOAL, len(entries))
        fresh.replay(entries)
        return not fresh._ready  # what it suggests otherwise would wait there


def main(directory: Path) -> None:
    """Run the searches and print their outcomes."""
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": SOON}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    nodes = {"first": cluster.add_node(num_cpus=1)}
    searches = Searches(directory)
    found: dict[str, Any] = {}

    def join(name: str, **resources: Any) -> None:
        nodes[name] = cluster.add_node(num_cpus=1, **resources)

    def replace_first() -> None:
        (directory / "moved.doomed").write_text(nodes["first"].node_id)
        join("second")
        cluster.remove_node(nodes["first"], allow_graceful=False)

    one = Workers(count=1)
    found["alone"] = searches.run("alone", one)
    found["moved"] = searches.run("moved", one, After(3, replace_first))
    found["late"] = searches.run("late", Workers(), After(0, lambda: join("third")), together=2)
    join("marked", resources={"latency_slot": 1})
    found["refused"] = searches.run("refused", Workers(), trials=2)
    found["scored"] = searches.run("scored", Workers(other_cpus="accuracy"), together=3)  # type: ignore[arg-type]
    found["ids"] = {name: node.node_id for name, node in nodes.items()}
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
