"""A worker builds many recipes one after the other, and holds no more memory after many than after a few."""

import os
import subprocess
import sys

import pytest

from raysq.tuning.trial import ENVIRONMENT

SCRIPT = """
import torch
from torch import nn

import raysq
from raysq import memory
from raysq.baseline import measure
from raysq.goal import Goal
from raysq.kernels import base
from raysq.options import Latency
from raysq.job import Job
from raysq.tuning.worker import Worker

FEW, MANY = 4, 14

torch.manual_seed(0)
model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(512, 512), nn.ReLU()))).eval()
x = torch.randn(16, 512)
prepared = raysq.prepare(model, [x], backend="ipex", num_threads=1)
engine, goal, latency = base.get("ipex"), Goal(), Latency(budget_s=0.01)
eval_fn = lambda model: float(model(x).isfinite().all())
worker = Worker(Job(prepared, eval_fn, goal, latency, measure(prepared, engine, model, eval_fn, goal, latency)), engine)
held = []
for trial in range(MANY):
    worker.begin({})
    reports = worker.advance(), worker.advance()
    assert [report["status"] for report in reports] == ["finished"] * 2, reports
    held.append(memory.resident())
print((held[-1] - held[FEW - 1]) / (MANY - FEW) / 2**20)
"""
MODEL_MIB = 4 * 512 * 512 * 4 / 2**20


@pytest.mark.slow
def test_memory_of_a_worker_is_bounded():
    pytest.importorskip("intel_extension_for_pytorch")
    run = [sys.executable, "-W", "ignore", "-c", SCRIPT]  # a process of its own: others' garbage would hide growth
    done = subprocess.run(run, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    growth = float(done.stdout.split()[-1])
    assert growth < 0.5 * MODEL_MIB, f"{growth:.2f} MiB a trial"  # measured: 0.2; traced in the global unit: over 1
