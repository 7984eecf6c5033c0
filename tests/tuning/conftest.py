"""A tiny prepared model on the reference backend."""

import sys
from dataclasses import dataclass

import pytest
import torch
from ray import cloudpickle
from torch import nn

from raysq.inspection import deployable
from raysq.kernels import base, reference
from raysq.observation import observe
from raysq.result import Baseline
from raysq.space import build_space

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import test modules


@dataclass(frozen=True)
class Prepared:
    source: base.Source
    engine: str
    capabilities: base.Capabilities
    space: object
    latency_args: tuple
    latency_kwargs: dict
    num_threads: int
    fingerprints: dict


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
    source = base.Source(deployed, graph, stats, example)
    return Prepared(source, "reference", capabilities, space, example, {}, 1, {"model": "m", "calibration": "c"})


@pytest.fixture(scope="session")
def baseline(prepared):
    return Baseline(1.0, {"accuracy": 1.0}, 1.0, reference.Engine().float_forms()[0], {})
