"""Architectures that raysq was not developed on: what runs in int8 is near fp32, and what doesn't has a reason."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from int8_calls import engine

import raysq
from raysq.recipe import Precision
from raysq.result import Ratio

QUICK = ("DLRM-like", "control flow", "dicts in and out", "tied weights")
SLOW = ("U-Net", "LSTM tagger", "experts, routed by value", "module called twice", "dynamic shapes")
SLOW += ("BERT", "GPT-2", "Llama", "Mixtral, experts")  # of transformers
FAITHFUL = 0.85  # random weights and 7 bits: these architectures reach 0.88 and more
LSTM = 0.4  # it reads and feeds back with one scale, and an untrained one's states are small beside its inputs


@pytest.fixture
def script(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("coverage_table")


@pytest.fixture
def zoo(benchmark_script: Callable[[str], ModuleType]) -> dict[str, Any]:
    return {one.name: one for one in benchmark_script("zoo").ALL}


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, backend) for name in QUICK for backend in ("onednn", "reference")),
        *(pytest.param(name, "onednn", marks=pytest.mark.slow) for name in SLOW),
    ],
)
def test_an_architecture_is_int8_or_says_why_not(name: str, backend: str, zoo: Any, script: ModuleType) -> None:
    engine(backend)
    torch.manual_seed(script.SEED)
    specimen = zoo[name].make()
    calib = raysq.Calibration([specimen.batch(n) for n in script.CALIBRATED], inputs=lambda batch: batch)
    int8 = raysq.quantize(specimen.model, calib, backend=backend)
    by_lstm = name == "LSTM tagger" and int8.executed["network"] is Precision.INT8
    assert script.Fidelity(specimen)(int8) > (LSTM if by_lstm else FAITHFUL)
    in_float = {call for call, precision in int8.executed.items() if precision is not Precision.INT8}
    assert in_float <= int8.left_in_float.keys()  # the default recipe leaves nothing in float without a reason
    assert len(in_float) < len(int8.executed)


def test_the_zoo_has_what_it_should(zoo: dict[str, Any]) -> None:
    names = list(zoo)
    assert len(names) >= 25 and len(set(map(str.lower, names))) == len(names)
    assert {one.package for one in zoo.values()} == {"torch", "torchvision", "timm", "transformers"}


def test_every_package_of_the_zoo_is_an_extra(zoo: dict[str, Any]) -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    extra = next(line for line in project.splitlines() if line.startswith("zoo = "))
    assert all(package in extra for package in {one.package for one in zoo.values()} - {"torch"})


def test_fidelity_is_one_less_the_error_beside_what_varies(script: ModuleType) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return x + 100  # what all outputs have in common counts for nothing

    batch = lambda number: torch.randn(16, 4, generator=torch.Generator().manual_seed(number))  # noqa: E731
    fidelity = script.Fidelity(importlib.import_module("zoo").Specimen(model, batch, lambda output: output))
    assert fidelity(model) == 1
    assert fidelity(lambda x: x * 0.9 + 100) == pytest.approx(0.9, abs=0.01)
    assert fidelity(lambda x: x * 0 + 100) == pytest.approx(0, abs=0.01)


def test_reasons_are_counted_by_kind(script: ModuleType) -> None:
    executed = {"a": Precision.INT8, "b": Precision.FP32, "c:add": Precision.FP32, "c:add#2": Precision.FP32}
    kinds = {"a": "linear", "b": "linear", "c:add": "add", "c:add#2": "add"}
    left = {"c:add": "no kernel", "c:add#2": "no kernel", "d:einsum": "no kernel", "einsum": "another"}
    assert script.condensed(executed, left, kinds) == {
        script.CHOSEN: {"linear": 1},
        "no kernel": {"add": 2, "einsum": 1},
        "another": {"einsum": 1},
    }


def test_a_backend_has_a_line_with_its_reasons_or_its_failure(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "PACKAGES", ("torch",))  # those of the zoo needn't be here
    executed = {"fc": Precision.INT8, "add": Precision.FP32}
    found = SimpleNamespace(
        latency_ratio=Ratio(0.5, 0.4, 0.6),
        executed=executed,
        left_in_float={"add": "no kernel | here"},
        accuracy=0.7,
        feasible=False,
        trials=(None, None),
    )
    record = script.found(found, {"fc": "linear", "add": "add"})
    assert json.loads(json.dumps(record)) == {**record, "ratio": [0.5, 0.4, 0.6]}
    measured = {"BERT": {"onednn": record, "ipex": {"failed": "exit code -11: no message\nmore"}}}
    head, rule, first, second, _, note = script.table(measured, max_trials=2).splitlines()
    assert first == (
        "| BERT | transformers | onednn | 2 | 1 | 1 | 0.700, below the goal | 0.50 [0.40, 0.60] | "
        "1 add: no kernel / here |"
    )
    assert second == "|  |  | ipex | – | – | – | – | – | **fails**: exit code -11: no message |"
    assert {line.count("|") for line in (head, rule, first, second)} == {10}
    assert "at most 2 trials" in note
    assert "Not measured here: ResNet; " in note and " BERT;" not in note  # of those there is no line


def test_what_is_missing_is_filled_in_and_a_crash_is_a_row(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def crashes_on_ipex(command: list[str], _: Path) -> str:
        backends = command[command.index("--backends") + 1 : command.index("--max-trials")]
        asked.append(backends)
        if backends[0] == "ipex":
            return "exit code -11: no message"
        script.record_path(tmp_path, "BERT", backends[0]).write_text("{}")
        return "exit code -11: no message"

    monkeypatch.setattr(script, "_run", crashes_on_ipex)
    for _ in range(2):  # the second time there is nothing to do
        script.complete(tmp_path, "BERT", ["onednn", "ipex"], ["--max-trials", "1"])
    assert asked == [["onednn", "ipex"]]
    assert script.known(tmp_path, ["BERT"], ["onednn", "ipex"])["BERT"] == {
        "onednn": {},
        "ipex": {"failed": "exit code -11: no message"},
    }


def test_a_process_that_fails_is_told_of_by_its_last_line(script: ModuleType, tmp_path: Path) -> None:
    assert script._run([sys.executable, "-c", "print('fine')"], tmp_path) == ""
    assert (
        script._run([sys.executable, "-c", "raise SystemExit('no such model')"], tmp_path)
        == "exit code 1: no such model"
    )
