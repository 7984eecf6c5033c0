"""The search for a clipping, on costs whose least is known."""

import numpy as np
import pytest

from raysq.calibration.clipping import best_clipping


def nearest(lo, hi):
    """Return a cost that is least at this range."""
    return lambda los, his: (los - lo) ** 2 + (his - hi) ** 2


@pytest.mark.parametrize(
    ("observed", "symmetric", "least"),
    [
        ((-100.0, 40.0), False, (-3.0, 5.0)),
        ((-100.0, 40.0), False, (-70.0, 0.4)),
        ((-100.0, 40.0), True, (-5.0, 5.0)),
        ((-40.0, 100.0), True, (-5.0, 5.0)),
        ((-100.0, 40.0), True, (-70.0, 40.0)),  # one end lies beyond what was observed
        ((0.0, 40.0), False, (0.0, 5.0)),
        ((2.0, 40.0), False, (2.0, 5.0)),  # an end that is not reached from zero stays
        ((-100.0, -1.0), False, (-3.0, -1.0)),
    ],
)
def test_the_range_of_the_least_cost_is_found(observed, symmetric, least):
    assert best_clipping(nearest(*least), *observed, symmetric) == pytest.approx(least, rel=0.02)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("observed", [(-100.0, 40.0), (0.0, 40.0), (-0.5, 40.0)])
def test_of_equals_the_widest_is_taken(observed, symmetric):
    assert best_clipping(lambda los, his: np.ones(len(los)), *observed, symmetric) == observed


def test_what_costs_infinitely_much_is_ruled_out():
    lo, hi = best_clipping(lambda los, his: np.where(his > 7, np.inf, -his), -100.0, 40.0, False)
    assert lo == -100
    assert 6.5 < hi <= 7


def test_an_end_is_cut_no_further_than_to_a_256th():
    _, hi = best_clipping(lambda los, his: his, 0.0, 256.0, False)
    assert hi == pytest.approx(1, rel=0.05)


def test_zero_is_not_searched():
    assert best_clipping(nearest(1, 1), 0.0, 0.0, False) == (0.0, 0.0)
