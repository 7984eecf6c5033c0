"""The search that MSE and KL share: the clipping of a range, at one end or both, for which a cost is least."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cost", "best_clipping"]

Floats = NDArray[np.float64]
Cost = Callable[[Floats, Floats], Floats]  # (candidates,) lo and hi to (candidates,) cost

OCTAVES = 8  # an end is cut to 1/256 of itself at most: what it then clips is all outliers
COARSE = {1: 257, 2: 17}  # candidates per end; costs are bumpy, so one end alone is searched densely
ROUNDS = 3  # refinements by a third each: 17 candidates end at 1.3 % of the threshold
CHUNK = 32  # candidates at once: the working set stays in cache


def best_clipping(cost: Cost, lo: float, hi: float, symmetric: bool) -> tuple[float, float]:
    """Return the range within [lo, hi] of the least cost; where costs are equal, the widest.

    Each end moves towards zero by a factor, which is one for both ends where the grid is symmetric. First a
    geometric grid, then ever finer ones around its best point.

    Args:
        cost: the cost of many candidates at once; inf rules one out.
        lo: smallest observed value.
        hi: largest observed value.
        symmetric: whether both ends lie equally far from zero.
    """
    ends = np.array([[-max(-lo, hi), max(-lo, hi)]]) if symmetric else np.diag([min(lo, 0.0), max(hi, 0.0)])
    ends = ends[np.any(ends != 0, axis=1)]  # (ends that move, 2)
    if not len(ends):
        return lo, hi

    def ranges(octaves: Floats) -> tuple[Floats, Floats]:  # (candidates, ends that move)
        bounds = np.clip(2.0**-octaves @ ends, lo, hi)
        return bounds[:, 0], bounds[:, 1]

    def cheapest(octaves: Floats) -> tuple[float, Floats]:
        parts = np.array_split(octaves, -(-len(octaves) // CHUNK))
        costs = np.concatenate([cost(*ranges(part)) for part in parts])
        best = int(np.argmin(costs))
        return float(costs[best]), octaves[best]

    axis = np.linspace(0, OCTAVES, COARSE[len(ends)])
    step = axis[1]
    least, best = cheapest(_product(axis, len(ends)))
    for _ in range(ROUNDS):
        around = _product(np.linspace(-step, step, 7), len(ends))
        value, point = cheapest(np.maximum(best + around, 0.0))
        if value < least:
            least, best = value, point
        step /= 3
    los, his = ranges(best[None, :])
    return float(los[0]), float(his[0])


def _product(axis: Floats, ends: int) -> Floats:
    return np.stack(np.meshgrid(*[axis] * ends, indexing="ij"), axis=-1).reshape(-1, ends)
