"""A search that test_dashboard.py looks at while it runs: `python watched_run.py DIRECTORY`.

One slot, four trials: one that holds the goal, one that fails, one that is rejected early, and one that waits for the
file "go" in its evaluation. Its Ray has ports of its own: where another Ray runs on the machine, as other tests have
one, the agent that serves logs would find its usual port taken.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ray
import torch
from ray.cluster_utils import Cluster
from ray.tune import Callback
from torch import Tensor, nn

import raysq

DIRECTORY = Path(sys.argv[1])
HERE = os.getpid()
X = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
WAIT_S = 600


class Tiny(nn.Sequential):
    """A model with a name of its own."""


def batches(model: nn.Module) -> Iterator[Tensor]:
    """Score all rows as right, in the second trial none; what the trials do is counted by lines of a file."""
    number = -1
    if os.getpid() != HERE:
        with (DIRECTORY / "calls").open("a+") as file:
            file.write("x")
            number = file.tell() - 1
    if number == 1:
        raise RuntimeError("no such kernel")
    end = time.monotonic() + WAIT_S
    while number == 3 and not (DIRECTORY / "go").exists() and time.monotonic() < end:
        time.sleep(0.1)
    for rows in X.split(50):
        model(rows)
        yield torch.full((len(rows),), float(number != 2))


class Tells(Callback):
    """Writes where the dashboard is, once there are three trials to be seen."""

    def on_trial_complete(self, iteration: int, trials: list[object], trial: object, **info: object) -> None:
        if len((DIRECTORY / "calls").read_text()) == 3:
            context = ray.get_runtime_context()
            where = {"url": ray._private.worker.get_dashboard_url(), "job": context.get_job_id()}
            (DIRECTORY / "part").write_text(json.dumps(where))
            (DIRECTORY / "part").rename(DIRECTORY / "where")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("", 0))
        return int(taken.getsockname()[1])


if __name__ == "__main__":
    ports = {"dashboard_port": free_port(), "dashboard_agent_listen_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": True, **ports})
    os.environ["RAY_ADDRESS"] = cluster.address
    torch.manual_seed(0)
    result = raysq.tune(
        Tiny(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval(),
        [X[:128]],
        raysq.Stream(batches, bounds=(0, 1), shuffled=True),
        tolerance=0.1,
        backend="reference",
        strategy="random",
        max_trials=4,
        num_threads=1,
        max_concurrent_trials=1,
        storage_path=DIRECTORY,
        name="watched",
        latency=raysq.Latency(0.02, 0.02),
        callbacks=[Tells()],
    )
    cluster.shutdown()
    print(result.journal)
