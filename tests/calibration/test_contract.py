"""What every calibrator promises, whatever its algorithm."""

import math
import pickle

import numpy as np
import pytest
import torch

from raysq.arithmetic import Grid, qparams
from raysq.calibration import ALL, Calibrator, parse
from raysq.calibration.mse import MSE
from raysq.calibration.percentile import Percentile
from raysq.errors import RecipeError

GRIDS = {
    f"{name} {'symmetric' if symmetric else 'affine'}": Grid(qmin, qmax, symmetric)
    for name, qmin, qmax in [("s8", -128, 127), ("u8", 0, 255), ("s7", -64, 63), ("u7", 0, 127)]
    for symmetric in (False, True)
}
normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
DATA = {
    "normal": normal,
    "relu": normal.relu(),
    "gelu": torch.nn.functional.gelu(2 * normal),
    "outlier": torch.cat([normal, torch.tensor([1e4, -300.0])]),
    "negative": -normal.abs() - 3,
    "positive": normal.abs() + 3,
    "large": normal * 1e29,
    "tiny": normal * 1e-35,
    "two values": torch.tensor([-1.0, 2.0]),
    "one value": torch.tensor([-7.25]),
    "all zero": torch.zeros(100),
    "empty": torch.zeros(0),
}


@pytest.fixture(params=ALL, ids=lambda kind: kind.name)
def calibrator(request) -> Calibrator:
    return request.param()


@pytest.fixture(params=GRIDS.values(), ids=list(GRIDS))
def grid(request) -> Grid:
    return request.param


@pytest.fixture(scope="module")
def stats(stats_of):
    return {name: stats_of(*values.split(5_000)) for name, values in DATA.items()}


@pytest.mark.parametrize("name", DATA)
class TestActivationRange:
    def test_is_finite_in_order_and_within_what_was_observed(self, calibrator, grid, stats, name):
        lo, hi = calibrator.activation_range(stats[name], grid)
        assert isinstance(lo, float)
        assert isinstance(hi, float)
        assert math.isfinite(lo)
        assert stats[name].minimum <= lo <= hi <= stats[name].maximum

    def test_gives_a_scale_above_zero_and_a_zero_point_in_the_grid(self, calibrator, grid, stats, name):
        p = qparams(*calibrator.activation_range(stats[name], grid), grid)
        assert p.scale > 0
        assert grid.qmin <= p.zero_point <= grid.qmax

    def test_is_the_same_each_time(self, calibrator, grid, stats, name):
        once, again = (calibrator.activation_range(stats[name], grid) for _ in range(2))
        assert once == again


def test_an_empty_tensor_has_the_range_zero(calibrator, grid, stats):
    assert calibrator.activation_range(stats["empty"], grid) == (0.0, 0.0)


def test_a_scaled_tensor_has_a_scaled_range(calibrator, grid, stats_of):
    ranges = [calibrator.activation_range(stats_of(*(normal * by).split(5_000)), grid) for by in (1, 4)]
    np.testing.assert_allclose(np.multiply(ranges[0], 4), ranges[1], rtol=1e-6)  # bins scale with powers of two


def test_spelling_round_trips(calibrator):
    assert parse(str(calibrator)) == calibrator
    assert parse(calibrator) is calibrator


def test_is_a_hashable_value_that_pickles(calibrator):
    assert hash(calibrator) == hash(type(calibrator)())
    assert pickle.loads(pickle.dumps(calibrator)) == calibrator


def test_names_are_unique():
    assert len({kind.name for kind in ALL}) == len(ALL)


WEIGHTS = {
    "normal": np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32),
    "one value each": np.float32([[3.0], [-2.0], [0.0]]),
    "all zero": np.zeros((2, 5), np.float32),
    "positive": np.random.default_rng(0).uniform(1, 2, size=(3, 40)).astype(np.float32),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_ranges_lie_within_each_channel_or_are_refused(calibrator, grid, name):
    weight = WEIGHTS[name]
    if type(calibrator).weight_range is Calibrator.weight_range:
        with pytest.raises(RecipeError, match="weights take 'minmax' or 'mse'"):
            calibrator.weight_range(weight, grid)
        return
    lo, hi = calibrator.weight_range(weight, grid)
    assert lo.shape == hi.shape == (len(weight),)
    assert lo.dtype == hi.dtype == np.float32
    assert np.all((weight.min(axis=1) <= lo) & (lo <= hi) & (hi <= weight.max(axis=1)))
    assert np.all(qparams(lo, hi, grid, axis=0).scale > 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mse", MSE()),
        ("percentile", Percentile(99.99)),
        ("percentile(99.9)", Percentile(99.9)),
        ("percentile(100)", Percentile(100)),
    ],
)
def test_parse(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("percentle", "Did you mean 'percentile'"),
        ("", "unknown calibration algorithm ''"),
        (None, "unknown calibration algorithm None"),
        (7, "unknown calibration algorithm 7"),
        ("percentile(", r"unknown calibration algorithm 'percentile\('"),
        ("percentile(5)", r"in \(50, 100\], got 5.0. Did you mean 95"),
        ("percentile(0.9999)", "Did you mean 99.99"),
        ("percentile(50)", r"in \(50, 100\], got 50"),
        ("percentile(100.1)", r"in \(50, 100\], got 100.1"),
        ("percentile(-1)", r"in \(50, 100\], got -1"),
        ("percentile(nan)", r"in \(50, 100\], got nan"),
        ("percentile(high)", "must be a number, got 'percentile"),
        ("percentile()", "must be a number, got 'percentile"),
        ("minmax(3)", "'minmax' takes no argument, got 'minmax"),
    ],
)
def test_parse_says_what_is_wrong(text, message):
    with pytest.raises(RecipeError, match=message):
        parse(text)
