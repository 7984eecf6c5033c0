"""Extrema along an axis, split: the same values, and models with them run in int8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import raysq
from raysq.kernels.extrema import split_extrema
from raysq.recipe import Precision


class Extrema(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return *x.max(-1), *x.min(0, keepdim=True), x.max(1).values, x.min(1).indices, x.max(), torch.max(x, 2 * x)


class OverTime(nn.Module):
    """Max over time, as TextCNN and PointNet have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(4, 8, 3), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        values, _ = self.conv(x).relu().max(-1)
        return self.fc(values) * values


@pytest.mark.parametrize("case", ["distinct", "ties", "not a number"])
def test_both_halves_are_what_they_were(case: str) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    if case == "ties":
        x[0] = x[:, 1] = 1.0
    if case == "not a number":
        x[1, 2] = torch.nan
    traced = torch.jit.freeze(torch.jit.trace(Extrema().eval(), x))
    split_extrema(traced.graph)
    assert not [node for node in traced.graph.nodes() if node.outputsSize() > 1]
    for got, wanted in zip(traced(x), Extrema()(x), strict=True):
        assert torch.equal(got.nan_to_num(9.0), wanted.nan_to_num(9.0))


def test_a_maximum_over_time_does_not_stop_int8_kernels() -> None:
    torch.manual_seed(0)
    model = OverTime().eval()
    batches = [(torch.randn(4, 4, 16),) for _ in range(3)]
    quantized = raysq.quantize(model, batches, backend="ipex")
    assert set(quantized.executed.values()) == {Precision.INT8}
    wanted = model(*batches[0])
    assert (quantized(*batches[0]) - wanted).abs().max() < 0.05 * wanted.abs().max()
