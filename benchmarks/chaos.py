"""Kills workers, drivers and nodes of small searches at random points, and checks what is left of each.

`python benchmarks/chaos.py --docs docs/faults.md` plays 20 rounds and writes their table between that file's marks. A
round is a search of its own in a process of its own, on the reference backend. In it a process dies of SIGKILL: the
worker that runs a trial; the driver, after which the run is resumed; or, with two nodes, the raylet of the second,
whose workers die with it. Which of them, after how many trials, and how long after, is drawn from the seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from tables import check_marks, markdown_head, markdown_row, publish, where

from raysq import journal
from raysq.result import Status

T = TypeVar("T")

ROUNDS = 20
TRIALS = 6
EVALUATION_S = 0.3  # as long as a trial takes at least, so that one is running whenever something is killed
PATIENCE_S = 400.0  # for a whole search; Ray alone takes ten seconds to start
STARTS = 4
TOO_SLOW = "timed out during startup"  # Ray gives itself 30 s, which a busy machine may not have
GONE_S = 150.0  # in which what belonged to a driver must have ended; Ray's agents try for 60 s to reach a dead node
VICTIMS = ("worker", "driver", "node")
PACKAGES = ("ray", "torch")
BEGIN, END = "<!-- chaos table -->", "<!-- end of chaos table -->"
MARK = "RAYSQ_CHAOS"
HEADINGS = (
    "round",
    "killed",
    "after trials",
    "finished trials lost",
    "evaluations",
    "failed trials",
    "processes left",
    "proposals",
)

DRIVER = f"""
import json, os, sys, time
from pathlib import Path

import torch
from torch import nn

import raysq

directory, nodes, resume = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "resume"
if nodes > 1:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1}})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")  # it dies with its node
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
x = torch.randn(128, 16)
driver = os.getpid()


def eval_fn(candidate):
    if os.getpid() != driver:
        with open(directory / "evaluations", "a") as file:
            file.write("trial\\n")
        time.sleep({EVALUATION_S})
    return float(-(candidate(x) - model(x)).abs().mean()) + 2.0


result = raysq.tune(
    model, [x], eval_fn, tolerance=0.5, backend="reference", strategy="random", num_threads=1,
    max_concurrent_trials=nodes, max_trials={TRIALS}, latency=raysq.Latency(0.02, 0.02), verbose=0,
    storage_path=directory, name="run", resume=directory / "run" if resume else None,
)
(directory / "found.json").write_text(json.dumps(sorted(trial.recipe.digest for trial in result.trials)))
if nodes > 1:
    ray.shutdown()  # before its node goes, as both would at exit, where Ray ends a driver whose node is gone with 1
    cluster.shutdown()
