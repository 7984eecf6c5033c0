"""Scales that fit few values closely clip what is still to come: how much is predicted, and counts."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import raysq
from raysq.arithmetic import qparams
from raysq.kernels import base
from raysq.recipe import QuantDType, Scheme, TensorConfig
from raysq.smoothquant.unseen import clipping_error
from raysq.stats import TensorStats

GRID = TensorConfig(QuantDType.U8, Scheme.AFFINE).grid
CHANNELS = 24


def observed(x: torch.Tensor) -> TensorStats:
    """Return the statistics of what a layer reads."""
    prepared = raysq.prepare(nn.Linear(CHANNELS, 4).eval(), [x], backend="reference", smoothing=False)
    assert prepared.source.stats is not None
    (stats,) = prepared.source.stats.tensors.values()
    return stats


DRAWS = {
    "normal": lambda n, seed: torch.randn(n, CHANNELS, generator=torch.Generator().manual_seed(seed)),
    "positive": lambda n, seed: torch.randn(n, CHANNELS, generator=torch.Generator().manual_seed(seed)).relu(),
    "exponential": lambda n, seed: -(1 - torch.rand(n, CHANNELS, generator=torch.Generator().manual_seed(seed))).log(),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=list(DRAWS))
@pytest.mark.parametrize("n", [64, 512])
def test_the_prediction_is_what_new_values_lose(draw: Any, n: int) -> None:
    predicted, lost = np.zeros(2), np.zeros(2)
    for seed in range(8):
        x, new = draw(n, seed), draw(20_000, 100 + seed).numpy()
        stats = observed(x)
        largest = x.abs().amax(0).numpy()
        vectors = np.stack([np.ones(CHANNELS, np.float32), largest])  # undivided, and each channel filling the range
        low, high = ([f(x.numpy() / v) for v in vectors] for f in (np.min, np.max))
        params = qparams(np.float32(low), np.float32(high), GRID, axis=0)
        predicted += clipping_error(stats, params, vectors).mean(axis=1)
        for place, vector in enumerate(vectors):
            edges = [
                (edge - params.zero_point[place]) * params.scale[place] * vector for edge in (GRID.qmin, GRID.qmax)
            ]
            lost[place] += np.square(new - np.clip(new, *edges)).mean()
    assert lost[1] > 3 * lost[0]
    assert lost[1] / 2.5 < predicted[1] < 2.5 * lost[1]  # normal tails are lighter than exponential ones
    assert predicted[0] < predicted[1] / 2


def test_few_rows_are_no_reason_to_smooth() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    new = torch.randn(4000, 16)
    for rows in (32, 64, 256):
        prepared = raysq.prepare(model, [torch.randn(rows, 16)], backend="reference")
        recipe = prepared.space.default()

        def error(recipe: raysq.Recipe, source: Any = prepared.source) -> float:
            built = base.get("reference").build(source, recipe).model
            with torch.no_grad():
                return float((built(new) - model(new)).norm() / model(new).norm())

        assert error(recipe) <= 1.1 * error(recipe.with_smoothing({}))


def test_where_nothing_varies_nothing_is_lost() -> None:
    stats = observed(torch.ones(64, CHANNELS))
    vectors = np.ones((1, CHANNELS), np.float32)
    params = qparams(np.zeros(1, np.float32), np.ones(1, np.float32), GRID, axis=0)
    assert not clipping_error(stats, params, vectors).any()
