"""Percentile against numpy on the raw data."""

import numpy as np
import pytest
import torch

from raysq.arithmetic import Grid
from raysq.calibration.percentile import Percentile, quantile
from raysq.errors import RecipeError
from raysq.histogram import Histogram

GRID = Grid(0, 255, False)
generator = torch.Generator().manual_seed(0)
DATA = {
    "normal": torch.randn(30_000, generator=generator),
    "skewed": torch.rand(30_000, generator=generator) ** 5 * 40 - 3,
    "relu": torch.randn(30_000, generator=generator).relu(),
    "gap": torch.cat([torch.rand(900, generator=generator), torch.rand(100, generator=generator) + 1e3]),
    "few": torch.tensor([-3.0, 0.0, 1.0, 8.0]),
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("percent", [51, 90, 95.5, 99, 99.9, 99.99, 100])
def test_both_ends_equal_numpy_percentile_within_a_bin(stats_of, name, percent):
    stats = stats_of(*DATA[name].split(7_000))
    raw = np.percentile(DATA[name].double().numpy(), [100 - percent, percent], method="inverted_cdf")
    np.testing.assert_allclose(Percentile(percent).activation_range(stats, GRID), raw, atol=stats.histogram.width)


@pytest.mark.parametrize("share", [0, 0.1, 1 / 6, 0.5, 0.9, 1])
def test_values_are_taken_as_evenly_spread_within_their_bin(share):
    histogram = Histogram(0.5, -1, np.array([1, 4, 1]))
    expected = np.interp(share, np.cumsum([0, 1, 4, 1]) / 6, histogram.edges)
    assert quantile(histogram, share) == pytest.approx(expected)


def test_a_hundred_cuts_nothing(stats_of):
    stats = stats_of(DATA["skewed"])
    assert Percentile(100).activation_range(stats, GRID) == (stats.minimum, stats.maximum)


def test_one_outlier_among_many_is_cut(stats_of):
    lo, hi = Percentile(99.9).activation_range(stats_of(DATA["normal"], torch.tensor([1e4])), GRID)
    assert -5 < lo < hi < 5 + 1e4 / 2048


@pytest.mark.parametrize("percent", [50, 0, -1, 100.01, float("nan"), float("inf"), "99", None, True])
def test_a_percentage_out_of_range_raises(percent):
    with pytest.raises(RecipeError, match="`percentile` takes a"):
        Percentile(percent)
