"""What counts as feasible, what makes one recipe better than another, and every part of a goal out of its range."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysq.errors import EvaluationError, OptionError
from raysq.goal import Criterion, Goal, Objective
from raysq.recipe import Recipe
from raysq.result import Ratio, Stage, Status, TrialRecord

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


RECALL = {"recall": Goal(0.02, "absolute")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"others": ["recall"]}, "`others` must be a dict such as"),
        ({"others": {"recall": 0.02}}, "`others` must be a dict such as"),
        ({"others": RECALL, "metric": "recall"}, "'recall' is the goal's own metric"),
        ({"others": {"recall": Goal(others=RECALL)}}, "of the goal of 'recall' only"),
        ({"others": {"recall": Goal(objectives={"size": 1})}}, "of the goal of 'recall' only"),
        ({"others": {"recall": Goal(confirm=len)}}, "of the goal of 'recall' only"),
        ({"others": {"recall": Goal(metric="f1")}}, "of the goal of 'recall' only"),
        ({"objectives": {}}, "`objectives` must be a dict of weights"),
        ({"objectives": ("latency", "size")}, "`objectives` must be a dict of weights"),
        ({"objectives": {"sizes": 1}}, "unknown objective 'sizes'; .* Did you mean 'size'"),
        ({"objectives": {"size": 0}}, "the weight of objective 'size' must be positive, got 0"),
        ({"objectives": {"size": -1}}, "must be positive, got -1"),
        ({"objectives": {"size": math.inf}}, "must be positive, got inf"),
        ({"objectives": {"size": True}}, "must be positive, got True"),
        ({"objectives": {"size": "1"}}, "must be positive, got '1'"),
        ({"confirm": 0.9}, "`confirm` must be a function of one argument"),
    ],
)
def test_what_goes_beyond_one_metric_out_of_range(options, message):
    with pytest.raises(OptionError, match=message):
        Goal(**options)


@pytest.mark.parametrize(
    "goal",
    [
        Goal(0.02, "absolute", False, "f1"),
        Goal(0.999),
        Goal(30, "absolute"),
        Goal(others=RECALL, objectives={"size": 2, "memory": 0.5}, confirm=len),
    ],
)
def test_goals_are_values_that_pickle(goal):
    again = pickle.loads(pickle.dumps(goal))
    assert again == goal
    assert hash(again) == hash(goal)


def test_a_goal_keeps_what_it_was_given_when_the_dict_changes():
    weights = {"latency": 1.0}
    goal = Goal(objectives=weights)
    weights["size"] = 1.0
    assert goal == Goal()


class TestCost:
    """The weighted sum of the objectives; the smaller, the better."""

    RECORD = TrialRecord(
        trial=0,
        recipe=Recipe({}),
        config={},
        status=Status.FINISHED,
        stage=Stage.TIMED,
        accuracy_drop=-0.25,
        latency_ratio=0.5,
        ratio=Ratio(0.5, 0.375, 0.75),
        size_ratio=0.125,
        memory_ratio=2.0,
    )
    UNKNOWN = TrialRecord(1, Recipe({}), {}, Status.FINISHED, Stage.EVALUATED, latency_ratio=0.5)

    @pytest.mark.parametrize(
        ("objectives", "cost"),
        [
            ({"latency": 1.0}, 0.75),  # the upper end of the interval
            ({"latency": 2}, 1.5),
            ({"size": 1.0}, 0.125),
            ({"memory": 1.0}, 2.0),
            ({"accuracy": 1.0}, -0.25),  # what is gained counts for it
            ({"latency": 1, "size": 4, "memory": 0.5, "accuracy": 1}, 0.75 + 0.5 + 1.0 - 0.25),
        ],
    )
    def test_weighted_sum(self, objectives, cost):
        assert Goal(objectives=objectives).cost(self.RECORD) == cost

    def test_by_default_it_is_the_latency_bound(self):
        assert Goal().cost(self.RECORD) == self.RECORD.latency_bound
        assert Goal().cost(self.UNKNOWN) == 0.5  # a prediction where nothing was timed

    @pytest.mark.parametrize("name", ["accuracy", "size", "memory"])
    def test_what_is_unknown_costs_infinitely(self, name):
        assert Goal(objectives={"latency": 1, name: 0.1}).cost(self.UNKNOWN) == math.inf

    def test_a_record_as_if_its_ratio_were_known(self):
        assert Goal().cost(self.RECORD.at(0.375)) == 0.375


@pytest.mark.parametrize(
    ("objectives", "front"),
    [
        ({"latency": 1}, (Objective.LATENCY, Objective.ACCURACY)),
        ({"size": 1}, (Objective.LATENCY, Objective.ACCURACY, Objective.SIZE)),
        ({"memory": 1, "size": 1}, tuple(Objective)),
    ],
)
def test_a_front_is_over_latency_accuracy_and_what_else_is_named(objectives, front):
    assert Goal(objectives=objectives).front == front


def test_the_criterion_may_be_spelled_as_a_string():
    assert Goal(criterion="absolute").criterion is Criterion.ABSOLUTE


@pytest.mark.parametrize(
    ("goal", "text"),
    [
        (Goal(0.01), "at most 1.000% relative loss"),
        (Goal(0.5, "absolute"), "at most 0.5 absolute loss"),
        (Goal(0.01, others=RECALL), "at most 1.000% relative loss, at most 0.02 absolute loss of recall"),
    ],
)
def test_a_goal_reads_as_a_sentence(goal, text):
    assert str(goal) == text
