"""The quantization formulas, against torch's own observers and kernels."""

import warnings
from itertools import product

import numpy as np
import pytest
import torch
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

from raysq.arithmetic import EPS, Grid, dequantize, qparams, quantize
from raysq.recipe import QuantDType, Scheme, TensorConfig

TORCH_DTYPE = {QuantDType.S8: torch.qint8, QuantDType.U8: torch.quint8}
TORCH_SCHEME = {
    (Scheme.AFFINE, False): torch.per_tensor_affine,
    (Scheme.SYMMETRIC, False): torch.per_tensor_symmetric,
    (Scheme.AFFINE, True): torch.per_channel_affine,
    (Scheme.SYMMETRIC, True): torch.per_channel_symmetric,
}
PAIRS = list(product(QuantDType, Scheme, (False, True)))  # dtype, scheme, reduce_range
REDUCED_SYMMETRIC_U8 = (QuantDType.U8, Scheme.SYMMETRIC, True)
DATA = {
    "both signs": lambda g: torch.randn(8, 500, generator=g) * torch.logspace(-3, 3, 8)[:, None],
    "skewed": lambda g: torch.rand(8, 500, generator=g) * 7 - 0.3,
    "positive": lambda g: torch.rand(8, 500, generator=g) + 5,
    "negative": lambda g: -torch.rand(8, 500, generator=g) - 5,
    "all zero": lambda g: torch.zeros(8, 500),
    "constant": lambda g: torch.full((8, 500), -2.5),
    "tiny": lambda g: torch.randn(8, 500, generator=g) * 1e-12,
}


def grid_of(dtype: QuantDType, scheme: Scheme, reduce_range: bool) -> Grid:
    return TensorConfig(dtype, scheme, reduce_range=reduce_range).grid


def observer_of(per_channel: bool, dtype: torch.dtype, scheme: torch.qscheme, reduce_range: bool):
    kind = PerChannelMinMaxObserver if per_channel else MinMaxObserver
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # reduce_range is to be replaced by quant_min and quant_max
        return kind(dtype=dtype, qscheme=scheme, reduce_range=reduce_range)


def data(name: str) -> torch.Tensor:
    return DATA[name](torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("dtype", "scheme", "reduce_range", "expected"),
    [
        (QuantDType.S8, Scheme.AFFINE, False, Grid(-128, 127, False)),
        (QuantDType.S8, Scheme.SYMMETRIC, True, Grid(-64, 63, True)),
        (QuantDType.U8, Scheme.SYMMETRIC, False, Grid(0, 255, True)),
        (QuantDType.U8, Scheme.AFFINE, True, Grid(0, 127, False)),
    ],
)
def test_grid_of_a_configuration(dtype, scheme, reduce_range, expected):
    assert grid_of(dtype, scheme, reduce_range) == expected


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("dtype", "scheme", "reduce_range"), [p for p in PAIRS if p != REDUCED_SYMMETRIC_U8])
def test_qparams_equal_torch_observers_bit_for_bit(dtype, scheme, reduce_range, per_channel, name):
    x = data(name)
    observer = observer_of(per_channel, TORCH_DTYPE[dtype], TORCH_SCHEME[scheme, per_channel], reduce_range)
    observer(x)
    scale, zero_point = observer.calculate_qparams()
    rows = x.numpy() if per_channel else x.numpy().reshape(1, -1)
    ours = qparams(rows.min(axis=1), rows.max(axis=1), grid_of(dtype, scheme, reduce_range), axis=0)
    np.testing.assert_array_equal(ours.scale, scale.numpy())
    np.testing.assert_array_equal(ours.zero_point, zero_point.numpy())


@pytest.mark.parametrize("per_channel", [False, True])
def test_torch_refuses_reduced_symmetric_u8(per_channel):
    with pytest.raises(NotImplementedError, match="Cannot reduce range"):
        observer_of(per_channel, torch.quint8, TORCH_SCHEME[Scheme.SYMMETRIC, per_channel], True)


def test_reduced_symmetric_u8_has_its_zero_point_in_the_middle_of_its_grid():
    p = qparams(-1.0, 1.0, grid_of(*REDUCED_SYMMETRIC_U8))
    assert p.zero_point == 64
    assert p.scale == np.float32(1) / np.float32(63.5)


