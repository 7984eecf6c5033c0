"""An evaluation ends when the verdict is clear, never with one that all items would have turned round at equality."""

import math

import numpy as np
import pytest

from raysq.errors import EvaluationError, OptionError
from raysq.goal import Goal
from raysq.rejection import Rejection, Watch
from raysq.scores import Part, Units

RNG = np.random.default_rng(0)
FP32 = Units(RNG.permutation(np.repeat([1.0, 0.0], [850, 150])), bounds=(0.0, 1.0))


def worse(by, units=FP32):
    """Scores of which `by` right ones, anywhere, became wrong."""
    scores = units.sums.copy()
    scores[RNG.permutation(np.flatnonzero(scores == 1))[:by]] = 0
    return scores


def follow(scores, goal, rejection=None, reference=FP32, step=20):
    """Watch one evaluation to its end."""
    watch = Watch(rejection or Rejection(), reference, goal)
    counts = reference.counts
    for first in range(0, len(scores), step):
        piece = slice(first, first + step)
        watch.saw(Part({"accuracy": scores[piece]}, counts[piece]), "accuracy")
        if watch.verdict is not None:
            return watch.verdict
    watch.ended()
    return None


@pytest.mark.parametrize(
    ("goal", "scale"),
    [
        (Goal(0.01), 1 / 0.85),
        (Goal(0.01, "absolute"), 1.0),
    ],
)
def test_a_recipe_far_off_ends_early_with_its_loss_as_the_goal_counts_it(goal, scale):
    early = follow(worse(150), goal)
    assert early.fails and early.items == 1000 and early.seen < 300
    drop = goal.drop(early.accuracy, FP32.mean)
    assert goal.tolerance < early.bound < drop
    assert drop == pytest.approx(0.15 * scale, abs=5 * early.std)
    assert 0 < early.std < 0.1


def test_losses_need_only_their_lower_bound():
    losses = Units(RNG.uniform(0.5, 1.5, 1000), bounds=(0.0, math.inf))
    goal = Goal(0.05, higher_is_better=False)
    more = RNG.uniform(0, 0.8, 1000)
    early = follow(losses.sums + more, goal, reference=losses)
    assert early.fails and early.accuracy == pytest.approx(losses.mean + more[: early.seen].mean())
    assert follow(losses.sums * 0.9, goal, reference=losses) is None
    assert follow(losses.sums + 0.8, Goal(0.05), reference=losses) is None  # higher is better: nothing bounds the rest


def batched(scores):
    """The same in batches of ten that are known as a whole."""
    return scores.reshape(100, 10).sum(axis=1)


BATCHES = Units(batched(FP32.sums), np.full(100, 10), (0.0, 1.0))


@pytest.mark.parametrize("goal", [Goal(0.05, "absolute"), Goal(0.05 / 0.85)])
@pytest.mark.parametrize(("reference", "units"), [(FP32, np.asarray), (BATCHES, batched)], ids=["items", "batches"])
def test_a_drop_of_exactly_the_tolerance_is_hardly_ever_rejected(goal, reference, units):
    step = len(reference.sums) // 20
    rejected = sum(follow(units(worse(50)), goal, reference=reference, step=step) is not None for _ in range(200))
    assert rejected <= 10  # at 1 % more than 10 of 200 come once in 2e5


def test_in_the_users_order_only_what_no_rest_can_save_is_rejected():
    goal, rejection = Goal(0.05, "absolute"), Rejection(shuffled=False)
    for wrong, ends in ((200, None), (201, 201)):  # 0.8 is just enough; all that is wrong comes first
        early = follow(np.concatenate([np.zeros(wrong), np.ones(1000 - wrong)]), goal, rejection, step=1)
        assert (early and early.seen) == ends
    assert early.fails and early.bound == pytest.approx(0.051, abs=2e-6)


def test_in_the_users_order_only_what_no_rest_can_spoil_passes():
    reference = Units(np.ones(1000), bounds=(0.0, 1.0))
    rejection = Rejection(shuffled=False, stop_passing=True)
    early = follow(reference.sums, Goal(0.05, "absolute"), rejection, reference, step=1)
    # with 950 seen the rest could lose 50 and a rounding error
    assert (early.fails, early.seen, early.bound) == (False, 951, pytest.approx(0.049, abs=2e-6))


