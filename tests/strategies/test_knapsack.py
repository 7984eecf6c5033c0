"""The integer programme against all choices there are."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from raysq.strategies.knapsack import Problem, solve

KINDS = 3


def random_problem(seed: int, calls: int = 6) -> Problem:
    rng = np.random.default_rng(seed)
    times = rng.random((calls, KINDS))
    times[rng.integers(calls), 2] = np.inf  # one call lacks a kind
    edges = np.array([(i, i + 1) for i in range(calls - 1)] + [(0, calls - 1)])
    return Problem(times, rng.random(calls), edges, rng.random(calls) / 2, calls / 2 * rng.random())


def value(problem: Problem, kinds: tuple[int, ...]) -> float:
    """What a choice takes, infinite where it breaks the limit."""
    if sum(loss for loss, kind in zip(problem.losses, kinds, strict=True) if kind == 0) > problem.limit:
        return np.inf
    crossed = [(kinds[a] == 0) != (kinds[b] == 0) for a, b in problem.edges]
    own = sum(problem.times[call, kind] for call, kind in enumerate(kinds))
    return float(own + np.sum(problem.crossing[crossed]))


@pytest.mark.parametrize("seed", range(20))
def test_it_finds_what_trying_all_finds(seed: int) -> None:
    problem = random_problem(seed)
    chosen = solve(problem)
    assert chosen is not None
    best = min(value(problem, kinds) for kinds in product(range(KINDS), repeat=len(problem.losses)))
    assert value(problem, tuple(chosen)) == pytest.approx(best, rel=1e-3)


def test_a_limit_that_nothing_holds_has_no_solution() -> None:
    problem = Problem(np.array([[1.0]]), np.array([0.5]), np.zeros((0, 2), int), np.zeros(0), 0.1)
    assert solve(problem) is None  # the call can run in int8 only


def test_leaving_int8_for_one_call_does_not_pay_where_crossing_costs_more() -> None:
    times = np.array([[0.1, 1.0], [0.5, 0.4], [0.1, 1.0]])  # the middle one is faster in float
    edges = np.array([(0, 1), (1, 2)])
    for crossing, middle in ((0.01, 1), (0.2, 0)):
        chosen = solve(Problem(times, np.zeros(3), edges, np.full(2, crossing), 1.0))
        assert chosen is not None and list(chosen) == [0, middle, 0]
