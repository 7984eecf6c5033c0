"""The stopper ends what misses the goal before it is timed, and never takes that back."""

import math

import pytest

from raysq.errors import EvaluationError, OptionError
from raysq.tuning.stopper import AccuracyConstraintStopper, StopAll


def report(accuracy, stage="evaluated", **more):
    return {"accuracy": accuracy, "baseline_accuracy": 0.8, "stage": stage, **more}


@pytest.mark.parametrize(
    ("options", "accuracy", "stops"),
    [
        ({}, 0.80, False),
        ({}, 0.792, False),  # a relative drop of exactly 0.01
        ({}, 0.791, True),
        ({"criterion": "absolute"}, 0.791, False),
        ({"criterion": "absolute"}, 0.789, True),
        ({"higher_is_better": False}, 0.7, False),
        ({"higher_is_better": False}, 0.82, True),
        ({"tolerance": 0}, 0.8, False),
        ({}, math.nan, True),
    ],
)
def test_goal(options, accuracy, stops):
    assert AccuracyConstraintStopper(**options)("t", report(accuracy)) is stops


def test_what_says_it_is_infeasible_stops():
    assert AccuracyConstraintStopper()("t", report(0.8, feasible=False))  # no call runs in int8


def test_failed_trial_stops():
    assert AccuracyConstraintStopper()("t", {"status": "failed"})


def test_works_on_any_trainable_that_reports_both_accuracies():
    stopper = AccuracyConstraintStopper(stop_at_first=True)
    assert not stopper("t", {"accuracy": 0.8, "baseline_accuracy": 0.8})
    assert stopper.stop_all()


def test_never_unstops():
    stopper = AccuracyConstraintStopper()
    assert stopper("t", report(0.1))
    assert stopper("t", report(0.8))


@pytest.mark.parametrize(
    ("stop_at_first", "stage", "accuracy", "ends"),
    [
        (True, "timed", 0.8, True),
        (True, "evaluated", 0.8, False),
        (True, "timed", 0.1, False),
        (False, "timed", 0.8, False),
    ],
)
def test_stop_at_first(stop_at_first, stage, accuracy, ends):
    stopper = AccuracyConstraintStopper(stop_at_first=stop_at_first)
    stopper("t", report(accuracy, stage))
    assert stopper.stop_all() is ends
    stopper("u", report(0.1))
    assert stopper.stop_all() is ends


def test_a_run_goes_on_after_a_trial_that_holds_unless_told_otherwise():
    stopper = AccuracyConstraintStopper()
    assert not stopper("t", report(0.8, "timed"))
    assert not stopper.stop_all()


def test_stop_all_ends_the_run_and_no_single_trial():
    answers = iter([False, True])
    stopper = StopAll(lambda: next(answers))
    assert not stopper("t", report(0.1))
    assert [stopper.stop_all(), stopper.stop_all()] == [False, True]


@pytest.mark.parametrize("options", [{"tolerance": -1}, {"tolerance": 1}, {"criterion": "relativ"}])
def test_arguments(options):
    with pytest.raises(OptionError):
        AccuracyConstraintStopper(**options)


def test_missing_report_is_named():
    with pytest.raises(EvaluationError, match="baseline_accuracy"):
        AccuracyConstraintStopper()("t", {"accuracy": 0.5})
