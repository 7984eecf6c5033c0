"""Times of single calls: who reads whom, the guess, the measured ones, their way into a journal and back."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from raysq.inspection import deployable
from raysq.journal_lines import to_dict
from raysq.kernels import base
from raysq.op_times import OpTimes, measured_times, neighbours, typical_times
from raysq.prepared import prepare
from raysq.recipe import Precision
from raysq.result import Baseline


class Net(nn.Module):
    """A residual block, and a layer norm that no int8 kernel passes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).relu()
        return self.head(self.norm((x + self.b(x)).mean((2, 3))))


EXAMPLE = torch.randn(2, 4, 8, 8)


def test_neighbours_pass_values_through_elementwise_functions_only() -> None:
    graph = deployable(Net().eval(), (EXAMPLE,), {})[1]
    assert set(neighbours(graph)) == {("a", "b"), ("a", "add"), ("b", "add")}


def test_the_guess_shares_out_the_products() -> None:
    graph = deployable(Net().eval(), (EXAMPLE,), {})[1]
    times = typical_times(graph)
    shares = {call.name: times.share(call.name, Precision.FP32) for call in graph.calls}
    assert sum(shares.values()) == pytest.approx(0.9)  # the rest is norms, softmax and the like
    assert shares["a"] == shares["b"] > shares["head"]
    assert times.share("a", Precision.INT8) < times.share("a", Precision.BF16) < shares["a"]
    assert times.share("unknown", Precision.INT8) == 0


@pytest.mark.parametrize("backend", ["ipex", "reference"])
def test_measured_where_the_backend_can(backend: str) -> None:
    prepared = prepare(Net().eval(), [EXAMPLE], backend=backend, num_threads=1)
    baseline = Baseline(accuracy=1.0, metrics={}, latency_ms=2.0, form="jit", forms_ms={})
    times = measured_times(prepared, base.get(backend), baseline)
    if backend == "reference":
        assert times is None  # its int8 is a simulation: how long it takes says nothing
        return
    assert times is not None
    assert times.shares.keys() == prepared.source.graph.by_name.keys()
    assert times.share("a", Precision.FP32) > 0 and times.entries["a"] > 0


def test_they_survive_json() -> None:
    times = typical_times(deployable(Net().eval(), (EXAMPLE,), {})[1])
    assert OpTimes.from_dict(json.loads(json.dumps(to_dict(times)))) == times
