"""What eval_fn may be and may return; everything else is refused with the rule."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from raysq.errors import EvaluationError
from raysq.evaluation import Score, check, confirm, evaluate, first_call, loss
from raysq.goal import Goal


@pytest.mark.parametrize("value", [0.5, 1, np.float32(0.5), np.int64(1), np.array(0.5), torch.tensor(0.5)])
def test_scalars(value):
    score = evaluate(lambda m: value, None, Goal())
    assert score.metrics == {"accuracy": float(value)}
    assert type(score.value) is float


@pytest.mark.parametrize(
    ("returned", "metric", "expected"),
    [
        ({"f1": 0.5}, None, 0.5),  # the only one
        ({"f1": 0.5, "accuracy": 0.7}, None, 0.7),
        ({"f1": 0.5, "accuracy": 0.7}, "f1", 0.5),
        ({"f1": torch.tensor(0.5)}, "f1", 0.5),
        ({"accuracy": 0.5, "recall": math.nan}, None, 0.5),  # only the one that counts must be finite
    ],
)
def test_dicts(returned, metric, expected):
    assert evaluate(lambda m: returned, None, Goal(metric=metric)).value == expected


def test_stream_is_the_mean_over_items():
    def eval_fn(model):
        yield 3, 4
        yield torch.tensor(1.0), 1
        yield 0, 0

    score = evaluate(eval_fn, None, Goal())
    assert (score.value, score.n) == (0.8, 5)


@pytest.mark.parametrize(
    "returned",
    [None, True, np.bool_(True), math.nan, math.inf, "0.5", [0.5], (0.5, 1), np.array([0.5]), torch.ones(2), 1j, {}],
    ids=repr,
)
def test_anything_else_says_what_is_allowed(returned):
    with pytest.raises(EvaluationError, match="eval_fn"):
        evaluate(lambda m: returned, None, Goal())


@pytest.mark.parametrize("yielded", [0.5, (1, 2, 3), ("a", 1), (1, -1), (1, 0.5), (None, 1), (math.nan, 1)], ids=repr)
def test_stream_of_anything_else_says_what_is_allowed(yielded):
    with pytest.raises(EvaluationError, match=r"\(sum, n\)"):
        evaluate(lambda m: (y for y in [yielded]), None, Goal())


def test_empty_stream():
    with pytest.raises(EvaluationError, match="no item"):
        evaluate(lambda m: (y for y in []), None, Goal())


@pytest.mark.parametrize("metric", [None, "bleu"])
def test_unclear_metric_names_the_goal(metric):
    with pytest.raises(EvaluationError, match=r"Goal\(metric="):
        evaluate(lambda m: {"f1": 0.5, "recall": 0.5}, None, Goal(metric=metric))


def test_exception_keeps_its_cause():
    with pytest.raises(EvaluationError, match="ZeroDivisionError") as caught:
        evaluate(lambda m: 1 / 0, None, Goal())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_exception_within_a_stream_keeps_its_cause():
    with pytest.raises(EvaluationError) as caught:
        evaluate(lambda m: (1 / y for y in [0]), None, Goal())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_runs_without_gradients():
    def eval_fn(model):
        yield float(torch.is_grad_enabled()), 1

    assert evaluate(eval_fn, None, Goal()).value == 0


class Metric:
    def __call__(self, model):
        return 1.0

    def two(self, model, loader):
        return 1.0


async def asynchronous(model):
    return 1.0


async def asynchronous_batches(model):
    yield 1.0, 1


@pytest.mark.parametrize(
    "eval_fn",
    [
        lambda model: 1,
        lambda *models: 1,
        lambda model, loader=None: 1,
        partial(lambda loader, model: 1, []),
        Metric(),
        len,
        dict,  # its signature can't be read
    ],
)
def test_check_accepts_one_argument(eval_fn):
    check(eval_fn)


@pytest.mark.parametrize(
    "eval_fn",
    [
        None,
        0.5,
        lambda: 1,
        lambda model, loader: 1,
        lambda model, *, loader: 1,
        Metric().two,
        asynchronous,
        asynchronous_batches,
    ],
)
def test_check_refuses_all_else(eval_fn):
    with pytest.raises(EvaluationError, match="eval_fn"):
        check(eval_fn)


BOTH = Goal(0.01, others={"recall": Goal(0.02, "absolute"), "perplexity": Goal(0.1, higher_is_better=False)})
BASE = {"accuracy": 0.8, "recall": 0.5, "perplexity": 10.0}


@pytest.mark.parametrize(
    ("change", "drop", "worst_drop", "reason"),
    [
        ({}, 0.0, 0.0, ""),
        ({"accuracy": 0.76}, 0.05, 0.05, "loses 0.05, allowed is at most 1.000% relative loss"),
        ({"recall": 0.48}, 0.0, 0.01, ""),  # exactly its tolerance is exactly the primary one's
        ({"recall": 0.45}, 0.0, 0.04, "loses 0.05 of recall, allowed is at most 0.02 absolute loss"),
        ({"perplexity": 11.0}, 0.0, 0.01, ""),
        ({"perplexity": 13.0}, 0.0, 0.21, "loses 0.3 of perplexity"),
        ({"accuracy": 0.76, "recall": 0.45}, 0.05, 0.05, "relative loss; loses 0.05 of recall"),
        ({"accuracy": 0.88, "recall": 0.6, "perplexity": 5.0}, -0.1, -0.1, ""),  # the least gain decides
    ],
)
def test_the_metric_that_passes_its_tolerance_by_most_decides(change, drop, worst_drop, reason):
    found = loss(Score({**BASE, **change}, "accuracy"), 0.8, BASE, BOTH)
    assert (found.drop, found.worst_drop) == (pytest.approx(drop), pytest.approx(worst_drop))
    assert BOTH.holds(found.worst_drop) is (found.reason == "")
    assert reason in found.reason


def test_with_a_single_metric_its_own_drop_decides():
    found = loss(Score({"accuracy": 0.7}, "accuracy"), 0.9, {"accuracy": 0.9}, Goal(0.1))
    assert found.worst_drop == found.drop == Goal().drop(0.7, 0.9)  # to the last bit


@pytest.mark.parametrize(
    ("returned", "others", "primary"),
    [
        ({"f1": 0.5, "recall": 0.7}, {"recall": Goal()}, "f1"),  # the only one that is not among the others
        ({"accuracy": 0.5, "f1": 0.5, "recall": 0.7}, {"recall": Goal()}, "accuracy"),
    ],
)
def test_the_primary_metric_is_not_among_the_others(returned, others, primary):
    assert evaluate(lambda m: returned, None, Goal(others=others)).primary == primary


@pytest.mark.parametrize(
    ("return_", "message"),
    [
        (
            lambda: {"accuracy": 0.5},
            "the goal has 'recall' among its `others`, so `eval_fn` must return it; it returned 'accuracy' only",
        ),
        (lambda: {"accuracy": 0.5, "recall": math.nan}, "finite; 'recall' is nan"),
        (lambda: {"f1": 0.5, "bleu": 0.5, "recall": 0.7}, r"Goal\(metric='f1'\)"),
        (lambda: {"recall": 0.7}, "'accuracy' is not among them"),
        (lambda: 0.5, "other metrics, 'recall', so .* must return a dict .* it returned 0.5"),
        (lambda: (y for y in [(1, 2)]), "it yielded batches"),
    ],
    ids=["another is missing", "nan", "two primaries", "no primary", "a number", "batches"],
)
def test_a_goal_of_several_metrics_needs_all_of_them(return_, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate(lambda m: return_(), None, Goal(others={"recall": Goal()}))


def test_the_other_metric_whose_baseline_is_zero_is_named():
    zero = {"accuracy": 0.8, "recall": 0.0}
    with pytest.raises(EvaluationError, match="the fp32 recall is 0"):
        loss(Score(zero, "accuracy"), 0.8, zero, Goal(others={"recall": Goal()}))


def test_confirm_is_scored_as_eval_fn_is():
    assert confirm(0.25, Goal(metric="f1", confirm=lambda m: {"f1": m, "recall": 1})).value == 0.25
    with pytest.raises(EvaluationError, match=r"`Goal\.confirm` .*ZeroDivisionError"):
        confirm(None, Goal(confirm=lambda m: 1 / 0))


def test_the_first_call_is_where_it_is_left():
    def eval_fn(model):
        model(1, x=2)
        raise AssertionError("left before")

    assert first_call(eval_fn, torch.nn.Identity(), Goal()) == ((1,), {"x": 2})


def test_the_first_call_is_known_of_one_that_swallows_everything():
    def eval_fn(model):
        try:
            model(1)
        except BaseException:
            return "no score"

    assert first_call(eval_fn, torch.nn.Identity(), Goal()) == ((1,), {})


def test_an_evaluation_that_does_not_call_the_model_has_no_first_call():
    assert first_call(lambda m: 0.5, torch.nn.Identity(), Goal()) is None
    with pytest.raises(EvaluationError):
        first_call(lambda m: "no score", torch.nn.Identity(), Goal())
