"""The RFC's `autotune`: its own lines run, and give the accuracy that was measured."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from ray import cloudpickle
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import raysq
from raysq import api, autotuning
from raysq.autotuning import autotune
from raysq.errors import (
    BackendError,
    CalibrationError,
    EvaluationError,
    InputError,
    ModelError,
    NoFeasibleRecipe,
    OptionError,
    RecipeError,
)
from raysq.goal import Criterion, Goal
from raysq.graph import OpType
from raysq.inspection import deployable
from raysq.kernels import base
from raysq.kernels.built import ScriptedModel
from raysq.kernels.executed import NOT_FUSED
from raysq.kernels.ipex_qconf import prepared_model
from raysq.kernels.qconf import why_not
from raysq.observation import observe
from raysq.recipe import OpConfig, Precision, QuantDType, Recipe, Scheme, TensorConfig, Transform
from raysq.smoothing import Smoothing
from raysq.source import Source

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import test modules
pytestmark = pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning")  # torch, of observers in a qconf

WIDTH, CLASSES, TIMES = 32, 8, 6


class Net(nn.Module):
    """Attention whose inputs have two channels of outliers, which int8 loses without SmoothQuant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        with torch.no_grad():
            for norm, readers in ((self.norm, (self.q, self.k, self.v)), (self.mlp_norm, (self.fc1,))):
                for channel in (3, 17):
                    norm.weight[channel] *= 150
                    for reader in readers:
                        reader.weight[:, channel] /= 150

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).view(x.shape[0], TIMES, 2, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(torch.matmul(q, k.transpose(2, 3)), -1)
        x = x + self.o(torch.matmul(weights, v).transpose(1, 2).reshape(x.shape))
        return self.head(x + self.fc2(torch.relu(self.fc1(self.mlp_norm(x))))).mean(1)


X = torch.randn(512, TIMES, WIDTH, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    LABELS = Net().eval()(X).argmax(1)


def accuracy(model: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """The share of rows on which the model says what fp32 says."""
    with torch.no_grad():
        return float((model(X).argmax(1) == LABELS).float().mean())


class Rows(Dataset[tuple[torch.Tensor, int]]):
    """Labelled rows, that log which were read in this process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read.append(index)
        return X[index], int(LABELS[index])


def ipex_quantization() -> Any:
    try:
        base.get("ipex_qconf")
    except BackendError as exc:
        pytest.skip(str(exc))
    from intel_extension_for_pytorch import quantization

    return quantization


def frozen(prepared: Any, example: torch.Tensor = X[:8]) -> Any:
    """The RFC's lines, and two calls: the first profiles, the second compiles."""
    converted = ipex_quantization().convert(prepared)
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(converted, example))
        traced(example), traced(example)
    return traced


# --- arguments: checked before any work ---


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `raysq.tune` was asked for, each time; it finds nothing."""
    ipex_quantization()
    calls: list[dict[str, Any]] = []

    def tune(**given: Any) -> None:
        given["batches"] = list(given["calib"].batches(given["model"]))
        calls.append(given)
        result: Any = SimpleNamespace(accuracy_drop=1 / len(calls), trials=[])
        raise NoFeasibleRecipe("nothing", result)

    monkeypatch.setattr(api, "tune", tune)
    return calls


def asks(*args: Any, **kwargs: Any) -> None:
    with pytest.raises(NoFeasibleRecipe):
        autotune(*args, **kwargs)


def calibrate(model: nn.Module) -> None:
    for rows in X[:24].split(8):
        model(rows)


def test_the_signature_is_the_rfc_s() -> None:
    parameters = inspect.signature(autotune).parameters
    assert [*parameters][:-1] == [
        *("model", "calib_dataloader", "calib_func", "eval_func", "op_type_dict", "smoothquant_args"),
        *("sampling_sizes", "accuracy_criterion", "tuning_time"),
    ]
    defaults = [p.default for p in parameters.values()][2:-1]
    assert defaults == [None, None, None, None, (100,), {"relative": 0.01}, 0]


@pytest.mark.parametrize(
    "call",
    [
        lambda: asks(Net(), [X[:8]], accuracy),
        lambda: asks(Net(), [X[:8]], eval_func=accuracy),
        lambda: asks(Net(), [X[:8]], None, accuracy),
        lambda: asks(Net(), [X[:8]], calibrate, accuracy),
        lambda: asks(Net(), [X[:8]], calibrate, eval_func=accuracy),
        lambda: asks(Net(), [X[:8]], accuracy, calib_func=calibrate),
    ],
    ids=["one by position", "by keyword", "none and one", "two", "position and keyword", "both ways"],
)
def test_one_function_by_position_evaluates(call: Callable[[], None], asked: list[dict[str, Any]]) -> None:
    call()
    assert asked[0]["eval_fn"] is accuracy


WRONG: dict[str, tuple[Callable[[], Any], type[InputError], str]] = {
    "no eval_func": (lambda: autotune(Net(), [X]), EvaluationError, r"autotune\(model, calib_dataloader, eval_func\)"),
    "calib_func alone": (lambda: autotune(Net(), [X], calib_func=calibrate), EvaluationError, "`eval_func` is needed"),
    "eval_func None": (lambda: autotune(Net(), [X], calibrate, None), EvaluationError, "`eval_func` is needed"),
    "eval_func no function": (lambda: autotune(Net(), [X], 0.9), EvaluationError, "one argument, the model; got 0.9"),
    "two arguments": (lambda: autotune(Net(), [X], lambda a, b: 1), EvaluationError, "exactly one argument"),
    "calib_func no function": (lambda: autotune(Net(), [X], 3, accuracy), OptionError, "`calib_func` must be"),
    "a function for a loader": (lambda: autotune(Net(), calibrate, accuracy), CalibrationError, "`calib_func=`"),
    "one batch for a loader": (lambda: autotune(Net(), X, accuracy), CalibrationError, "iterable of batches"),
    "no sizes": (lambda: autotune(Net(), [X], accuracy, sampling_sizes=[]), OptionError, r"such as \[100\]"),
    "a size of 0": (lambda: autotune(Net(), [X], accuracy, sampling_sizes=[0]), OptionError, r"got \[0\]"),
    "sizes a number": (lambda: autotune(Net(), [X], accuracy, sampling_sizes=100), OptionError, "got 100"),
    "sizes and calib_func": (
        lambda: autotune(Net(), [X], calibrate, accuracy, sampling_sizes=[7]),
        OptionError,
        "no effect with `calib_func`",
    ),
    "two criteria": (
        lambda: autotune(Net(), [X], accuracy, accuracy_criterion={"relative": 0.01, "absolute": 1}),
        OptionError,
        "one key, 'relative' or 'absolute'",
    ),
    "no criterion": (lambda: autotune(Net(), [X], accuracy, accuracy_criterion={}), OptionError, "one key"),
    "unknown criterion": (
        lambda: autotune(Net(), [X], accuracy, accuracy_criterion={"relativ": 0.01}),
        OptionError,
        "Did you mean 'relative'",
    ),
    "per cent": (lambda: autotune(Net(), [X], accuracy, accuracy_criterion={"relative": 1}), OptionError, "share"),
    "negative time": (lambda: autotune(Net(), [X], accuracy, tuning_time=-1), OptionError, "got -1"),
    "smoothing a list": (lambda: autotune(Net(), [X], accuracy, smoothquant_args=[]), OptionError, "must be a dict"),
    "unknown smoothing": (
        lambda: autotune(Net(), [X], accuracy, smoothquant_args={"alfa": 1}),
        OptionError,
        "Did you mean 'alpha'",
    ),
    "rules a list": (lambda: autotune(Net(), [X], accuracy, op_type_dict=["linear"]), OptionError, "`op_type_dict`"),
    "unknown option": (
        lambda: autotune(Net(), [X], accuracy, sampling_size=[7]),
        OptionError,
        "Did you mean 'sampling_sizes'",
    ),
    "no model": (lambda: autotune("nonsense", [X], accuracy), ModelError, "module:function"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_says_what_to_do(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, error, says = WRONG[case]
    monkeypatch.setattr(autotuning, "_read", lambda *_: pytest.fail("data was read"))
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("way", ["prepare", "convert"])
def test_a_prepared_model_is_refused_with_the_right_lines(way: str) -> None:
    quantization = ipex_quantization()
    mapping = quantization.default_static_qconfig_mapping
    model = quantization.prepare(Net().eval(), mapping, example_inputs=(X[:8],))
    if way == "convert":
        with torch.no_grad():
            model(X[:8])
        model = quantization.convert(model)
    with pytest.raises(ModelError) as caught:
        autotune(model, [X[:8]], accuracy)
    assert "    tuned_model = raysq.autotune(model, calib_dataloader, eval_func)\n" in str(caught.value)


# --- data ---


class TwoInputs(Net):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x + y)


class OptionalInput(Net):
    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if y is None else x + y)


A, B, Y = X[:8], X[8:16], LABELS[:8]


@pytest.mark.parametrize(
    ("model", "batch", "inputs"),
    [
        (Net, A, (A,)),
        (Net, (A, Y), (A,)),
        (Net, [A, Y], (A,)),
        (OptionalInput, (A, Y), (A,)),
        (OptionalInput, ((A, B), Y), (A, B)),
        (TwoInputs, (A, B), (A, B)),
        (TwoInputs, ((A, B), Y), (A, B)),
        (TwoInputs, (A, B, Y), (A, B)),
        (TwoInputs, ({"x": A, "y": B}, Y), {"x": A, "y": B}),
        (TwoInputs, {"x": A, "y": B, "labels": Y}, {"x": A, "y": B}),
    ],
)
def test_example_inputs_are_the_first_batch_without_the_label(
    model: type[Net], batch: Any, inputs: Any, asked: list[dict[str, Any]]
) -> None:
    asks(model(), [batch, batch], accuracy)
    given = asked[0]["example_inputs"]
    assert [*given] == [*inputs] if isinstance(inputs, dict) else len(given) == len(inputs)
    pairs = [(given[k], inputs[k]) for k in (inputs if isinstance(inputs, dict) else range(len(inputs)))]
    assert all(torch.equal(got, wanted) for got, wanted in pairs)
    assert len(asked[0]["batches"]) == 2


def test_sizes_count_samples_and_are_prefixes_of_one_pass(asked: list[dict[str, Any]]) -> None:
    rows = Rows(64)
    asks(Net(), DataLoader(rows, batch_size=8), accuracy, sampling_sizes=[20, 3, 11])
    assert rows.read == [*range(24)]  # once, and no further than the largest size needs
    read = [torch.cat([batch.args[0] for batch in given["batches"]]) for given in asked]
    assert [len(x) for x in read] == [20, 3, 11]
    assert all(torch.equal(x, X[: len(x)]) for x in read)
    assert all(given["example_inputs"][0].shape == A.shape for given in asked)  # not cut


def test_a_size_that_the_loader_does_not_have_is_all_of_it(asked: list[dict[str, Any]]) -> None:
    asks(Net(), iter([A, B]), accuracy, sampling_sizes=[100, 200])
    assert [sum(len(batch.args[0]) for batch in given["batches"]) for given in asked] == [16]


def test_calib_func_calibrates_and_the_loader_gives_the_example_only(asked: list[dict[str, Any]]) -> None:
    rows = Rows(64)
    asks(Net(), DataLoader(rows, batch_size=8), calib_func=calibrate, eval_func=accuracy)
    assert rows.read == [*range(8)]
    assert torch.equal(torch.cat([batch.args[0] for batch in asked[0]["batches"]]), X[:24])


# --- what the search is asked for ---


def test_without_time_the_first_that_passes_ends_it(asked: list[dict[str, Any]]) -> None:
    asks(Net(), [A], accuracy, accuracy_criterion={"absolute": 0.5})
    given = asked[0]
    assert (given["stop_at_first"], given.get("timeout_s"), given["backend"]) == (True, None, "ipex_qconf")
    assert (given["goal"], given["smoothing"]) == (Goal(0.5, Criterion.ABSOLUTE), False)


def test_given_time_is_used_whole_and_shared_by_the_sizes(asked: list[dict[str, Any]]) -> None:
    asks(Net(), [A, B], accuracy, tuning_time=30, sampling_sizes=[8, 16], num_threads=1, name="mine")
    assert [given["timeout_s"] for given in asked] == [15, 15]
    assert not any(given.get("stop_at_first") for given in asked)
    assert [given["name"] for given in asked] == ["mine-8", "mine-16"]
    assert {given["num_threads"] for given in asked} == {1}


def test_if_nothing_passes_the_error_is_that_of_the_closest(asked: list[dict[str, Any]]) -> None:
    with pytest.raises(NoFeasibleRecipe) as caught:
        autotune(Net(), [A, B], accuracy, sampling_sizes=[8, 16, 3])
    assert caught.value.result.accuracy_drop == 1 / 3


def test_smoothquant_args_are_read_as_the_rfc_has_them(asked: list[dict[str, Any]]) -> None:
    given = {"alpha": "auto", "auto_alpha_args": {"init_alpha": 0.8}}
    asks(Net(), [A], accuracy, smoothquant_args=given)
    assert asked[0]["smoothing"] == Smoothing(init_alpha=0.8)
    assert given == {"alpha": "auto", "auto_alpha_args": {"init_alpha": 0.8}}, "INC pops from the caller's dict"


# --- the backend ---


def source(model: nn.Module, *inputs: torch.Tensor) -> Source:
    copied, graph = deployable(model.eval(), inputs, {})
    return Source(copied, graph, observe(copied, graph, [(inputs, {})]), inputs)


def int8(of: Source, **kwargs: Any) -> Recipe:
    capabilities = base.get("ipex_qconf").capabilities()
    config = OpConfig(
        Precision.INT8,
        activation=TensorConfig(QuantDType.U8, Scheme.AFFINE, reduce_range=capabilities.reduce_range),
    )
    kinds = capabilities.ops.keys() - {OpType.ADD}  # which CPUs with VNNI have in int8, where something takes it so
    return Recipe({call.name: config for call in of.graph.calls if call.op in kinds}, **kwargs)


def test_a_smoothed_recipe_computes_what_its_configuration_computes_in_a_script(tmp_path: Path) -> None:
    quantization, of = ipex_quantization(), source(Net(), A)
    groups = [name for name, group in of.graph.groups.items()]
    built = base.get("ipex_qconf").build(of, int8(of, smoothing=dict.fromkeys(groups, 0.5)))
    assert built.left_in_float == {}
    built.save(tmp_path)
    mapping = quantization.get_smooth_quant_qconfig_mapping()
    prepared = quantization.prepare(Net().eval(), mapping, example_inputs=(A,))
    prepared.load_qconf_summary(str(tmp_path / "configure.json"))
    script = frozen(prepared)
    with torch.no_grad():
        assert torch.equal(script(X), built.model(X))
        exact, plain = Net().eval()(X), base.get("ipex_qconf").build(of, int8(of)).model(X)
        losses = [float((y - exact).abs().mean()) for y in (built.model(X), plain)]
    assert losses[0] < losses[1] / 2, "smoothing is what the outliers need"


def test_an_unsmoothed_recipe_computes_what_the_ipex_backend_computes() -> None:
    ipex_quantization()
    of = source(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.randn(2, 3, 9, 9)
    )
    recipe = int8(of)
    built = base.get("ipex_qconf").build(of, recipe)
    assert built.executed == dict.fromkeys(of.graph.by_name, Precision.INT8)
    assert torch.equal(built.model(*of.args), base.get("ipex").build(of, recipe).model(*of.args))


class Pooled(nn.Module):
    """A pool without a stride, whose trace IPEX's own flow can't run: "could not set attribute to the op"."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(72, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.conv(x).relu(), 2)
        return self.fc(x.flatten(1))


def test_a_pool_without_a_stride_runs_in_a_script_too() -> None:
    ipex_quantization()
    of = source(Pooled(), torch.randn(2, 3, 9, 9))
    built = base.get("ipex_qconf").build(of, int8(of))
    assert built.executed["conv"] == built.executed["fc"] == Precision.INT8
    assert isinstance(built, ScriptedModel) and built.configure is not None
    converted = ipex_quantization().convert(prepared_model(of, built.configure()))
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(converted, of.args))
        traced(*of.args), traced(*of.args)
        assert torch.equal(traced(*of.args), built.model(*of.args))


def test_a_model_that_is_called_by_keyword_is_prepared_by_keyword() -> None:
    quantization, inputs = ipex_quantization(), {"y": B, "x": A}
    copied, graph = deployable(TwoInputs().eval(), (), inputs)
    of = Source(copied, graph, observe(copied, graph, [((), inputs)]), (), inputs)
    built = base.get("ipex_qconf").build(of, int8(of))
    assert built.left_in_float == {}
    assert isinstance(built, ScriptedModel) and built.configure is not None
    converted = quantization.convert(prepared_model(of, built.configure()))
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(converted, example_kwarg_inputs=inputs))
        traced(**inputs), traced(**inputs)
        assert torch.equal(traced(**inputs), built.model(x=A, y=B))


