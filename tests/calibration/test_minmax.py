"""MinMax against torch's observers."""

import numpy as np
import torch
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

from raysq.arithmetic import Grid
from raysq.calibration.minmax import MinMax

GRID = Grid(-128, 127, True)


def test_activation_range_equals_torch_min_max_observer(stats_of):
    batches = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0))
    observer = MinMaxObserver()
    for batch in batches:
        observer(batch)
    assert MinMax().activation_range(stats_of(*batches), GRID) == (float(observer.min_val), float(observer.max_val))


def test_weight_range_equals_torch_per_channel_observer():
    weight = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    observer = PerChannelMinMaxObserver()
    observer(weight)
    lo, hi = MinMax().weight_range(weight.numpy(), GRID)
    np.testing.assert_array_equal(lo, observer.min_val.numpy())
    np.testing.assert_array_equal(hi, observer.max_val.numpy())
