"""What importing IPEX does to the process that it happens in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from int8_calls import engine, int8_everywhere, source
from torch import Tensor, nn

from raysq.kernels import base
from raysq.recipe import Approach

CHILDREN = """
from pathlib import Path
from raysq.kernels import ipex
ipex.extension()
print(sum(len((task / "children").read_text().split()) for task in Path("/proc/self/task").iterdir()))
"""


def test_importing_it_starts_no_process() -> None:
    pytest.importorskip("intel_extension_for_pytorch")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHILDREN], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]  # torch's compiler would keep some ready, for GPUs


class WithScalar(nn.Module):
    """Two linear layers, and between them arithmetic with a tensor that has no axis."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(16, 32), nn.Linear(32, 8), function

    def forward(self, x: Tensor, scalar: Tensor) -> Tensor:
        return self.b(self.function(self.a(x), scalar))


SCALARS = {
    "times a mean": lambda y, s: y * y.mean(),
    "plus a mean": lambda y, s: y + y.mean(),
    "by its largest": lambda y, s: y / y.abs().max(),
    "by a function of its largest": lambda y, s: y / (y.abs().amax() + 1e-3).sqrt(),
    "less its smallest": lambda y, s: y - y.min(),
    "times an input": lambda y, s: y * s,
    "an input less it": lambda y, s: s - y,
}


@pytest.mark.parametrize("name", SCALARS)
def test_arithmetic_with_what_has_no_axis_runs(name: str) -> None:
    torch.manual_seed(0)
    of = source(WithScalar(SCALARS[name]), torch.randn(8, 16), torch.tensor(2.0))
    recipe = int8_everywhere(of, engine("ipex").capabilities(), Approach.STATIC)
    ours, theirs = (base.get(backend).build(of, recipe).model(*of.args) for backend in ("ipex", "reference"))
    assert (ours - theirs).abs().max() <= 0.03 * theirs.abs().max()


def test_a_tensor_that_changes_is_quantized_again() -> None:
    torch.manual_seed(0)
    of = source(Changing(), torch.randn(8, 16))
    recipe = int8_everywhere(of, engine("ipex").capabilities(), Approach.STATIC)
    ours, theirs = (base.get(backend).build(of, recipe).model(*of.args) for backend in ("ipex", "reference"))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 0.03 * b.abs().max()


class Changing(nn.Module):
    """Two layers read one tensor, before and after a part of it is set to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 1.0
        before = self.a(h)
        h[:, :8] = 0
        return before, self.b(h)


class Counting(nn.Module):
    """Counts, in a buffer, how often it ran: such a model is traced twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)
        self.register_buffer("ran", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.ran += 1
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("smoothed", [False, True])
def test_a_model_that_changes_a_buffer_reads_its_input(smoothed: bool) -> None:
    torch.manual_seed(0)
    of = source(Counting(), torch.randn(64, 16))
    recipe = int8_everywhere(of, engine("ipex").capabilities(), Approach.STATIC)
    if smoothed:
        recipe = replace(recipe, smoothing=dict.fromkeys(of.graph.groups, 0.5))
    model, x = base.get("ipex").build(of, recipe).model, of.args[0].flip(0)
    with torch.no_grad():
        assert (model(x) - of.model(x)).norm() < 0.05 * of.model(x).norm()


class Shortcut(nn.Module):
    """Adds what a layer reads to what it computes."""

    def __init__(self, image: bool) -> None:
        super().__init__()
        layer = partial(nn.Conv2d, 8, 8, 1) if image else partial(nn.Linear, 8, 8)
        self.a, self.b, self.c = layer(), layer(), layer()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.c(torch.relu(x + self.b(x)))


@pytest.mark.parametrize("image", [False, True])
def test_a_sum_of_what_a_layer_reads_and_computes(image: bool) -> None:
    torch.manual_seed(0)
    of = source(Shortcut(image), torch.randn(2, 8, 6, 6) if image else torch.randn(16, 8))
    recipe = int8_everywhere(of, engine("ipex").capabilities(), Approach.STATIC)
    ours, theirs = (base.get(backend).build(of, recipe).model(*of.args) for backend in ("ipex", "reference"))
    assert (ours - theirs).norm() < 0.05 * theirs.norm()
