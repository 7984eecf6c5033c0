"""A tiny prepared model on the reference backend."""

import pytest
import torch
from torch import nn

from raysq.inspection import deployable
from raysq.kernels import reference
from raysq.observation import observe
from raysq.prepared import Prepared
from raysq.result import Baseline
from raysq.source import Source
from raysq.space import build_space


@pytest.fixture(scope="session")
def prepared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    example = (torch.randn(4, 16),)
    deployed, graph = deployable(model, example, {})
    stats = observe(deployed, graph, [((torch.randn(32, 16),), {})])
    engine = reference.Engine()
    capabilities = engine.capabilities()
    space = build_space(graph, capabilities, rankings={"order": [call.name for call in graph.calls]})
    source = Source(deployed, graph, stats, example)
    return Prepared(source, "reference", capabilities, space, example, {}, 1, {"model": "m", "calibration": "c"})


@pytest.fixture(scope="session")
def baseline(prepared):
    return Baseline(1.0, {"accuracy": 1.0}, 1.0, reference.Engine().float_forms()[0], {})
