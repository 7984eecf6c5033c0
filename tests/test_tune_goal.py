"""A whole search for more than one number: two criteria, three objectives, and a split that confirms the winner."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import cloudpickle
from torch import nn

import raysq
from raysq.errors import EvaluationError, OptionError, ResumeError

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import test modules

X = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
SEEN, UNSEEN = X[:256], X[256:]
TRIALS = 5


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def scores(rows: torch.Tensor) -> Any:
    """Return an eval_fn of two metrics: how often the argmax is fp32's, and how far the outputs are from fp32's."""
    with torch.no_grad():
        wanted = mlp()(rows)

    def eval_fn(candidate: nn.Module) -> dict[str, float]:
        outputs = candidate(rows)
        return {
            "accuracy": float((outputs.argmax(1) == wanted.argmax(1)).float().mean()),
            "distance": float((outputs - wanted).abs().mean()),
        }

    return eval_fn


GOAL = raysq.Goal(
    0.1,
    others={"distance": raysq.Goal(0.05, "absolute", higher_is_better=False)},
    objectives={"latency": 1.0, "size": 0.5, "memory": 0.1},
    confirm=scores(UNSEEN),
)
QUICK = {"num_threads": 1, "max_concurrent_trials": 1, "verbose": 0, "latency": raysq.Latency(0.02, 0.02)}


@pytest.fixture(scope="module")
def searched(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    directory = tmp_path_factory.mktemp("searched")
    result = raysq.tune(
        mlp(),
        [SEEN[:64]],
        scores(SEEN),
        goal=GOAL,
        strategy="nsga2",
        strategy_kwargs={"population_size": 2},
        max_trials=TRIALS,
        storage_path=directory,
        name="run",
        **QUICK,
    )
    return SimpleNamespace(result=result, directory=directory)


@pytest.mark.slow
def test_feasible_is_what_holds_both_criteria(searched: SimpleNamespace) -> None:
    baseline = searched.result.baseline
    assert baseline.metrics == {"accuracy": 1.0, "distance": pytest.approx(0.0, abs=1e-6)}
    for trial in searched.result.trials:
        lost = trial.metrics["distance"] - baseline.metrics["distance"]
        assert trial.feasible == (trial.metrics["accuracy"] >= 0.9 and lost <= 0.05)
        assert trial.loss == pytest.approx(max(1 - trial.metrics["accuracy"], lost - 0.05 + 0.1))


@pytest.mark.slow
def test_size_and_memory_are_ratios_to_the_fp32_form(searched: SimpleNamespace) -> None:
    for trial in searched.result.trials:
        assert trial.size_ratio == trial.size_bytes / searched.result.baseline.size_bytes
        assert trial.memory_ratio > 0


@pytest.mark.slow
def test_the_winner_is_confirmed_on_the_other_split(searched: SimpleNamespace) -> None:
    result = searched.result
    found = result.confirmation
    again = GOAL.confirm(result.model)
    assert (found.holds, found.accuracy, found.baseline_accuracy) == (True, again["accuracy"], 1.0)
    assert result.baseline.confirm_metrics == pytest.approx({"accuracy": 1.0, "distance": 0.0}, abs=1e-6)
    assert scores(SEEN)(result.model)["accuracy"] == result.accuracy


@pytest.mark.slow
def test_the_front_is_over_all_objectives(searched: SimpleNamespace) -> None:
    front = searched.result.pareto_front()
    assert 1 <= len(front) <= TRIALS
    assert searched.result.objectives == GOAL.front
    assert not front[["latency_ratio", "accuracy_drop", "size_ratio", "memory_ratio"]].isna().any(axis=None)


def elsewhere(model: nn.Module) -> dict[str, float]:
    return {"accuracy": 1.0, "distance": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("confirm", [None, elsewhere])
def test_a_run_is_not_resumed_with_another_confirmation(searched: SimpleNamespace, confirm: Any) -> None:
    goal = replace(GOAL, confirm=confirm)
    with pytest.raises(ResumeError, match="confirmation"):
        raysq.tune(mlp(), [SEEN[:64]], scores(SEEN), goal=goal, resume=searched.directory / "run", **QUICK)


@pytest.mark.parametrize(
    ("goal", "error", "message"),
    [
        (raysq.Goal(confirm=lambda model, loader: 1.0), EvaluationError, r"`Goal.confirm` must take exactly one"),
        (raysq.Goal(others={"recall": raysq.Goal()}), EvaluationError, "the goal has 'recall' among its `others`"),
    ],
)
def test_what_the_goal_cannot_score_is_refused_before_the_search(
    tmp_path: Path, goal: raysq.Goal, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        raysq.tune(mlp(), [SEEN[:64]], scores(SEEN), goal=goal, storage_path=tmp_path / "runs", **QUICK)
    assert not (tmp_path / "runs").exists()


def test_a_tuner_of_ones_own_cannot_confirm() -> None:
    prepared = raysq.prepare(mlp(), [SEEN[:64]], backend="reference", num_threads=1)
    with pytest.raises(OptionError, match="`Goal.confirm` is scored by `raysq.tune`"):
        raysq.trainable(prepared, scores(SEEN), goal=GOAL)
