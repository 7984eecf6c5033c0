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


class Attention(nn.Module):
    """Products of two activations, whose axes are positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return torch.softmax(q @ k.transpose(1, 2), -1) @ v


def test_batches_of_another_length_count() -> None:
    model = Attention()
    batches = [torch.randn(2, 9, 8), *(3 * torch.randn(2, length, 8) for length in (5, 6, 12))]
    _, stats = observed(model, batches)
    with torch.no_grad():
        keys = [model.k(x) for x in batches]
    (keys_read,) = (t for n, t in stats.tensors.items() if n.startswith("matmul") and n.endswith("/1") and "#" not in n)
    assert keys_read.minimum == min(k.min().item() for k in keys)
    assert keys_read.maximum == max(k.max().item() for k in keys)
    assert keys_read.histogram.total == sum(k.numel() for k in keys)


class Routed(nn.Module):
    """Two experts, of which each has the rows that a sign sends it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        here, out = x[:, 0] > 0, x.new_zeros(len(x), 4)
        out[here], out[~here] = self.a(x[here]), self.b(x[~here])
        return out


def test_a_call_may_get_no_row_of_a_batch() -> None:
    batches = [torch.randn(16, 8), torch.randn(16, 8).abs(), torch.randn(16, 8)]
    _, stats = observed(Routed(), batches)
    assert stats.tensors["b/0"].histogram.total < stats.tensors["a/0"].histogram.total


class Masked(nn.Module):
    """Takes a mask, and does nothing with it here."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.fc(x)


@pytest.mark.parametrize(
    ("mask", "counted"),
    [
        (torch.tensor([[1, 1, 1], [1, 0, 0]]), 4),
        (torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), 4),
        (torch.zeros(2, 3), 6),  # an additive one
        (torch.tensor([[0.0, 0.0, -1e9], [0.0, 0.0, 0.0]]), 6),
        (torch.ones(3, 3).tril(), 6),  # a causal one
    ],
)
def test_only_a_mask_of_tokens_leaves_some_out(mask: torch.Tensor, counted: int) -> None:
    _, stats = observed(Masked(), [torch.randn(2, 3, 8)], attention_mask=mask)
    assert stats.tensors["fc/0"].histogram.total == counted * 8


class Changing(nn.Module):
    """Two layers read one tensor, before and after a part of it grows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 1.0
        before = self.a(h)
        h[:, :4] = 50 * x[:, :4]
        return before + self.b(h)


def test_a_tensor_that_changes_has_statistics_before_and_after() -> None:
    x = torch.randn(16, 8)
    _, stats = observed(Changing(), [x])
    assert stats.tensors["a/0"].maximum == x.max()
    assert stats.tensors["b/0"].maximum == max(x[:, 4:].max(), 50 * x[:, :4].max())


class Normalizing(nn.Module):
    """Changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.sub_(10).div_(5))


def test_inputs_that_the_model_changes_stay_as_they_are() -> None:
    batches = [5 * torch.randn(16, 8) + 10 for _ in range(3)]
    before = [batch.clone() for batch in batches]
    _, stats = observed(Normalizing(), batches)
    assert all(torch.equal(a, b) for a, b in zip(batches, before, strict=True))
    assert stats.tensors["fc/0"].maximum == max((b.sub(10).div(5)).max() for b in before)


def test_inputs_in_bf16_are_kept() -> None:
    class Widening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.float())

    _, stats = observed(Widening(), [torch.randn(4, 8).bfloat16()])
    assert stats.items[0].args[0].dtype == torch.bfloat16
