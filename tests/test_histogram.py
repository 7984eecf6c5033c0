"""Histograms hold exactly what was counted, however it was split into batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raysq.histogram import BINS, Histogram, HistogramBuilder

# subnormals, ranges of 60 orders and values that are left out included
floats = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1e30, -3e38])
batches = st.lists(st.lists(floats, max_size=30), max_size=6)


def build(*batches) -> Histogram:
    builder = HistogramBuilder()
    for batch in batches:
        builder.add(torch.as_tensor(batch, dtype=torch.float32))
    return builder.build()


def kept(values) -> np.ndarray:
    values = np.array(values, np.float32)
    return values[np.abs(values) <= np.float32(1e30)].astype(np.float64)


def assert_equal(a: Histogram, b: Histogram) -> None:
    assert (a.width, a.first) == (b.width, b.first)
    np.testing.assert_array_equal(a.counts, b.counts)


@given(batches)
def test_splits_into_batches_do_not_matter(batches):
    assert_equal(build(*batches), build(sum(batches, [])))


@given(batches, st.randoms())
def test_the_order_of_batches_does_not_matter(batches, random):
    shuffled = random.sample(batches, len(batches))
    assert_equal(build(*batches), build(*shuffled))


@given(batches)
def test_each_value_is_counted_in_the_bin_that_covers_it(batches):
    histogram = build(*batches)
    numbers = [math.floor(v / histogram.width) - histogram.first for v in kept(sum(batches, []))]
    expected = np.bincount(numbers, minlength=1) if numbers else np.zeros(1)
    np.testing.assert_array_equal(histogram.counts, expected)


@given(batches)
def test_the_width_follows_from_the_smallest_and_the_largest_value_alone(batches):
    values = kept(sum(batches, []))
    if len(values):
        ends = build([values.min(), values.max()])
        assert (build(*batches).width, len(build(*batches).counts)) == (ends.width, len(ends.counts))


@given(batches)
def test_shape_of_the_bins(batches):
    histogram = build(*batches)
    assert len(histogram.counts) <= BINS
    assert math.frexp(histogram.width)[0] == 0.5  # a power of two
    np.testing.assert_array_equal(np.diff(histogram.edges), histogram.width)


def test_a_wide_tensor_uses_at_least_half_of_the_bins():
    histogram = build(np.random.default_rng(0).normal(size=10_000))
    assert BINS // 2 <= len(histogram.counts) <= BINS


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ([], 0),
        ([0.0] * 7, 7),
        ([2.5] * 7, 7),
        ([-1e30] * 7, 7),
        ([math.nan, math.inf, -math.inf, -3e38, 2e30], 0),
        ([math.nan, 1.0, -3e38, 2.0], 2),
    ],
)
def test_degenerate_tensors(values, total):
    histogram = build(values)
    assert histogram.total == total
    assert len(histogram.counts) == 1 or total == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_every_dtype_counts(dtype):
    values = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    assert_equal(build([0, 1, 1, 0]), build(values))


def test_any_shape_and_stride_counts_and_the_tensor_stays_as_it_is():
    values = torch.randn(4, 5, 6, 7, requires_grad=True).permute(2, 0, 3, 1)[::2]
    before = values.detach().clone()
    assert build(values.detach()).total == values.numel()
    assert torch.equal(values, before)


def test_more_values_than_are_binned_at_once():
    values = torch.randn(600_001, generator=torch.Generator().manual_seed(0))
    histogram = build(values)
    expected, _ = np.histogram(values.double().numpy(), histogram.edges)
    np.testing.assert_array_equal(histogram.counts, expected)


def test_what_was_built_does_not_change_with_later_batches():
    builder = HistogramBuilder()
    builder.add(torch.tensor([1.0]))
    histogram = builder.build()
    builder.add(torch.tensor([1.0]))
    assert histogram.total == 1
