"""The fastest choice of a precision for each call under a limit on the loss: an integer programme, solved by HiGHS.

times   (calls, kinds)   what a call takes in each kind of precision, inf where it can't run so; kind 0 is int8
losses  (calls,)         what a call in int8 costs
edges   (n, 2)           calls between which leaving int8 costs `crossing` (n,), if exactly one of them is in int8
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

__all__ = ["Problem", "solve"]

Floats = NDArray[np.float64]

GAP = 1e-4  # of the optimum: the times are known to a few per cent
NODES = 5_000  # of the search tree, not seconds: the same problem must have the same answer


@dataclass(frozen=True)
class Problem:
    """What is minimised, in the file's notation.

    Attributes:
        times: see above.
        losses: see above; negative ones count as gains.
        edges: see above.
        crossing: see above, >= 0.
        limit: what the losses may sum up to.
    """

    times: Floats
    losses: Floats
    edges: NDArray[np.int64]
    crossing: Floats
    limit: float


def solve(problem: Problem) -> NDArray[np.int64] | None:
    """Return the kind of each call, (calls,); None if the limit can't be held.

    HAWQ-V3 (arXiv 2011.10680, eq. 6) chooses bit widths in this way; the cost of leaving int8 is added here.
    """
    calls, kinds = problem.times.shape
    links = len(problem.edges)
    size = calls * kinds
    first = np.arange(calls) * kinds  # column of each call's int8 variable
    possible = np.isfinite(problem.times)
    cost = np.concatenate([np.where(possible, problem.times, 0.0).ravel(), problem.crossing])
    one_kind = coo_array((np.ones(size), (np.repeat(np.arange(calls), kinds), np.arange(size))), (calls, size + links))
    held = coo_array((problem.losses, (np.zeros(calls, int), first)), (1, size + links))
    constraints = [LinearConstraint(one_kind, 1, 1), LinearConstraint(held, -np.inf, problem.limit)]
    if links:  # crossing >= |int8 of one - int8 of the other|
        a, b = first[problem.edges[:, 0]], first[problem.edges[:, 1]]
        rows = np.concatenate([np.arange(links)] * 3)
        columns = np.concatenate([a, b, size + np.arange(links)])
        for sign in (1.0, -1.0):
            values = np.repeat([sign, -sign, -1.0], links)
            constraints.append(
                LinearConstraint(coo_array((values, (rows, columns)), (links, size + links)), -np.inf, 0)
            )
    found = milp(
        cost,
        constraints=constraints,
        integrality=np.concatenate([np.ones(size), np.zeros(links)]),
        bounds=Bounds(0, np.concatenate([possible.ravel().astype(float), np.ones(links)])),
        options={"mip_rel_gap": GAP, "node_limit": NODES},
    )
    if found.x is None:
        return None
    kind: NDArray[np.int64] = found.x[:size].reshape(calls, kinds).argmax(axis=1)
    return kind
