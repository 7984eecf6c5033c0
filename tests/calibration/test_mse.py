"""MSE against torch's HistogramObserver, brute force over raw data, and closed forms."""

import numpy as np
import pytest
import torch
from torch.ao.quantization import HistogramObserver

from raysq.arithmetic import Grid, QParams, dequantize, qparams, quantize
from raysq.calibration.mse import MSE, expected_error
from raysq.histogram import Histogram

generator = torch.Generator().manual_seed(0)
DATA = {
    "normal": torch.randn(40_000, generator=generator),
    "laplace": torch.randn(40_000, generator=generator) * torch.randn(40_000, generator=generator),
    "relu": torch.randn(40_000, generator=generator).relu(),
    "gelu": torch.nn.functional.gelu(2 * torch.randn(40_000, generator=generator)),
    "outlier": torch.cat([torch.randn(40_000, generator=generator), torch.tensor([60.0, -20.0])]),
}
GRIDS = {"affine": Grid(0, 255, False), "symmetric": Grid(-128, 127, True), "reduced": Grid(-64, 63, False)}


def raw_error(x: np.ndarray, lo: float, hi: float, grid: Grid) -> float:
    p = qparams(lo, hi, grid)
    return float(np.mean((dequantize(quantize(x, p), p).astype(np.float64) - x) ** 2))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
@pytest.mark.parametrize("name", DATA)
class TestActivationRange:
    def test_loses_hardly_more_than_the_best_of_a_brute_force_search(self, stats_of, name, grid):
        x = DATA[name].numpy()
        ours = raw_error(x, *MSE().activation_range(stats_of(DATA[name]), grid), grid)
        ends = np.linspace(1, 0.02, 25)
        thin = x[::8] if name != "outlier" else np.concatenate([x[:-2:8], x[-2:]])  # brute force is slow
        weights = np.ones(len(thin)) * 8
        if name == "outlier":
            weights[-2:] = 1
        best, least = (0.0, 0.0), np.inf
        for down in ends if not grid.symmetric else ends[:1]:
            for up in ends:
                lo, hi = min(x.min(), 0) * down, x.max() * up
                if grid.symmetric:
                    hi = max(-x.min(), x.max()) * up
                    lo = -hi
                p = qparams(lo, hi, grid)
                error = float(weights @ (dequantize(quantize(thin, p), p) - thin) ** 2)
                if error < least:
                    best, least = (lo, hi), error
        assert ours <= 1.03 * raw_error(x, *best, grid)

    def test_loses_no_more_than_torch_histogram_observer(self, stats_of, name, grid):
        x = DATA[name]
        dtype = torch.quint8 if grid.qmin == 0 else torch.qint8
        scheme = torch.per_tensor_symmetric if grid.symmetric else torch.per_tensor_affine
        observer = HistogramObserver(dtype=dtype, qscheme=scheme, quant_min=grid.qmin, quant_max=grid.qmax)
        observer(x)
        scale, zero = (v.numpy() for v in observer.calculate_qparams())
        p = QParams(scale, zero.astype(np.int32), grid)
        theirs = np.mean((dequantize(quantize(x.numpy(), p), p).astype(np.float64) - x.numpy()) ** 2)
        ours = raw_error(x.numpy(), *MSE().activation_range(stats_of(x), grid), grid)
        assert ours <= 1.01 * theirs


class TestExpectedError:
    HISTOGRAM = Histogram(1 / 1024, -4096, np.full(4096, 10))  # uniform in [-4, 0)

    @pytest.mark.parametrize("name", DATA)
    def test_equals_the_error_on_raw_data(self, stats_of, name):
        ranges = np.array([[-1, 1], [-4, 4], [-0.1, 9], [-2, 0.5]], float)
        grid = GRIDS["affine"]
        expected = [raw_error(DATA[name].numpy(), lo, hi, grid) for lo, hi in ranges]
        ours = expected_error(stats_of(DATA[name]).histogram, qparams(*ranges.T, grid))
        np.testing.assert_allclose(ours, expected, rtol=0.03)

    def test_rounding_uniform_values_costs_a_twelfth_of_a_step_squared(self):
        p = qparams(-4.0, 0.0, GRIDS["affine"])
        assert expected_error(self.HISTOGRAM, p)[0] == pytest.approx(float(p.scale) ** 2 / 12, rel=0.01)

    def test_clipping_uniform_values_costs_a_third_of_the_excess_squared(self):
        p = qparams(-1.0, 0.0, GRIDS["affine"])  # three quarters lie below -1, by 0 to 3: 3/4 * 3^2 / 3
        assert expected_error(self.HISTOGRAM, p)[0] == pytest.approx(9 / 4, rel=1e-4)

    def test_a_bin_may_be_wider_than_a_step(self):
        p = qparams(0.0, 1.0, GRIDS["affine"])
        error = expected_error(Histogram(1.0, 0, np.array([5])), p)
        assert error[0] == pytest.approx(float(p.scale) ** 2 / 12, rel=1e-3)

    def test_an_empty_histogram_has_none(self):
        assert expected_error(Histogram(1.0, 0, np.zeros(1, np.int64)), qparams(0.0, 1.0, GRIDS["affine"])) == [0.0]


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
@pytest.mark.parametrize("shape", [(4, 9), (16, 300), (1, 100_000), (3, 70_000)])
def test_weight_ranges_equal_brute_force_over_shrinking_ranges(grid, shape):
    weight = np.random.default_rng(1).standard_t(3, size=shape).astype(np.float32)
    lo, hi = MSE().weight_range(weight, grid)
    for row, low, high in zip(weight, lo, hi, strict=True):
        ends = (-np.abs(row).max(), np.abs(row).max()) if grid.symmetric else (row.min(), row.max())
        brute = min(raw_error(row, ends[0] * s, ends[1] * s, grid) for s in np.linspace(1, 0.3, 36))
        assert raw_error(row, low, high, grid) == pytest.approx(brute, rel=1e-4)


def test_a_weight_with_an_outlier_is_clipped_and_one_without_is_not():
    flat = np.tile(np.linspace(-1, 1, 1000, dtype=np.float32), (2, 1))
    flat[1, 0] = 2.0
    _, hi = MSE().weight_range(flat, Grid(-8, 7, True))
    assert hi[0] > 0.9
    assert hi[1] < 1.9
