"""Experiments are tracked in a file, once each; SigOpt's arguments are taken, its token is not kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import optuna
import pytest
from driving import drive
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray import cloudpickle
from simulation import Simulation

from raysq import api, strategies
from raysq.errors import OptionError, StorageError
from raysq.goal import Goal
from raysq.strategies.base import Strategy

SIM = Simulation(sensitive=2, failing=frozenset({"kl"}))
TOKEN = "a-secret-token"


def bound(file: Path | None, name: str = "x", goal: Goal = SIM.goal) -> Strategy:
    return strategies.get("constrained", experiment_name=name, storage=file, startup_trials=50).bind(SIM.space(), goal)


def study(file: Path, name: str = "x") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(file))))


def test_each_experiment_is_in_the_file_when_it_ends(tmp_path: Path) -> None:
    file = tmp_path / "experiments.log"
    strategy = bound(file)
    drive(strategy, SIM, trials=8)
    tracked = study(file).trials
    assert [t.user_attrs["recipe"] for t in tracked] == [r.recipe.digest for r in strategy.history]
    for trial, record in zip(tracked, strategy.history, strict=True):
        if trial.state is TrialState.COMPLETE:
            assert trial.value == SIM.goal.cost(record)
            assert (max(trial.constraints.values()) <= 0) == record.feasible
            assert strategy.space.recipe(trial.params) == record.recipe
    assert {t.state for t in tracked} == {TrialState.COMPLETE, TrialState.FAIL}


def test_a_search_that_is_opened_again_adds_only_what_is_new(tmp_path: Path) -> None:
    file = tmp_path / "experiments.log"
    first = bound(file)
    drive(first, SIM, trials=4)
    cloudpickle.loads(cloudpickle.dumps(first))  # makes its calls again
    configs = drive(bound(file), SIM, trials=6)
    assert configs[:4] == drive(bound(None), SIM, trials=4)  # the file says nothing about what is tried
    assert len(study(file).trials) == 6


def test_after_its_first_draws_it_models_loss_and_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the contract tests it only draws: a fit of the model takes seconds."""
    asked = []
    real = optuna.samplers.GPSampler.sample_relative

    def counted(self: Any, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        found = real(self, study, trial, search_space)
        asked.append(found)
        return found

    monkeypatch.setattr(optuna.samplers.GPSampler, "sample_relative", counted)
    strategy = strategies.get("constrained", startup_trials=4).bind(SIM.space(), SIM.goal)
    drive(strategy, SIM, trials=6)
    recipes = [record.recipe.digest for record in strategy.history]
    assert len(set(recipes)) == 6 and any(asked), "the sampler proposed by its model"


def test_two_searches_share_a_file_by_their_names(tmp_path: Path) -> None:
    file = tmp_path / "experiments.log"
    for name in ("x", "y"):
        drive(bound(file, name), SIM, trials=2)
    assert [len(study(file, name).trials) for name in ("x", "y")] == [2, 2]


def test_a_name_of_another_search_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "experiments.log"
    drive(bound(file), SIM, trials=1)
    with pytest.raises(StorageError, match="of another goal. Pass another `experiment_name`"):
        drive(bound(file, goal=Goal(0.5)), SIM, trials=1)


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a journal\nat all\n")
    with pytest.raises(StorageError, match="can't be used as an Optuna journal"):
        drive(bound(tmp_path / "notes.txt"), SIM, trials=1)
    with pytest.raises(StorageError, match="a directory that exists"):
        bound(tmp_path / "nowhere" / "file")


def test_each_experiment_is_logged_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "raysq"):
        drive(bound(None, "mine"), SIM, trials=3)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert [line.split(":")[0] for line in lines] == ["mine 0", "mine 1", "mine 2"]


def test_sigopt_is_another_name_and_its_token_is_not_kept(tmp_path: Path) -> None:
    given = {"sigopt_api_token": TOKEN, "sigopt_project_id": "project-7", "sigopt_experiment_name": "nc-tune"}
    with pytest.warns(UserWarning, match="not used and not kept") as warned:
        strategy = strategies.get("SigOpt", **given, storage=tmp_path / "log", startup_trials=50)
    assert [str(w.message).split("`")[1] for w in warned] == ["sigopt_api_token", "sigopt_project_id"]
    assert strategy.name == "constrained" and vars(strategy)["experiment_name"] == "nc-tune"
    drive(strategy.bind(SIM.space(), SIM.goal), SIM, trials=2)
    kept = [repr(vars(strategy)).encode(), cloudpickle.dumps(strategy), (tmp_path / "log").read_bytes()]
    assert not any(secret in text for text in kept for secret in (TOKEN.encode(), b"project-7"))
    assert not any(TOKEN in str(w.message) for w in warned)


def test_an_experiment_is_named_once() -> None:
    with pytest.raises(OptionError, match="not both"):
        strategies.get("sigopt", sigopt_experiment_name="a", experiment_name="b")


@pytest.mark.parametrize(("name", "directory"), [(None, "nc-tune"), ("mine", "mine")])
def test_the_experiment_names_the_run(
    name: str | None, directory: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(*_: Any) -> None:
        raise StorageError("far enough")

    asked: list[tuple[Path, str | None]] = []
    real = api.journal_path
    monkeypatch.setattr(api, "journal_path", lambda *given: asked.append(real(*given)) or stop())
    with pytest.raises(StorageError, match="far enough"):
        api.tune(
            None,  # type: ignore[arg-type]
            None,
            lambda model: 1.0,
            strategy="sigopt",
            strategy_kwargs={"sigopt_experiment_name": "nc-tune"},
            name=name,
            storage_path=tmp_path,
        )
    assert asked[0] == (tmp_path / directory / "journal.jsonl", None)
