"""The script that kills what belongs to a search: some of its rounds, and what it makes of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

ROUNDS = 3  # one of each kind


@pytest.fixture
def script(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("chaos")


def test_a_seed_makes_the_same_plans_with_every_kind_in_turn(script: ModuleType) -> None:
    plans = script.plans(20, seed=1)
    assert plans == script.plans(20, seed=1) != script.plans(20, seed=2)
    assert [plan.victim for plan in plans[:3]] == ["worker", "driver", "node"]
    assert all(0 <= plan.after < script.TRIALS - 1 for plan in plans)  # a trial is left to be running


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"evaluations": 7}, True),  # the one that was running
        ({"evaluations": 8}, False),
        ({"lost": 1}, False),
        ({"failed": 1}, False),
        ({"left": 1}, False),
        ({"alike": False}, False),
    ],
)
def test_a_round_holds(script: ModuleType, changes: dict[str, int], holds: bool) -> None:
    outcome = {"ended": 2, "lost": 0, "evaluations": 6, "failed": 0, "left": 0, "alike": True, **changes}
    assert script.Outcome(script.Plan("worker", 2, 0.1), **outcome).holds is holds


def test_a_row_per_round(script: ModuleType) -> None:
    outcome = script.Outcome(script.Plan("driver", 1, 0.2), 2, 0, 7, 0, 0, True)
    table = script.table({1: outcome, 2: outcome}, seed=0).splitlines()
    assert table[2] == "| 1 | driver | 2 | 0 | 7 of 6 trials | 0 | 0 | as undisturbed |"
    assert table[2].count("|") - 1 == len(script.HEADINGS)
    assert "2 of 2 rounds held" in table[-1]


@pytest.mark.slow
def test_nothing_is_lost_whatever_is_killed(script: ModuleType, tmp_path: Path) -> None:
    expected = script.insistent(script.undisturbed, tmp_path / "0")
    for number, plan in enumerate(script.plans(ROUNDS, seed=0), 1):
        outcome = script.insistent(partial(script.play, plan, expected), tmp_path / str(number))
        assert outcome.holds, outcome