class Mixed(nn.Module):
    """Calls that a qconf can and can't name or smooth: a layer, a 1-d convolution, a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.first = nn.Conv1d(16, 16, 1), nn.LayerNorm(16), nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2)))
        return nn.functional.linear(torch.tanh(x), self.weight)


class Attending(nn.Module):
    """Torch's attention, whose layers IPEX doesn't look into."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = x.flip(1)
        return self.fc(self.attention(x, memory, memory, need_weights=False)[0])


def test_what_a_qconf_cannot_say_stays_in_float_with_the_reason() -> None:
    ipex_quantization()
    backend, of = base.get("ipex_qconf"), source(Mixed(), torch.randn(2, 5, 16))
    recipe = int8(of)
    assert backend.build(of, recipe).executed == {
        "conv": Precision.FP32,
        "first": Precision.INT8,
        "linear": Precision.INT8,
    }
    built = backend.build(of, recipe.with_smoothing(dict.fromkeys(of.graph.groups, 0.5)))
    assert built.executed["first"] is Precision.INT8
    assert built.left_in_float == {"linear": "its recipe smooths it, which a qconf can do to nn.Linear modules only"}

    of = source(Attending(), torch.randn(2, 5, 16))
    built = backend.build(of, int8(of))
    assert built.executed["fc"] is Precision.INT8
    assert {call: "doesn't record" in reason for call, reason in built.left_in_float.items()} == {
        call: True for call in of.graph.by_name if call.startswith("attention:linear")
    }


