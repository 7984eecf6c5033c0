"""A generator keeps its order; how early it may end is what its user says of that order."""

import functools
import math

import pytest
import torch

from raysq import Stream
from raysq.errors import EvaluationError, OptionError
from raysq.evaluation import check, digest, evaluate
from raysq.goal import Goal

N, STEP = 600, 20
ORDER = torch.randperm(N, generator=torch.Generator().manual_seed(0))
FP32 = torch.ones(N, dtype=torch.bool)
BAD = ORDER % 3 > 0


def arrays(scores):
    yield from scores.split(STEP)


def pairs(scores):
    for piece in scores.split(STEP):
        yield piece.sum(), len(piece)
        yield 0, 0


def run(stream, scores, goal=None):
    reference = evaluate(stream, FP32, goal or Goal())
    return evaluate(stream, scores, goal or Goal(), reference.units)


@pytest.mark.parametrize(
    ("stream", "seen"),
    [
        (Stream(arrays, shuffled=True), 60),
        (Stream(pairs, bounds=(0, 1), shuffled=True), 100),
        (Stream(arrays), 60),  # fp32 has all right: the seventh that is wrong decides in any order
        (Stream(pairs, bounds=(0, 1)), 60),
    ],
    ids=["items", "batches", "items in order", "batches in order"],
)
def test_a_bad_model_is_not_scored_to_the_end(stream, seen):
    score = run(stream, BAD)
    assert score.early.fails and score.n <= seen
    assert score.value < 0.9
    assert run(stream, FP32).early is None


def test_in_order_it_goes_on_as_long_as_the_rest_may_save_it():
    scores = torch.cat([torch.zeros(100, dtype=torch.bool), torch.ones(N - 100, dtype=torch.bool)])
    assert run(Stream(arrays), scores, Goal(1 / 6)).early is None
    assert run(Stream(arrays), scores, Goal(0.15)).early.fails
    assert run(Stream(arrays, shuffled=True), scores, Goal(1 / 6)).early.fails  # what is stated is believed


def test_without_bounds_sums_may_be_anything():
    assert run(Stream(pairs, shuffled=True), BAD).early is None


def test_a_bare_generator_is_scored_whole():
    reference = evaluate(arrays, FP32, Goal())
    assert evaluate(arrays, BAD, Goal(), reference.units).early is None
    assert evaluate(arrays, BAD, Goal()).value == evaluate(pairs, BAD, Goal()).value == pytest.approx(2 / 3, abs=0.01)


def test_the_generator_is_closed():
    closed = []

    def batches(scores):
        try:
            yield from arrays(scores)
        finally:
            closed.append(len(scores))

    run(Stream(batches), BAD)
    assert closed == [N, N]


def test_batches_of_other_sizes_are_refused():
    def changing(scores):
        yield from scores.split(STEP if scores is FP32 else 30)

    def sums(scores):
        return ((piece.sum(), len(piece)) for piece in changing(scores))

    assert run(Stream(changing, shuffled=True), BAD).early.fails  # items are items
    with pytest.raises(EvaluationError, match="same sizes for every model"):
        run(Stream(functools.partial(lambda f, s: (yield from f(s)), sums), bounds=(0, 1), shuffled=True), BAD)


def test_fewer_items_than_with_fp32_are_refused():
    with pytest.raises(EvaluationError, match="same sizes"):
        run(Stream(arrays), FP32[:-STEP])


@pytest.mark.parametrize("yielded", [(3, 2), (-1, 2), (math.nan, 1), torch.tensor([0.5, 1.5]), torch.ones(2, 2)])
def test_scores_outside_of_the_bounds_are_refused(yielded):
    with pytest.raises(EvaluationError, match="bounds|finite|one score for each item"):
        evaluate(Stream(lambda model: (yield yielded), bounds=(0, 1)), None, Goal())


def test_it_is_an_eval_fn_of_its_own():
    stream = Stream(arrays)
    check(stream)
    assert stream(FP32) == 1
    assert digest(stream) == digest(Stream(arrays)) != digest(Stream(arrays, shuffled=True)) != digest(Stream(pairs))


@pytest.mark.parametrize("batches", [None, lambda model: 0.5, [1], functools.partial(len)])
def test_what_is_no_generator_is_refused(batches):
    with pytest.raises(EvaluationError, match="generator function"):
        Stream(batches)


def test_bad_options():
    with pytest.raises(OptionError, match="bounds"):
        Stream(arrays, bounds=(1, 0))
    with pytest.raises(OptionError, match="shuffled"):
        Stream(arrays, shuffled="yes")