"""


class Search:
    """A process that searches; what it starts carries a mark in its environment."""

    def __init__(self, directory: Path, nodes: int = 1, *, resume: bool = False) -> None:
        self.directory = directory
        mark = f"{directory}/{'second' if resume else 'first'}"
        self._mark = f"{MARK}={mark}\0".encode()
        script = directory / "driver.py"
        script.write_text(DRIVER)
        self._ray = tempfile.mkdtemp(prefix="chaos-")  # what a killed Ray leaves must mislead no other
        env = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": self._ray}
        env.pop("RAY_ADDRESS", None)
        with (directory / "errors").open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", script, directory, str(nodes), "resume" if resume else "new"],
                env=env,
                cwd=directory,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def processes(self) -> Iterator[tuple[int, str]]:
        """Yield number and command line of each process that carries the mark."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark in (process / "environ").read_bytes():
                    yield int(process.name), (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue

    def victims(self, kind: str) -> list[int]:
        """Return the processes that a round of this kind may kill."""
        if kind == "driver":
            return [self.process.pid]
        if kind == "worker":
            return [pid for pid, line in self.processes() if line.startswith("ray::QuantTrial")]
        return [pid for pid, line in self.processes() if "raylet/raylet " in line and " --head" not in line]

    def result(self) -> list[str]:
        """Return the digests of all trials' recipes.

        Raises:
            RuntimeError: the search failed.
        """
        if self.process.wait(PATIENCE_S):
            raise RuntimeError(f"the search failed: {(self.directory / 'errors').read_text()[-2000:]}")
        found: list[str] = json.loads((self.directory / "found.json").read_text())
        return found

    def close(self) -> None:
        """Kill the search if it still runs."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self._ray, ignore_errors=True)

    def left_behind(self) -> int:
        """Return how many of its processes outlive it."""
        wait_for(lambda: not list(self.processes()), GONE_S)
        return len(list(self.processes()))


@dataclass(frozen=True)
class Plan:
    """What is killed in a round: `victim` so many seconds after so many trials have ended."""

    victim: str
    after: int
    seconds: float

    @property
    def nodes(self) -> int:
        """How many the search runs on."""
        return 2 if self.victim == "node" else 1


@dataclass(frozen=True)
class Outcome:
    """What was left after a round.

    Attributes:
        plan: what was killed.
        ended: trials that stood in the journal when it was.
        lost: those of them that don't stand there at the end, as they did.
        evaluations: how many were made in all.
        failed: trials that ended without a score.
        left: processes that were still there.
        alike: whether the recipes are those of a search in which nothing was killed.
    """

    plan: Plan
    ended: int
    lost: int
    evaluations: int
    failed: int
    left: int
    alike: bool

    @property
    def holds(self) -> bool:
        """Whether nothing was lost, failed, done twice without need, or left behind."""
        again = self.evaluations - TRIALS
        return not (self.lost or self.failed or self.left) and self.alike and again <= self.plan.nodes


def plans(rounds: int, seed: int) -> list[Plan]:
    """Return what is killed in each round: each kind in turn, the rest at random."""
    chance = random.Random(seed)
    return [
        Plan(VICTIMS[n % len(VICTIMS)], chance.randrange(TRIALS - 2), chance.uniform(0, 2 * EVALUATION_S))
        for n in range(rounds)
    ]


def undisturbed(directory: Path) -> list[str]:
    """Return the recipes of a search in which nothing is killed."""
    search = Search(directory)
    try:
        return search.result()
    finally:
        search.close()


def play(plan: Plan, expected: Sequence[str], directory: Path) -> Outcome:
    """Play a round.

    Args:
        plan: what is killed.
        expected: digests of the recipes that are proposed where nothing is killed.
        directory: of the search, empty.

    Raises:
        RuntimeError: the search failed, or ended before there was something to kill.
    """
    path = directory / "run" / journal.FILE
    first = Search(directory, plan.nodes)
    last = first
    try:
        wait_for(lambda: first.process.poll() is not None or lines(path) > plan.after, PATIENCE_S)
        time.sleep(plan.seconds)
        wait_for(lambda: first.process.poll() is not None or first.victims(plan.victim), PATIENCE_S)
        victims = first.victims(plan.victim)
        if first.process.poll() is not None or not victims:
            raise RuntimeError(f"nothing to kill: {(directory / 'errors').read_text()[-2000:]}")
        os.kill(victims[0], signal.SIGKILL)
        before = path.read_bytes()
        before = before[: before.rfind(b"\n") + 1]
        if plan.victim == "driver":
            first.process.wait()
            last = Search(directory, plan.nodes, resume=True)
        found = last.result()
    finally:
        for search in (first, last):
            search.close()
    after = path.read_bytes()
    records = [entry.record for entry in journal.read(path)[1]]
    kept = set(after.split(b"\n"))
    return Outcome(
        plan=plan,
        ended=before.count(b"\n") - 1,
        lost=sum(line not in kept for line in before.splitlines()),
        evaluations=(directory / "evaluations").read_text().count("trial"),
        failed=sum(record.status is Status.FAILED for record in records),
        left=first.left_behind() + (last.left_behind() if last is not first else 0),
        alike=found == list(expected) and sorted(record.trial for record in records) == list(range(TRIALS)),
    )


def insistent(attempt: Callable[[Path], T], directory: Path) -> T:
    """Return what an attempt gives in a directory of its own; another one is made where Ray wasn't up in time.

    Raises:
        RuntimeError: what the attempt raises.
    """
    for number in range(STARTS):
        place = directory / str(number)
        place.mkdir(parents=True)
        try:
            return attempt(place)
        except RuntimeError as exc:
            if TOO_SLOW not in str(exc):
                raise
    raise RuntimeError(f"Ray didn't start in {STARTS} attempts: the machine is too busy.")


def lines(path: Path) -> int:
    """Return how many whole lines a file has, 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition: Callable[[], object], within_s: float) -> None:
    """Return when the condition holds, or the time is up."""
    end = time.monotonic() + within_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)


def row(number: int, outcome: Outcome) -> str:
    """Return one line of the table."""
    cells = (
        str(number),
        outcome.plan.victim,
        str(outcome.ended),
        str(outcome.lost),
        f"{outcome.evaluations} of {TRIALS} trials",
        str(outcome.failed),
        str(outcome.left),
        "as undisturbed" if outcome.alike else "**others**",
    )
    return markdown_row(cells)


def table(outcomes: Mapping[int, Outcome], seed: int) -> str:
    """Return the whole table in Markdown, with what it was measured on."""
    head = markdown_head(HEADINGS)
    held = sum(outcome.holds for outcome in outcomes.values())
    verdict = f"{held} of {len(outcomes)} rounds held, seed {seed}. {where(1, PACKAGES)}"
    return "\n".join([*head, *(row(number, outcome) for number, outcome in outcomes.items()), "", verdict])


def main() -> int:
    """Play the rounds, print each, and write the table where asked; 1 if one of them didn't hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=1, help="how many rounds are played at the same time")
    parser.add_argument("--within-s", type=float, default=float("inf"), help="begin no round after so many seconds")
    parser.add_argument("--docs", type=Path, help="file whose table is replaced")
    options = parser.parse_args()
    check_marks(options.docs, BEGIN, END)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch, ThreadPoolExecutor(options.at_once) as pool:
        expected = insistent(undisturbed, Path(scratch) / "0")

        def played(number: int, plan: Plan) -> Outcome | None:
            if time.monotonic() - begun > options.within_s:
                return None
            outcome = insistent(partial(play, plan, expected), Path(scratch) / str(number))
            print(row(number, outcome), flush=True)
            return outcome

        numbers = range(1, options.rounds + 1)
        ended = zip(numbers, pool.map(played, numbers, plans(options.rounds, options.seed)), strict=True)
        outcomes = {number: outcome for number, outcome in ended if outcome}
    content = table(outcomes, options.seed)
    publish(content, options.docs, BEGIN, END)
    return 0 if all(outcome.holds for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