def test_the_space_holds_what_a_qconf_can_say_only() -> None:
    ipex_quantization()
    torch.manual_seed(0)
    prepared = raysq.prepare(Mixed().eval(), [torch.randn(4, 5, 16)], backend="ipex_qconf", num_threads=1)
    space = prepared.space
    assert {name for name, configs in space.options.items() if any(c.is_int8 for c in configs)} == {"first", "linear"}
    assert all(why_not(Recipe({n: c})) == () for n, configs in space.options.items() for c in configs)
    assert not {t.value for t in Transform} & set(space.choices)
    smoothed = {group for groups in space.model.kinds.values() for group in groups}
    assert {call for name in smoothed for call in prepared.source.graph.groups[name].calls} == {"first"}

    prepared = raysq.prepare(Attending().eval(), [torch.randn(4, 5, 16)], backend="ipex_qconf", num_threads=1)
    assert {n for n, configs in prepared.space.options.items() if any(c.is_int8 for c in configs)} == {"fc"}
    assert "doesn't record" in prepared.left_in_float["attention:linear"]


def test_what_changes_weights_is_refused() -> None:
    ipex_quantization()
    of = source(Net(), A)
    with pytest.raises(RecipeError, match="bias_correction changes weights"):
        base.get("ipex_qconf").build(of, int8(of, transforms=(Transform.BIAS_CORRECTION,)))


