"""The capital is that of the paper's formula, a fair game at the limit, and its bound errs as seldom as it says."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom

from raysq.betting import FRACTIONS, SHARES, Bet, lower_bound

TRIALS = 10_000


def capital(values, limit, floor, size):
    """The same by the definition: the sum of shares * prod(1 + bet * (value - mean of the rest)), draw by draw."""
    total = 0.0
    for fraction, share in zip(FRACTIONS, SHARES, strict=True):
        product, seen = share, 0.0
        for i, value in enumerate(values):
            mean = (size * limit - seen) / (size - i)
            product *= 1 + fraction / (mean - floor) * (value - mean)
            seen += value
        total += product
    return total


def log_capitals(values, limit, floor):
    """All trials at once: the log capital after each draw, (trials, draws)."""
    size = values.shape[1]
    before = np.cumsum(values, axis=1) - values
    gap = (size * limit - before) / (size - np.arange(size)) - floor
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(gap > 0, (values - floor) / gap, 1.0)
    logs = [np.log(s) + np.log1p(f * (ratio - 1)).cumsum(axis=1) for f, s in zip(FRACTIONS, SHARES, strict=True)]
    found = np.logaddexp.reduce(logs)
    return np.where(np.minimum.accumulate(gap, axis=1) < 0, math.inf, found)


def shuffled(values, trials, seed=0):
    return np.random.default_rng(seed).permuted(np.tile(values, (trials, 1)), axis=1)


def flips(size, lost, won):
    """Paired scores of which `lost` got worse and `won` better, in {-1, 0, 1}."""
    return np.concatenate([np.ones(lost), -np.ones(won), np.zeros(size - lost - won)])


@pytest.mark.parametrize("limit", [-0.2, 0.0, 0.05, 0.3])
def test_capital_is_that_of_the_definition(limit):
    values = np.random.default_rng(0).uniform(-1, 1, 30)
    bet = Bet(limit, -1.0, 60)
    for piece in np.split(values, [3, 4, 17]):  # in pieces or at once
        bet.add(piece)
    assert math.exp(bet.log_capital) == pytest.approx(capital(values, limit, -1.0, 60))


def test_at_the_limit_the_game_is_fair_and_below_it_the_gambler_loses():
    values = np.array([-1.0, -0.5, 0.25, 0.5, 0.5, 1.0])
    for drawn in range(1, 5):
        kept = {limit: [] for limit in (values.mean(), values.mean() + 0.1)}
        for order in itertools.permutations(values):  # every order: an exact expectation
            for limit, capitals in kept.items():
                bet = Bet(limit, -1.0, 6)
                bet.add(np.array(order[:drawn]))
                capitals.append(math.exp(bet.log_capital))
        fair, worse = map(np.mean, kept.values())
        assert fair == pytest.approx(1)
        assert worse < 1


@pytest.mark.parametrize(
    "values",
    [
        flips(400, 12, 8),
        flips(400, 60, 20),
        flips(400, 4, 0),  # only losses
        np.random.default_rng(1).normal(0, 0.1, 400).clip(-1, 1),
        np.concatenate([np.full(396, 0.02), np.full(4, -1.0)]),  # rare large gains hide in what looks like a loss
    ],
    ids=["flips", "many flips", "losses", "steady", "skewed"],
)
def test_who_stops_at_the_first_convincing_moment_errs_no_more_often_than_stated(values):
    drawn = shuffled(values, TRIALS)
    found = log_capitals(drawn, values.mean() + 1e-9, -1.0)
    for error_rate in (0.01, 0.05):
        wrong = int((found.max(axis=1) >= -math.log(error_rate)).sum())
        assert wrong <= binom.ppf(1 - 1e-6, TRIALS, error_rate)  # fails by chance once in a million
    for row, logs in zip(drawn[:5], found[:5], strict=True):  # what was simulated is what runs
        bet = Bet(values.mean() + 1e-9, -1.0, 400)
        bet.add(row[:300])
        assert bet.log_capital == pytest.approx(logs[299])


def test_a_loss_of_5_points_shows_in_a_tenth_of_5000_items():
    values = flips(5000, 385, 135)  # as MobileNetV2 on CIFAR-10 where it loses 0.05
    found = log_capitals(shuffled(values, 400), 0.0085, -1.0)
    first = (found >= math.log(100)).argmax(axis=1) + 1
    assert np.median(first) < 0.1 * 5000


def test_certain_where_even_the_best_rest_does_not_help():
    bet = Bet(0.1, -1.0, 10)
    bet.add(np.ones(5))
    assert not bet.certain  # (5 - 5) / 10 is below the limit
    bet.add(np.ones(1))
    assert bet.certain and bet.log_capital == math.inf
    bet.add(-np.ones(4))
    assert bet.certain  # 0.2


def test_where_the_rest_can_only_be_at_the_floor_the_next_value_decides():
    bet = Bet(0.5, 0.0, 4)
    bet.add(np.array([1.0, 1.0]))  # the mean is the limit if all others are 0
    capital = bet.log_capital
    bet.add(np.array([0.0]))
    assert not bet.certain and bet.log_capital == capital  # as was expected: nothing is won
    bet.add(np.array([1.0]))
    assert bet.certain


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_a_mean_of_exactly_the_limit_is_never_certain(order):
    values = flips(100, 5, 0)[order]
    bet = Bet(0.05 + 1e-9, 0.0, 100)
    for value in values:
        bet.add(np.array([value]))
        assert not bet.certain


def test_without_a_floor_nothing_convinces():
    bet = Bet(0.0, -math.inf, 10)
    bet.add(np.ones(10))
    assert not bet.certain and not bet.convinces(0.49)


@pytest.mark.parametrize(
    ("drawn", "floor", "error_rate"),
    [
        (20, -1.0, 0.05),
        (100, -1.0, 0.05),
        (250, -1.0, 0.05),
        (290, -3.0, 1e-9),  # hardly more than what the rest at the floor would leave
    ],
)
def test_the_bound_is_where_the_capital_convinces(drawn, floor, error_rate):
    values = -floor * np.random.default_rng(drawn).permutation(flips(300, 90, 10))[:drawn]
    bound = lower_bound(values, floor, 300, error_rate)
    assert bound < values.mean()
    for limit, convinces in ((bound - 1e-6, True), (bound + 1e-6, False)):
        bet = Bet(limit, floor, 300)
        bet.add(values)
        assert bet.convinces(error_rate) is convinces


def test_the_bound_of_all_items_is_their_mean():
    values = flips(50, 7, 3)
    assert lower_bound(values, -1.0, 50, 0.01) == pytest.approx(values.mean())


def test_the_bound_holds_as_often_as_stated():
    values = flips(200, 30, 10)
    bounds = [lower_bound(row[:80], -1.0, 200, 0.05) for row in shuffled(values, 300)]
    assert sum(bound > values.mean() for bound in bounds) <= binom.ppf(1 - 1e-6, 300, 0.05)
