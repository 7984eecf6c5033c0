"""What a forward adds to the resident memory is what its tensors take, not what the process holds."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from raysq import memory
from raysq.errors import OptionError

MIB = 2**20


class Wide(nn.Module):
    """Holds one activation of so many MiB."""

    def __init__(self, mib):
        super().__init__()
        self.mib = mib
        self.ballast = torch.ones(8 * MIB)  # 32 MiB between forwards

    def forward(self, x):
        return (torch.zeros(self.mib * MIB // 4) + x).sum()  # two tensors live at once


MEASURE = """
import sys, torch
sys.path.insert(0, {tests!r})
from raysq import memory
from test_memory import Wide

for mib in (2, 8, 32):
    model, x = Wide(mib), torch.ones(1)
    model(x)
    print(memory.growth(model, (x,), {{}}))
"""


def test_growth_is_that_of_the_activations():
    """In a process of its own, as a worker is: what other tests left running here also takes and frees memory."""
    code = MEASURE.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = [int(line) for line in done.stdout.splitlines()]
    # the counters may lag by some pages per thread
    assert found == [pytest.approx(2 * mib * MIB, rel=0.1, abs=MIB / 2) for mib in (2, 8, 32)]


def test_growth_is_at_least_a_page_so_that_ratios_exist():
    assert memory.growth(nn.Identity(), (torch.ones(1),), {}) >= memory.PAGE


def test_where_it_cannot_be_measured_the_objective_is_named(monkeypatch):
    def refuse():
        raise PermissionError("not yours")

    monkeypatch.setattr(memory, "reset_peak", refuse)
    with pytest.raises(OptionError, match="the objective 'memory' needs .*not yours"):
        memory.growth(nn.Identity(), (torch.ones(1),), {})