class Products(nn.Module):
    """One product that oneDNN Graph fuses, of four axes, and one that it doesn't."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.first(x), self.second(x)
        unfused = torch.matmul(a, b.transpose(1, 2))
        a, b = (y.view(2, 6, 2, 8).transpose(1, 2) for y in (a, b))
        return torch.matmul(a, b.transpose(2, 3)).sum(1) + unfused


def test_which_of_two_calls_of_a_kind_was_not_fused_is_told() -> None:
    ipex_quantization()
    of = source(Products(), torch.randn(2, 6, 16))
    built = base.get("ipex_qconf").build(of, int8(of))
    assert built.left_in_float == {"matmul": NOT_FUSED}
    assert [n for n, p in built.executed.items() if p is Precision.INT8] == ["first", "second", "matmul#2"]


# --- whole searches ---


QUICK = {"num_threads": 1, "max_concurrent_trials": 1, "verbose": 0, "latency": raysq.Latency(0.02, 0.02)}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[raysq.Result]:
    """The results of `raysq.tune`."""
    found: list[raysq.Result] = []
    tune = api.tune

    def kept(**given: Any) -> raysq.Result:
        found.append(tune(**{**QUICK, **given}))
        return found[-1]

    monkeypatch.setattr(api, "tune", kept)
    return found


@pytest.mark.slow
def test_the_rfc_s_lines_give_what_was_measured(
    cluster: None, results: list[raysq.Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ipex_quantization()
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("something is installed"))
    model, rows = Net().train(), Rows(64)
    before = copy.deepcopy(model.state_dict())
    tuned = autotune(
        model,
        DataLoader(rows, batch_size=8),
        accuracy,
        smoothquant_args={"alpha": 0.5},
        op_type_dict={"matmul": {"activation": {"dtype": ["fp32"]}}},
        sampling_sizes=[40],
        accuracy_criterion={"relative": 0.05},
        storage_path=tmp_path,
        **QUICK,
    )
    result = results[0]
    assert rows.read == [*range(40)]
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not hasattr(model, "q_config")

    script = frozen(tuned)
    assert accuracy(script) == result.accuracy >= 0.95
    tuned.save_qconf_summary(str(tmp_path / "qconf.json"))
    qconf = json.loads((tmp_path / "qconf.json").read_text())
    ops = [info for module in qconf.values() for info in module["q_op_infos"].values()]
    products = [info["input_tensor_infos"] for info in ops if "matmul" in info["op_type"]]
    assert {tensor["force_dtype"] for tensors in products for tensor in tensors} == {"torch.float32"}
    layers = [info["input_tensor_infos"][0]["force_dtype"] for info in ops if "Linear" in info["op_type"]]
    assert len(layers) == 7 and set(layers) == {"torch.quint8"}

    quantization = ipex_quantization()
    again = quantization.prepare(
        copy.deepcopy(model).eval(), quantization.get_smooth_quant_qconfig_mapping(), example_inputs=(A,)
    )
    again.load_qconf_summary(str(tmp_path / "qconf.json"))
    with torch.no_grad():
        assert torch.equal(frozen(again)(X), script(X))


@pytest.mark.slow
def test_of_several_sizes_the_one_that_passes_is_taken(
    cluster: None, results: list[raysq.Result], tmp_path: Path
) -> None:
    ipex_quantization()
    misleading = torch.zeros_like(X[:1])  # what one sample shows is no range at all
    misleading[..., 0] = 1e-3
    tuned = autotune(
        Net(),
        [misleading, X[:32]],
        accuracy,
        smoothquant_args={"alpha": 0.5},
        sampling_sizes=[1, 33],
        accuracy_criterion={"relative": 0.05},
        storage_path=tmp_path,
        name="sizes",
        max_trials=1,
        **QUICK,
    )
    assert accuracy(frozen(tuned)) == results[0].accuracy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sizes-1", "sizes-33"]


@pytest.mark.slow
def test_if_nothing_passes_the_error_carries_the_best(cluster: None, tmp_path: Path) -> None:
    ipex_quantization()
    with torch.no_grad():
        exact = Net().eval()(X)

    def closeness(model: Any) -> float:
        return 1 - float((model(X) - exact).abs().mean())

    with pytest.raises(NoFeasibleRecipe) as caught:
        autotune(
            Net(),
            [X[:32]],
            closeness,
            accuracy_criterion={"absolute": 1e-7},
            tuning_time=600,
            storage_path=tmp_path,
            max_trials=2,
            **QUICK,
        )
    result = caught.value.result
    assert len(result.trials) == 2
    assert closeness(result.model) == result.accuracy == max(t.accuracy or 0 for t in result.trials)
    assert "a larger loss in `accuracy_criterion`" in str(caught.value)
    result.save(tmp_path / "closest")
    quantization = ipex_quantization()
    prepared = quantization.prepare(Net().eval(), quantization.default_static_qconfig_mapping, example_inputs=(X[:32],))
    prepared.load_qconf_summary(str(tmp_path / "closest" / "configure.json"))
    assert closeness(frozen(prepared, X[:32])) == pytest.approx(result.accuracy, abs=1e-6)


# --- the RFC's example ---

PROPOSAL_3 = """\
import intel_extension_for_pytorch as ipex
# Set the tune space of SmoothQuant
smoothquant_args={
"alpha": "auto",
"auto_alpha_args"{
"init_alpha": 0.5,
"alpha_min": 0.0,
"alpha_max": 1.0,
"alpha_step": 0.1,
"shared_criterion": "max",
"enable_blockwise_loss": False,
}
}
tuned_model = ipex.quantization.autotune(
model, calib_dataloader, eval_func, smoothquant_args=smoothquant_args,
sampling_sizes=[100], accuracy_criterion={'relative': 0.01}, tuning_time=0
)
# Convert the model to jit model
quantized_model = ipex.quantization.convert(tuned_model)
with torch.no_grad():
traced_model = torch.jit.trace(quantized_model, example_input)
traced_model = torch.jit.freeze(traced_model)
# Do inference
y = traced_model(x)
"""
GLOBAL_ALPHA = """\
smoothquant_args={
"alpha": numpy.arange(0.0, 1.0, 0.1).tolist(),
}
"""
LAYER_WISE_ALPHA = """\
smoothquant_args={
"alpha": "auto",
"auto_alpha_args"{
"init_alpha": 0.8,
"alpha_min": 0.8,
"alpha_max": 0.99,
"alpha_step": 0.01,
"shared_criterion": "mean",
"enable_blockwise_loss": False,
}
}
"""
IMPORT = "import intel_extension_for_pytorch as ipex\n"
TYPOS = {  # in the seed's own text
    '"auto_alpha_args"{': '"auto_alpha_args": {',  # a missing colon
    "\ntraced_model = torch.jit.": "\n    traced_model = torch.jit.",  # lost indentation
}


def repaired(text: str) -> str:
    for typo, right in TYPOS.items():
        text = text.replace(typo, right)
    return text


@pytest.fixture
def script(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What a script has before the RFC's lines, its import apart."""
    ipex_quantization()
    monkeypatch.chdir(tmp_path)
    loader = DataLoader(TensorDataset(X[:128], LABELS[:128]), batch_size=8)
    threads = torch.get_num_threads()
    yield {
        "torch": torch,
        "numpy": numpy,
        "model": Net(),
        "calib_dataloader": loader,
        "eval_func": accuracy,
        "example_input": A,
        "x": A,
    }
    assert torch.get_num_threads() == threads


def run(text: str, names: dict[str, Any]) -> None:
    exec(compile(repaired(text.replace(IMPORT, "import raysq.compat as ipex\n")), "rfc", "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["", GLOBAL_ALPHA, LAYER_WISE_ALPHA], ids=["proposal 3", "global", "layer-wise"])
def test_the_rfc_s_example_runs_as_printed(setting: str, script: dict[str, Any], results: list[raysq.Result]) -> None:
    begin, end = PROPOSAL_3.index("smoothquant_args={"), PROPOSAL_3.index("tuned_model =")
    run(PROPOSAL_3[:begin] + setting + PROPOSAL_3[end:] if setting else PROPOSAL_3, script)
    traced = script["traced_model"]
    with torch.no_grad():
        traced(A)
    assert script["y"].shape == (len(A), CLASSES)
    assert accuracy(traced) == results[0].accuracy >= 0.99 * results[0].baseline.accuracy
    assert set(os.listdir()) == {"raysq_runs"}


def test_the_rfc_s_text_needs_its_typos_repaired() -> None:
    for text in (PROPOSAL_3, LAYER_WISE_ALPHA):
        with pytest.raises(SyntaxError):
            compile(text, "rfc", "exec")
        compile(repaired(text), "rfc", "exec")
