"""A small net and its score, in a module of its own: workers must find it where the job's files are."""

from __future__ import annotations

import functools
import socket
import time
from pathlib import Path

import ray
import torch
from torch import nn

X = torch.randn(128, 16, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


TARGET = model()(X).detach()


@ray.remote(num_cpus=0)
class Meeting:
    """Counts the machines that have a worker."""

    def __init__(self) -> None:
        self.machines: set[str] = set()

    def join(self, machine: str) -> int:
        self.machines.add(machine)
        return len(self.machines)


@functools.cache
def meet() -> None:
    """Wait for a worker on another machine: these trials are so short that the first worker would run them all."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        # detached: it outlives the worker that made it, which Ray Tune may end
        meeting = Meeting.options(name="meeting", get_if_exists=True, lifetime="detached").remote()
        if ray.get(meeting.join.remote(socket.gethostname())) > 1:
            return
        time.sleep(1)


def closeness(candidate: nn.Module) -> float:
    if ray.is_initialized():  # else it is the driver, which scores fp32 and the finalists
        meet()
    scale = float(Path("scale.txt").read_text())  # evaluations read files that lie beside them
    return 1.0 - scale * float((candidate(X) - TARGET).abs().mean())
