"""What a result tells of its trials, the Pareto front, and of its winner."""

import itertools
import random

import pytest

from raysq.goal import Objective
from raysq.recipe import Recipe
from raysq.result import COLUMNS, Baseline, Ratio, Result, Stage, Status, TrialRecord

FRONTS = [
    (Objective.LATENCY, Objective.ACCURACY),
    (Objective.LATENCY, Objective.ACCURACY, Objective.SIZE),
    tuple(Objective),
]


def trial(number, latency, drop, size=None, memory=None, timed=True):
    return TrialRecord(
        trial=number,
        recipe=Recipe({}),
        config={},
        status=Status.FINISHED,
        stage=Stage.TIMED,
        accuracy_drop=drop,
        latency_ratio=latency,
        ratio=Ratio(latency, latency, latency) if timed else None,
        size_ratio=size,
        memory_ratio=memory,
    )


def result(trials=(), objectives=FRONTS[0], ratio=None, bf16=None):
    nothing = dict.fromkeys(("model", "built", "recipe", "accuracy", "accuracy_drop", "latency_ms"))
    return Result(
        **nothing,
        latency_ratio=ratio,
        baseline=Baseline(1.0, {}, 1.0, "jit", {}, bf16_ratio=bf16),
        feasible=True,
        trials=tuple(trials),
        executed={},
        left_in_float={},
        objectives=objectives,
    )


def front(trials, objectives):
    return result(trials, objectives).pareto_front()


@pytest.mark.parametrize("objectives", FRONTS, ids=len)
@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_brute_force_finds(objectives, seed):
    rng = random.Random(seed)
    trials = [trial(i, *(rng.randrange(1, 7) / 4 for _ in Objective)) for i in range(60)]  # with ties and equals
    points = {t.trial: tuple(getattr(t, COLUMNS[o]) for o in objectives) for t in trials}
    beaten = {
        number
        for (number, point), other in itertools.product(points.items(), points.values())
        if other != point and all(a <= b for a, b in zip(other, point, strict=True))
    }
    expected = {points[number] for number in points.keys() - beaten}
    found = front(trials, objectives)
    assert sorted(points[number] for number in found["trial"]) == sorted(expected)  # each point once
    assert all(t == min(n for n in points if points[n] == points[t]) for t in found["trial"])  # by its first trial
    assert list(found["latency_ratio"]) == sorted(found["latency_ratio"])


def test_what_was_not_timed_or_lacks_an_objective_is_not_on_it():
    trials = [trial(0, 0.5, 0.1, size=0.5), trial(1, 0.1, 0.0, size=0.1, timed=False), trial(2, 0.2, 0.0)]
    assert list(front(trials, FRONTS[1])["trial"]) == [0]
    assert list(front(trials, FRONTS[0])["trial"]) == [2]


@pytest.mark.parametrize(
    ("ratio", "bf16", "is_worthwhile"),
    [
        (Ratio(0.5, 0.4, 0.6), None, True),
        (Ratio(0.9, 0.8, 1.1), None, False),  # may be luck
        (Ratio(1.2, 1.1, 1.3), None, False),
        (Ratio(0.5, 0.4, 0.6), Ratio(0.7, 0.6, 0.8), True),
        (Ratio(0.5, 0.4, 0.6), Ratio(0.55, 0.5, 0.6), False),
    ],
)
def test_worthwhile_is_what_is_faster_beyond_luck(ratio, bf16, is_worthwhile):
    assert result(ratio=ratio, bf16=bf16).worthwhile is is_worthwhile
