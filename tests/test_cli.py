"""The command line: what it runs, and how it answers what it can't use."""

from __future__ import annotations

import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import raysq
from raysq import cli, journal
from raysq.recipe import Recipe
from raysq.result import Baseline, Confirmation, Ratio, Stage, Status, TrialRecord
from raysq.run import Entry, Header


@pytest.fixture
def workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file with workloads in every accepted form."""
    (tmp_path / "cli_workload.py").write_text(
        textwrap.dedent("""
            import torch
            def triple():
                return torch.nn.Linear(3, 2), [torch.ones(4, 3)], lambda model: 1.0
            def mapping():
                model, calib, eval_fn = triple()
                return {"model": model, "calib": calib, "eval_fn": eval_fn, "tolerance": 0.02}
            def wrong():
                return 5
            model = torch.nn.Linear(3, 2)
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return str(tmp_path / "cli_workload.py")


CONFIRMATION = Confirmation(0.79, 0.8, 0.0125, 0.0125, holds=False, tried=5)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What raysq.tune was called with."""
    seen: dict[str, Any] = {}

    def tune(
        model: Any, calib: Any, eval_fn: Any, *, tolerance: float = 0.01, max_trials: int = 50, strategy: str = "auto"
    ) -> Any:
        seen.update(model=model, tolerance=tolerance, max_trials=max_trials, strategy=strategy)
        frame = SimpleNamespace(to_string=lambda: "frame")
        return SimpleNamespace(
            dataframe=lambda: frame,
            accuracy=0.9,
            baseline=SimpleNamespace(accuracy=0.9),
            speedup=2.0,
            trials=(1, 2, 3),
            confirmation=CONFIRMATION if max_trials == 7 else None,
            save=lambda path: seen.update(saved=str(path)),
        )

    monkeypatch.setattr(raysq, "tune", tune, raising=False)
    return seen


@pytest.mark.parametrize(("name", "tolerance"), [("triple", 0.01), ("mapping", 0.02)])
def test_tune_runs_what_a_function_returns(workload: str, asked: dict[str, Any], name: str, tolerance: float) -> None:
    assert cli.main(["tune", f"{workload}:{name}", "--max-trials", "7", "--save", "out"]) == 0
    assert isinstance(asked.pop("model"), torch.nn.Linear)
    assert asked == {"tolerance": tolerance, "max_trials": 7, "strategy": "auto", "saved": "out"}


@pytest.mark.parametrize(
    ("trials", "said"),
    [("6", "not confirmed: the best of 3 trials on one evaluation set"), ("7", f"{CONFIRMATION}")],
)
def test_it_says_whether_the_winner_is_confirmed(
    workload: str, asked: dict[str, Any], trials: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["tune", f"{workload}:triple", "--max-trials", trials])
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_module_name_works_as_well_as_a_file(workload: str, asked: dict[str, Any]) -> None:
    assert cli.main(["tune", "cli_workload:triple"]) == 0
    assert asked["tolerance"] == 0.01


def test_yaml_holds_arguments_and_options_override_it(workload: str, asked: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "tune.yaml"
    file.write_text("workload: cli_workload:mapping\ntolerance: 0.5\nmax_trials: 3\nsave: there\n")
    assert cli.main(["tune", str(file), "--max-trials", "4", "--strategy", "random"]) == 0
    assert (asked["tolerance"], asked["max_trials"], asked["strategy"], asked["saved"]) == (0.5, 4, "random", "there")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("tolerance: 1", "must name `workload"),
        ("[1, 2]", "must hold keys"),
        ("a: [", "must be YAML"),
        ("workload: cli_workload:triple\ntolerence: 0.1", "Did you mean 'tolerance'"),
    ],
)
def test_yaml_that_cannot_be_used(
    workload: str, asked: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, says: str
) -> None:
    file = tmp_path / "tune.yaml"
    file.write_text(content)
    assert cli.main(["tune", str(file)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tune", "no_colon"], "must read"),
        (["tune", "no_such_module_here:f"], "can't import 'no_such_module_here'"),
        (["tune", "cli_workload:tripel"], "Did you mean 'triple'"),
        (["tune", "cli_workload:wrong"], "must return `model, calib, eval_fn`"),
        (["tune", "missing.yaml"], "can't read missing.yaml"),
        (["tune", "cli_workload:triple", "--unknown"], "unknown option '--unknown'"),
        (["inspect", "cli_workload:model"], "Pass their shape"),
        (["inspect", "cli_workload:model", "--shape", "1x3"], "whole numbers"),
        (["show", "nowhere"], "holds no journal"),
    ],
)
def test_bad_arguments_say_what_to_do(
    workload: str, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert cli.main(arguments) == 2
    assert says in capsys.readouterr().err


def test_show_prints_the_trials_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = Baseline(accuracy=0.95, metrics={"accuracy": 0.95}, latency_ms=2.0, form="jit", forms_ms={"jit": 2.0})
    header = Header({"model": "m"}, {}, {}, "ipex", baseline)
    record = TrialRecord(
        3,
        Recipe({}),
        {},
        Status.FINISHED,
        Stage.TIMED,
        accuracy=0.94,
        accuracy_drop=0.0105,
        feasible=True,
        latency_ms=1.0,
        latency_ratio=0.5,
        ratio=Ratio(0.5, 0.49, 0.51),
        label="all int8",
    )
    with journal.Journal.create(tmp_path / "run" / "journal.jsonl", header) as written:
        written.append(Entry(record, seen=3))
    assert cli.main(["show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for part in ("ipex", "0.9500", "all int8", "0.9400", "0.500 [0.490, 0.510]"):
        assert part in shown
