"""KL against TensorRT's algorithm written out bin by bin, and brute force over thresholds."""

import numpy as np
import pytest
import torch

from raysq.arithmetic import Grid, qparams
from raysq.calibration.kl import KL, _Cumulative
from raysq.histogram import Histogram

generator = torch.Generator().manual_seed(0)
DATA = {
    "normal": torch.randn(40_000, generator=generator),
    "skewed": torch.nn.functional.gelu(2 * torch.randn(40_000, generator=generator)),
    "relu": torch.randn(40_000, generator=generator).relu(),
    "heavy tails": torch.randn(40_000, generator=generator) / torch.rand(40_000, generator=generator).clamp(0.02),
}
GRIDS = {"affine": Grid(0, 255, False), "symmetric": Grid(-128, 127, True)}


def divergence(histogram: Histogram, lo: float, hi: float, grid: Grid) -> float:
    """KL(P || Q), every step as it stands in Migacz 2017."""
    counts = histogram.counts.astype(float)
    zero = -histogram.first
    if 0 <= zero < len(counts):
        around = [counts[i] for i in (zero - 1, zero + 1) if 0 <= i < len(counts)]
        counts[zero] = min(counts[zero], max(around, default=0)) if any(around) else counts[zero]
    p = qparams(lo, hi, grid)
    centres = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    level = np.floor(centres / float(p.scale) + 0.5) + int(p.zero_point)
    inside = (level >= grid.qmin) & (level <= grid.qmax)
    in_use = np.flatnonzero(inside & (counts > 0))
    reference = np.where(inside, counts, 0)
    reference[in_use[0]] += counts[level < grid.qmin].sum()
    reference[in_use[-1]] += counts[level > grid.qmax].sum()
    quantized = np.zeros(len(counts))
    for k in np.unique(level[in_use]):
        members = in_use[level[in_use] == k]
        quantized[members] = counts[members].mean()
    P, Q = reference[in_use] / reference.sum(), quantized[in_use] / quantized.sum()
    return float(np.sum(P * np.log(P / Q)))


def random_histograms(count: int):
    """Few bins, many of them empty, zero among them or beyond either end."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        bins = int(rng.integers(1, 60))
        counts = rng.integers(0, 50, bins) * (rng.random(bins) < rng.uniform(0.1, 1))
        counts[[0, -1]] += 1  # a histogram begins and ends with a value
        yield Histogram(0.25, int(rng.integers(-bins - 2, 3)), counts), rng


@pytest.mark.parametrize("grid", [Grid(0, 15, False), Grid(-8, 7, True), Grid(0, 15, True)], ids=str)
def test_the_divergence_is_that_of_the_algorithm_step_by_step(grid):
    ruled_out = 0
    for histogram, rng in random_histograms(300):
        ends = histogram.edges[[0, -1]]
        lo, hi = np.sort(rng.uniform(min(ends[0], 0), max(ends[1], 0.1), (2, 6)), axis=0)
        p = qparams(lo, hi, grid)
        for ours, low, high, scale in zip(_Cumulative.of(histogram).divergence(p), lo, hi, p.scale, strict=True):
            if np.isinf(ours):
                ruled_out += 1
                centres = (histogram.edges[:-1] + histogram.edges[1:]) / 2
                level = np.floor(centres / float(scale) + 0.5) + int(qparams(low, high, grid).zero_point)
                nothing_inside = not histogram.counts[(level >= grid.qmin) & (level <= grid.qmax)].any()
                assert nothing_inside or scale < histogram.width
            else:
                assert ours == pytest.approx(divergence(histogram, low, high, grid), rel=1e-9, abs=1e-9)
    assert 0 < ruled_out < 1000  # of 1800


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
@pytest.mark.parametrize("name", DATA)
def test_no_threshold_of_a_brute_force_search_diverges_much_less(stats_of, name, grid):
    stats = stats_of(DATA[name])
    histogram, lo, hi = stats.histogram, stats.minimum, stats.maximum
    ours = divergence(histogram, *KL().activation_range(stats, grid), grid)
    thresholds = np.linspace(1, 0.06, 48)
    if grid.symmetric:
        top = max(-lo, hi)
        candidates = [(max(lo, -top * s), min(hi, top * s)) for s in thresholds]
    else:
        candidates = [(min(lo, 0) * down, hi * up) for up in thresholds for down in thresholds[:: 4 if lo < 0 else 48]]
    possible = [c for c in candidates if qparams(*c, grid).scale >= histogram.width]
    best = min(divergence(histogram, *c, grid) for c in possible)
    assert ours <= best * 1.03 + 1e-6


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
def test_outliers_are_clipped(stats_of, grid):
    stats = stats_of(DATA["normal"], torch.tensor([30.0, -30.0]))
    lo, hi = KL().activation_range(stats, grid)
    assert -15 < lo < hi < 15


def test_ends_are_clipped_by_themselves(stats_of):
    lo, hi = KL().activation_range(stats_of(DATA["normal"], torch.tensor([30.0])), GRIDS["affine"])
    assert lo == pytest.approx(float(DATA["normal"].min()), rel=0.2)
    assert hi < 15


def test_uniform_values_are_not_clipped(stats_of):
    stats = stats_of(torch.rand(200_000, generator=generator))
    assert KL().activation_range(stats, GRIDS["affine"])[1] > 0.99


def test_zeros_after_a_relu_do_not_change_the_range(stats_of):
    values = DATA["relu"]
    padded = torch.cat([values, torch.zeros(200_000)])
    assert KL().activation_range(stats_of(padded), GRIDS["affine"]) == KL().activation_range(
        stats_of(values), GRIDS["affine"]
    )
