"""What counts as feasible, and every option out of its range."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysq.errors import EvaluationError, OptionError
from raysq.options import Criterion, Goal, Latency, Workers

scores = st.floats(-1e6, 1e6)


class TestDrop:
    @pytest.mark.parametrize(
        ("criterion", "higher_is_better", "baseline", "accuracy", "drop"),
        [
            ("relative", True, 0.8, 0.76, 0.05),
            ("absolute", True, 0.8, 0.76, 0.04),
            ("relative", True, 0.8, 0.84, -0.05),  # a gain is a negative drop
            ("absolute", True, 0.8, 0.84, -0.04),
            ("relative", False, 2.0, 2.1, 0.05),  # perplexity: more is worse
            ("absolute", False, 2.0, 2.1, 0.1),
            ("relative", False, 2.0, 1.9, -0.05),
            ("relative", True, -2.0, -2.1, 0.05),  # a log likelihood: shares of |b|
            ("relative", True, -2.0, -1.9, -0.05),
            ("relative", False, -2.0, -1.9, 0.05),
            ("absolute", True, -2.0, -2.1, 0.1),
            ("absolute", True, 0.0, -0.1, 0.1),
            ("absolute", False, 0.0, 0.1, 0.1),
            ("relative", True, 0.8, 0.8, 0.0),
        ],
    )
    def test_formula(self, criterion, higher_is_better, baseline, accuracy, drop):
        goal = Goal(criterion=criterion, higher_is_better=higher_is_better)
        assert goal.drop(accuracy, baseline) == pytest.approx(drop)

    @pytest.mark.parametrize("baseline", [0, 0.0, -0.0])
    def test_a_relative_loss_of_a_baseline_of_zero_proposes_absolute(self, baseline):
        with pytest.raises(EvaluationError, match='Use `criterion="absolute"`'):
            Goal().drop(0.1, baseline)

    @given(scores, scores.filter(bool), st.sampled_from(Criterion))
    def test_lower_is_better_is_higher_is_better_negated(self, accuracy, baseline, criterion):
        up, down = (Goal(criterion=criterion, higher_is_better=higher) for higher in (True, False))
        assert down.drop(accuracy, baseline) == up.drop(-accuracy, -baseline)

    @given(scores, scores, scores.filter(bool), st.sampled_from(Criterion), st.booleans())
    def test_a_better_score_never_drops_more(self, a, b, baseline, criterion, higher):
        goal = Goal(criterion=criterion, higher_is_better=higher)
        better, worse = (max(a, b), min(a, b)) if higher else (min(a, b), max(a, b))
        assert goal.drop(better, baseline) <= goal.drop(worse, baseline)


class TestHolds:
    @pytest.mark.parametrize(
        ("criterion", "tolerance", "baseline", "accuracy"),
        [
            ("relative", 0.01, 1.0, 0.99),
            ("relative", 0.01, 0.7, 0.693),
            ("relative", 0.1, 0.3, 0.27),
            ("absolute", 0.1, 0.9, 0.8),  # 0.9 - 0.8 > 0.1 in floats
            ("absolute", 0.01, 76.13, 76.12),
            ("relative", 0.0, 0.5, 0.5),
            ("relative", 0.01, 8462 / 10_000, 8462 * 0.99 / 10_000),
        ],
    )
    def test_a_drop_of_exactly_the_tolerance_passes(self, criterion, tolerance, baseline, accuracy):
        goal = Goal(tolerance, criterion)
        assert goal.holds(goal.drop(accuracy, baseline))

    @pytest.mark.parametrize("lost", [1, 2, 50])
    def test_one_item_in_a_million_beyond_the_tolerance_fails(self, lost):
        goal = Goal(0.01, "absolute")
        assert not goal.holds(goal.drop((990_000 - lost) / 1e6, 1.0))

    @pytest.mark.parametrize(
        ("drop", "holds"), [(-5.0, True), (-math.inf, True), (0.02, False), (math.inf, False), (math.nan, False)]
    )
    def test_extremes(self, drop, holds):
        assert Goal(0.01).holds(drop) is holds

    def test_no_tolerance_admits_no_loss(self):
        assert not Goal(0).holds(1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.01}, r"`tolerance` must lie in \[0, 1\), got -0.01"),
        ({"tolerance": 1}, r"in \[0, 1\), got 1. A relative tolerance is a share: 1 % is 0.01"),
        ({"tolerance": 5, "criterion": "relative"}, "1 % is 0.01"),
        ({"tolerance": math.nan}, "got nan"),
        ({"tolerance": math.inf, "criterion": "absolute"}, r"in \[0, inf\), got inf"),
        ({"tolerance": -1, "criterion": "absolute"}, r"in \[0, inf\), got -1"),
        ({"tolerance": "1%"}, "`tolerance` must be a number, got '1%'"),
        ({"tolerance": True}, "`tolerance` must be a number, got True"),
        ({"tolerance": None}, "`tolerance` must be a number, got None"),
        (
            {"criterion": "relativ"},
            "unknown criterion 'relativ'; .* Did you mean 'relative'",
        ),
        ({"criterion": None}, "unknown criterion None"),
        ({"higher_is_better": 1}, "`higher_is_better` must be True or False, got 1"),
        ({"higher_is_better": "yes"}, "`higher_is_better` must be True or False, got 'yes'"),
    ],
)
def test_goal_out_of_range(options, message):
    with pytest.raises(OptionError, match=message):
        Goal(**options)


@pytest.mark.parametrize("name", ["budget_s", "final_budget_s", "ci_width"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_latency_out_of_range(name, value):
    with pytest.raises(OptionError, match=f"`Latency.{name}` must be positive, got {value}"):
        Latency(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus_per_trial": 0}, "`Workers.cpus_per_trial` must be at least 1, got 0"),
        ({"cpus_per_trial": -2}, "`Workers.cpus_per_trial` must be at least 1, got -2"),
        ({"max_failures": -1}, "`Workers.max_failures` must be at least 0, got -1"),
    ],
)
def test_workers_out_of_range(options, message):
    with pytest.raises(OptionError, match=message):
        Workers(**options)


@pytest.mark.parametrize(
    "option",
    [Goal(0.02, "absolute", False, "f1"), Goal(0.999), Goal(30, "absolute"), Latency(0.1, 0.2, 0.3), Workers(2, 0)],
)
def test_options_within_their_ranges_are_values_that_pickle(option):
    assert pickle.loads(pickle.dumps(option)) == option
    assert hash(pickle.loads(pickle.dumps(option))) == hash(option)


def test_the_criterion_may_be_spelled_as_a_string():
    assert Goal(criterion="absolute").criterion is Criterion.ABSOLUTE


@pytest.mark.parametrize(
    ("goal", "text"),
    [(Goal(0.01), "at most 1.000% relative loss"), (Goal(0.5, "absolute"), "at most 0.5 absolute loss")],
)
def test_a_goal_reads_as_a_sentence(goal, text):
    assert str(goal) == text
