"""What can't be used is refused at the front door: by name, with what to do, before any work."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune
from torch import nn

import raysq
from raysq import errors
from raysq.errors import (
    CalibrationError,
    EvaluationError,
    ModelError,
    OptionError,
    ResumeError,
    SpaceError,
    StorageError,
)
from raysq.journal import Journal
from raysq.result import Baseline
from raysq.run import Header
from raysq.tuning import runner

FLOAT = {"activation": {"dtype": ["fp32"]}, "weight": {"dtype": ["fp32"]}}


class Batches:
    """Three batches that fit `net()`, and how many were read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Any:
        for _ in range(3):
            self.read += 1
            yield torch.randn(4, 8)


class Calls:
    """An eval_fn that counts its calls."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, model: nn.Module) -> float:
        self.made += 1
        return 1.0


class Holding(nn.Module):
    """A model with something in it that isn't a tensor."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.inner.held = held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.fc(x))


class Copyable:
    """Can be copied, but not pickled: a handle to something in this process."""

    def __deepcopy__(self, memo: Any) -> Copyable:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a handle stays in its process")


class TwoInputs(nn.Linear):
    """Could take what a loader gives as its label for a mask."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if mask is None else x * mask)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def refused(tmp_path: Path, error: type[Exception], says: tuple[str, ...], **arguments: Any) -> tuple[Batches, Calls]:
    """Call `raysq.tune` with these arguments; return how much of the default data and eval_fn was used."""
    batches, calls = Batches(), Calls()
    given = {
        "model": net(),
        "calib": batches,
        "eval_fn": calls,
        "backend": "reference",
        "num_threads": 1,
        "storage_path": tmp_path / "runs",
        "verbose": 0,
    }
    with pytest.raises(error) as caught, pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "session", lambda *_: pytest.fail("Ray is asked for"))
        raysq.tune(**{**given, **arguments})
    message = str(caught.value)
    assert [words for words in says if words not in message] == [], message
    assert not (tmp_path / "runs").exists()  # no run, no directory of one
    return batches, calls


# arguments, what the error names, what it says to do
OPTIONS = {
    "tolerance below 0": ({"tolerance": -0.1}, OptionError, "`tolerance`", "[0, 1)"),
    "tolerance in percent": ({"tolerance": 1.5}, OptionError, "`tolerance`", "1 % is 0.01"),
    "tolerance is NaN": ({"tolerance": float("nan")}, OptionError, "`tolerance`", "[0, 1)"),
    "tolerance is text": ({"tolerance": "1%"}, OptionError, "`tolerance`", "must be a number"),
    "criterion misspelt": ({"criterion": "relativ"}, OptionError, "criterion 'relativ'", "mean 'relative'"),
    "direction is text": ({"higher_is_better": "no"}, OptionError, "`higher_is_better`", "True or False"),
    "a goal, and a tolerance beside it": (
        {"goal": raysq.Goal(0.02), "tolerance": 0.05},
        OptionError,
        "`goal` is given",
        "Goal(",
    ),
    "a goal, and a direction": ({"goal": raysq.Goal(0.02), "higher_is_better": False}, OptionError, "`goal` is given"),
    "no list of callbacks": ({"callbacks": None}, OptionError, "`callbacks` must be a list", "None"),
    "a callback that is none": ({"callbacks": [print]}, OptionError, "`callbacks` must be a list", "print"),
    "a callback's class": ({"callbacks": [tune.Callback]}, OptionError, "`callbacks` must be a list", "Callback"),
    "goal is a number": ({"goal": 0.01}, OptionError, "`goal`", "raysq.Goal"),
    "latency is a number": ({"latency": 0.5}, OptionError, "`latency`", "raysq.Latency"),
    "workers is a number": ({"workers": 2}, OptionError, "`workers`", "raysq.Workers"),
    "no trial": ({"max_trials": 0}, OptionError, "`max_trials`", "at least 1"),
    "half a trial": ({"max_trials": 1.5}, OptionError, "`max_trials`", "whole number"),
    "INC's timeout=0": ({"timeout_s": 0}, OptionError, "`timeout_s`", "`stop_at_first=True`"),
    "timeout below 0": ({"timeout_s": -1.0}, OptionError, "`timeout_s`", "positive"),
    "timeout is NaN": ({"timeout_s": float("nan")}, OptionError, "`timeout_s`", "positive"),
    "timeout is text": ({"timeout_s": "60"}, OptionError, "`timeout_s`", "positive"),
    "no slot": ({"max_concurrent_trials": 0}, OptionError, "`max_concurrent_trials`", "at least 1"),
    "slots as text": ({"max_concurrent_trials": "2"}, OptionError, "`max_concurrent_trials`", "at least 1"),
    "no thread": ({"num_threads": 0}, OptionError, "`num_threads`", "[1, 1024]"),
    "threads as text": ({"num_threads": "2"}, OptionError, "`num_threads`", "[1, 1024]"),
    "seed is text": ({"seed": "x"}, OptionError, "`seed`", "whole number"),
    "strategy misspelt": ({"strategy": "tpee"}, OptionError, "strategy 'tpee'", "mean 'tpe'"),
    "strategy is no searcher": ({"strategy": 3}, OptionError, "`strategy`", "a name or a Ray Tune searcher"),
    "unknown argument of a strategy": (
        {"strategy": "tpe", "strategy_kwargs": {"startup_trial": 3}},
        OptionError,
        "'startup_trial'",
        "mean 'startup_trials'",
    ),
    "backend misspelt": ({"backend": "ipx"}, OptionError, "backend 'ipx'", "mean 'ipex'"),
}

MODELS = {
    "no module": ({"model": 3}, ModelError, "int", "torch.nn.Module"),
    "no such module": ({"model": "nowhere:model"}, ModelError, "nowhere", '"module:function"'),
    "no such function": ({"model": "json:model"}, ModelError, "'model'", '"module:function"'),
    "a name without function": ({"model": "json"}, ModelError, "'json'", '"module:function"'),
    "on another device": (lambda: {"model": net().to("meta")}, ModelError, "0.weight is on meta", "model.cpu()"),
    "in half precision": (lambda: {"model": net().half()}, ModelError, "0.weight is torch.float16", "model.float()"),
    "nothing to quantize": ({"model": nn.ReLU()}, ModelError, "can run in int8", "linear"),
    "can't be copied or pickled": (
        lambda: {"model": Holding(threading.Lock())},
        ModelError,
        "`inner.held` (lock)",
        "`__getstate__`",
    ),
    "can't be pickled": (
        lambda: {"model": Holding(Copyable())},
        ModelError,
        "`inner.held` (Copyable)",
        "`__getstate__`",
    ),
}

SPACES = {
    "nothing may run in int8": ({"op_name_dict": {".*": FLOAT}}, SpaceError, "no call may run", "Allow int8"),
    "bad expression by name": ({"op_name_dict": {"(": FLOAT}}, SpaceError, "op_name_dict['(']", "Escape"),
    "bad expression by type": ({"op_type_dict": {"*": FLOAT}}, SpaceError, "op_type_dict['*']", "Escape"),
    "rules in a list": ({"op_type_dict": ["linear"]}, SpaceError, "`op_type_dict`", "must be a mapping"),
    "unknown key of a rule": (
        {"op_type_dict": {"linear": {"weights": {}}}},
        SpaceError,
        "'weights'",
        "mean 'weight'",
    ),
    "unknown dtype of a rule": (
        {"op_type_dict": {"linear": {"weight": {"dtype": ["int7"]}}}},
        SpaceError,
        "dtype 'int7'",
        "int8",
    ),
    "no such space": ({"space": "nowhere.yaml"}, SpaceError, "nowhere.yaml", "known are"),
    "space is a number": ({"space": 3}, SpaceError, "3", "known are"),
    "approach misspelt": ({"approach": "statik"}, OptionError, "approach 'statik'", "mean 'static'"),
}

CALIBRATION = {
    "no batch": ({"calib": []}, CalibrationError, "at least one batch", "none"),
    "an iterator at its end": (lambda: {"calib": iter(())}, CalibrationError, "at least one batch", "pass a list"),
    "nothing": ({"calib": None}, CalibrationError, "`calib`", 'approach="dynamic"'),
    "one tensor": ({"calib": torch.zeros(4, 8)}, CalibrationError, "one Tensor", "`calib=[batch]`"),
    "one dict": ({"calib": {"input": torch.zeros(4, 8)}}, CalibrationError, "one dict", "`calib=[batch]`"),
    "a number": ({"calib": 3}, CalibrationError, "got int", "iterable of batches"),
    "a dataset": (
        lambda: {"calib": torch.utils.data.TensorDataset(torch.zeros(4, 8))},
        CalibrationError,
        "got a Dataset",
        "DataLoader(dataset, batch_size=32)",
    ),
    "a callable that doesn't run the model": (
        {"calib": lambda model: None},
        CalibrationError,
        "at least one batch",
        "didn't call the model",
    ),
    "arrays": ({"calib": [[1.0, 2.0]]}, CalibrationError, "batch", "raysq.Calibration("),
    "a keyword that forward doesn't take": (
        {"calib": [{"pixels": torch.zeros(4, 8)}]},
        CalibrationError,
        "'pixels'",
        "raysq.Calibration(loader, inputs=lambda b: ...)",
    ),
    "too many items": ({"calib": [(torch.zeros(4, 8),) * 3]}, CalibrationError, "3 items", "inputs=lambda b: b[0]"),
    "input or label": (
        lambda: {"model": TwoInputs(8, 4), "calib": [(torch.zeros(4, 8), torch.zeros(4, dtype=torch.long))]},
        CalibrationError,
        "inputs and a label",
        "calib=raysq.Calibration(loader, inputs=lambda b: b[0], target=lambda b: b[1])",
    ),
    "another width": ({"calib": [torch.zeros(4, 9)]}, ModelError, "example inputs", "(4, 9)"),
    "another width later on": (
        {"calib": [torch.zeros(4, 8), torch.zeros(4, 9)]},
        CalibrationError,
        "batch 2",
        "(4, 9)",
    ),
}


def two_arguments(model: nn.Module, loader: Any) -> float:
    return 1.0


def no_argument() -> float:
    return 1.0


async def asynchronous(model: nn.Module) -> float:
    return 1.0


def raising(model: nn.Module) -> float:
    raise KeyError("labels")


def streaming(*batches: Any) -> Any:
    def eval_fn(model: nn.Module) -> Any:
        yield from batches

    return eval_fn


EVALUATIONS = {
    "nothing": (None, "`eval_fn`", "a function of one argument, the model"),
    "one argument more": (two_arguments, "(model: 'nn.Module', loader: 'Any')", "lambda model:"),
    "one argument less": (no_argument, "() -> 'float'", "exactly one argument, the model"),
    "asynchronous": (asynchronous, "`eval_fn`", "not `async def`"),
    "raises": (raising, "KeyError", "'labels'"),
    "returns nothing": (lambda model: None, "None (NoneType)", "must return a number"),
    "returns text": (lambda model: "0.9", "'0.9' (str)", "must return a number"),
    "returns a truth value": (lambda model: True, "True (bool)", "must return a number"),
    "returns outputs": (lambda model: model(torch.zeros(2, 8)), "(Tensor)", "must return a number"),
    "returns NaN": (lambda model: float("nan"), "nan", "must be finite"),
    "returns a dict that leaves open which counts": (
        lambda model: {"f1": 0.5, "recall": 0.4},
        "'f1', 'recall'",
        "`goal=Goal(metric='f1')`",
    ),
    "returns an empty dict": (lambda model: {}, "nothing", "Goal(metric="),
    "returns text in a dict": (lambda model: {"f1": "high"}, "'f1'", "must return a number"),
    "yields nothing": (streaming(), "yielded no item", "score"),
    "yields numbers": (streaming(1.0, 2.0), "1.0 (float)", "yield (sum, n)"),
    "yields a share as n": (streaming((1.0, 0.5)), "n = 0.5", "number of items"),
    "scores fp32 at 0, and the loss is relative": (lambda model: 0.0, "score is 0", 'criterion="absolute"'),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str, tmp_path: Path) -> None:
    arguments, error, *says = OPTIONS[case]
    batches, calls = refused(tmp_path, error, tuple(says), **arguments)
    assert (batches.read, calls.made) == (0, 0)


@pytest.mark.parametrize("case", MODELS)
def test_models(case: str, tmp_path: Path) -> None:
    arguments, error, *says = MODELS[case]
    batches, calls = refused(tmp_path, error, tuple(says), **(arguments() if callable(arguments) else arguments))
    assert batches.read <= 1  # the first batch may be what the model is inspected with
    assert calls.made == 0


@pytest.mark.parametrize("case", SPACES)
def test_spaces(case: str, tmp_path: Path) -> None:
    arguments, error, *says = SPACES[case]
    batches, calls = refused(tmp_path, error, tuple(says), **arguments)
    assert batches.read <= 1
    assert calls.made == 0


def test_inputs_to_time_that_the_model_cannot_take(tmp_path: Path) -> None:
    says = ("must run on `latency_inputs`", "(2, 5)")
    _, calls = refused(tmp_path, OptionError, says, latency_inputs=torch.randn(2, 5))
    assert calls.made == 0


@pytest.mark.parametrize("case", CALIBRATION)
def test_calibration_data(case: str, tmp_path: Path) -> None:
    arguments, error, *says = CALIBRATION[case]
    _, calls = refused(tmp_path, error, tuple(says), **(arguments() if callable(arguments) else arguments))
    assert calls.made == 0


@pytest.mark.parametrize("case", EVALUATIONS)
def test_evaluations(case: str, tmp_path: Path) -> None:
    eval_fn, *says = EVALUATIONS[case]
    refused(tmp_path, EvaluationError, tuple(says), eval_fn=eval_fn)


def test_an_eval_fn_that_cannot_be_sent_to_workers(tmp_path: Path) -> None:
    lock = threading.Lock()

    def eval_fn(model: nn.Module) -> float:
        with lock:
            return 1.0

    batches, _ = refused(tmp_path, EvaluationError, ("`eval_fn` can't be sent to workers", "lock"), eval_fn=eval_fn)
    assert batches.read <= 1


@pytest.mark.parametrize("below", ["/proc/nowhere", "/dev/null/runs"])
def test_a_path_that_cannot_be_written(below: str, tmp_path: Path) -> None:
    batches, calls = refused(tmp_path, StorageError, (below, "`storage_path`"), storage_path=below)
    assert (batches.read, calls.made) == (0, 0)


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "journal.jsonl").write_text("{}\n")
    batches, calls = refused(tmp_path, StorageError, ("mine", "`resume="), storage_path=tmp_path, name="mine")
    assert (batches.read, calls.made) == (0, 0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ("no journal at", "directory of an earlier run")),
        ("", ("holds no header", "Start a new one")),
        ("{\n", ("line 1 is damaged", "Remove that line")),
        ('{"schema": 1}\n', ("line 1 is not what raysq wrote",)),
    ],
    ids=["nothing", "an empty file", "a damaged file", "another file"],
)
def test_nothing_to_resume(content: str | None, says: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    if content is not None:
        path.write_text(content)
    batches, calls = refused(tmp_path, ResumeError, (str(path), *says), resume=path)
    assert (batches.read, calls.made) == (0, 0)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ("nowhere", ResumeError, ("nothing at nowhere", "directory of an earlier run")),
        (["nowhere"], ResumeError, ("nothing at nowhere",)),
        ({"runs": "x"}, OptionError, ("`warm_start`", "or a list of these", "dict")),
    ],
)
def test_nothing_to_start_from(given: Any, error: type[Exception], says: tuple[str, ...], tmp_path: Path) -> None:
    batches, calls = refused(tmp_path, error, says, warm_start=given)
    assert (batches.read, calls.made) == (0, 0)


def test_a_run_is_resumed_with_what_it_was_started_with(ended_run: Path, tmp_path: Path) -> None:
    says = ("`resume` goes on with", "Leave out `warm_start`", f"warm_start=[{str(ended_run)!r}")
    refused(tmp_path, OptionError, says, resume=ended_run, warm_start=ended_run)


@pytest.fixture
def ended_run(tmp_path: Path) -> Path:
    baseline = Baseline(1.0, {"accuracy": 1.0}, 1.0, "jit", {})
    Journal.create(tmp_path / "ended" / "journal.jsonl", Header({}, {}, {}, "reference", baseline)).close()
    return tmp_path / "ended"


def test_train_mode_is_said_to_be_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="raysq"):
        raysq.quantize(net().train(), Batches(), backend="reference")
    assert "train mode" in caplog.text and "copy" in caplog.text


def test_every_such_error_is_an_input_error_and_a_value_error() -> None:
    kinds = [CalibrationError, EvaluationError, ModelError, OptionError, ResumeError, SpaceError, StorageError]
    assert all(issubclass(kind, errors.InputError) and issubclass(kind, ValueError) for kind in kinds)
