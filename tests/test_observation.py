"""The statistics of one pass, against the raw activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import MovingAverageMinMaxObserver

from raysq.errors import CalibrationError
from raysq.inspection import deployable
from raysq.intercept import Window
from raysq.observation import _receptive_fields, observe


def observed(model: nn.Module, batches: list[torch.Tensor], **kwargs):
    copy, graph = deployable(model.eval(), (batches[0],), {})
    return graph, observe(copy, graph, [((b,), kwargs) for b in batches])


def test_ranges_means_and_moving_averages_are_those_of_the_data() -> None:
    batches = [torch.randn(4, 8) * (i + 1) for i in range(5)]
    _, stats = observed(nn.Linear(8, 3), batches)
    tensor, raw = stats.tensors["linear/0"], torch.cat(batches)
    moving = MovingAverageMinMaxObserver(averaging_constant=0.01)
    for batch in batches:
        moving(batch)
    assert np.array_equal(tensor.channel_min, raw.amin(0).numpy())
    assert np.array_equal(tensor.channel_max, raw.amax(0).numpy())
    assert np.allclose(tensor.channel_mean, raw.mean(0).numpy(), atol=1e-6)
    assert (tensor.moving_min, tensor.moving_max) == pytest.approx((moving.min_val.item(), moving.max_val.item()))
    assert tensor.histogram.total == raw.numel()
    assert (stats.samples, stats.batches) == (20, 5)


def test_values_that_are_not_finite_or_huge_are_left_out() -> None:
    x = torch.randn(4, 8)
    x[0, 0], x[1, 1], x[2, 2] = float("nan"), -3e38, float("inf")
    _, stats = observed(nn.Linear(8, 3), [x])
    usable = x[x.abs() <= 1e30]
    tensor = stats.tensors["linear/0"]
    assert (tensor.minimum, tensor.maximum) == (usable.min().item(), usable.max().item())


@pytest.mark.parametrize(("stride", "padding", "dilation", "kernel"), [(1, 1, 1, 3), (2, 3, 1, 7), (1, "same", 2, 3)])
def test_rows_of_a_convolution_are_what_it_reads(stride, padding, dilation, kernel) -> None:
    x, weight = torch.randn(4, 6, 11, 9), torch.randn(5, 6, kernel, kernel)
    output = F.conv2d(x, weight, None, stride, padding, dilation)
    window = Window(
        (kernel,) * 2, (stride,) * 2, padding if isinstance(padding, str) else (padding,) * 2, (dilation,) * 2
    )
    places = np.random.default_rng(0).random(50)
    rows = _receptive_fields(x, window, places)
    flat = output.movedim(1, -1).reshape(-1, 5)
    wanted = flat[torch.from_numpy((places * len(flat)).astype(np.int64))]
    assert torch.allclose(F.conv2d(rows, weight)[:, :, 0, 0], wanted, atol=1e-4)


def test_rows_are_aligned_across_calls() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 3))
    graph, stats = observed(model, [torch.randn(6, 5, 8) for _ in range(3)])
    first, last = (stats.tensors[call.tensors[0]].rows for call in graph.calls)
    with torch.no_grad():
        assert torch.allclose(model[0](torch.from_numpy(first)), torch.from_numpy(last), atol=1e-5)


def test_no_batch_is_an_error() -> None:
    copy, graph = deployable(nn.Linear(8, 3).eval(), (torch.randn(2, 8),), {})
    with pytest.raises(CalibrationError, match="at least one batch"):
        observe(copy, graph, [])
