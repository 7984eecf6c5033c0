"""What a worker holds and takes: no more after many recipes than after a few, and a few times the weights at most."""

import os
import subprocess
import sys

import pytest

from raysq.tuning.trial import ENVIRONMENT

SETUP = """
import sys

import torch
from torch import nn

import raysq
from raysq import memory
from raysq.baseline import measure
from raysq.goal import Goal
from raysq.kernels import base
from raysq.latency import Latency
from raysq.job import Job
from raysq.tuning.worker import Worker


def working(backend, layers, width, smoothing):
    \"\"\"Return a worker with a model of linear layers, and the function that makes one trial with it.\"\"\"
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(layers) for m in (nn.LayerNorm(width), nn.Linear(width, width)))).eval()
    x = torch.randn(16, width)
    memory.release()
    memory.reset_peak()
    held = memory.resident()
    prepared = raysq.prepare(model, [x], backend=backend, num_threads=1, smoothing=smoothing)
    engine, goal, latency = base.get(backend), Goal(), Latency(budget_s=0.01)
    eval_fn = lambda model: float(model(x).isfinite().all())
    baseline = measure(prepared, engine, model, eval_fn, goal, latency)
    worker = Worker(Job(prepared, eval_fn, goal, latency, baseline), engine)

    def trial(**change):
        worker.begin({**prepared.space.config(prepared.space.default()), **change})
        reports = worker.advance(), worker.advance()
        assert [report["status"] for report in reports] == ["finished"] * 2, reports

    return prepared, held, trial
"""
MANY_TRIALS = """
FEW, MANY = 4, 14

_, _, trial = working(sys.argv[1], 4, 512, False)
held = []
for _ in range(MANY):
    trial()
    held.append(memory.resident())
print((held[-1] - held[FEW - 1]) / (MANY - FEW) / (4 * 512 * 512 * 4))
"""
MANY_FLOAT_FORMS = """
FEW, MANY = 2, 6

prepared, _, _ = working("ipex", 4, 512, False)
held = []
for _ in range(MANY):
    base.get("ipex").build_float(prepared.source, "ipex")
    memory.release()
    held.append(memory.resident())
print((held[-1] - held[FEW - 1]) / (MANY - FEW) / (4 * 512 * 512 * 4))
"""
LARGE = """
LAYERS, WIDTH = 5, 2048  # 21 million parameters

working(sys.argv[1], 1, 8, False)[2]()  # what is imported and compiled for any model
prepared, held, trial = working(sys.argv[1], LAYERS, WIDTH, raysq.Smoothing(alpha=0.5))
peak = memory.peak()  # a trial resets it
for bits in ("7", "8"):
    trial(**{name.name: bits for name in prepared.space.dimensions if name.name.endswith("bits")})
    peak = max(peak, memory.peak())
print((peak - held) / (LAYERS * WIDTH * WIDTH * 4))
"""


def share(script: str, backend: str = "ipex") -> float:
    """Return what a script prints, run in a process of its own: others' garbage would hide growth."""
    if backend == "ipex":
        pytest.importorskip("intel_extension_for_pytorch")
    run = [sys.executable, "-W", "ignore", "-c", SETUP + script, backend]
    done = subprocess.run(run, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onednn", "ipex"])
def test_a_trial_leaves_nothing_behind(backend):
    # of the weights in fp32; measured: 0.03. Kept by oneDNN Graph, int8 weights are 0.25; in the global unit, 0.5
    assert share(MANY_TRIALS, backend) < 0.1


@pytest.mark.slow
def test_a_float_form_goes_with_its_model():
    assert share(MANY_FLOAT_FORMS) < 0.4  # measured: 0.1; where torch.jit.trace leaves it, 4.6


@pytest.mark.slow
def test_a_large_model_takes_a_few_times_its_weights():
    # one divided by the scales, and in int8 as stored and as packed, for two recipes, make 2; the rest is temporary.
    # Measured: 3.8, with what is imported on the way, which this leaves out
    assert share(LARGE, "onednn") < 5
