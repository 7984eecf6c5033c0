"""MovingAverage against torch's observer; the statistics themselves are tested where they are collected."""

import math
from dataclasses import replace

import pytest
import torch
from torch.ao.quantization import MovingAverageMinMaxObserver

from raysq.arithmetic import Grid
from raysq.calibration.moving_average import MovingAverage

GRID = Grid(0, 255, False)


def test_equals_torch_moving_average_observer(stats_of):
    batches = torch.randn(9, 40, generator=torch.Generator().manual_seed(0))
    observer = MovingAverageMinMaxObserver(averaging_constant=0.01)
    for batch in batches:
        observer(batch)
    expected = float(observer.min_val), float(observer.max_val)
    assert MovingAverage().activation_range(stats_of(*batches), GRID) == expected


def test_an_outlier_in_a_later_batch_hardly_moves_it(stats_of):
    stats = stats_of(torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 101.0]))
    assert MovingAverage().activation_range(stats, GRID) == pytest.approx((-1.0, 2.0))


@pytest.mark.parametrize("moving", [math.nan, math.inf])
def test_averages_that_are_not_finite_stay_within_what_was_observed(stats_of, moving):
    stats = replace(stats_of(torch.tensor([-1.0, 1.0])), moving_min=-moving, moving_max=moving)
    lo, hi = MovingAverage().activation_range(stats, GRID)
    assert -1 <= lo <= hi <= 1
