"""Evidence that the mean of a finite set exceeds a limit, gathered while its values are drawn without replacement.

A gambler starts with 1 and bets, before each draw, that it will be above what the rest must average if the mean of all
is the limit. If the mean is at most that, the game is fair or worse for him, so that his capital ever passes
1 / error_rate with a probability of at most error_rate (Ville): whoever looks after each draw and stops at that moment
errs no more often. Waudby-Smith & Ramdas, Estimating means of bounded random variables by betting (arXiv 2010.09686),
section 5, with the capital split among constant fractions. No package has it that installs without a compiler:
`confseq` 0.0.11 is of January 2023, C++ without wheels.

values  (draws,)    in the order in which they were drawn
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bet", "lower_bound"]

Floats = NDArray[np.float64]

# Of what may be lost with a draw, and how the capital is split. 0.4 is nearly the best for paired scores in {0, 1}:
# the best is (mean - limit) / variance. 0.1 is for noisier values, 0.9 for steadier ones.
FRACTIONS = np.array([0.1, 0.4, 0.9])
SHARES = np.array([0.1, 0.8, 0.1])
PRECISION = 1e-7  # of a bound, which is read by people


class Bet:
    """The capital of a gambler who bets on a mean above `limit`; it changes with every draw.

    Args:
        limit: of the mean.
        floor: no value lies below it; -inf: nothing is known, and he can't bet.
        size: how many values there are in all, >= 1.
    """

    def __init__(self, limit: float, floor: float, size: int) -> None:
        self._total = size * limit  # what all values add up to if the mean is the limit
        self._floor = floor
        self._left = size
        self._logs = np.log(SHARES)
        self._peak = 0.0  # of the log capital, after any draw so far

    def add(self, values: Floats) -> None:
        """Draw values that were not drawn yet."""
        if math.isinf(self._floor):
            return
        sums = np.concatenate([[0.0], np.cumsum(values)])
        rest = self._left - np.arange(len(values))
        gap = (self._total - sums[:-1]) / rest - self._floor  # what the next value is expected to be above the floor
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(gap > 0, (values - self._floor) / gap, 1.0)
            logs = self._logs[:, None] + np.log1p(FRACTIONS[:, None] * (ratio - 1)).cumsum(axis=1)
        self._peak = max(self._peak, float(np.logaddexp.reduce(logs).max()))
        self._logs = logs[:, -1]
        self._total -= float(sums[-1])
        self._left -= len(values)

    @property
    def certain(self) -> bool:
        """Whether the mean exceeds the limit even if all that is left is at the floor."""
        return math.isfinite(self._floor) and self._total < self._left * self._floor

    @property
    def log_capital(self) -> float:
        """The logarithm of what 1 has become; infinite where nothing is left to bet on."""
        return math.inf if self.certain else float(np.logaddexp.reduce(self._logs))

    def convinces(self, error_rate: float) -> bool:
        """Whether the mean exceeds the limit, at this risk of ever saying so where it doesn't.

        It is enough that he was rich enough after one of the draws: who looks after each would have stopped there.
        """
        return self.certain or self._peak >= -math.log(error_rate)


def lower_bound(values: Floats, floor: float, size: int, error_rate: float) -> float:
    """Return what the mean exceeds, at this risk; the largest limit of which a bet on these draws convinces.

    Args:
        values: what was drawn, at least one.
        floor: no value lies below it, finite.
        size: how many values there are in all.
        error_rate: in (0, 1); holds however it was decided to stop here.
    """

    def convinces(limit: float) -> bool:
        bet = Bet(limit, floor, size)
        bet.add(values)
        return bet.convinces(error_rate)

    high = float(values.mean())
    low = (float(values.sum()) + (size - len(values)) * floor) / size  # what the mean is in any case
    if low >= high or convinces(high):
        return high
    while high - low > PRECISION * max(1.0, abs(low)):
        middle = (low + high) / 2
        low, high = (middle, high) if convinces(middle) else (low, middle)
    return low