@pytest.mark.parametrize("name", ["both signs", "skewed", "positive", "negative", "constant"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("dtype", "scheme", "reduce_range"), PAIRS)
def test_dequantized_values_equal_torch_fake_quantize(dtype, scheme, reduce_range, per_channel, name):
    x, grid = data(name), grid_of(dtype, scheme, reduce_range)
    rows = x.numpy() if per_channel else x.numpy().reshape(1, -1)
    lo, hi = rows.min(axis=1) * 0.7, rows.max(axis=1) * 0.7  # some values clamp
    if per_channel:
        p = qparams(lo, hi, grid, axis=0)
        scale, zero_point = torch.tensor(p.scale), torch.tensor(p.zero_point)
        expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, grid.qmin, grid.qmax)
    else:
        p = qparams(lo[0], hi[0], grid)
        expected = torch.fake_quantize_per_tensor_affine(x, float(p.scale), int(p.zero_point), grid.qmin, grid.qmax)
    np.testing.assert_array_equal(dequantize(quantize(x.numpy(), p), p), expected.numpy())


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("dtype", QuantDType)
def test_integers_equal_torch_quantize_per_tensor_ties_included(dtype, scheme):
    p = qparams(-127.5, 127.5, grid_of(dtype, scheme, False))
    assert p.scale == 1.0
    x = np.arange(-400, 400, dtype=np.float32) / 2  # every second one is a tie
    expected = torch.quantize_per_tensor(torch.tensor(x), 1.0, int(p.zero_point), TORCH_DTYPE[dtype]).int_repr()
    np.testing.assert_array_equal(quantize(x, p), expected.numpy())


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize(("dtype", "scheme", "reduce_range"), PAIRS)
def test_error_inside_the_range_is_at_most_half_a_step(dtype, scheme, reduce_range, name):
    x = data(name).numpy()
    p = qparams(x.min(), x.max(), grid_of(dtype, scheme, reduce_range))
    error = np.abs(dequantize(quantize(x, p), p).astype(np.float64) - x)
    end = 0.5  # an affine zero point is rounded, a symmetric grid lacks half a step above: both move an end
    assert error.max() <= p.scale * (0.5 + end) * (1 + 1e-5)
    inside = (x > x.min() + p.scale) & (x < x.max() - p.scale)
    assert error[inside].max(initial=0) <= p.scale * 0.5 * (1 + 1e-5)


@pytest.mark.parametrize(("dtype", "scheme", "reduce_range"), PAIRS)
def test_zero_is_exact(dtype, scheme, reduce_range):
    p = qparams(3.0, 5.0, grid_of(dtype, scheme, reduce_range))  # a range that doesn't hold zero is widened
    zero = np.zeros(1, np.float32)
    assert dequantize(quantize(zero, p), p) == 0


def test_an_all_zero_tensor_gets_the_smallest_scale():
    assert qparams(0.0, 0.0, Grid(0, 255, False)).scale == EPS


def test_values_that_are_not_finite_stay_in_the_grid():
    p = qparams(-1.0, 3.0, Grid(0, 255, False))
    assert quantize(np.float32([np.nan, np.inf, -np.inf]), p).tolist() == [int(p.zero_point), 255, 0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_channels_run_along_the_axis(axis):
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    others = tuple(a for a in range(3) if a != axis)
    p = qparams(x.min(axis=others), x.max(axis=others), Grid(-128, 127, True), axis)
    expected = torch.quantize_per_channel(
        torch.tensor(x), torch.tensor(p.scale), torch.tensor(p.zero_point), axis, torch.qint8
    )
    np.testing.assert_array_equal(dequantize(quantize(x, p), p), expected.dequantize().numpy())


@pytest.mark.parametrize(("lo", "hi"), [(np.nan, 1.0), (0.0, np.inf), (-np.inf, 0.0), (2.0, 1.0), ([0, 3], [1, 2])])
def test_a_range_that_is_none_raises(lo, hi):
    with pytest.raises(ValueError, match="finite bounds in order"):
        qparams(lo, hi, Grid(0, 255, False))


class TestGuideFormulas:
    """What INC's guide prints, against the float values it should bring back: each of its claims that errs."""

    X = np.linspace(-1, 3, 1001)

    @staticmethod
    def error(x, scale, zero_point, qmin, qmax):
        return np.abs((np.clip(np.round(x / scale + zero_point), qmin, qmax) - zero_point) * scale - x).max()

    def test_affine_s8_by_127_wastes_half_of_the_grid(self):
        ours = qparams(-1.0, 3.0, Grid(-128, 127, False))
        guide = 4 / 127
        assert guide == pytest.approx(float(ours.scale) * 255 / 127)
        assert self.error(self.X, guide, -128 + 1 / guide, -128, 127) > 1.9 * float(ours.scale) / 2

    def test_symmetric_u8_by_255_clips_half_of_the_range(self):
        assert self.error(self.X, 3 / 255, 128, 0, 255) > 1.4

    def test_multiplying_by_the_scale_brings_every_value_to_one_integer(self):
        assert len(np.unique(np.round(4 / 255 * self.X + 63.75))) == 1

    def test_two_full_range_products_overflow_int16_and_reduced_ones_do_not(self):
        full, reduced = grid_of(QuantDType.U8, Scheme.AFFINE, False), grid_of(QuantDType.U8, Scheme.AFFINE, True)
        assert 2 * full.qmax * 128 > np.iinfo(np.int16).max >= 2 * reduced.qmax * 128
