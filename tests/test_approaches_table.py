"""The script that writes the table of approaches: what it computes beside measuring."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn


@pytest.fixture
def script(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("approaches")


def test_a_workload_has_a_line_for_fp32_and_each_approach(script: ModuleType) -> None:
    static = {"accuracy": 0.78, "ratio": [0.5, 0.4, 0.6], "calls": [3, 4], "seconds": 1.25}
    measured = {"name": "net", "fp32": 0.8, "form": "jit", "approaches": {"static": static, "weight_only": static}}
    measured["approaches"]["weight_only"] = {**static, "ratio": None}
    assert script.rows(measured) == [
        "| net | fp32 (jit) | 0.8000 | 1 | | |",
        "|  | `static` | 0.7800 (2.50%) | **0.500** [0.400, 0.600] | 3 / 4 | 1.2 |",
        "|  | `weight_only` | 0.7800 (2.50%) | simulated | 3 / 4 | 1.2 |",
    ]


def test_training_follows_the_float_model(script: ModuleType) -> None:
    torch.manual_seed(0)
    model, calib = nn.Linear(4, 3), [(torch.randn(16, 4),)]
    other = nn.Linear(4, 3)
    distance = lambda: (other(*calib[0]).softmax(-1) - model(*calib[0]).softmax(-1)).abs().max()  # noqa: E731
    before = distance()
    script.distilled(model, calib)(other)
    assert distance() < before
