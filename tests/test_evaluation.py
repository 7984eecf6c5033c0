"""What eval_fn may be and may return; everything else is refused with the rule."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from raysq.errors import EvaluationError
from raysq.evaluation import check, evaluate
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
    [None, 0.5, lambda: 1, lambda model, loader: 1, lambda model, *, loader: 1, Metric().two, asynchronous],
)
def test_check_refuses_all_else(eval_fn):
    with pytest.raises(EvaluationError, match="eval_fn"):
        check(eval_fn)
