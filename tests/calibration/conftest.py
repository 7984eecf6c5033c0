"""Statistics of tensors, for tests of calibrators."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.ao.quantization import MovingAverageMinMaxObserver

from raysq.histogram import HistogramBuilder
from raysq.stats import TensorStats


def build_stats(*batches: torch.Tensor) -> TensorStats:
    builder, observer = HistogramBuilder(), MovingAverageMinMaxObserver(averaging_constant=0.01)
    for batch in batches:
        builder.add(batch)
        observer(batch)
    values = torch.cat([b.reshape(-1) for b in batches]).numpy()
    return TensorStats(
        channel_min=np.array([values.min(initial=np.inf)], np.float32),
        channel_max=np.array([values.max(initial=-np.inf)], np.float32),
        channel_mean=np.array([values.mean() if len(values) else 0.0], np.float32),
        moving_min=float(observer.min_val),
        moving_max=float(observer.max_val),
        histogram=builder.build(),
        rows=values[:64, None],
    )


@pytest.fixture(scope="session")
def stats_of() -> Callable[..., TensorStats]:
    """Return a function from batches to the statistics of the tensor."""
    return build_stats