def test_what_passes_ends_early_where_that_is_asked_for():
    goal = Goal(0.1, "absolute")
    assert follow(worse(10), goal) is None
    early = follow(worse(10), goal, Rejection(stop_passing=True))
    assert not early.fails and early.seen < 500
    assert goal.drop(early.accuracy, FP32.mean) < early.bound < goal.tolerance
    better = FP32.sums.copy()
    better[np.flatnonzero(better == 0)[:100]] = 1
    early = follow(better, goal, Rejection(stop_passing=True))
    assert goal.drop(early.accuracy, FP32.mean) < early.bound < goal.tolerance
    by_accuracy = Goal(0.1, "absolute", objectives={"accuracy": 1})
    assert follow(worse(10), by_accuracy, Rejection(stop_passing=True)) is None  # accuracy decides: score it whole


def test_a_recipe_that_fails_is_hardly_ever_taken_for_one_that_passes():
    goal = Goal(0.05, "absolute")
    found = [follow(worse(51), goal, Rejection(stop_passing=True), step=50) for _ in range(200)]
    assert sum(early is not None and not early.fails for early in found) <= 10  # at 1 %: once in 2e5


def test_batches_that_count_as_one_end_later_but_end():
    early = follow(batched(worse(300)), Goal(0.01), reference=BATCHES, step=1)
    assert early.fails and early.seen % 10 == 0 and early.items == 1000
    assert 0.01 < early.bound < Goal().drop(early.accuracy, FP32.mean)
    assert follow(BATCHES.sums, Goal(0.01), reference=BATCHES, step=1) is None


def test_the_standard_error_is_that_of_a_mean_drawn_without_replacement():
    scores, goal = worse(150), Goal(0.01, "absolute")
    early = follow(scores, goal)
    lost = (FP32.sums - scores)[: early.seen]
    variance = lost.var(ddof=1) / early.seen * (1 - early.seen / 1000)  # Cochran, Sampling Techniques, eq. 2.20
    assert early.std == pytest.approx(math.sqrt(variance))


def test_of_a_single_batch_all_may_be_luck():
    reference = Units(np.full(10, 100.0), np.full(10, 100), (0.0, 1.0))
    early = follow(np.array([40.0] * 10), Goal(0.05, "absolute"), Rejection(shuffled=False), reference, step=1)
    assert (early.seen, early.std) == (100, pytest.approx(0.6))


def test_unknown_bounds_reject_nothing():
    reference = Units(FP32.sums)
    assert not Watch(Rejection(), reference, Goal()).rejects
    assert follow(np.zeros(1000), Goal(), reference=reference) is None


def test_other_items_than_with_fp32_are_refused():
    watch = Watch(Rejection(), FP32, Goal())
    with pytest.raises(EvaluationError, match="same sizes for every model"):
        watch.saw(Part({"accuracy": np.ones(1001)}, np.ones(1001, np.int64)), "accuracy")
    with pytest.raises(EvaluationError, match="same sizes"):
        watch.saw(Part({"accuracy": np.ones(1)}, np.array([2])), "accuracy")
    with pytest.raises(EvaluationError, match="same sizes"):
        watch.ended()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bounds": 1}, "bounds"),
        ({"bounds": (1, 0)}, "bounds"),
        ({"bounds": (0, math.nan)}, "bounds"),
        ({"bounds": "01x"}, "bounds"),
        ({"error_rate": 0}, r"\(0, 0.5\)"),
        ({"error_rate": 0.5}, r"\(0, 0.5\)"),
        ({"error_rate": 1}, "1 % is 0.01"),
        ({"error_rate": "1 %"}, "got '1 %'"),
        ({"error_rate": True}, "error_rate"),
        ({"shuffled": 1}, "shuffled"),
        ({"stop_passing": None}, "stop_passing"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(OptionError, match=message):
        Rejection(**arguments)


def test_bounds_are_a_pair_of_floats_whatever_they_are_given_as():
    assert Rejection([0, 1]) == Rejection((0.0, 1.0))
    assert hash(Rejection([0, 1])) == hash(Rejection((0.0, 1.0)))
