"""The script that compares raysq with its peers: what it computes beside running them."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from raysq.goal import Goal

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TUNED = {"trials": 3, "seconds": 12.34, "to_pass": 4.0, "accuracy": 0.792, "reason": "", "start_s": 9.0}
COURSE: dict[str, Any] = {"cores": [0], "threads": 1, "tolerance": 0.01, "rounds": 3}


@pytest.fixture
def script(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("peers")


@pytest.fixture
def turns(script: ModuleType) -> ModuleType:
    return importlib.import_module("contenders.turns")


def entrant(script: ModuleType, name: str) -> Any:
    return script.Entrant(name, f"the {name}", "contenders.none")


def line(script: ModuleType, times: Mapping[str, Sequence[float]] | None = None, **known: Any) -> str:
    """The row of an entrant where fp32 scores 0.8 and raysq takes 2 ms."""
    tuned = TUNED | known.pop("tuned", {})
    found = script.Found(entrant(script, "peer"), tuned, **({"accuracy": 0.792, "ms": times or {}} | known))
    shown: str = script.line(found, 0.8, Goal(0.01), {"batch": [2.0] * 3, "single": [2.0] * 3})
    assert shown.count("|") == len(script.HEADINGS) + 1
    return shown


def test_a_row_has_loss_and_times_as_ratios_to_raysq(script: ModuleType) -> None:
    row = line(script, {"batch": [3.0, 4.0, 5.0], "single": [1.0, 1.0, 1.0]})
    assert row == (
        "| the peer | 3 | 4.0 | 12.3 + 9.0 | 0.7920 (1.00%) | 4 | 2.00 [1.50, 2.50] | 1 | 0.50 [0.50, 0.50] |"
    )


def test_what_raysq_itself_is_divided_by_is_one(script: ModuleType) -> None:
    found = script.Found(entrant(script, "raysq"), TUNED, 0.792, {"batch": [2.0], "single": [4.0]})
    assert script.line(found, 0.8, Goal(0.01), found.ms).endswith("| 2 | 1 | 4 | 1 |")


def test_an_artifact_that_loses_more_than_its_maker_says_fails(script: ModuleType) -> None:
    assert "| 0.7800 (2.50%), **fails**, reported as 0.7920 |" in line(script, accuracy=0.78)


@pytest.mark.parametrize(
    ("known", "shown"),
    [
        ({"tuned": {"reason": "found no model"}}, "| found no model | – | – | – | – |"),
        ({"reason": "exit code 1: a | b"}, "| exit code 1: a / b | – | – | – | – |"),
    ],
)
def test_a_contender_without_an_artifact_is_a_row_with_its_reason(
    script: ModuleType, known: dict[str, Any], shown: str
) -> None:
    assert line(script, accuracy=None, **known).endswith(shown)


def test_an_artifact_that_cant_be_timed_keeps_its_accuracy(script: ModuleType) -> None:
    assert "(1.00%), can't be timed: killed | – | – | – | – |" in line(script, reason="killed")


def test_trials_on_a_part_of_the_data_are_told_apart(script: ModuleType) -> None:
    assert "| 3, 1 on all data |" in line(script, tuned={"whole": 1})


def test_a_table_needs_no_raysq_but_fp32(script: ModuleType) -> None:
    fp32 = script.Found(entrant(script, script.FP32), TUNED, 0.8, {"batch": [2.0], "single": [2.0]})
    assert "| 0.8000 (0.00%), reported as 0.7920 | 2 | – | 2 | – |" in script.table("net", [fp32], "raysq", Goal(0.01))
    failed = script.Found(entrant(script, script.FP32), TUNED | {"reason": "no memory"}, None, {})
    with pytest.raises(SystemExit, match="no memory"):
        script.table("net", [failed], "raysq", Goal(0.01))


def test_each_backend_has_two_rows_and_names_are_unique(script: ModuleType) -> None:
    names = [row.name for row in script.entrants(["ipex", "onednn"])]
    assert names[0] == script.FP32 and names[-4:] == [
        "raysq_ipex",
        "raysq_ipex_first",
        "raysq_onednn",
        "raysq_onednn_first",
    ]
    assert len(set(names)) == len(names)


def test_results_under_other_settings_are_not_mixed(script: ModuleType, tmp_path: Path) -> None:
    row = entrant(script, "peer")
    folders = {
        script.Course(tmp_path, **(COURSE | other)).folder("net", row)
        for other in ({}, {"threads": 2}, {"tolerance": 0.02}, {"cores": [1], "rounds": 9})
    }
    assert len(folders) == 3  # cores and rounds change no result


def test_what_is_known_is_not_run_again(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(course: Any, action: str, workload: str, row: Any) -> str:
        ran.append(action)
        if action == "tune":
            (course.folder(workload, row) / "tuned.json").write_text(json.dumps(TUNED))
        else:
            (course.folder(workload, row) / "scored.json").write_text(json.dumps({"accuracy": 0.5}))
        return ""

    monkeypatch.setattr(script.Course, "run", run)
    course, row = script.Course(tmp_path, **COURSE), entrant(script, "peer")
    for _ in range(2):
        course.measure("net", row)
    assert ran == ["tune", "score"]
    assert [found.accuracy for found in course.found("net", [row, entrant(script, "other")])] == [0.5]


def test_a_process_that_fails_leaves_its_last_words(script: ModuleType, tmp_path: Path) -> None:
    course, row = script.Course(tmp_path, **COURSE), entrant(script, "peer")  # there is no such module
    course.measure("digits_cnn", row)
    (found,) = course.found("digits_cnn", [row])
    assert found.tuned["reason"].startswith("ModuleNotFoundError: No module named 'contenders.none'")


class Noted:
    """An engine that takes `ms`, and notes its turns."""

    def __init__(self, name: str, ms: float, turns: list[str]) -> None:
        self._name, self._ms, self._turns = name, ms, turns

    def sample(self, what: str, calls: int) -> float:
        self._turns.append(f"{self._name}{calls}")
        return self._ms


def test_engines_take_turns_and_each_round_begins_with_another(turns: ModuleType) -> None:
    seen: list[str] = []
    rests: list[float] = []
    engines = {"a": Noted("a", 50.0, seen), "b": Noted("b", 0.001, seen)}
    times = turns.interleaved(engines, ["batch"], 3, 0.5, rests.append)
    assert seen[:2] == ["a3", "b3"]  # how long a call takes
    assert seen[2:] == ["a2", "b1000", "b1000", "a2", "a2", "b1000"]
    assert times == {"batch": {"a": [50.0] * 3, "b": [0.001] * 3}} and rests == [0.5] * 6


def test_a_process_answers_until_it_ends(turns: ModuleType, tmp_path: Path) -> None:
    served = (
        "import sys; from contenders.process import take_turns\n"
        "print('last words', file=sys.stderr, flush=True)\n"
        "take_turns({'batch': lambda: None}, sys.stdin, sys.stdout)"
    )
    command = [sys.executable, "-c", served]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    with turns.Process(command, environment, tmp_path / "log").ready() as engine:
        assert 0 <= engine.sample("batch", 3) < 1000 and engine.cpu_s() >= 0
        with pytest.raises(turns.ContenderError, match="exit code 1: KeyError: 'other'"):
            engine.sample("other", 1)


def test_turns_answer_the_median(script: ModuleType) -> None:
    process = importlib.import_module("contenders.process")
    runs: list[int] = []
    answers = io.StringIO()
    process.take_turns({"batch": lambda: runs.append(1)}, io.StringIO("batch 4\n"), answers)
    ready, ms = answers.getvalue().splitlines()
    assert ready == "ready" and float(ms) >= 0 and len(runs) == 1 + 4  # one to have the caches back


@pytest.fixture
def commands(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Sequence[str]]:
    """What an environment runs instead of pip; its packages lie in tmp_path."""
    ran: list[Sequence[str]] = []

    def run(command: Sequence[str]) -> str:
        ran.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir()
        return str(tmp_path)

    monkeypatch.setattr(importlib.import_module("contenders.environments"), "_run", run)
    return ran


def test_an_environment_is_made_once_and_anew_when_it_needs_more(
    script: ModuleType, commands: list[Sequence[str]], tmp_path: Path
) -> None:
    first = script.Environment("peer", ("peer==1.0",), needs_gb=0.0)
    assert first.python(tmp_path) == first.python(tmp_path) == tmp_path / "peer" / "bin" / "python"
    assert [command[-1] for command in commands] == [str(tmp_path / "peer"), "peer==1.0"]
    script.Environment("peer", ("peer==2.0",), needs_gb=0.0).python(tmp_path)
    assert commands[-1][-1] == "peer==2.0" and len(commands) == 4


def test_what_is_here_is_borrowed_and_anything_else_installed(
    script: ModuleType, commands: list[Sequence[str]], tmp_path: Path
) -> None:
    here = f"pytest=={pytest.__version__}"
    script.Environment("borrows", ("peer==1.0",), 0.0, borrowed=(here,), borrowed_gb=1e9).python(tmp_path)
    assert commands[-1][-2:] == ["--ignore-installed", "peer==1.0"]  # a borrowed dependency of its own would not do
    assert (tmp_path / "borrowed.pth").read_text().endswith("site-packages")
    script.Environment("installs", ("peer==1.0",), 0.0, borrowed=(here, "pytest==0.1")).python(tmp_path)
    assert commands[-1][-3:] == ["peer==1.0", here, "pytest==0.1"]


def test_an_environment_that_does_not_fit_is_not_begun(
    script: ModuleType, commands: list[Sequence[str]], tmp_path: Path
) -> None:
    with pytest.raises(script.EnvironmentFailure, match="it needs 1000000000 GB"):
        script.Environment("large", ("peer==1.0",), needs_gb=1e9).python(tmp_path)
    assert commands == []
